//! Which process is meant: proofs that a recorded process is the one that has its number now. Decides nothing about
//! what to do with it.
//!
//! A number alone proves nothing, since the kernel gives it out again. Number and start time do, within one boot of
//! the host, once a descriptor of the process was opened first and the process still lives after the comparison.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::launch::{ExitRecord, Record, read_json};
use crate::{MachineDir, cgroup};

/// Time for the kernel to end a VMM whose shim has died.
const BOUND_DIES: Duration = Duration::from_secs(1);

/// A process of one boot of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// Clock ticks from the boot to its start: field 22 of `/proc/PID/stat`, see proc(5).
    pub(crate) start_time: u64,
}

impl Identity {
    /// Of a process that cannot vanish meanwhile: oneself, or a child that nobody has waited for.
    pub(crate) fn of(pid: Pid) -> io::Result<Self> {
        let pid = pid.as_raw_nonzero().get();
        let start_time = Stat::read(pid)?.start_time;
        Ok(Self { pid, start_time })
    }
}

/// What can be said about a recorded process.
#[derive(Debug)]
pub(crate) enum Proof {
    /// It lives, and this is a descriptor of it.
    Alive(OwnedFd),
    /// It has ended.
    Gone,
    /// Neither can be proved.
    Doubt(&'static str),
}

/// Finds out about a process of this boot of the host, which must be a child of `parent` where that is given.
pub(crate) fn prove(identity: Identity, parent: Option<i32>) -> Proof {
    // A number below zero, which means a group elsewhere, is more than `from_raw` takes.
    let Some(pid) = Pid::from_raw(identity.pid.max(0)) else {
        return Proof::Doubt("the recorded process has no possible number");
    };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Proof::Gone,
        Err(_) => return Proof::Doubt("the recorded process cannot be opened"),
    };
    let stat = match Stat::read(identity.pid) {
        Ok(stat) => stat,
        Err(_) if ended(&pidfd, Duration::ZERO) => return Proof::Gone,
        Err(_) => return Proof::Doubt("the state of the recorded process cannot be read"),
    };
    // Until it has ended its number is its own, so what was read just now was about it.
    if ended(&pidfd, Duration::ZERO) || stat.start_time != identity.start_time {
        return Proof::Gone;
    }
    if parent.is_some_and(|parent| parent != stat.parent) {
        return Proof::Doubt("the recorded VMM is not a child of the recorded shim");
    }
    Proof::Alive(pidfd)
}

/// Waits for the end of a process. Blocks.
pub(crate) fn ended(pidfd: &OwnedFd, within: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: within.as_secs() as i64,
        tv_nsec: within.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Err(Errno::INTR) => {}
            other => return other.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Whether the standard input of a process is this very lock file. `None` when it may not be looked at.
pub(crate) fn holds(pid: i32, lock: &File) -> Option<bool> {
    let theirs = std::fs::metadata(format!("/proc/{pid}/fd/0")).ok()?;
    let ours = lock.metadata().ok()?;
    Some((theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()))
}

/// Names this boot of the host.
pub(crate) fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

/// With the machine's lock in hand: whether nothing is left of the last run. The kernel kills a VMM whose shim dies,
/// but the lock is free an instant before the VMM is gone. Blocks.
pub(crate) fn orphan_is_gone(dir: &MachineDir, within: Duration) -> bool {
    let Some(record) = read_json::<Record>(&dir.file(MachineDir::SHIM)) else {
        return true;
    };
    let exit = read_json::<ExitRecord>(&dir.file(MachineDir::EXIT));
    if exit.is_some_and(|exit| exit.shim == record.shim)
        || boot_id().is_ok_and(|id| id != record.boot_id)
    {
        return true;
    }
    match prove(record.vmm, None) {
        Proof::Gone => true,
        Proof::Alive(pidfd) => ended(&pidfd, within),
        Proof::Doubt(_) => false,
    }
}

/// The same, and ends one that the kernel did not: a VMM that changed its user itself is not bound to its shim any more.
/// That it is in its machine's own cgroup is the further proof that this takes. Blocks.
pub(crate) fn end_orphan(dir: &MachineDir, within: Duration) -> bool {
    if orphan_is_gone(dir, BOUND_DIES) {
        return true;
    }
    let record = read_json::<Record>(&dir.file(MachineDir::SHIM));
    if let Some(record) = record
        && let Some(placed) = &record.cgroup
        && let Proof::Alive(_) = prove(record.vmm, None)
        && cgroup::holds(&placed.name, record.vmm.pid)
    {
        let ended = cgroup::destroy(&placed.name);
        tracing::warn!(dir = %dir.path().display(), ?ended, "ended a VMM that outlived its shim");
    }
    orphan_is_gone(dir, within)
}

struct Stat {
    parent: i32,
    start_time: u64,
}

impl Stat {
    fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// The name in field 2 may contain anything, so fields are counted from the last parenthesis.
    fn parse(text: &[u8]) -> Option<Self> {
        let name_end = text.iter().rposition(|byte| *byte == b')')?;
        let fields = std::str::from_utf8(&text[name_end + 1..]).ok()?;
        let mut fields = fields.split_ascii_whitespace();
        let parent = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(17)?.parse().ok()?;
        Some(Self { parent, start_time })
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_with_parentheses_hides_no_field() {
        let line = b"77 (a) S 1 (b) R 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 4242 23";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.parent, stat.start_time), (5, 4242));
        assert!(Stat::parse(b"77 (a) S 1").is_none());
        assert!(Stat::parse(b"").is_none());
    }

    #[test]
    fn only_the_very_process_is_alive() {
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let identity = Identity::of(Pid::from_child(&child)).unwrap();
        let us = rustix::process::getpid().as_raw_nonzero().get();
        let of_reused_number = Identity {
            start_time: identity.start_time - 1,
            ..identity
        };
        assert!(matches!(prove(identity, Some(us)), Proof::Alive(_)));
        assert!(matches!(prove(identity, Some(1)), Proof::Doubt(_)));
        assert!(matches!(prove(of_reused_number, None), Proof::Gone));
        for pid in [0, -1, i32::MIN] {
            assert!(matches!(
                prove(Identity { pid, ..identity }, None),
                Proof::Doubt(_)
            ));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(prove(identity, None), Proof::Gone));
    }
}
