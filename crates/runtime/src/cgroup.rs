//! The cgroups of machines: in each hierarchy of the host that is of use one group per machine, `hutch/LABEL`, with its
//! VMM and not the shim. Which limits there are and how both versions call them, who made a group, and what may be left
//! of it. Why a VMM ended is decided elsewhere.
//!
//! Groups stand below the root of a hierarchy and not below the server's own: a machine outlives its server, and the
//! next one, wherever it runs, must find its group. A host without usable cgroups (a container, a server that is not
//! root) runs machines without limits.

mod mounts;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Access;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::{MachineSpec, RuntimeConfig};
use mounts::{Mount, Version};

/// Holds the groups of all machines of all servers of a host. Never removed.
const PARENT: &str = "hutch";
/// How often, and how long apart, one that is being emptied is tried again.
const TRIES: u32 = 200;
const AGAIN: Duration = Duration::from_millis(10);
/// The period in which a share of the CPUs is counted, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// What a machine's VMM may use, and the name of its group. In `run/launch.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limits {
    /// The machine's label.
    pub(crate) name: String,
    /// The guest's memory and what the VMM needs beside it, in bytes.
    pub(crate) memory_bytes: u64,
    /// The most threads and processes.
    pub(crate) tasks: u32,
    /// The share of busy CPUs: 100 is that of any other process group.
    pub(crate) cpu_weight: u32,
    /// The most CPU time, in percent of one CPU.
    pub(crate) cpu_percent: Option<u32>,
}

impl Limits {
    /// For a machine whose VMM needs `overhead_mib` beside the guest's memory and `tasks` beside a thread per CPU.
    pub(crate) fn new(
        spec: &MachineSpec,
        config: &RuntimeConfig,
        overhead_mib: u32,
        tasks: u32,
    ) -> Self {
        let mib = u64::from(spec.memory_mib) + u64::from(overhead_mib);
        Self {
            name: spec.label.clone(),
            memory_bytes: mib << 20,
            tasks: tasks.saturating_add(spec.vcpu),
            cpu_weight: spec.vcpu.saturating_mul(100),
            cpu_percent: config
                .cpu_percent
                .map(|each| each.saturating_mul(spec.vcpu)),
        }
    }
}

/// The group of a machine that runs: in `run/shim.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Placed {
    /// The name of the group.
    pub(crate) name: String,
    /// What could not be done, in words; a machine runs all the same.
    pub(crate) flaws: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Controller {
    Memory,
    Cpu,
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }

    /// The files that hold these limits (cgroup-v2.rst, cgroup-v1/ in the kernel's documentation).
    fn settings(self, version: Version, limits: &Limits) -> Vec<(&'static str, String)> {
        let memory = limits.memory_bytes.to_string();
        let quota = limits
            .cpu_percent
            .map(|percent| (u64::from(percent) * PERIOD_US / 100).max(1_000));
        // A weight of 100 and 1024 shares are the same.
        let shares = (u64::from(limits.cpu_weight) * 1024 / 100).clamp(2, 262_144);
        let weight = limits.cpu_weight.clamp(1, 10_000).to_string();
        match (self, version) {
            (Self::Memory, Version::V2) => {
                vec![("memory.max", memory), ("memory.oom.group", "1".to_owned())]
            }
            (Self::Memory, Version::V1) => vec![("memory.limit_in_bytes", memory)],
            (Self::Pids, _) => vec![("pids.max", limits.tasks.to_string())],
            (Self::Cpu, Version::V2) => std::iter::once(("cpu.weight", weight))
                .chain(quota.map(|quota| ("cpu.max", format!("{quota} {PERIOD_US}"))))
                .collect(),
            (Self::Cpu, Version::V1) => std::iter::once(("cpu.shares", shares.to_string()))
                .chain(quota.map(|_| ("cpu.cfs_period_us", PERIOD_US.to_string())))
                .chain(quota.map(|quota| ("cpu.cfs_quota_us", quota.to_string())))
                .collect(),
        }
    }
}

/// A hierarchy that groups are made in.
#[derive(Debug, Clone)]
struct Hierarchy {
    mount: Mount,
    /// Those of ours that it has. The one of version 2 is of use without any: what is in a group ends as one.
    controllers: Vec<Controller>,
}

impl Hierarchy {
    /// Those of use to us: for root only.
    fn all() -> Vec<Self> {
        if !rustix::process::geteuid().is_root() {
            return Vec::new();
        }
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        choose(&mounts::parse(&text), usable_v2)
    }

    fn group(&self, name: &str) -> PathBuf {
        self.mount.point.join(PARENT).join(name)
    }

    /// Makes the directory that holds all machines, and hands the controllers down to it and through it.
    fn make_parent(&self) -> io::Result<()> {
        let parent = self.mount.point.join(PARENT);
        make_dir(&parent)?;
        if self.mount.version == Version::V2 {
            for controller in &self.controllers {
                let enable = format!("+{}", controller.name());
                for dir in [&self.mount.point, &parent] {
                    // What does not come of it is seen when the limit is set.
                    let _ = fs::write(dir.join("cgroup.subtree_control"), &enable);
                }
            }
        }
        Ok(())
    }
}

/// Which mounts to use, and for what. `usable_v2` says which controllers one of version 2 can hand down.
fn choose(mounts: &[Mount], usable_v2: impl Fn(&Path) -> Vec<String>) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    let mut mounts: Vec<&Mount> = mounts.iter().filter(|mount| mount.writable).collect();
    // The same hierarchy may be mounted again, say for a container: the shortest path is the host's own.
    mounts.sort_by_key(|mount| {
        let v1 = mount.version == Version::V1;
        (v1, !mount.whole, mount.point.as_os_str().len())
    });
    for mount in mounts {
        let v2 = mount.version == Version::V2;
        if v2 && found.iter().any(|one| one.mount.version == Version::V2) {
            continue;
        }
        let has = if v2 {
            usable_v2(&mount.point)
        } else {
            mount.controllers.clone()
        };
        let taken = |one: &Controller| found.iter().any(|other| other.controllers.contains(one));
        let controllers: Vec<_> = Controller::ALL
            .into_iter()
            .filter(|one| has.iter().any(|name| name == one.name()) && !taken(one))
            .collect();
        if v2 || !controllers.is_empty() {
            found.push(Hierarchy {
                mount: mount.clone(),
                controllers,
            });
        }
    }
    found
}

/// The controllers that groups below `root` can have. One that is not the host's own root and has processes in it
/// hands nothing further down than it does already.
fn usable_v2(root: &Path) -> Vec<String> {
    let words = |name: &str| -> Vec<String> {
        let text = fs::read_to_string(root.join(name)).unwrap_or_default();
        text.split_ascii_whitespace().map(str::to_owned).collect()
    };
    let is_host_root = !root.join("cgroup.type").exists();
    if is_host_root || words("cgroup.procs").is_empty() {
        words("cgroup.controllers")
    } else {
        words("cgroup.subtree_control")
    }
}

/// What a host can limit machines by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Support {
    /// What is limited: of `memory`, `cpu` and `pids`.
    pub limited: Vec<&'static str>,
    /// What is not.
    pub unlimited: Vec<&'static str>,
    /// Why not.
    pub reason: Option<String>,
}

/// Looks at what machines can be limited by here. Changes nothing.
pub fn support() -> Support {
    let root = rustix::process::geteuid().is_root();
    let mut all = Hierarchy::all();
    all.retain(|one| rustix::fs::access(&one.mount.point, Access::WRITE_OK).is_ok());
    let (limited, unlimited): (Vec<_>, Vec<_>) = Controller::ALL
        .into_iter()
        .partition(|one| all.iter().any(|other| other.controllers.contains(one)));
    let reason = match (root, all.is_empty()) {
        (false, _) => Some("the server is not root"),
        (_, true) => Some("no cgroup hierarchy can be written to"),
        _ if !unlimited.is_empty() => Some("the host's cgroups do not have them"),
        _ => None,
    };
    Support {
        limited: limited.into_iter().map(Controller::name).collect(),
        unlimited: unlimited.into_iter().map(Controller::name).collect(),
        reason: reason.map(str::to_owned),
    }
}

/// The groups that are here of machines of the server with this tag: their labels.
pub fn labels(tag: &str) -> BTreeSet<String> {
    let mut labels = BTreeSet::new();
    for hierarchy in Hierarchy::all() {
        let entries = fs::read_dir(hierarchy.mount.point.join(PARENT));
        for entry in entries.into_iter().flatten().flatten() {
            if let Ok(name) = entry.file_name().into_string()
                && slot(&name, tag).is_some()
            {
                labels.insert(name);
            }
        }
    }
    labels
}

/// The slot that a label of this tag's is of.
pub fn slot(label: &str, tag: &str) -> Option<u16> {
    let number = label.strip_prefix('h')?.strip_prefix(tag)?;
    let number = number.strip_prefix('-')?;
    let slot: u16 = number.parse().ok()?;
    (slot.to_string() == number).then_some(slot)
}

/// Removes a machine's group where nothing is in it. One that is not there is removed.
///
/// # Errors
/// Something is in it, or the operating system refuses.
pub fn remove(label: &str) -> io::Result<()> {
    each(label, remove_empty)
}

/// Ends all that is in a machine's group, and removes it. One that is not there is removed. Blocks for a moment.
///
/// # Errors
/// What is in it does not end, or the operating system refuses.
pub fn destroy(label: &str) -> io::Result<()> {
    each(label, destroy_dir)
}

fn each(label: &str, act: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    if !is_name(label) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // To the last one, whatever becomes of the first.
    let all = Hierarchy::all();
    let done: Vec<_> = all.iter().map(|one| act(&one.group(label))).collect();
    done.into_iter().collect()
}

/// Whether a process is in the group of that name.
pub(crate) fn holds(name: &str, pid: i32) -> bool {
    is_name(name)
        && Hierarchy::all()
            .iter()
            .any(|one| pids(&one.group(name)).contains(&pid))
}

/// A name that leads nowhere else.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !name.is_empty() && name.bytes().all(fits)
}

fn make_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn remove_empty(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A container's root may not even look.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !dir.exists() => Ok(()),
        other => other,
    }
}

fn destroy_dir(dir: &Path) -> io::Result<()> {
    let mut tries = TRIES;
    loop {
        match remove_empty(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries > 0 => {
                tries -= 1;
                kill_all(dir);
                std::thread::sleep(AGAIN);
            }
            other => return other,
        }
    }
}

/// All at once where the kernel can (Linux 5.14, version 2), one after the other elsewhere.
fn kill_all(dir: &Path) {
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for pid in pids(dir) {
        let Some(raw) = Pid::from_raw(pid) else {
            continue;
        };
        // Only one that is still in it once its number cannot be given out again.
        if let Ok(process) = rustix::process::pidfd_open(raw, PidfdFlags::empty())
            && pids(dir).contains(&pid)
        {
            let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        }
    }
}

fn pids(dir: &Path) -> Vec<i32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The group of a machine, in the hands of its shim: what is in it ends with this value, and so does the group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    name: String,
    memory_bytes: u64,
    groups: Vec<PathBuf>,
    flaws: Vec<String>,
}

impl Cgroup {
    /// Makes it in each hierarchy. What an earlier run left in one of this name is ended: the caller has the machine's
    /// lock. What cannot be done is noted.
    pub(crate) fn make(limits: &Limits) -> Self {
        let mut made = Self {
            name: limits.name.clone(),
            memory_bytes: limits.memory_bytes,
            groups: Vec::new(),
            flaws: Vec::new(),
        };
        if !is_name(&limits.name) {
            made.flaws.push("a label that is no name".to_owned());
            return made;
        }
        let all = Hierarchy::all();
        if all.is_empty() {
            made.flaws.push("no hierarchy can be written to".to_owned());
        }
        for hierarchy in all {
            let dir = hierarchy.group(&limits.name);
            match made.make_group(&hierarchy, limits, &dir) {
                Ok(()) => made.groups.push(dir),
                Err(error) => made.flaws.push(format!("{}: {error}", dir.display())),
            }
        }
        made
    }

    fn make_group(&mut self, hierarchy: &Hierarchy, limits: &Limits, dir: &Path) -> io::Result<()> {
        hierarchy.make_parent()?;
        // A new one counts from zero.
        destroy_dir(dir)?;
        make_dir(dir)?;
        for controller in &hierarchy.controllers {
            for (file, value) in controller.settings(hierarchy.mount.version, limits) {
                // Not created: a file that is missing is a limit that is not there.
                let file = dir.join(file);
                let mut options = File::options();
                let written = options
                    .write(true)
                    .open(&file)
                    .and_then(|mut open| io::Write::write_all(&mut open, value.as_bytes()));
                if let Err(error) = written {
                    self.flaws.push(format!("{}: {error}", file.display()));
                }
            }
        }
        Ok(())
    }

    /// What a child writes `0` to, to join.
    pub(crate) fn joints(&self) -> Vec<File> {
        let open = |dir: &PathBuf| File::options().write(true).open(dir.join("cgroup.procs"));
        self.groups
            .iter()
            .filter_map(|dir| open(dir).ok())
            .collect()
    }

    /// What became of it, with a look at whether the VMM has joined.
    pub(crate) fn placed(&self, vmm: Pid) -> Placed {
        let vmm = vmm.as_raw_nonzero().get();
        let outside = self.groups.iter().filter(|dir| !pids(dir).contains(&vmm));
        let outside = outside.map(|dir| format!("{}: not joined", dir.display()));
        Placed {
            name: self.name.clone(),
            flaws: self.flaws.iter().cloned().chain(outside).collect(),
        }
    }

    /// The limit, where the kernel has killed something in the group for it.
    pub(crate) fn out_of_memory(&self) -> Option<u64> {
        let killed = |dir: &PathBuf| {
            ["memory.events", "memory.oom_control"].iter().any(|file| {
                fs::read_to_string(dir.join(file)).is_ok_and(|text| oom_kills(&text) > 0)
            })
        };
        let any = self.groups.iter().any(killed);
        any.then_some(self.memory_bytes)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for dir in &self.groups {
            // What stays is removed by the next start, or by the server.
            let _ = destroy_dir(dir);
        }
    }
}

/// How often the kernel has killed in a group for its limit; both versions count under the same word.
fn oom_kills(text: &str) -> u64 {
    let mut lines = text.lines();
    let count = lines.find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
