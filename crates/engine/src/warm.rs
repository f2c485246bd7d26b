//! Warm starts: machines that go on from the memory of one that had just come up, before it had an identity.
//!
//! ```text
//! first cold start of a shape:  boot ─► the agent answers ─► keep a template ─► Configure: it is a machine like any other
//! later ones:                   clone its disk, map its memory ─► the agent answers ─► Configure
//! ```
//!
//! A template is a cache: a directory `templates/KEY` whose name is the digest of all that decides whether a machine can begin
//! with it. No row tells of it, nothing needs it for longer than a start takes, and a machine that cannot begin with its
//! template boots. So it may be dropped at any moment: when its image goes, when it is damaged, when there is no room.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use hutch_contract::id::ImageId;
use hutch_contract::record::{Fit, MachineRecord, SnapshotRecord};
use hutch_net::address::MACHINE_MAC;
use hutch_runtime::{Nic, Root, Runtime};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::drive::blocking;
use crate::engine::{Shared, templates_dir};
use crate::images::CancelOnDrop;
use crate::prepare::{erase_dir, io_error};
use crate::snapshots::{self, files};
use crate::{Engine, Error, keys};

/// In a template's directory, beside the files that a snapshot has.
const SHAPE: &str = "shape.json";
/// Bytes in a MiB.
const MIB: u64 = 1 << 20;

/// All that decides how a machine comes up. Two of the same shape do so in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub image: ImageId,
    runtime: String,
    fit: Fit,
    /// Digest of kernel, modules and agent.
    boot_set: String,
    /// What is on the kernel's command line besides.
    kernel_args: Vec<String>,
    vcpu: u32,
    memory_mib: u32,
    disk_gib: u32,
    card: String,
    /// This program: another one may give machines other devices.
    program: String,
}

impl Shape {
    /// The name of the template's directory.
    pub fn key(&self) -> String {
        let text = serde_json::to_vec(self).expect("shapes have string keys only");
        keys::sha256_hex(&text)[..32].to_owned()
    }
}

/// How a card looks from inside; `None` where each machine's looks different.
fn card(nic: &Nic) -> Option<String> {
    match nic {
        Nic::None => Some("none".into()),
        Nic::Restricted => Some("restricted".into()),
        Nic::Tap { mac, .. } => (*mac == MACHINE_MAC).then(|| "tap".into()),
        Nic::Filtered(user) => Some(format!("filtered {:02x?}", user.mac)),
    }
}

/// This program, as far as it can be told from another without reading it.
fn program(launcher: &Path) -> io::Result<String> {
    let metadata = fs::metadata(launcher)?;
    let changed = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH);
    let changed = changed.unwrap_or_default().as_nanos();
    Ok(format!(
        "{} {} {changed}",
        env!("CARGO_PKG_VERSION"),
        metadata.len()
    ))
}

/// A template that machines can begin with.
#[derive(Debug, Clone)]
struct Ready {
    image: ImageId,
    used_bytes: u64,
    used_at: SystemTime,
}

#[derive(Debug, Clone)]
enum State {
    /// A machine is being kept as it.
    Making,
    Ready(Ready),
    /// It could not be made, or used: not again by this server.
    Given,
}

/// The templates of a server.
pub(crate) struct Templates {
    all: Mutex<HashMap<String, State>>,
}

impl Templates {
    pub fn new() -> Templates {
        Templates {
            all: Mutex::default(),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, State>> {
        // Every change is one insertion or removal.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether machines can begin with it; it counts as used then.
    fn take(&self, key: &str) -> bool {
        match self.all().get_mut(key) {
            Some(State::Ready(ready)) => {
                ready.used_at = SystemTime::now();
                true
            }
            _ => false,
        }
    }

    /// What becomes of a claim.
    fn settle(&self, key: &str, state: Option<State>) {
        match state {
            Some(state) => self.all().insert(key.to_owned(), state),
            None => self.all().remove(key),
        };
    }

    /// Takes out those least recently used until the others have at most `most` bytes.
    fn beyond(&self, most: u64) -> Vec<String> {
        let mut all = self.all();
        let mut ready: Vec<(SystemTime, String, u64)> = all
            .iter()
            .filter_map(|(key, state)| match state {
                State::Ready(ready) => Some((ready.used_at, key.clone(), ready.used_bytes)),
                State::Making | State::Given => None,
            })
            .collect();
        ready.sort();
        let mut total: u64 = ready.iter().map(|(_, _, bytes)| bytes).sum();
        let mut out = Vec::new();
        for (_, key, bytes) in ready {
            if total <= most {
                break;
            }
            total -= bytes;
            all.remove(&key);
            out.push(key);
        }
        out
    }

    fn of_image(&self, image: &ImageId) -> Vec<String> {
        let mut all = self.all();
        let its = |state: &State| matches!(state, State::Ready(ready) if ready.image == *image);
        let keys: Vec<_> = all
            .iter()
            .filter(|(_, state)| its(state))
            .map(|(key, _)| key.clone())
            .collect();
        keys.iter().for_each(|key| drop(all.remove(key)));
        keys
    }
}

/// The right to make a template, which nobody else has meanwhile. Given back when it is dropped.
pub(crate) struct Claim {
    shared: Arc<Shared>,
    pub key: String,
    shape: Shape,
    settled: bool,
}

impl Claim {
    /// Never again by this server.
    pub fn give_up(mut self) {
        self.shared.templates.settle(&self.key, Some(State::Given));
        self.settled = true;
    }

    /// Makes what lies in the stage a template. Errors are told in the log: nobody waits for it.
    pub async fn publish(self, record: SnapshotRecord) {
        let stage = self.shared.snapshot_stage(&record.id);
        let target = self.shared.template_dir(&self.key);
        let cancel = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(cancel.clone());
        let (shape, counted) = (self.shape.clone(), self.shared.tasks.token());
        let from = stage.clone();
        let published = blocking("publish the template", move || {
            let _counted = counted;
            let text = serde_json::to_vec_pretty(&shape).expect("shapes have string keys only");
            hutch_disk::write_atomic(&from.join(SHAPE), &text, 0o400)?;
            erase_dir(&target)?;
            files::publish(&from, &target, record, &cancel)
        });
        let published = tokio::select! {
            published = published => published,
            // The next server erases it.
            () = self.shared.stop.cancelled() => return,
        };
        let kept = match published {
            Ok(record) => self.shared.show_template(&self.key, &record).await,
            Err(error) => Err(error),
        };
        match kept {
            Ok(()) => {
                info!(template = self.key, image = %self.shape.image, "machines of this shape start warm");
                let mut claim = self;
                claim.settled = true;
            }
            Err(error) => {
                warn!(template = self.key, error = %error.chain(), "no template");
                drop(blocking("erase a broken template", move || erase_dir(&stage)).await);
                self.give_up();
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.settled {
            self.shared.templates.settle(&self.key, None);
        }
    }
}

impl Shared {
    pub(crate) fn template_dir(&self, key: &str) -> PathBuf {
        templates_dir(&self.config.data_dir).join(key)
    }

    /// The shape of a machine that may start warm, or be kept as a template.
    pub(crate) async fn shape(
        &self,
        record: &MachineRecord,
        runtime: &dyn Runtime,
    ) -> Option<Shape> {
        let able = runtime.root() == Root::Disk && runtime.capabilities().memory_snapshot;
        if self.config.templates_max_mib == 0 || record.cold || record.origin.is_some() || !able {
            return None;
        }
        let card = card(&self.network().plug(record, runtime).nic)?;
        let (boot_set, kernel_args) = self.kernel.get(record.kernel.as_deref()).await.ok()?;
        Some(Shape {
            image: record.image.clone(),
            runtime: record.runtime.clone(),
            fit: snapshots::fit_of(runtime).await,
            boot_set: boot_set.id,
            kernel_args,
            vcpu: record.vcpu,
            memory_mib: record.memory_mib,
            disk_gib: record.disk_gib,
            card,
            program: program(&self.config.launcher).ok()?,
        })
    }

    /// The template that machines of this shape begin with, if there is one.
    pub(crate) fn template(&self, shape: &Shape) -> Option<String> {
        let key = shape.key();
        self.templates.take(&key).then_some(key)
    }

    /// The right to make the template of this shape, unless there is one, or somebody has it.
    pub(crate) fn claim_template(self: &Arc<Self>, shape: &Shape) -> Option<Claim> {
        let key = shape.key();
        {
            let mut all = self.templates.all();
            if all.contains_key(&key) {
                return None;
            }
            all.insert(key.clone(), State::Making);
        }
        Some(Claim {
            shared: self.clone(),
            key,
            shape: shape.clone(),
            settled: false,
        })
    }

    async fn show_template(&self, key: &str, record: &SnapshotRecord) -> Result<(), Error> {
        let used_bytes = record.files.iter().map(|file| file.used_bytes).sum();
        let most = self.config.templates_max_mib.saturating_mul(MIB);
        let ready = Ready {
            image: record.image.clone(),
            used_bytes,
            used_at: SystemTime::now(),
        };
        self.templates.settle(key, Some(State::Ready(ready)));
        // Its image may have been deleted meanwhile.
        let gone = match self.fleet().images.contains_key(&record.image) {
            true => self.templates.beyond(most),
            false => self.templates.of_image(&record.image),
        };
        self.erase_templates(gone).await
    }

    async fn erase_templates(&self, keys: Vec<String>) -> Result<(), Error> {
        for key in keys {
            let dir = self.template_dir(&key);
            blocking("erase a template", move || erase_dir(&dir)).await?;
            info!(template = key, "gone");
        }
        Ok(())
    }

    /// Drops a template that a machine could not begin with; machines of its shape boot until the next server tries again.
    pub(crate) async fn distrust_template(&self, key: &str) {
        self.templates.settle(key, Some(State::Given));
        if let Err(error) = self.erase_templates(vec![key.to_owned()]).await {
            warn!(template = key, error = %error.chain(), "cannot be erased; the next start does it");
        }
    }

    /// Drops the templates of an image that is gone.
    pub(crate) async fn drop_templates_of(&self, image: &ImageId) {
        let keys = self.templates.of_image(image);
        if let Err(error) = self.erase_templates(keys).await {
            warn!(%image, error = %error.chain(), "its templates cannot be erased; the next start does it");
        }
    }
}

impl Engine {
    /// Looks at every byte of the templates that earlier servers left, and lets those be used that are whole and fit.
    pub(crate) async fn load_templates(self) {
        let dir = templates_dir(&self.shared.config.data_dir);
        let names = match fs::read_dir(&dir) {
            Ok(entries) => entries.flatten().map(|entry| entry.file_name()),
            Err(error) => {
                warn!(path = %dir.display(), %error, "templates cannot be listed");
                return;
            }
        };
        let keys: Vec<_> = names.filter_map(|name| name.into_string().ok()).collect();
        for key in keys {
            let shared = self.shared.clone();
            if let Err(error) = shared.load_template(&key).await {
                info!(template = key, reason = %error.chain(), "dropping a template");
                if let Err(error) = shared.erase_templates(vec![key.clone()]).await {
                    warn!(template = key, error = %error.chain(), "cannot be erased");
                }
            }
        }
    }
}

impl Shared {
    async fn load_template(self: &Arc<Self>, key: &str) -> Result<(), Error> {
        let dir = self.template_dir(key);
        let unfit = |problem: &str| Error::SnapshotBroken {
            name: key.to_owned(),
            problem: problem.to_owned(),
        };
        let shape = fs::read(dir.join(SHAPE));
        let shape = shape.map_err(|source| io_error("read", &dir.join(SHAPE), source))?;
        let shape: Shape =
            serde_json::from_slice(&shape).map_err(|_| unfit("its shape cannot be read"))?;
        if shape.key() != key {
            return Err(unfit("its shape is another"));
        }
        if !self.fleet().images.contains_key(&shape.image) {
            return Err(unfit("its image is gone"));
        }
        let runtime = self.runtime(&shape.runtime)?;
        let now = snapshots::fit_of(runtime.as_ref()).await;
        let program = program(&self.config.launcher)
            .map_err(|source| io_error("look at", &self.config.launcher, source))?;
        if shape.program != program || shape.fit != now {
            return Err(unfit(
                "it was made by another program or VMM, or on another processor",
            ));
        }
        // Whoever needs it at once boots, and makes no second one.
        let Some(claim) = self.claim_template(&shape) else {
            return Ok(());
        };
        let cancel = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(cancel.clone());
        let verified = blocking("look at a template", move || {
            files::verify_whole(&dir, &cancel)
        });
        let record = verified.await?;
        self.show_template(key, &record).await?;
        let mut claim = claim;
        claim.settled = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shape() -> Shape {
        Shape {
            image: "img-01j0000000000000000000000a".parse().expect("an id"),
            runtime: "qemu".into(),
            fit: Fit::default(),
            boot_set: "b".into(),
            kernel_args: Vec::new(),
            vcpu: 1,
            memory_mib: 256,
            disk_gib: 2,
            card: "tap".into(),
            program: "p".into(),
        }
    }

    fn ready(seconds: u64, bytes: u64) -> State {
        State::Ready(Ready {
            image: shape().image,
            used_bytes: bytes,
            used_at: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        })
    }

    #[test]
    fn whatever_differs_makes_another_shape() {
        let others = [
            Shape {
                image: "img-01j0000000000000000000000b".parse().expect("an id"),
                ..shape()
            },
            Shape {
                boot_set: "c".into(),
                ..shape()
            },
            Shape {
                kernel_args: vec!["quiet".into()],
                ..shape()
            },
            Shape {
                memory_mib: 512,
                ..shape()
            },
            Shape {
                card: "restricted".into(),
                ..shape()
            },
            Shape {
                program: "q".into(),
                ..shape()
            },
        ];
        assert_eq!(shape().key(), shape().key());
        for other in others {
            assert_ne!(other.key(), shape().key(), "{other:?}");
        }
    }

    #[test]
    fn a_card_of_one_s_own_has_no_template() {
        let tap = |mac| Nic::Tap {
            name: "tap".into(),
            mac,
        };
        assert_eq!(card(&tap(MACHINE_MAC)).as_deref(), Some("tap"));
        assert_eq!(card(&tap([2, 0, 0, 0, 0, 1])), None);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let templates = Templates::new();
        for (key, seconds) in [("old", 1), ("older", 0), ("new", 2)] {
            templates.settle(key, Some(ready(seconds, 10)));
        }
        templates.settle("making", Some(State::Making));
        assert_eq!(templates.beyond(30), [""; 0]);
        assert!(templates.take("older"), "and is the newest now");
        assert_eq!(templates.beyond(15), ["old", "new"]);
        assert!(!templates.take("old") && !templates.take("making"));
        assert_eq!(templates.beyond(0), ["older"]);
    }

    #[test]
    fn those_of_an_image_go_with_it() {
        let templates = Templates::new();
        templates.settle("its", Some(ready(0, 1)));
        let other = "img-01j0000000000000000000000b".parse().expect("an id");
        assert_eq!(templates.of_image(&other), [""; 0]);
        assert_eq!(templates.of_image(&shape().image), ["its"]);
        assert!(!templates.take("its"));
    }
}
