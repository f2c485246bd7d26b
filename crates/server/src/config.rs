//! What a server is told at start: a tree of plain structs, and [`load`], which fills it from `default.toml`, a file,
//! the environment and flags, and remembers where each value came from. Read once, at start.
//!
//! The environment comes in as pairs; nothing here looks at the process's own.

mod environment;
mod gateway;
mod layers;
mod table;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use hutch_engine::{
    Cidr, EngineConfig, Kernels, Mode, NamedKernel, NetworkConfig, PoolMode, RuntimeOptions,
};
use serde::{Deserialize, Serialize};

pub use gateway::{CaddyMode, Domain, Gateway, HttpListen};
pub(crate) use gateway::{paths, provider};
pub use layers::{Entry, Loaded, load};

/// The defaults, with comments: also the documentation of the configuration file.
pub const DEFAULT_TOML: &str = include_str!("default.toml");

/// The configuration of a server. Each field is described in `default.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the API listens by TCP.
    pub listen: SocketAddr,
    /// What must survive.
    pub data_dir: PathBuf,
    /// What can be made again.
    pub cache_dir: PathBuf,
    /// The program that runs in guests.
    pub agent: PathBuf,
    /// A kernel package or a kernel to use instead of the distribution's newest.
    pub kernel: Option<PathBuf>,
    /// The modules of a kernel alone.
    pub kernel_modules: Option<PathBuf>,
    /// Words for the command line of every guest's kernel.
    pub kernel_args: Option<String>,
    /// Kernels that machines may ask for by name.
    #[serde(default)]
    pub kernels: BTreeMap<String, Kernel>,
    /// The API.
    #[serde(default)]
    pub api: Api,
    /// How machines are reached from outside.
    pub gateway: Gateway,
    /// Runtimes.
    pub runtime: Runtime,
    /// The network of machines.
    pub network: Network,
    /// Disks.
    pub disk: Disk,
    /// Limits.
    pub limits: Limits,
    /// `hutch` itself, which has the hidden subcommands that the engine starts. Not configurable.
    #[serde(skip)]
    pub launcher: PathBuf,
    /// What the environment says about the account that the server runs as. Not configurable.
    #[serde(skip)]
    pub account: BTreeMap<String, String>,
}

/// The API.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Api {
    /// A key with every right, beside those in the store.
    pub token: Option<Secret>,
}

/// A kernel that machines may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// A kernel package, or a kernel.
    pub path: PathBuf,
    /// The modules of a kernel alone.
    pub modules: Option<PathBuf>,
    /// Words for its command line.
    pub args: Option<String>,
}

/// Runtimes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// The runtime when a request names none.
    pub default: Option<String>,
    /// `kvm` or `tcg`.
    pub acceleration: Option<String>,
    /// Where Docker listens.
    pub docker_socket: Option<PathBuf>,
    /// The network of containers.
    pub docker_network: Option<String>,
    /// Whether emulated machines may be made.
    pub allow_emulation: bool,
    /// The processor that guests see.
    pub cpu_template: Option<String>,
    /// Whether the memory of guests is in huge pages.
    pub huge_pages: bool,
    /// The host's CPUs that VMMs may run on.
    pub affinity: Option<Cpus>,
    /// The most CPU time for each virtual CPU, in percent.
    pub cpu_percent: Option<u32>,
    /// Firecracker's jailer.
    pub jailer: Option<PathBuf>,
    /// Whether memory that guests free goes back to the host.
    pub balloon: bool,
    /// The most bytes in a second on each disk.
    pub disk_bytes_per_s: Option<u64>,
    /// The same in operations.
    pub disk_ops_per_s: Option<u64>,
    /// The base VM and snapshot of VirtualBox' machines.
    pub virtualbox_base: Option<String>,
    /// VirtualBox' own directory of settings.
    pub virtualbox_home: Option<PathBuf>,
    /// Path of a program, by runtime.
    #[serde(default)]
    pub programs: BTreeMap<String, PathBuf>,
}

/// The network of machines.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// `auto`, `routed`, `user` or `none`.
    pub mode: String,
    /// Where machines' addresses come from.
    pub subnet: Option<String>,
    /// The bridge that machines are on.
    pub bridge: Option<String>,
    /// Ranges that `public` machines do not reach, with commas between.
    pub private: Option<String>,
    /// Name servers, with commas between.
    pub dns: Option<String>,
    /// Connections of a machine to others at one time.
    pub connections: Option<u32>,
    /// The most bytes in a second from a machine.
    pub out_bytes_per_s: Option<u64>,
    /// The most bytes in a second to a machine.
    pub in_bytes_per_s: Option<u64>,
}

/// Whether a network interface can have this name (`IFNAMSIZ` in `linux/if.h`, without its NUL).
fn is_interface(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=15).contains(&name.len()) && name.chars().all(good) && !name.starts_with(['.', '-'])
}

/// Reads ranges with commas between.
fn ranges(text: &str) -> Option<Vec<Cidr>> {
    let texts = text.split(',').map(str::trim);
    texts.map(|text| text.parse().ok()).collect()
}

/// Reads addresses of name servers with commas between, with their ports where these are not 53.
fn servers(text: &str) -> Option<Vec<SocketAddr>> {
    let server = |text: &str| {
        let alone = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        alone.or_else(|_| text.parse()).ok()
    };
    text.split(',').map(|text| server(text.trim())).collect()
}

/// Disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// `auto`, `off` or `require`.
    pub pool: String,
}

/// Limits.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Machines on this host.
    pub machines: u32,
    /// Memory may be promised so many times over.
    pub memory_overcommit: u32,
    /// Memory of the host that stays free.
    pub memory_floor_mib: u64,
    /// Disk of the data directory that stays free.
    pub disk_reserve_mib: u64,
    /// The largest image.
    pub image_max_gib: u64,
    /// The most that is kept for warm starts.
    pub templates_mib: u64,
    /// Console output kept per machine.
    pub console_kib: u64,
    /// From power-on to the agent's first answer.
    pub boot_timeout_ms: u64,
}

/// Numbers of CPUs, written as `0-3,8`, as taskset(1) and cpuset(7) take them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cpus(Vec<u32>);

impl Cpus {
    /// The highest number that there can be on Linux (`NR_CPUS`).
    const HIGHEST: u32 = 8191;
}

impl std::str::FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Cpus, String> {
        let number = |text: &str| {
            let number = text.trim().parse::<u32>().ok();
            number.filter(|number| *number <= Cpus::HIGHEST)
        };
        let mut all = std::collections::BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => all.extend(first..=last),
                _ => return Err(format!("`{part}` names no CPUs")),
            }
        }
        Ok(Cpus(all.into_iter().collect()))
    }
}

impl TryFrom<String> for Cpus {
    type Error = String;

    fn try_from(text: String) -> Result<Cpus, String> {
        text.parse()
    }
}

impl From<Cpus> for String {
    fn from(cpus: Cpus) -> String {
        let numbers = cpus.0.iter().map(u32::to_string);
        numbers.collect::<Vec<_>>().join(",")
    }
}

/// A text that is shown to nobody: neither by `Debug` nor when the configuration is printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(set)")
    }
}

/// The flags of `hutch serve`, as they were typed.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config FILE`.
    pub config: Option<PathBuf>,
    /// `--listen ADDR`.
    pub listen: Option<String>,
    /// `--http-listen ADDR`.
    pub http_listen: Option<String>,
    /// `--data-dir DIR`.
    pub data_dir: Option<PathBuf>,
}

/// What defaults depend on.
#[derive(Debug, Clone)]
pub struct Host {
    /// Whether the server runs as root.
    pub root: bool,
    /// The `hutch` executable.
    pub executable: PathBuf,
    /// The process's environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl Config {
    /// What the engine is told.
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            data_dir: self.data_dir.clone(),
            cache_dir: self.cache_dir.clone(),
            launcher: self.launcher.clone(),
            agent: self.agent.clone(),
            kernel: self.kernel.clone(),
            kernels: self.kernels(),
            runtime: self.runtime.default.clone(),
            runtime_programs: self.runtime.programs.clone(),
            acceleration: self.runtime.acceleration.clone(),
            runtime_options: RuntimeOptions {
                docker_socket: self.runtime.docker_socket.clone(),
                docker_network: self.runtime.docker_network.clone(),
                cpu_template: self.runtime.cpu_template.clone(),
                huge_pages: self.runtime.huge_pages,
                affinity: self
                    .runtime
                    .affinity
                    .clone()
                    .map_or(Vec::new(), |cpus| cpus.0),
                cpu_percent: self.runtime.cpu_percent,
                jailer: self.runtime.jailer.clone(),
                balloon: self.runtime.balloon,
                disk_bytes_per_s: self.runtime.disk_bytes_per_s,
                disk_ops_per_s: self.runtime.disk_ops_per_s,
                virtualbox_base: self.runtime.virtualbox_base.clone(),
                virtualbox_environment: self.virtualbox_environment(),
            },
            allow_emulation: self.runtime.allow_emulation,
            network: self.network(),
            max_machines: self.limits.machines,
            memory_overcommit: self.limits.memory_overcommit,
            memory_floor_mib: self.limits.memory_floor_mib,
            pool: match self.disk.pool.as_str() {
                "off" => PoolMode::Off,
                "require" => PoolMode::Require,
                _ => PoolMode::Auto,
            },
            disk_reserve_mib: self.limits.disk_reserve_mib,
            image_max_bytes: self.limits.image_max_gib << 30,
            templates_max_mib: self.limits.templates_mib,
            console_bytes: self.limits.console_kib << 10,
            boot_timeout_ms: self.limits.boot_timeout_ms,
            reach: self.gateway.reach(None),
        }
    }

    fn network(&self) -> NetworkConfig {
        let network = &self.network;
        NetworkConfig {
            mode: match network.mode.as_str() {
                "routed" => Mode::Routed,
                "user" => Mode::User,
                "none" => Mode::None,
                _ => Mode::Auto,
            },
            subnet: network.subnet.as_deref().and_then(|text| text.parse().ok()),
            bridge: network.bridge.clone(),
            private: network
                .private
                .as_deref()
                .and_then(ranges)
                .unwrap_or_default(),
            dns: network.dns.as_deref().and_then(servers).unwrap_or_default(),
            connections: network.connections,
            out_bytes_per_s: network.out_bytes_per_s,
            in_bytes_per_s: network.in_bytes_per_s,
        }
    }

    fn kernels(&self) -> Kernels {
        let words = |text: &Option<String>| {
            let words = text.as_deref().unwrap_or_default().split_ascii_whitespace();
            words.map(str::to_owned).collect::<Vec<_>>()
        };
        let named = self.kernels.iter().map(|(name, kernel)| {
            let named = NamedKernel {
                path: kernel.path.clone(),
                modules: kernel.modules.clone(),
                args: words(&kernel.args),
            };
            (name.clone(), named)
        });
        Kernels {
            modules: self.kernel_modules.clone(),
            args: words(&self.kernel_args),
            named: named.collect(),
        }
    }

    /// Where `hutch runtime install` puts programs, and the runtimes look first.
    pub fn programs_dir(&self) -> PathBuf {
        self.data_dir.join("programs")
    }

    /// The account's, with the registry that is configured.
    fn virtualbox_environment(&self) -> BTreeMap<String, String> {
        let mut all = self.account.clone();
        if let Some(home) = &self.runtime.virtualbox_home {
            all.insert("VBOX_USER_HOME".to_owned(), home.display().to_string());
        }
        all
    }

    /// The unix socket of the API.
    pub fn socket(&self) -> PathBuf {
        self.data_dir.join("hutch.sock")
    }

    /// The unix socket of the gateway, for a proxy of this host.
    pub fn gateway_socket(&self) -> PathBuf {
        self.data_dir.join("gateway.sock")
    }

    /// The home of a Caddy of ours.
    pub fn caddy_dir(&self) -> PathBuf {
        self.data_dir.join("caddy")
    }

    /// The root certificate that clients must trust, where certificates are of an authority of our own.
    pub fn caddy_root(&self) -> PathBuf {
        self.data_dir.join("caddy-root.crt")
    }

    /// How it stands with Caddy, as long as the server runs.
    pub(crate) fn caddy_note(&self) -> PathBuf {
        self.data_dir.join("caddy.json")
    }
}

#[cfg(test)]
mod tests;
