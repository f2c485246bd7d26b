//! The small parent of a VMM: holds the machine's lock, records what the VMM says, and writes down how it ended. It
//! knows no runtime: what to start stands in `run/launch.json` (`launch.rs`).
//!
//! The server starts it with the machine's directory as working directory and the locked `run/lock` as standard
//! input. It answers with one line on standard output and is on its own from then on:
//!
//! ```text
//! server                 shim                                      VMM
//!   | lock, launch.json    |                                         |
//!   |--------------------->| own session, sockets, tap, pipes        |
//!   |                      |---------------------------------------->| cgroup, other user, no new privileges, exec
//!   |                      | run/shim.json                           |
//!   |<--- {"ok": …} -------|                                         |
//!   | (may die)            |<--- console, its own words, events -----|
//!   |                      | console.log vmm.log run/events.log      |
//!   |                      |<--- end --------------------------------|
//!   |<--- end -------------| run/exit.json
//! ```
//! When the shim dies the kernel kills the VMM: nothing runs without its lock. When the VMM ends, what it
//! started and what is in its cgroup ends too, before `exit.json`. One thread, no tokio.

pub(crate) mod frames;
mod link;
mod relay;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid};
use rustix::process::{Pid, PidfdFlags, Resource, Signal, WaitOptions};
use rustix::thread::CpuSet;

use crate::MachineDir;
use crate::cgroup::Cgroup;
use crate::identity::{Identity, boot_id};
use crate::launch::{
    Answer, ExitRecord, ExitStatus, Launch, LaunchMemory, Open, Record, read_json, write_json,
};
use crate::passt::{self, LaunchPasst};
use crate::ring::RingWriter;
use crate::sys;
use crate::tap::{self, LaunchTap};
use frames::Policy;
use link::Link;
use relay::Source;

/// The most bytes kept of what an event monitor says.
const EVENTS_BYTES: u64 = 64 * 1024;
/// Where descriptors stand until they get their agreed numbers, which are below.
const ABOVE_AGREED: i32 = 64;
/// How often, and how long apart, processes that a VMM left are ended.
const ORPHAN_TRIES: u32 = 200;
const ORPHAN_AGAIN: Duration = Duration::from_millis(5);

/// What went wrong before the VMM ran.
struct Failure {
    what: String,
    source: io::Error,
}

fn at<S: Into<String>>(what: S) -> impl FnOnce(io::Error) -> Failure {
    let what = what.into();
    move |source| Failure { what, source }
}

/// The hidden subcommand `shim`, to be run first thing in `main`: before any thread, descriptor or argument parser.
pub fn main() -> ExitCode {
    let (vmm, record) = match start() {
        Ok(started) => started,
        Err(Failure { what, source }) => {
            // Without the lock this directory is not ours.
            if holds_lock().is_ok() {
                remove_sockets();
            }
            answer(&Answer::Error {
                what,
                errno: source.raw_os_error(),
                text: source.to_string(),
            });
            return ExitCode::FAILURE;
        }
    };
    answer(&Answer::Ok(record.clone()));
    let (status, out_of_memory) = vmm.run();
    remove_sockets();
    let at_ms = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let exit = ExitRecord {
        shim: record.shim,
        status,
        out_of_memory,
        at_ms: at_ms.as_millis().try_into().unwrap_or(u64::MAX),
    };
    // Without it the end counts as one that nobody saw, which is then the truth.
    match write_json(Path::new(MachineDir::EXIT), &exit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tells the server, which may be gone, and lets go of it.
fn answer(answer: &Answer) {
    let line = serde_json::to_string(answer).expect("an answer has no map with odd keys");
    let _ = writeln!(io::stdout(), "{line}");
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if let Ok(null) = null {
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

fn start() -> Result<(Vmm, Record), Failure> {
    sys::ignore_stopping_signals();
    let memory = inherited();
    sys::close_inherited_but(memory.as_slice()).map_err(at("close inherited descriptors"))?;
    holds_lock().map_err(at("look for the lock on standard input"))?;
    // What a VMM starts and leaves comes to us, also where there are no cgroups.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    // Fails for the leader of a session, which is as good.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let launch: Launch = read_json(Path::new(MachineDir::LAUNCH))
        .ok_or_else(|| at("read run/launch.json")(io::ErrorKind::InvalidData.into()))?;

    // While the agreed numbers are free.
    let Descriptors {
        kept,
        events,
        frames,
    } = descriptors(&launch, memory)?;
    let ring = |path: &str, size| {
        RingWriter::open(Path::new(path), size).map_err(at(format!("open {path}")))
    };
    let console = ring(MachineDir::CONSOLE, launch.console_bytes)?;
    let log = ring(MachineDir::VMM_LOG, EVENTS_BYTES)?;
    let (console_from, vmm_log_from) = (console.total(), log.total());
    give(&launch)?;
    let events = match events {
        Some(events) => {
            let ends_on = launch.monitor.as_ref().and_then(|m| m.ends_on.as_deref());
            let source = Source::new(events, ring(MachineDir::EVENTS, EVENTS_BYTES)?);
            Some(source.ending_on(ends_on))
        }
        None => None,
    };
    stay_on(&launch.affinity)?;
    let cgroup = launch.cgroup.as_ref().map(Cgroup::make);
    let (said, words) = io::pipe().map_err(at("make a pipe"))?;
    let link = match launch.passt.as_ref().zip(frames) {
        Some((passt, frames)) => {
            let words = words.try_clone().map_err(at("give passt our pipe"))?;
            let link = connect(&launch, passt, frames, words, cgroup.as_ref())?;
            Some(link)
        }
        None => None,
    };
    let mut child = spawn(&launch, &kept, words, cgroup.as_ref())?;
    drop(kept);

    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    let out = child.stdout.take().expect("its output is piped");
    let placed = cgroup.as_ref().map(|cgroup| cgroup.placed(pid));
    let vmm = Vmm {
        child,
        cgroup,
        pidfd: pidfd.map_err(|error| at("open the VMM's process")(error.into()))?,
        sources: [
            Some(Source::new(out.into(), console).ending_after(launch.last_words.as_deref())),
            Some(Source::new(said.into(), log)),
            events,
        ],
        link,
    };
    let record = Record {
        boot_id: boot_id().map_err(at("read the host's boot id"))?,
        shim: Identity::of(rustix::process::getpid()).map_err(at("read our own state"))?,
        vmm: Identity::of(pid).map_err(at("read the VMM's state"))?,
        console_from,
        vmm_log_from,
        cgroup: placed,
    };
    write_json(Path::new(MachineDir::SHIM), &record).map_err(at("write run/shim.json"))?;
    Ok((vmm, record))
}

/// The number of the descriptor that we are given beside the standard three.
fn inherited() -> Option<RawFd> {
    std::env::args().nth(2)?.parse().ok()
}

/// That we were started as we must be, and not by hand: a shim without the lock would be a second owner.
fn holds_lock() -> io::Result<()> {
    let held = rustix::fs::fstat(rustix::stdio::stdin())?;
    let lock = rustix::fs::stat(MachineDir::LOCK)?;
    if (held.st_dev, held.st_ino) != (lock.st_dev, lock.st_ino) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    Ok(rustix::fs::flock(rustix::stdio::stdin(), exclusive)?)
}

/// Removes what a VMM is reached by. What stays is removed by the next start.
fn remove_sockets() {
    let launch: Option<Launch> = read_json(Path::new(MachineDir::LAUNCH));
    for listen in launch.into_iter().flat_map(|launch| launch.listen) {
        let _ = std::fs::remove_file(listen.path);
    }
    // Only sockets: the VMM may have left more than that.
    for entry in std::fs::read_dir(MachineDir::VMM)
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let _ = std::fs::remove_dir(MachineDir::VMM);
}

/// Gives the VMM's user what is to be its own. Links are not followed.
fn give(launch: &Launch) -> Result<(), Failure> {
    if launch.own_dir {
        rustix::fs::mkdir(MachineDir::VMM, Mode::RWXU)
            .map_err(|error| at("make run/vmm")(error.into()))?;
    }
    for (old, new) in &launch.links {
        let parent = Path::new(new).parent().unwrap_or(Path::new(""));
        std::fs::create_dir_all(parent)
            .and_then(|()| std::fs::hard_link(old, new))
            .map_err(at(format!("link {old} to {new}")))?;
    }
    for (path, text) in &launch.files {
        let new = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        new.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(at(format!("write {path}")))?;
    }
    let Some(user) = &launch.user else {
        return Ok(());
    };
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let own_dir = (launch.own_dir && !launch.changes_user).then(|| MachineDir::VMM.to_owned());
    for path in launch.own.iter().chain(launch.files.keys()).chain(&own_dir) {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), flags)
            .map_err(|error| at(format!("give away {path}"))(error.into()))?;
    }
    Ok(())
}

/// What is open before the VMM runs.
struct Descriptors {
    /// What the VMM inherits, under the numbers agreed for them.
    kept: Vec<OwnedFd>,
    /// Our end of its event monitor.
    events: Option<OwnedFd>,
    /// Our end of its network card.
    frames: Option<OwnedFd>,
}

fn descriptors(launch: &Launch, memory: Option<RawFd>) -> Result<Descriptors, Failure> {
    let mut kept = Vec::new();
    if let Some(LaunchMemory { fd, .. }) = launch.memory {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let memory = memory.ok_or_else(missing).and_then(sys::inherited);
        kept.push((memory.map_err(at("take over the guest's memory"))?, fd));
    }
    for Open { path, fd } in &launch.open {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty());
        let file = file.map_err(|error| at(format!("open {path}"))(error.into()))?;
        kept.push((file, *fd));
    }
    for listen in &launch.listen {
        let socket = listen_on(&listen.path).map_err(at(format!("listen on {}", listen.path)))?;
        kept.push((socket, listen.fd));
    }
    for LaunchTap { name, fd } in &launch.taps {
        let user = launch.user.as_ref().map(|user| user.uid);
        let tap = tap::open(name, user).map_err(at(format!("open the tap {name}")))?;
        // A VMM that opens it by itself is told less clearly why it may not.
        if let Some(number) = fd {
            kept.push((tap, *number));
        }
    }
    let events = match &launch.monitor {
        None => None,
        Some(monitor) => {
            let (mut ours, theirs) = UnixStream::pair().map_err(at("make a pair of sockets"))?;
            ours.write_all(monitor.greeting.as_bytes())
                .map_err(at("greet the event monitor"))?;
            kept.push((theirs.into(), monitor.fd));
            Some(above(ours.into()).map_err(at("move a descriptor"))?)
        }
    };
    let frames = match &launch.passt {
        None => None,
        Some(passt) => {
            let (ours, theirs) = pair()?;
            kept.push((theirs, passt.fd));
            Some(ours)
        }
    };
    let mut placed = Vec::new();
    for (fd, number) in kept {
        placed.push((above(fd).map_err(at("move a descriptor"))?, number));
    }
    let place = |(fd, number): (OwnedFd, i32)| {
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, number)?;
        match fd.as_raw_fd() {
            placed if placed == number && (3..ABOVE_AGREED).contains(&number) => Ok(fd),
            _ => Err(io::Error::from(io::ErrorKind::AddrInUse)),
        }
    };
    let kept: io::Result<Vec<OwnedFd>> = placed.into_iter().map(place).collect();
    Ok(Descriptors {
        kept: kept.map_err(at("give a descriptor its number"))?,
        events,
        frames,
    })
}

/// Two connected sockets, above the agreed numbers.
fn pair() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (one, other) = UnixStream::pair().map_err(at("make a pair of sockets"))?;
    let above = |socket: UnixStream| above(socket.into()).map_err(at("move a descriptor"));
    Ok((above(one)?, above(other)?))
}

/// Starts passt and puts the filter between it and `frames`, our end of the VMM's network card.
fn connect(
    launch: &Launch,
    passt: &LaunchPasst,
    frames: OwnedFd,
    words: io::PipeWriter,
    cgroup: Option<&Cgroup>,
) -> Result<Link, Failure> {
    let addresses = sys::own_addresses().map_err(at("read the host's addresses"))?;
    let mut filter = passt.filter.clone();
    let resolvers = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    filter.dns &= link::has_resolver(&resolvers);
    let (ours, theirs) = pair()?;
    let joints = cgroup.map(Cgroup::joints).unwrap_or_default();
    let child = passt::spawn(&passt.argv, &theirs, words.into(), set_up(launch, &joints));
    let program = passt.argv.first().map_or("nothing", String::as_str);
    let child = child.map_err(at(format!("run {program}")))?;
    let policy = Policy::new(&filter, &addresses);
    Ok(Link::new(frames, ours, child, policy))
}

fn above(fd: OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, ABOVE_AGREED)?)
}

fn listen_on(path: &str) -> io::Result<OwnedFd> {
    // The mode comes from the umask, so there is no moment in which it is wider.
    let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    Ok(listener?.into())
}

/// Binds this process, and with it the VMM, to these CPUs of the host; to none: to all.
fn stay_on(cpus: &[u32]) -> Result<(), Failure> {
    if cpus.is_empty() {
        return Ok(());
    }
    let failed = || at(format!("run on CPUs {cpus:?}"));
    let mut set = CpuSet::new();
    for cpu in cpus {
        let cpu = usize::try_from(*cpu)
            .ok()
            .filter(|cpu| *cpu < CpuSet::MAX_CPU);
        set.set(cpu.ok_or_else(|| failed()(io::ErrorKind::InvalidInput.into()))?);
    }
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| failed()(error.into()))
}

fn spawn(
    launch: &Launch,
    kept: &[OwnedFd],
    words: io::PipeWriter,
    cgroup: Option<&Cgroup>,
) -> Result<std::process::Child, Failure> {
    let [program, arguments @ ..] = launch.argv.as_slice() else {
        return Err(at("run nothing")(io::ErrorKind::InvalidInput.into()));
    };
    let joints = cgroup.map(Cgroup::joints).unwrap_or_default();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&launch.env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(words);
    sys::set_up(
        &mut command,
        sys::Child {
            keep: kept.iter().map(|fd| fd.as_fd().as_raw_fd()).collect(),
            own_network: launch.own_network,
            limits: vec![(Resource::Core, 0), (Resource::Nofile, launch.open_files)],
            gains_privileges: launch.gains_privileges,
            ..set_up(launch, &joints)
        },
    );
    command.spawn().map_err(at(format!("run {program}")))
}

/// What all children have in common. `joints` stay open until they run.
fn set_up(launch: &Launch, joints: &[File]) -> sys::Child {
    let user = launch.user.as_ref().filter(|_| !launch.changes_user);
    sys::Child {
        join: joints.iter().map(AsRawFd::as_raw_fd).collect(),
        keep: Vec::new(),
        ids: user.map(|user| (user.uid, user.gid, user.groups.clone())),
        own_network: false,
        limits: Vec::new(),
        gains_privileges: false,
    }
}

/// Ends all children of this process, which then are those that its VMM has left.
fn end_descendants() {
    let own = rustix::process::getpid();
    let list = format!("/proc/self/task/{own}/children");
    for _ in 0..ORPHAN_TRIES {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let children = std::fs::read_to_string(&list).unwrap_or_default();
        let mut children = children.split_ascii_whitespace().peekable();
        if children.peek().is_none() {
            return;
        }
        // Nobody else waits for them: the numbers are theirs.
        for child in children.filter_map(|child| Pid::from_raw(child.parse().ok()?)) {
            let _ = rustix::process::kill_process(child, Signal::KILL);
        }
        std::thread::sleep(ORPHAN_AGAIN);
    }
}

/// A running VMM and what it says.
struct Vmm {
    child: std::process::Child,
    /// Ends with this value, and with it all that is still in it.
    cgroup: Option<Cgroup>,
    pidfd: OwnedFd,
    sources: [Option<Source>; 3],
    /// Its network, where that goes through us.
    link: Option<Link>,
}

impl Vmm {
    /// Records until it has ended. Says how, and its limit of memory when it was killed for that.
    fn run(mut self) -> (ExitStatus, Option<u64>) {
        relay::until_end(&mut self.sources, &mut self.link, &self.pidfd);
        let status = match self.child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => ExitStatus::Code(code),
                (None, signal) => ExitStatus::Signal(signal.unwrap_or(0)),
            },
            // It has ended and is our child: there is a status.
            Err(_) => ExitStatus::Code(-1),
        };
        // While its number is still its own.
        self.link = None;
        end_descendants();
        let killed = status == ExitStatus::Signal(libc::SIGKILL);
        let cgroup = self.cgroup.as_ref().filter(|_| killed);
        (status, cgroup.and_then(Cgroup::out_of_memory))
    }
}
