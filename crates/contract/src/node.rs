//! The host that a server runs on, as the API and `hutch doctor` show it.

use serde::{Deserialize, Serialize};

use crate::machine::Isolation;

/// Answer of `/health`: needs no key and tells nothing but this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the server.
    pub version: String,
}

/// A runtime on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct RuntimeInfo {
    /// Its name.
    pub name: String,
    /// Whether machines can be made with it here.
    pub usable: bool,
    /// Why not, or what it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How to get it, or to make it better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Version of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where the program is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Such as `kvm` or `tcg`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceleration: Option<String>,
    /// What it can do.
    pub capabilities: Capabilities,
}

impl RuntimeInfo {
    /// One of which nothing is known yet, so not usable.
    pub fn new(name: &str, capabilities: Capabilities) -> Self {
        Self {
            name: name.to_owned(),
            usable: false,
            reason: None,
            hint: None,
            version: None,
            path: None,
            acceleration: None,
            capabilities,
        }
    }
}

/// What a runtime can do here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Capabilities {
    /// How well machines are kept apart from the host.
    pub isolation: Isolation,
    /// Whether a machine can be paused in memory.
    pub pause: bool,
    /// Whether memory can be snapshotted.
    pub memory_snapshot: bool,
    /// Whether vCPUs or memory can change while it runs.
    pub live_resize: bool,
    /// Whether the runtime can give a machine a network card that its host routes for.
    #[serde(default)]
    pub network: bool,
}

/// What `hutch doctor` found out about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at: `acceleration`, `disk`, `network`, …
    pub area: String,
    /// How it is.
    pub level: Level,
    /// What was found, in a sentence.
    pub found: String,
    /// How to get more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As good as it gets.
    Good,
    /// Works, and could be better.
    Limited,
    /// Machines cannot be made without it.
    Missing,
}
