//! What a server is told at start: a tree of plain structs, and [`load`], which fills it from `default.toml`, a file,
//! the environment and flags, and remembers where each value came from. Read once, at start.
//!
//! The environment comes in as pairs; nothing here looks at the process's own.

mod environment;
mod layers;
mod table;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use hutch_engine::EngineConfig;
use serde::{Deserialize, Serialize};

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
    /// A kernel package to use instead of the distribution's newest.
    pub kernel: Option<PathBuf>,
    /// The API.
    #[serde(default)]
    pub api: Api,
    /// Runtimes.
    pub runtime: Runtime,
    /// Limits.
    pub limits: Limits,
    /// `hutch` itself, which has the hidden subcommands that the engine starts. Not configurable.
    #[serde(skip)]
    pub launcher: PathBuf,
}

/// The API.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Api {
    /// A key with every right, beside those in the store.
    pub token: Option<Secret>,
}

/// Runtimes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// The runtime when a request names none.
    pub default: Option<String>,
    /// `kvm` or `tcg`.
    pub acceleration: Option<String>,
    /// Whether emulated machines may be made.
    pub allow_emulation: bool,
    /// Path of a program, by runtime.
    #[serde(default)]
    pub programs: BTreeMap<String, PathBuf>,
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
    /// Console output kept per machine.
    pub console_kib: u64,
    /// From power-on to the agent's first answer.
    pub boot_timeout_ms: u64,
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
            runtime: self.runtime.default.clone(),
            runtime_programs: self.runtime.programs.clone(),
            acceleration: self.runtime.acceleration.clone(),
            allow_emulation: self.runtime.allow_emulation,
            max_machines: self.limits.machines,
            memory_overcommit: self.limits.memory_overcommit,
            memory_floor_mib: self.limits.memory_floor_mib,
            disk_reserve_mib: self.limits.disk_reserve_mib,
            image_max_bytes: self.limits.image_max_gib << 30,
            console_bytes: self.limits.console_kib << 10,
            boot_timeout_ms: self.limits.boot_timeout_ms,
        }
    }

    /// The unix socket of the API.
    pub fn socket(&self) -> PathBuf {
        self.data_dir.join("hutch.sock")
    }
}

#[cfg(test)]
mod tests;
