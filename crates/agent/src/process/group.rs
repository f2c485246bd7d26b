//! The processes that belong to one user process: a control group each, where we have a cgroup v2 tree; else what can
//! be found by walking parents and sessions.
//!
//! The walk is weaker, and that is said here rather than hidden: a process that makes its own session after its parent
//! died belongs to nobody any more. It is still found, as a descendant of the agent, when the agent ends.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::Pid;
use tokio::io::Interest;

use crate::sys::poll;
use crate::sys::signal::kill;

const SIGKILL: i32 = 9;
/// Time for killed processes to disappear, and for frozen ones to come to rest.
const SETTLE: Duration = Duration::from_secs(5);
/// Rounds of a walk that kills: each finds what was forked during the one before.
const ROUNDS: usize = 32;

/// Where groups are made.
pub enum Groups {
    /// Below this directory of a cgroup v2 tree.
    Cgroup {
        /// The directory.
        dir: PathBuf,
        /// Number of the next group.
        next: AtomicU64,
    },
    /// No control groups.
    Walk,
}

/// All that one user process has started.
pub enum Group {
    /// A directory of a cgroup v2 tree.
    Cgroup(PathBuf),
    /// Found by walking from the leader.
    Walk,
}

impl Groups {
    /// Uses `base/user` for groups. Numbers used by an earlier agent of this boot are not used again: its processes
    /// may still be there.
    ///
    /// # Errors
    /// `base` is not a writable cgroup v2 directory.
    pub fn in_cgroup(base: &Path) -> io::Result<Self> {
        let dir = base.join("user");
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Only a cgroup v2 directory has it, since Linux 5.14.
        OpenOptions::new()
            .write(true)
            .open(dir.join("cgroup.kill"))?;
        let used = fs::read_dir(&dir)?.flatten();
        let used = used.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
        let next = AtomicU64::new(used.max().map_or(1, |last| last.saturating_add(1)));
        Ok(Self::Cgroup { dir, next })
    }

    /// A new, empty group.
    ///
    /// # Errors
    /// The kernel refuses to make it.
    pub fn create(&self) -> io::Result<Group> {
        match self {
            Self::Walk => Ok(Group::Walk),
            Self::Cgroup { dir, next } => {
                let dir = dir.join(next.fetch_add(1, Ordering::Relaxed).to_string());
                fs::create_dir(&dir)?;
                Ok(Group::Cgroup(dir))
            }
        }
    }

    /// Stops every user process where it is.
    ///
    /// # Errors
    /// Without control groups this cannot be done; with them, it may not come to rest in time.
    pub async fn freeze(&self) -> io::Result<()> {
        let Self::Cgroup { dir, .. } = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        fs::write(dir.join("cgroup.freeze"), "1")?;
        wait_for(dir, "frozen 1").await
    }

    /// Ends [`Groups::freeze`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn thaw(&self) -> io::Result<()> {
        match self {
            Self::Walk => Ok(()),
            Self::Cgroup { dir, .. } => fs::write(dir.join("cgroup.freeze"), "0"),
        }
    }

    /// Sends a signal to every user process.
    pub fn signal_all(&self, signal: i32) {
        match self {
            Self::Cgroup { dir, .. } => signal_cgroup(dir, signal),
            Self::Walk => walk(signal, |tree| tree.descendants(std::process::id())),
        }
    }

    /// Removes the directory of all groups when none is left.
    pub fn remove_if_empty(&self) {
        if let Self::Cgroup { dir, .. } = self {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Waits until no user process is left. Without control groups it cannot be waited for.
    pub async fn empty(&self) {
        match self {
            Self::Cgroup { dir, .. } => {
                let _ = wait_for(dir, "populated 0").await;
            }
            Self::Walk => std::future::pending().await,
        }
    }
}

impl Group {
    /// An open `cgroup.procs`, through which a child joins.
    ///
    /// # Errors
    /// The group is gone.
    pub fn entrance(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Walk => Ok(None),
            Self::Cgroup(dir) => {
                let file = OpenOptions::new()
                    .write(true)
                    .open(dir.join("cgroup.procs"))?;
                Ok(Some(file.into()))
            }
        }
    }

    /// Sends `signal` to every process of the group. `leader` has not been reaped yet, or nothing is left to walk from.
    pub fn signal(&self, leader: Option<Pid>, signal: i32) {
        match (self, leader) {
            (Self::Cgroup(dir), _) => signal_cgroup(dir, signal),
            (Self::Walk, Some(leader)) => {
                let leader = leader.as_raw_nonzero().get().unsigned_abs();
                walk(signal, |tree| tree.family(leader));
            }
            (Self::Walk, None) => {}
        }
    }

    /// Kills what is left and removes the control group.
    pub async fn remove(&self) {
        let Self::Cgroup(dir) = self else { return };
        if remove_tree(dir).is_ok() {
            return;
        }
        signal_cgroup(dir, SIGKILL);
        let _ = wait_for(dir, "populated 0").await;
        let _ = remove_tree(dir);
    }

    /// Removes the control group when nothing is left in it.
    pub fn remove_if_empty(&self) {
        if let Self::Cgroup(dir) = self {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Processes in a guest may make control groups below theirs, to any depth that the kernel allows.
fn remove_tree(dir: &Path) -> io::Result<()> {
    for child in subdirectories(dir) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path()).collect()
}

fn signal_cgroup(dir: &Path, signal: i32) {
    if signal == SIGKILL && fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for child in subdirectories(dir) {
        signal_cgroup(&child, signal);
    }
    let members = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse::<i32>().ok()) {
        // 0 stands for a process of another pid namespace, and would mean our own group.
        if pid > 0 {
            let _ = kill(pid, signal);
        }
    }
}

/// Waits until `cgroup.events` has the line `wanted`; the kernel notifies its readers of changes.
async fn wait_for(dir: &Path, wanted: &str) -> io::Result<()> {
    let events = File::open(dir.join("cgroup.events"))?;
    let events = poll::watch(events, Interest::PRIORITY)?;
    let waiting = async {
        loop {
            let mut text = [0; 256];
            let length = rustix::io::pread(events.get_ref(), &mut text, 0)?;
            let text = String::from_utf8_lossy(&text[..length]);
            if text.lines().any(|line| line == wanted) {
                return Ok(());
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    };
    let late = || Err(io::ErrorKind::TimedOut.into());
    tokio::time::timeout(SETTLE, waiting)
        .await
        .unwrap_or_else(|_| late())
}

/// One look at all processes: pid, parent, session.
struct Tree(Vec<(u32, u32, u32)>);

impl Tree {
    fn read() -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Self(
            pids.filter_map(|pid: u32| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                // The name in parentheses may contain anything, a closing one too.
                let (_, rest) = stat.rsplit_once(')')?;
                let mut fields = rest.split_ascii_whitespace();
                let state = fields.next()?;
                let parent = fields.next()?.parse().ok()?;
                let session = fields.nth(1)?.parse().ok()?;
                (state != "Z").then_some((pid, parent, session))
            })
            .collect(),
        )
    }

    fn grow(&self, mut found: BTreeSet<u32>) -> BTreeSet<u32> {
        loop {
            let before = found.len();
            for (pid, parent, _) in &self.0 {
                if found.contains(parent) {
                    found.insert(*pid);
                }
            }
            if found.len() == before {
                return found;
            }
        }
    }

    fn descendants(&self, of: u32) -> BTreeSet<u32> {
        let mut found = self.grow(BTreeSet::from([of]));
        found.remove(&of);
        found
    }

    /// The leader, its descendants, its session and their descendants.
    fn family(&self, leader: u32) -> BTreeSet<u32> {
        let session = self.0.iter().filter(|(_, _, session)| *session == leader);
        let mut found: BTreeSet<u32> = session.map(|(pid, _, _)| *pid).collect();
        found.insert(leader);
        self.grow(found)
    }
}

/// Sends `signal` to all that `choose` finds; a SIGKILL until it finds nothing new.
fn walk(signal: i32, choose: impl Fn(&Tree) -> BTreeSet<u32>) {
    let mut done = BTreeSet::new();
    for _ in 0..ROUNDS {
        let mut found = choose(&Tree::read());
        found.retain(|pid| !done.contains(pid));
        if found.is_empty() {
            return;
        }
        for pid in &found {
            if let Ok(pid) = i32::try_from(*pid) {
                let _ = kill(pid, signal);
            }
        }
        if signal != SIGKILL {
            return;
        }
        done.append(&mut found);
    }
}
