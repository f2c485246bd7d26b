//! What a machine does without being asked.

use serde::{Deserialize, Serialize};

/// When a machine rests or ends by itself; with nothing in it, never. In a change, what is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Lifetime {
    /// Pause it when nobody has used it for so many seconds: no command whose output somebody follows, no file on its way,
    /// no connection to a port or a URL of it. The next use lets it go on. 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_pause_s: Option<u32>,
    /// Seconds from its creation, or from when this was set, after which `ttl_action` is done to it, used or not. What is
    /// started or goes on after that gets as many again. 0: without an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u32>,
    /// What happens when its time is over; `pause` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_action: Option<TtlAction>,
    /// Whether it is started again when it has ended without being told to; `never` when left out. One that ends soon after
    /// each start waits longer before the next; a start that fails is not tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
}

impl Lifetime {
    /// Whether it rests and ends only when it is told to.
    pub fn is_default(&self) -> bool {
        *self == Lifetime::default()
    }
}

/// What happens to a machine whose time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum TtlAction {
    /// It is paused; its next use lets it go on.
    #[default]
    Pause,
    /// It is stopped; its disk is kept.
    Stop,
    /// It is deleted, with its disk.
    Delete,
}

/// Which ends of a machine, not wanted by anybody, are followed by a start. A guest's own reboot always is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// None: it stays stopped.
    #[default]
    Never,
    /// All but a power-off by the guest: a panic of its kernel, an end of its VMM, a reboot of the host.
    OnFailure,
    /// All.
    Always,
}
