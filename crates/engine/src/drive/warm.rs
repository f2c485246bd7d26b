//! What a machine's task does for warm starts: begins with a template, is kept as one, and boots when the first does not work.

use hutch_contract::error::Kind;
use hutch_contract::id::SnapshotId;
use hutch_contract::name::Name;
use hutch_contract::record::{MachineRecord, Observed, SnapshotRecord};
use hutch_contract::snapshot::SnapshotState;
use hutch_guest::session::Session;
use hutch_runtime::MachineDir;
use tracing::{info, warn};

use super::Driver;
use super::snapshot::FROM;
use crate::phases::Phases;
use crate::plan::{self, Step};
use crate::prepare::{self, erase_dir};
use crate::snapshots::{self, files};
use crate::{Error, deadline};

impl Driver {
    /// Boots the machine, or greets it. One that should have gone on from a template and does not is made anew, to boot.
    pub(super) async fn start(&mut self, step: &Step, record: &MachineRecord) -> Result<(), Error> {
        let done = match step {
            Step::Boot => self.boot(record).await,
            _ => self.greet(record).await,
        };
        let (Err(error), Some(template)) = (&done, &self.warm) else {
            return done;
        };
        if plan::came_to_run(record) {
            return done;
        }
        warn!(machine = %record.id, template, error = %error.chain(), "it does not go on from its template: it boots");
        let template = template.clone();
        self.kill().await?;
        self.shared.distrust_template(&template).await;
        (self.warm, self.boots) = (None, true);
        self.files = false;
        Ok(())
    }

    /// Makes the machine's files from the template of its shape. Whether there is one.
    pub(super) async fn prepare_warm(&mut self, record: &MachineRecord) -> bool {
        (self.warm, self.shape) = (None, None);
        if record.observed != Observed::Absent || self.boots {
            return false;
        }
        self.shape = self.shared.shape(record, self.runtime.as_ref()).await;
        let template = self.shape.as_ref();
        let Some(key) = template.and_then(|shape| self.shared.template(shape)) else {
            return false;
        };
        let (dir, made_for, shared) = (self.dir.clone(), record.clone(), self.shared.clone());
        let template = shared.template_dir(&key);
        let made = self.file_work("prepare", move || {
            let disk = template.join(MachineDir::DISK);
            shared.with_room(|| prepare::prepare(&dir, Some(&disk), &made_for))?;
            files::link(&template, &dir.file(FROM))
        });
        match made.await {
            Ok(()) => {
                (self.warm, self.fresh_disk) = (Some(key), true);
                true
            }
            Err(error) => {
                warn!(machine = %record.id, template = key, error = %error.chain(), "it cannot begin with its template: it boots");
                // One that went meanwhile is made again by the next machine; on a full disk nothing helps.
                self.shape = self
                    .shape
                    .take()
                    .filter(|_| error.kind() != Kind::Exhausted);
                false
            }
        }
    }

    /// Keeps a machine that has just booted for the first time, and has no identity yet, as the template of its shape, if there
    /// is none. Whatever comes of it, the machine goes on.
    pub(super) async fn keep_as_template(
        &mut self,
        record: &MachineRecord,
        session: Session,
    ) -> Result<Session, Error> {
        let shape = self.shape.take().filter(|_| self.warm.is_none());
        let claim = shape
            .filter(|_| self.booted && !session.hello().configured)
            .and_then(|shape| self.shared.claim_template(&shape));
        let Some(claim) = claim else {
            return Ok(session);
        };
        let started = std::time::Instant::now();
        let name: Name = "template".parse().expect("letters are a name");
        let id = SnapshotId::new();
        let begun = SnapshotRecord {
            state: SnapshotState::Ready,
            memory: true,
            ..snapshots::of(record, id.clone(), name, self.shared.now_ms())
        };
        drop(session);
        let taken = match self.shared.room_for_disk(&self.dir.file(MachineDir::DISK)) {
            Ok(()) => self.take(record, &begun, &mut Phases::default()).await,
            Err(error) => Err(error),
        };
        self.go_on().await?;
        let session = self.connect(deadline::RECONNECT).await?;
        self.clock.phase("template", started);
        match taken {
            Ok((taken, _)) => {
                info!(machine = %record.id, template = claim.key, "kept as a template");
                self.shared.tasks.spawn(claim.publish(taken));
            }
            Err(error) => {
                warn!(machine = %record.id, error = %error.chain(), "no template");
                let stage = self.shared.snapshot_stage(&id);
                self.file_work("erase a broken template", move || erase_dir(&stage))
                    .await?;
                claim.give_up();
            }
        }
        Ok(session)
    }
}
