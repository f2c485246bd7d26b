//! What machines may reach, and what they are reached by.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::name::Name;

/// The most ranges and domains in each list of a policy.
pub const MAX_RULES: usize = 256;
/// The most groups of one machine.
pub const MAX_GROUPS: usize = 16;

/// What a machine reaches where no list of its policy says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Everything but other machines, the host and the metadata services of clouds.
    Open,
    /// The public internet: no private addresses either.
    #[default]
    Public,
    /// Nothing.
    None,
}

impl Egress {
    /// All of them, from the widest.
    pub const ALL: [Egress; 3] = [Egress::Open, Egress::Public, Egress::None];

    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Egress::Open => "open",
            Egress::Public => "public",
            Egress::None => "none",
        }
    }
}

/// Whom a machine may talk to. Answers to what came in always go out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// Where neither list says so.
    #[serde(default)]
    pub egress: Egress,
    /// Reachable in any case: ranges such as `10.1.0.0/16`, domains such as `example.com` or `*.example.com`. Metadata
    /// services are reachable by this only; the host and other machines never are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Not reachable in any case, likewise. Ranges go before what is allowed; of domains the one that is named more
    /// exactly counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// Machines of the same owner that share a group may talk to each other, and find each other as
    /// `NAME.hutch.internal`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Name>,
}

impl NetworkPolicy {
    /// Whether it is what a machine has that asks for nothing.
    pub fn is_default(&self) -> bool {
        *self == NetworkPolicy::default()
    }
}

/// How machines come by their network on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// The host routes for each of them; addresses and policies are the server's.
    Routed,
    /// They are on a bridge of the host's; likewise.
    Bridge,
    /// A program without privilege carries their connections out; only `public` and `none` exist.
    User,
    /// They have none. Ports of theirs are reached all the same, through the agent.
    None,
    /// The runtime gives what network there is, and no policy holds.
    Runtime,
}

/// The network of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MachineNetwork {
    /// How it comes by it.
    pub mode: NetworkMode,
    /// Its address, which only this host and machines of its groups reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ipv4: Option<Ipv4Addr>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ipv6: Option<Ipv6Addr>,
    /// Whom it may talk to.
    pub policy: NetworkPolicy,
}
