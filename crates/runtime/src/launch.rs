//! What the server and the shim say to each other, and the server's side of a start: the lock, the files, the shim.
//! Which program runs with which arguments is the runtimes' affair.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::cgroup::{Limits, Placed};
use crate::identity::{self, Identity, Proof};
use crate::memory::{FileId, Memory};
use crate::passt::LaunchPasst;
use crate::process::{Judge, Process, Vmm};
use crate::spec::{MachineSpec, RuntimeConfig, User};
use crate::tap::LaunchTap;
use crate::{Error, MachineDir, kvm, sys};

/// Time for the shim to come up and start the VMM.
const SHIM_STARTS: Duration = Duration::from_secs(10);
/// A lock that is held an instant only belongs to somebody who looks whether it is held.
const LOCK_TRIES: u32 = 10;
const LOCK_AGAIN: Duration = Duration::from_millis(10);
/// Time for a VMM to end that has dropped a connection.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Time for a VMM to die whose shim is dead.
const ORPHAN_DIES: Duration = Duration::from_secs(5);

/// What the shim is to do: `run/launch.json`. A newer shim reads what an older server wrote, so fields are only added,
/// with defaults.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Launch {
    /// The program by its absolute path, and its arguments.
    pub(crate) argv: Vec<String>,
    /// All of its environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Who it runs as, when that changes.
    pub(crate) user: Option<LaunchUser>,
    /// Paths, relative to the machine's directory, that are given to that user.
    pub(crate) own: Vec<String>,
    /// Whether it gets the directory [`MachineDir::VMM`] to make its sockets in.
    #[serde(default)]
    pub(crate) own_dir: bool,
    /// That it begins as we are and changes to that user by itself: a jailer. Then the directory stays ours.
    #[serde(default)]
    pub(crate) changes_user: bool,
    /// Further names of files, with directories on the way where they are missing: old and new ones, relative to the
    /// machine's directory.
    #[serde(default)]
    pub(crate) links: Vec<(String, String)>,
    /// Files that are made for that user, by their paths relative to the machine's directory: their texts.
    #[serde(default)]
    pub(crate) files: BTreeMap<String, String>,
    /// Whether an exec may give it privileges: only for a VMM that is set-uid and refuses to run otherwise.
    #[serde(default)]
    pub(crate) gains_privileges: bool,
    /// Sockets to listen on.
    pub(crate) listen: Vec<Listen>,
    /// The guest's memory, in MiB.
    #[serde(default)]
    pub(crate) memory_mib: u32,
    /// Files to open for reading.
    #[serde(default)]
    pub(crate) open: Vec<Open>,
    /// Memory that its guest goes on with.
    #[serde(default)]
    pub(crate) memory: Option<LaunchMemory>,
    /// Taps that it uses.
    #[serde(default)]
    pub(crate) taps: Vec<LaunchTap>,
    /// The user-mode network that it uses.
    #[serde(default)]
    pub(crate) passt: Option<LaunchPasst>,
    /// A connection whose output is recorded.
    pub(crate) monitor: Option<Monitor>,
    /// The most descriptors it may have open.
    pub(crate) open_files: u64,
    /// What it may use of the host; where there are no cgroups that says nothing.
    #[serde(default)]
    pub(crate) cgroup: Option<Limits>,
    /// The CPUs that it and its shim may run on; empty: all.
    #[serde(default)]
    pub(crate) affinity: Vec<u32>,
    /// Size of the rings, in bytes.
    pub(crate) console_bytes: u64,
    /// Whether it gets a network namespace of its own, with nothing in it. For one that begins as root.
    #[serde(default)]
    pub(crate) own_network: bool,
    /// The end of a line of the console after which, when nothing follows, the VMM is killed. For one that does not end
    /// when its guest stops for ever.
    #[serde(default)]
    pub(crate) last_words: Option<String>,
}

impl Launch {
    /// A program that may reach its disk and nothing else. What it needs besides is for its runtime to say.
    pub(crate) fn new(argv: Vec<String>, spec: &MachineSpec, config: &RuntimeConfig) -> Self {
        Self {
            argv,
            env: BTreeMap::new(),
            user: spec.user.map(|user| LaunchUser::new(user, Vec::new())),
            own: vec![MachineDir::DISK.to_owned()],
            own_dir: false,
            changes_user: false,
            links: Vec::new(),
            files: BTreeMap::new(),
            gains_privileges: false,
            listen: Vec::new(),
            memory_mib: spec.memory_mib,
            open: Vec::new(),
            memory: None,
            taps: Vec::new(),
            passt: None,
            monitor: None,
            open_files: 0,
            cgroup: None,
            affinity: config.affinity.clone(),
            console_bytes: config.console_bytes,
            own_network: false,
            last_words: None,
        }
    }
}

/// Who a VMM runs as.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaunchUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All of its further groups.
    pub(crate) groups: Vec<u32>,
}

impl LaunchUser {
    fn new(user: User, groups: Vec<u32>) -> Self {
        Self {
            uid: user.uid,
            gid: user.gid,
            groups,
        }
    }

    /// Somebody who may use KVM.
    pub(crate) fn with_kvm(user: User) -> Self {
        Self::new(user, group_of_device(kvm::DEVICE, user))
    }
}

/// A unix socket that the shim makes, so that it can be connected to before the VMM looks at it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Listen {
    /// Relative to the machine's directory.
    pub(crate) path: String,
    /// The number under which the VMM finds it.
    pub(crate) fd: i32,
}

/// A file that the VMM's user may not open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Open {
    /// Relative to the machine's directory. What lies there is ours, and no link.
    pub(crate) path: String,
    /// The number under which the VMM finds it.
    pub(crate) fd: i32,
}

/// The memory that a guest goes on with, which the shim inherits.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaunchMemory {
    /// The number under which the VMM finds it.
    pub(crate) fd: i32,
    /// The file that it was read from, relative to the machine's directory.
    pub(crate) path: String,
    /// What that was.
    pub(crate) of: FileId,
    /// What is handed over.
    #[serde(skip)]
    pub(crate) memory: Option<Arc<Memory>>,
}

/// One end of a socket pair for the VMM; what it sends there is recorded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Monitor {
    /// The number under which the VMM finds it.
    pub(crate) fd: i32,
    /// Sent to it once; may be empty.
    #[serde(default)]
    pub(crate) greeting: String,
    /// Bytes upon which the VMM is killed as soon as it says them there. For one that has no other way to end with
    /// its guest's reset: that must not depend on a server that may be down.
    #[serde(default)]
    pub(crate) ends_on: Option<String>,
}

/// Who runs: `run/shim.json`, and the good answer of the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The boot of the host in which the numbers below mean something.
    pub(crate) boot_id: String,
    pub(crate) shim: Identity,
    pub(crate) vmm: Identity,
    /// Where this run begins in `console.log`.
    pub(crate) console_from: u64,
    /// Where this run begins in `vmm.log`.
    pub(crate) vmm_log_from: u64,
    /// The cgroup that the VMM is in.
    #[serde(default)]
    pub(crate) cgroup: Option<Placed>,
}

/// How the VMM ended: `run/exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// The run that it is about.
    pub(crate) shim: Identity,
    pub(crate) status: ExitStatus,
    /// The VMM's limit of memory in bytes, where the kernel has killed for it.
    #[serde(default)]
    pub(crate) out_of_memory: Option<u64>,
    /// UTC, in milliseconds since 1970.
    pub(crate) at_ms: u64,
}

/// What the kernel says about an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ExitStatus {
    Code(i32),
    Signal(i32),
}

/// The shim's one line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Ok(Record),
    Error {
        /// What it was doing.
        what: String,
        /// What the operating system said.
        errno: Option<i32>,
        /// The same in words.
        text: String,
    },
}

/// Reads a file of ours. `None` when it is missing or, after a crash of the host, not whole.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Puts a file in place so that a reader sees all of it or nothing.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let new = path.with_extension("new");
    let text = serde_json::to_vec(value)?;
    remove(&new)?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&text)?;
    std::fs::rename(&new, path)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes a machine's lock, or says `None` when somebody has it. It is free again when the last descriptor made from
/// this one is closed, in whatever process.
pub(crate) fn lock(dir: &MachineDir, create: bool) -> io::Result<(File, bool)> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(create)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(dir.file(MachineDir::LOCK))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok((file, true)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok((file, false)),
        Err(error) => Err(error.into()),
    }
}

/// Starts a VMM under a shim. It may end at once: that is for the caller to find out.
///
/// Goes on to its end when the future is dropped.
pub(crate) async fn launch(
    runtime: &'static str,
    config: &RuntimeConfig,
    dir: &MachineDir,
    launch: Launch,
    judge: Judge,
) -> Result<Process, Error> {
    let (config, dir) = (config.clone(), dir.clone());
    let launched = tokio::spawn(async move {
        let its_dir = dir.clone();
        // Held for as long as the machine lives: others may begin with the same.
        let memory = launch.memory.as_ref().and_then(|its| its.memory.clone());
        let spawned = tokio::task::spawn_blocking(move || spawn(&config, &its_dir, &launch));
        let (shim, answers) = spawned.await.expect("spawning a shim does not panic")?;
        let record = match answer(&dir, answers).await {
            Ok(record) => record,
            Err(error) => {
                end(shim).await;
                return Err(error);
            }
        };
        if let Some(placed) = record.cgroup.as_ref().filter(|one| !one.flaws.is_empty()) {
            let flaws = placed.flaws.join("; ");
            tracing::debug!(name = %placed.name, flaws, "a VMM runs without all of its limits");
        }
        let vmm = match identity::prove(record.vmm, Some(record.shim.pid)) {
            Proof::Alive(vmm) => Some(vmm),
            Proof::Gone | Proof::Doubt(_) => None,
        };
        let vmm = Vmm::new(runtime, dir, record, judge, shim, vmm)?;
        Ok(Process::new(vmm.with(memory)))
    });
    launched.await.expect("launching does not panic")
}

/// Starts a VMM under a shim and waits until `ready` says that it is of use. Nothing is left running after an error.
pub(crate) async fn until_ready(
    runtime: &'static str,
    config: &RuntimeConfig,
    dir: &MachineDir,
    what: Launch,
    judge: Judge,
    within: Duration,
    ready: impl Future<Output = Result<(), Error>>,
) -> Result<Process, Error> {
    let process = launch(runtime, config, dir, what, judge).await?;
    let failed = tokio::select! {
        biased;
        report = process.wait() => return Err(Error::Exited { runtime, report }),
        ready = tokio::time::timeout(within, ready) => match ready {
            Ok(Ok(())) => return Ok(process),
            Ok(Err(error)) => error,
            Err(_) => Error::Timeout { what: "start of the VMM", seconds: within.as_secs() },
        },
    };
    // Most often a connection broke because it ended; then its own words say more than ours.
    if !matches!(failed, Error::Timeout { .. })
        && let Ok(report) = tokio::time::timeout(LAST_WORDS, process.wait()).await
    {
        return Err(Error::Exited { runtime, report });
    }
    process.kill().await?;
    Err(failed)
}

/// Ends a shim that gave no good answer, and with it what it may have started.
async fn end(shim: OwnedFd) {
    let _ = rustix::process::pidfd_send_signal(&shim, Signal::KILL);
    if let Ok(shim) = sys::readable(shim) {
        let _ = tokio::time::timeout(ORPHAN_DIES, shim.readable()).await;
        let id = WaitId::PidFd(shim.get_ref().as_fd());
        let _ = rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
}

async fn answer(dir: &MachineDir, answers: OwnedFd) -> Result<Record, Error> {
    let mut line = Vec::new();
    let receive = async {
        let answers = pipe::Receiver::from_owned_fd(answers)?;
        answers.take(64 * 1024).read_to_end(&mut line).await
    };
    match tokio::time::timeout(SHIM_STARTS, receive).await {
        Err(_) => {
            return Err(Error::Timeout {
                what: "start of the shim",
                seconds: SHIM_STARTS.as_secs(),
            });
        }
        Ok(Err(source)) => {
            return Err(Error::io("read the answer of the shim in", dir.path())(
                source,
            ));
        }
        Ok(Ok(_)) => {}
    }
    match serde_json::from_slice(&line) {
        Ok(Answer::Ok(record)) => Ok(record),
        Ok(Answer::Error { what, errno, text }) => Err(match errno {
            Some(errno) => Error::Io {
                what: "launch in",
                path: dir.path().to_owned(),
                source: io::Error::other(format!(
                    "{what}: {}",
                    io::Error::from_raw_os_error(errno)
                )),
            },
            None => Error::Launch {
                answer: format!("{what}: {text}"),
            },
        }),
        Err(_) => Err(Error::Launch {
            answer: crate::process::printable(&line, 1024),
        }),
    }
}

/// Everything before the shim runs. Blocks.
fn spawn(
    config: &RuntimeConfig,
    dir: &MachineDir,
    launch: &Launch,
) -> Result<(OwnedFd, OwnedFd), Error> {
    let run = dir.file(MachineDir::RUN);
    match std::fs::DirBuilder::new().mode(0o700).create(&run) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io("make", run)(error));
        }
        _ => {}
    }
    let lock_path = dir.file(MachineDir::LOCK);
    let mut tries = LOCK_TRIES;
    let (lock, ours) = loop {
        let tried = lock(dir, true).map_err(Error::io("lock", &lock_path))?;
        tries -= 1;
        if tried.1 || tries == 0 {
            break tried;
        }
        std::thread::sleep(LOCK_AGAIN);
    };
    if !ours {
        return Err(Error::Locked {
            dir: dir.path().to_owned(),
        });
    }
    if !identity::end_orphan(dir, ORPHAN_DIES) {
        return Err(Error::Unproved {
            dir: dir.path().to_owned(),
            reason: "the VMM of a shim that is dead does not die".to_owned(),
        });
    }
    for name in [
        MachineDir::SHIM,
        MachineDir::EXIT,
        MachineDir::KILLED,
        MachineDir::EVENTS,
    ]
    .into_iter()
    .chain(launch.listen.iter().map(|listen| listen.path.as_str()))
    {
        let path = dir.file(name);
        remove(&path).map_err(Error::io("remove", path))?;
    }
    let own_dir = dir.file(MachineDir::VMM);
    match std::fs::remove_dir_all(&own_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io("remove", own_dir)(error));
        }
        _ => {}
    }
    // A VMM of another user must be able to go through its working directory, and to nothing that it is not told of.
    let mode = if launch.user.is_some() { 0o711 } else { 0o700 };
    std::fs::set_permissions(dir.path(), Permissions::from_mode(mode))
        .map_err(Error::io("set the mode of", dir.path()))?;
    let mode = if launch.own_dir && launch.user.is_some() {
        0o711
    } else {
        0o700
    };
    std::fs::set_permissions(&run, Permissions::from_mode(mode))
        .map_err(Error::io("set the mode of", &run))?;
    let path = dir.file(MachineDir::LAUNCH);
    write_json(&path, launch).map_err(Error::io("write", path))?;
    let memory = launch.memory.as_ref().and_then(|its| its.memory.as_ref());
    let memory = memory.map(|memory| memory.as_fd().as_raw_fd());
    spawn_shim(config, dir, lock, memory).map_err(Error::io("run", &config.launcher))
}

/// Returns a descriptor of the process, and the end of the pipe that it answers on. `memory` is what it inherits.
fn spawn_shim(
    config: &RuntimeConfig,
    dir: &MachineDir,
    lock: File,
    memory: Option<RawFd>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let (answers, theirs) = io::pipe()?;
    let mut command = Command::new(std::path::absolute(&config.launcher)?);
    command
        .arg("shim")
        .env_clear()
        .current_dir(dir.path())
        // The lock is on the open file, not on the process: it is never free between here and there.
        .stdin(Stdio::from(lock))
        .stdout(Stdio::from(theirs.try_clone()?))
        .stderr(Stdio::from(theirs));
    if let Some(memory) = memory {
        command.arg(memory.to_string());
        sys::hand_over(&mut command, vec![memory]);
    }
    let mut child = command.spawn()?;
    // A child that nobody waited for keeps its number.
    match rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok((pidfd, OwnedFd::from(answers))),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error.into())
        }
    }
}

/// The further groups that `user` needs to open a device that only its group may.
fn group_of_device(device: &str, user: User) -> Vec<u32> {
    let Ok(metadata) = std::fs::metadata(device) else {
        return Vec::new();
    };
    let (for_all, group) = (metadata.mode() & 0o006 == 0o006, metadata.gid());
    match for_all || group == user.gid || group == 0 {
        true => Vec::new(),
        false => vec![group],
    }
}
