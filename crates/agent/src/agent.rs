//! What the agent is, whichever connection asks: its identity, its processes, whether it is frozen or about to end.
//!
//! ```text
//!             Configure              Quiesce
//! unconfigured ──────▶ configured ◀─────────▶ quiesced    (Quiesce also works before the first Configure)
//!                           ▲   Thaw, 10 s   │
//!                           └────────────────┘  Configure: identity first, then thaw
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hutch_guest::pb;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::Status;

use crate::error::say;
use crate::files::blocking;
use crate::process::Table;
use crate::process::launch::{Defaults, check_environment};
use crate::status;
use crate::system::System;

/// A frozen machine thaws by itself after this time.
const THAW: Duration = Duration::from_secs(10);
/// Time for the root file system to come to rest.
const FREEZE: Duration = Duration::from_secs(5);
/// Bytes of the boot nonce.
pub const NONCE: usize = 16;
/// Offset in the state of the byte that is 1 once a host has said Hello.
pub const GREETED: u64 = NONCE as u64;
/// Longest time between SIGTERM and SIGKILL that a Shutdown may ask for.
const GRACE_MAX: Duration = Duration::from_secs(600);

/// Why fields of Configure are not applied on a host.
const NOT_A_GUEST: &str = "not a guest: this belongs to the host";

/// How the agent is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Restart instead of power off.
    pub reboot: bool,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Whether the machine ends too, or only the agent.
    pub machine: bool,
}

/// The agent.
pub struct Agent {
    /// User processes.
    pub table: Arc<Table>,
    /// Base of relative paths, and default working directory.
    root: Option<PathBuf>,
    system: Option<Arc<dyn System>>,
    identity: Mutex<Identity>,
    /// Taken by all that freezes, thaws or configures.
    changing: tokio::sync::Mutex<()>,
    quiesced: AtomicBool,
    thaw_timer: Mutex<Option<AbortHandle>>,
    ending: watch::Sender<Option<Ending>>,
    /// Ends the connection that said Hello last.
    current: Mutex<Option<Arc<tokio::sync::Notify>>>,
}

struct Identity {
    nonce: [u8; NONCE],
    /// Keeps the nonce when the agent crashes and PID 1 starts another.
    file: Option<std::fs::File>,
    configured: bool,
    defaults: Defaults,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// An agent that has not been configured. `state` holds the nonce already, when there was an agent before.
    pub fn new(
        table: Table,
        root: Option<PathBuf>,
        system: Option<Arc<dyn System>>,
        nonce: [u8; NONCE],
        state: Option<std::fs::File>,
    ) -> Self {
        let cwd = root
            .as_ref()
            .map_or_else(String::new, |root| root.display().to_string());
        Self {
            table: Arc::new(table),
            root,
            system,
            identity: Mutex::new(Identity {
                nonce,
                file: state,
                configured: false,
                defaults: Defaults {
                    cwd,
                    ..Defaults::default()
                },
            }),
            changing: tokio::sync::Mutex::new(()),
            quiesced: AtomicBool::new(false),
            thaw_timer: Mutex::new(None),
            ending: watch::Sender::new(None),
            current: Mutex::new(None),
        }
    }

    /// Answers Hello and makes the caller's connection the only one; `over` ends it when the next one says Hello.
    pub fn hello(&self, over: Arc<tokio::sync::Notify>) -> pb::HelloReply {
        let older = lock(&self.current).replace(over.clone());
        if let Some(older) = older.filter(|older| !Arc::ptr_eq(older, &over)) {
            older.notify_one();
        }
        let identity = lock(&self.identity);
        if let Some(state) = &identity.file {
            // Lost, it only makes PID 1 less patient.
            let _ = state.write_all_at(&[1], GREETED);
        }
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        pb::HelloReply {
            generation: hutch_guest::limits::GENERATION,
            boot_nonce: Bytes::copy_from_slice(&identity.nonce),
            configured: identity.configured,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            quiesced: self.quiesced.load(Ordering::Relaxed),
            boot_id: boot_id.unwrap_or_default().trim().to_owned(),
        }
    }

    /// Whether Configure has been done.
    pub fn is_configured(&self) -> bool {
        lock(&self.identity).configured
    }

    /// What new processes get.
    pub fn defaults(&self) -> Defaults {
        lock(&self.identity).defaults.clone()
    }

    /// Base of relative paths.
    pub fn base(&self) -> PathBuf {
        let cwd = PathBuf::from(self.defaults().cwd);
        self.root.clone().unwrap_or_else(|| "/".into()).join(cwd)
    }

    /// Gives the machine its identity, then thaws it. May be repeated.
    ///
    /// # Errors
    /// A malformed request. What cannot be applied is in the reply.
    pub async fn configure(
        &self,
        request: pb::ConfigureRequest,
    ) -> Result<Vec<pb::Unapplied>, Status> {
        check_environment(&request.environment)?;
        let nonce = match request.boot_nonce.len() {
            0 => None,
            _ => Some(
                <[u8; NONCE]>::try_from(&request.boot_nonce[..])
                    .map_err(|_| Status::invalid_argument("boot_nonce must have 16 bytes"))?,
            ),
        };
        let _changing = self.changing.lock().await;
        // Identity goes into files: the file systems thaw before it, the processes after it.
        if self.quiesced.load(Ordering::Relaxed) {
            self.thaw_root().await?;
        }
        let defaults = Defaults {
            environment: request.environment.clone(),
            cwd: match (request.default_cwd.as_str(), &self.root) {
                ("", Some(root)) => root.display().to_string(),
                (cwd, Some(root)) => root.join(cwd).display().to_string(),
                (cwd, None) => cwd.to_owned(),
            },
            user: request.default_user.clone(),
        };
        let system = self.system.clone();
        let apply = move || Ok(apply(system.as_deref(), &request));
        let unapplied = blocking(apply).await?;
        {
            let mut identity = lock(&self.identity);
            if let Some(nonce) = nonce {
                identity.nonce = nonce;
                let kept = identity
                    .file
                    .as_ref()
                    .map(|file| file.write_all_at(&nonce, 0));
                if let Some(Err(error)) = kept {
                    say(&format!("keep the boot nonce: {error}"));
                }
            }
            identity.defaults = defaults;
            identity.configured = true;
        }
        self.thaw_processes()?;
        Ok(unapplied)
    }

    /// Brings user processes and file systems to rest, for [`THAW`] at most.
    ///
    /// # Errors
    /// Something does not come to rest; all goes on then.
    pub async fn quiesce(self: &Arc<Self>) -> Result<(), Status> {
        let _changing = self.changing.lock().await;
        if !self.quiesced.load(Ordering::Relaxed) {
            self.table
                .close(Some("the machine is frozen for a snapshot"));
            if let Err(failure) = self.freeze().await {
                let _ = self.thaw_processes();
                return Err(failure);
            }
            self.quiesced.store(true, Ordering::Relaxed);
        }
        let agent = self.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(THAW).await;
            if let Err(failure) = agent.thaw().await {
                say(&format!(
                    "thaw after {} s: {}",
                    THAW.as_secs(),
                    failure.message()
                ));
            }
        });
        self.stop_timer(Some(timer.abort_handle()));
        Ok(())
    }

    async fn freeze(&self) -> Result<(), Status> {
        let frozen = self.table.groups().freeze().await;
        frozen.map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => {
                Status::failed_precondition("user processes cannot be frozen without a cgroup")
            }
            _ => status::of_io("freeze user processes", &error),
        })?;
        let Some(system) = self.system.clone() else {
            return Ok(());
        };
        let abandoned = Arc::new(AtomicBool::new(false));
        let seen = abandoned.clone();
        let freezing = blocking(move || {
            let frozen = system.freeze_root();
            if seen.load(Ordering::SeqCst) {
                let _ = system.thaw_root();
            }
            frozen.map_err(|error| status::of_io("freeze the root file system", &error))
        });
        tokio::time::timeout(FREEZE, freezing)
            .await
            .unwrap_or_else(|_| {
                abandoned.store(true, Ordering::SeqCst);
                Err(Status::deadline_exceeded(
                    "the root file system does not come to rest",
                ))
            })
    }

    /// Ends a Quiesce; without one, nothing happens.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn thaw(&self) -> Result<(), Status> {
        let _changing = self.changing.lock().await;
        if !self.quiesced.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.thaw_root().await?;
        self.thaw_processes()
    }

    /// Sets the clock of a guest that was paused; 0 leaves it alone. One that cannot be set holds up nothing.
    pub async fn catch_up(&self, clock_unix_ms: i64) {
        let Some(system) = self.system.clone().filter(|_| clock_unix_ms != 0) else {
            return;
        };
        let set = move || {
            let set = system.set_clock(clock_unix_ms);
            set.map_err(|error| status::of_io("set the clock", &error))
        };
        if let Err(failure) = blocking(set).await {
            say(failure.message());
        }
    }

    async fn thaw_root(&self) -> Result<(), Status> {
        let Some(system) = self.system.clone() else {
            return Ok(());
        };
        let thaw = move || {
            let thawed = system.thaw_root();
            thawed.map_err(|error| status::of_io("thaw the root file system", &error))
        };
        blocking(thaw).await
    }

    fn thaw_processes(&self) -> Result<(), Status> {
        let thawed = self.table.groups().thaw();
        thawed.map_err(|error| status::of_io("thaw user processes", &error))?;
        self.quiesced.store(false, Ordering::Relaxed);
        if self.ending.borrow().is_none() {
            self.table.close(None);
        }
        Ok(())
    }

    /// The timer's own task calls this too, as its last act.
    fn stop_timer(&self, next: Option<AbortHandle>) {
        let old = std::mem::replace(&mut *lock(&self.thaw_timer), next);
        if let Some(old) = old {
            old.abort();
        }
    }

    /// Begins the end of the machine; the first wish counts.
    pub fn end(&self, reboot: bool, grace: Duration) {
        self.wish(Ending {
            reboot,
            grace: grace.min(GRACE_MAX),
            machine: true,
        });
    }

    /// Begins the end of the agent, which whoever started it wants.
    pub fn leave(&self, grace: Duration) {
        self.wish(Ending {
            reboot: false,
            grace,
            machine: false,
        });
    }

    fn wish(&self, ending: Ending) {
        self.ending.send_if_modified(|wish| {
            let first = wish.is_none();
            wish.get_or_insert(ending);
            first
        });
    }

    /// Waits for [`Agent::end`], then ends all user processes.
    pub async fn ended(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        let wish = match ending.wait_for(Option::is_some).await {
            Ok(wish) => *wish,
            Err(_) => None,
        };
        let wish = wish.unwrap_or(Ending {
            reboot: false,
            grace: Duration::ZERO,
            machine: false,
        });
        // Frozen processes cannot end, nor can anything be written.
        if let Err(failure) = self.thaw().await {
            say(&format!("thaw before the end: {}", failure.message()));
        }
        // For the reply that announces it.
        let reply = tokio::time::sleep(Duration::from_millis(50));
        tokio::join!(self.table.end_all(wish.grace), reply);
        wish
    }
}

/// Applies what only a guest can, each field for itself, entropy first: everything after it may use random numbers.
fn apply(system: Option<&dyn System>, request: &pb::ConfigureRequest) -> Vec<pb::Unapplied> {
    type Step<'a> = (
        &'static str,
        bool,
        Box<dyn Fn(&dyn System) -> io::Result<()> + 'a>,
    );
    let hostname = request.hostname.as_deref().unwrap_or_default();
    let steps: [Step<'_>; 8] = [
        (
            "entropy",
            !request.entropy.is_empty(),
            Box::new(|s| s.add_entropy(&request.entropy)),
        ),
        (
            "clock",
            request.clock_unix_ms != 0,
            Box::new(|s| s.set_clock(request.clock_unix_ms)),
        ),
        (
            "machine_id",
            // A container's file is its image's.
            !request.machine_id.is_empty() && system.is_some(),
            Box::new(|s| s.set_machine_id(&request.machine_id)),
        ),
        ("grow_root", request.grow_root, Box::new(|s| s.grow_root())),
        (
            "hostname",
            request.hostname.is_some(),
            Box::new(|s| s.set_hostname(hostname)),
        ),
        (
            "addresses",
            !request.addresses.is_empty(),
            Box::new(|s| s.set_addresses(&request.addresses, request.mtu)),
        ),
        (
            "dns",
            !request.dns_servers.is_empty(),
            Box::new(|s| s.set_dns(&request.dns_servers, &request.dns_search)),
        ),
        (
            "ssh_authorized_keys",
            !request.ssh_authorized_keys.is_empty(),
            Box::new(|s| s.authorize_keys(&request.ssh_authorized_keys)),
        ),
    ];
    let mut unapplied = BTreeMap::new();
    for (field, wanted, step) in steps {
        let reason = match system {
            _ if !wanted => continue,
            None => Err(NOT_A_GUEST.to_owned()),
            Some(system) => step(system).map_err(|error| status::text(&error)),
        };
        if let Err(reason) = reason {
            unapplied.insert(field, reason);
        }
    }
    let unapplied = unapplied.into_iter().map(|(field, reason)| pb::Unapplied {
        field: field.to_owned(),
        reason,
    });
    unapplied.collect()
}
