//! How a machine is reached from outside: TCP ports of its host, and names for HTTP.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::lifetime::Lifetime;

/// The guest's port behind the machine's name when the request names none.
pub const DEFAULT_HTTP_PORT: u16 = 8080;
/// The guest's port for SSH.
pub const SSH_PORT: u16 = 22;
/// The most ports of the host that one machine may have.
pub const MAX_PORTS: usize = 32;
/// The most ports that one machine may expose by number.
pub const MAX_EXPOSED: usize = 64;
/// How long a token for a machine's URL holds when the request does not say, in seconds: a day.
pub const DEFAULT_TOKEN_LIFETIME_S: u64 = 24 * 3600;
/// The longest that one may hold, in seconds: 30 days.
pub const MAX_TOKEN_LIFETIME_S: u64 = 30 * 24 * 3600;

/// A port of the host that is to lead to a port of the machine, by TCP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PublishPort {
    /// Port in the machine. A program that listens on its loopback is enough.
    pub guest_port: u16,
    /// Port of the host; the lowest free one of the server's range when left out or 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port: Option<u16>,
    /// Address of the host that it listens on; the server's default when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>, example = "127.0.0.1"))]
    pub bind: Option<IpAddr>,
}

/// What a port of the host is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// Any TCP service.
    Tcp,
    /// SSH, asked for with `ssh`.
    Ssh,
}

/// A port of the host as it was given to a machine: part of its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenPort {
    /// Port of the host.
    pub host_port: u16,
    /// Port in the machine.
    pub guest_port: u16,
    /// What it is for.
    pub kind: PortKind,
    /// Address of the host.
    pub bind: IpAddr,
}

/// Whether connections to a port of the host are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// They are, and lead into the machine while it runs.
    Listening,
    /// Not yet, or something else on the host has the port: it is tried again.
    Waiting,
}

/// A port of the host that leads to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Port {
    /// Port of the host.
    pub host_port: u16,
    /// Port in the machine.
    pub guest_port: u16,
    /// What it is for.
    pub kind: PortKind,
    /// Address of the host that it listens on.
    #[cfg_attr(feature = "schema", schema(value_type = String, example = "127.0.0.1"))]
    pub bind: IpAddr,
    /// Whether it does.
    pub state: PortState,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Who may reach a machine by its URL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Who has a key that may see the machine, or a token of it.
    #[default]
    Private,
    /// Everybody.
    Public,
}

impl Access {
    /// Whether it is [`Access::Private`], which need not be written down.
    pub fn is_private(&self) -> bool {
        *self == Access::Private
    }
}

/// Which ports of a machine have URLs of their own, `{port}-{name}`, besides the one behind its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(untagged, expecting = "a list of ports, or \"all\"")]
pub enum Expose {
    /// These.
    Ports(Vec<u16>),
    /// Every port.
    All(All),
}

/// The word `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum All {
    /// Every one.
    All,
}

impl Default for Expose {
    fn default() -> Expose {
        Expose::Ports(Vec::new())
    }
}

impl Expose {
    /// Every port.
    pub const ALL: Expose = Expose::All(All::All);

    /// Whether no port has a URL but the one behind the name.
    pub fn is_empty(&self) -> bool {
        matches!(self, Expose::Ports(ports) if ports.is_empty())
    }
}

/// How a machine is reached: part of its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposure {
    /// The label below the server's domain; none in records of versions that gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The port behind it.
    #[serde(default = "default_http_port")]
    pub http_port: u16,
    /// Further ports with URLs.
    #[serde(default, skip_serializing_if = "Expose::is_empty")]
    pub expose: Expose,
    /// Who may come in by a URL.
    #[serde(default, skip_serializing_if = "Access::is_private")]
    pub access: Access,
    /// Counted up to make all tokens that were given out worthless.
    #[serde(default)]
    pub generation: u64,
    /// Ports of the host, each reserved in the same commit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<GivenPort>,
}

fn default_http_port() -> u16 {
    DEFAULT_HTTP_PORT
}

impl Default for Exposure {
    fn default() -> Exposure {
        Exposure {
            host: None,
            http_port: DEFAULT_HTTP_PORT,
            expose: Expose::default(),
            access: Access::default(),
            generation: 0,
            ports: Vec::new(),
        }
    }
}

impl Exposure {
    /// Whether there is nothing to write down.
    pub fn is_default(&self) -> bool {
        *self == Exposure::default()
    }
}

/// A change of a machine; what is left out stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ChangeMachine {
    /// Who may reach it by its URL. Any change makes tokens that were given out worthless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    /// The port behind its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_port: Option<u16>,
    /// All the ports that have URLs of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expose: Option<Expose>,
    /// When it rests or ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<Lifetime>,
}

/// What token to make for a machine's URL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MintToken {
    /// How long it holds, in seconds: a day when left out, 30 days at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_s: Option<u64>,
    /// The port that the answer's URL is for; the one behind the name when left out. The token opens all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// A token that opens a private machine: in the header `x-hutch-token`, or once in a browser by the URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct UrlToken {
    /// The token.
    pub token: String,
    /// A link with it, for a browser. None when the server has no HTTP gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// When it ends, UTC, in milliseconds since 1970.
    pub expires_at_ms: u64,
}
