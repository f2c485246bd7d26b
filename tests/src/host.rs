//! The host that tests run on: what is there, and what runs below a directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal};

/// Whether we are root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where QEMU is, if it is.
pub fn qemu() -> Option<PathBuf> {
    program(&format!("qemu-system-{}", std::env::consts::ARCH))
}

/// Where a VMM is, if it is.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/local/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}

/// Whether the processor can run guests; a device `/dev/kvm` alone says nothing.
pub(crate) fn has_virtualization() -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| {
        line.split_whitespace()
            .any(|flag| matches!(flag, "vmx" | "svm"))
    })
}

/// The directory of `hutch` itself for what can be made again: kernels are downloaded once for all tests.
pub fn cache_dir() -> PathBuf {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || {
        variable("HOME")
            .expect("there is a home directory")
            .join(".cache")
    };
    variable("HUTCH_CACHE_DIR").unwrap_or_else(|| match is_root() {
        true => "/var/cache/hutch".into(),
        false => variable("XDG_CACHE_HOME")
            .unwrap_or_else(home)
            .join("hutch"),
    })
}

/// Processes that work in `dir` or below it. Those of other users are seen by root only.
pub fn processes_below(dir: &Path) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let below = pids.filter(|pid| {
        let works_in = fs::read_link(format!("/proc/{pid}/cwd"));
        *pid != rustix::process::getpid().as_raw_nonzero().get()
            && works_in.is_ok_and(|works_in| works_in.starts_with(dir))
    });
    below.collect()
}

/// Ends a process at once.
pub(crate) fn kill(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Ends everything below a directory and removes it.
pub(crate) fn clear(dir: &Path) {
    for _ in 0..100 {
        let left = processes_below(dir);
        if left.is_empty() {
            break;
        }
        left.into_iter().for_each(|pid| kill(pid, Signal::KILL));
        std::thread::sleep(Duration::from_millis(20));
    }
    let items = hutch_engine::inventory(&dir.join("data")).unwrap_or_default();
    for item in items.iter().filter(|item| item.kind == "cgroup") {
        drop(hutch_runtime::cgroup::destroy(&item.name));
    }
    drop(fs::remove_dir_all(dir));
}

/// Asks again and again until `ready` says so.
///
/// # Panics
/// After `limit`, which is generous: it is there to end a test that hangs.
pub async fn wait_until(what: &str, limit: Duration, mut ready: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !ready().await {
        assert!(start.elapsed() < limit, "waited {limit:?} for this: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Numbers that look random and can be had again (xorshift64*).
pub struct Random(u64);

impl Random {
    /// From `HUTCH_TEST_SEED`, else from the time; says which.
    pub fn new() -> Random {
        let given = std::env::var("HUTCH_TEST_SEED")
            .ok()
            .map(|seed| seed.parse().unwrap());
        let now = || {
            SystemTime::UNIX_EPOCH
                .elapsed()
                .unwrap_or_default()
                .subsec_nanos()
                .into()
        };
        let seed: u64 = given.unwrap_or_else(now);
        eprintln!("HUTCH_TEST_SEED={seed}");
        Random(seed | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory that a process has in use, in KiB.
pub fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
