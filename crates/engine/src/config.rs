//! What an engine is told at start: plain data, resolved by the server.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use hutch_disk::pool::Mode as PoolMode;
use hutch_net::cidr::Cidr;

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
    /// A kernel package (`.deb`) or a kernel to use instead of the distribution's newest.
    pub kernel: Option<PathBuf>,
    /// What goes with it, and the kernels that machines may ask for by name.
    pub kernels: Kernels,
    /// The runtime when a request names none; the best usable one when absent.
    pub runtime: Option<String>,
    /// Path of a runtime's program, by runtime, where it is not found by itself.
    pub runtime_programs: BTreeMap<String, PathBuf>,
    /// `kvm` or `tcg` for qemu, when it is not to be found out.
    pub acceleration: Option<String>,
    /// What only some runtimes have.
    pub runtime_options: RuntimeOptions,
    /// Whether emulated machines, which are no security boundary, may be made.
    pub allow_emulation: bool,
    /// The network of machines.
    pub network: NetworkConfig,
    /// The most machines on this host.
    pub max_machines: u32,
    /// Memory promised to machines may be so many times the host's.
    pub memory_overcommit: u32,
    /// Free memory of the host that no new machine may touch, in MiB.
    pub memory_floor_mib: u64,
    /// Whether disks lie in a pool of ours where the data directory has no reflinks.
    pub pool: PoolMode,
    /// Free disk of the data directory that no new machine or image may touch, in MiB; a pool does not grow into it.
    pub disk_reserve_mib: u64,
    /// The most that templates for warm starts hold, in MiB; 0: machines boot.
    pub templates_max_mib: u64,
    /// The largest image, unpacked, in bytes.
    pub image_max_bytes: u64,
    /// The most console output kept per machine, in bytes.
    pub console_bytes: u64,
    /// How long a guest may take from power-on to its agent's first answer, in milliseconds.
    pub boot_timeout_ms: u64,
    /// How machines are reached from outside.
    pub reach: Reach,
}

/// How machines are reached from outside.
#[derive(Debug, Clone)]
pub struct Reach {
    /// Ports of the host that are given out where a request names none.
    pub ports: RangeInclusive<u16>,
    /// The address of the host that they listen on where a request names none.
    pub ports_bind: IpAddr,
    /// How the URLs of machines are written; none: there is no HTTP gateway.
    pub urls: Option<Urls>,
}

/// How the URLs of machines are written.
#[derive(Debug, Clone)]
pub struct Urls {
    /// `http` or `https`.
    pub scheme: String,
    /// What machines are one label below of.
    pub domain: String,
    /// The port, where it is not the scheme's own.
    pub port: Option<u16>,
}

impl Urls {
    /// The URL of a port of the machine with this label; without a port that of the one behind the label.
    #[must_use]
    pub fn of(&self, label: &str, port: Option<u16>) -> String {
        let Urls { scheme, domain, .. } = self;
        let before = port.map_or(String::new(), |port| format!("{port}-"));
        let after = self.port.map_or(String::new(), |port| format!(":{port}"));
        format!("{scheme}://{before}{label}.{domain}{after}")
    }
}

/// Where machines' network comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Routed where the host can, else by a program without privilege where that works, else none.
    #[default]
    Auto,
    /// Routed, or the server does not start.
    Routed,
    /// By a program without privilege, or the server does not start.
    User,
    /// None: machines reach nothing, and are reached through their agents.
    None,
}

/// The network of machines.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// Where it comes from.
    pub mode: Mode,
    /// Where machines' addresses come from; an unused private network when absent.
    pub subnet: Option<Cidr>,
    /// The bridge that machines are on, made when it is not there; without one, each has a link of its own.
    pub bridge: Option<String>,
    /// Ranges that count as private beside those that the standards name: `public` machines do not reach them.
    pub private: Vec<Cidr>,
    /// Whom the resolver of machines asks; those of the host when empty.
    pub dns: Vec<SocketAddr>,
    /// The most connections of a machine to others at one time.
    pub connections: Option<u32>,
    /// The most that a machine sends to others in a second, in bytes.
    pub out_bytes_per_s: Option<u64>,
    /// The most that it gets from others.
    pub in_bytes_per_s: Option<u64>,
}

/// What goes with the server's kernel, and further kernels.
#[derive(Debug, Clone, Default)]
pub struct Kernels {
    /// The modules of [`EngineConfig::kernel`] where that is a kernel alone: its directory `lib/modules/RELEASE`.
    pub modules: Option<PathBuf>,
    /// Added to the command line of every kernel.
    pub args: Vec<String>,
    /// Those that machines may ask for.
    pub named: BTreeMap<String, NamedKernel>,
}

/// A kernel that machines may ask for.
#[derive(Debug, Clone)]
pub struct NamedKernel {
    /// A kernel package (`.deb`), or a kernel.
    pub path: PathBuf,
    /// The modules of a kernel alone: its directory `lib/modules/RELEASE`.
    pub modules: Option<PathBuf>,
    /// Added to its command line.
    pub args: Vec<String>,
}

/// What only some runtimes have; the others pass over it.
#[derive(Debug, Clone, Default)]
pub struct RuntimeOptions {
    /// The processor that guests see, by Firecracker's name for it.
    pub cpu_template: Option<String>,
    /// Back the memory of guests with huge pages of the host.
    pub huge_pages: bool,
    /// The host's CPUs that VMMs may run on; empty: all.
    pub affinity: Vec<u32>,
    /// The most CPU time of the host for each virtual CPU, in percent of one CPU; none: as much as there is.
    pub cpu_percent: Option<u32>,
    /// Firecracker's jailer, when its machines are to run in it.
    pub jailer: Option<PathBuf>,
    /// Give memory that a guest frees back to the host.
    pub balloon: bool,
    /// The most that a guest may read and write on each disk in a second, in bytes.
    pub disk_bytes_per_s: Option<u64>,
    /// The same in operations.
    pub disk_ops_per_s: Option<u64>,
    /// Where a Docker-compatible engine listens, when it is not the usual place.
    pub docker_socket: Option<PathBuf>,
    /// The engine's network that its containers are in; none when absent.
    pub docker_network: Option<String>,
    /// What VirtualBox' machines are clones of: `VM@SNAPSHOT`.
    pub virtualbox_base: Option<String>,
    /// The environment of VirtualBox' programs: where the account's registry of VMs is.
    pub virtualbox_environment: BTreeMap<String, String>,
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
            kernels: Kernels::default(),
            runtime: None,
            runtime_programs: BTreeMap::new(),
            acceleration: None,
            runtime_options: RuntimeOptions::default(),
            allow_emulation: true,
            network: NetworkConfig {
                mode: Mode::None,
                ..NetworkConfig::default()
            },
            max_machines: 100,
            memory_overcommit: 4,
            memory_floor_mib: 256,
            pool: PoolMode::Off,
            disk_reserve_mib: 1024,
            image_max_bytes: 20 << 30,
            templates_max_mib: 0,
            console_bytes: 1 << 20,
            boot_timeout_ms: 60_000,
            reach: Reach {
                ports: 22_001..=32_000,
                ports_bind: [127, 0, 0, 1].into(),
                urls: Some(Urls {
                    scheme: "http".to_owned(),
                    domain: "vms.localhost".to_owned(),
                    port: Some(8081),
                }),
            },
        }
    }
}
