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
    /// Such as `kvm` or `tcg`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceleration: Option<String>,
    /// What it can do.
    pub capabilities: Capabilities,
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
}
