//! What an engine is told at start: plain data, resolved by the server.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// The configuration of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Everything that must survive: store, machines, images.
    pub data_dir: PathBuf,
    /// Everything that can be made again: kernels, boot sets.
    pub cache_dir: PathBuf,
    /// `hutch` itself: has the hidden subcommands `shim` and `build-disk`.
    pub launcher: PathBuf,
    /// The guest's agent.
    pub agent: PathBuf,
    /// A kernel package (`.deb`) to use instead of the distribution's newest.
    pub kernel: Option<PathBuf>,
    /// The runtime when a request names none; the best usable one when absent.
    pub runtime: Option<String>,
    /// Path of a runtime's program, by runtime, where it is not found by itself.
    pub runtime_programs: BTreeMap<String, PathBuf>,
    /// `kvm` or `tcg` for qemu, when it is not to be found out.
    pub acceleration: Option<String>,
    /// Whether emulated machines, which are no security boundary, may be made.
    pub allow_emulation: bool,
    /// The most machines on this host.
    pub max_machines: u32,
    /// Memory promised to machines may be so many times the host's.
    pub memory_overcommit: u32,
    /// Free memory of the host that no new machine may touch, in MiB.
    pub memory_floor_mib: u64,
    /// Free disk of the data directory that no new machine or image may touch, in MiB.
    pub disk_reserve_mib: u64,
    /// The largest image, unpacked, in bytes.
    pub image_max_bytes: u64,
    /// The most console output kept per machine, in bytes.
    pub console_bytes: u64,
    /// How long a guest may take from power-on to its agent's first answer, in milliseconds.
    pub boot_timeout_ms: u64,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::path::Path;

    /// A configuration for tests in `dir`.
    pub(crate) fn config(dir: &Path) -> EngineConfig {
        EngineConfig {
            data_dir: dir.join("data"),
            cache_dir: dir.join("cache"),
            launcher: "hutch".into(),
            agent: "hutch-agent".into(),
            kernel: None,
            runtime: None,
            runtime_programs: BTreeMap::new(),
            acceleration: None,
            allow_emulation: true,
            max_machines: 100,
            memory_overcommit: 4,
            memory_floor_mib: 256,
            disk_reserve_mib: 1024,
            image_max_bytes: 20 << 30,
            console_bytes: 1 << 20,
            boot_timeout_ms: 60_000,
        }
    }
}
