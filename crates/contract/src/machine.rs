//! Machines as the API shows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::expose::{Access, Expose, Port, PublishPort};
use crate::id::{ImageId, MachineId, OperationId};
use crate::lifetime::Lifetime;
use crate::name::Name;
use crate::network::{MachineNetwork, NetworkPolicy};
use crate::node::Capabilities;

/// Memory of a machine when the request names none.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// Virtual CPUs of a machine when the request names none.
pub const DEFAULT_VCPU: u32 = 1;
/// Disk of a machine when the request names none and the image is smaller.
pub const DEFAULT_DISK_GIB: u32 = 8;
/// The least memory that a distribution's kernel boots with (Debian's 6.1 does not with 64 MiB).
pub const MIN_MEMORY_MIB: u32 = 128;
/// The most memory one machine may ask for.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// The most virtual CPUs one machine may ask for.
pub const MAX_VCPU: u32 = 64;
/// The largest disk one machine may ask for.
pub const MAX_DISK_GIB: u32 = 16 * 1024;

/// What to make. Only `image` has no default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateMachine {
    /// Name or id of an image.
    pub image: String,
    /// Unique among the owner's machines; three words when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// `qemu`, `firecracker`, …; the best usable one when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// One of the kernels that the server's administrator has named; the server's own when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Size of the root disk in GiB, at least the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_gib: Option<u32>,
    /// Environment of every process that is started in the machine.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Anything the owner wants to find it by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Whom it may talk to; the public internet when left out.
    #[serde(default, skip_serializing_if = "NetworkPolicy::is_default")]
    pub network: NetworkPolicy,
    /// When it rests or ends by itself.
    #[serde(default, skip_serializing_if = "Lifetime::is_default")]
    pub lifetime: Lifetime,
    /// Boot from the beginning even where a warm start would do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold: bool,
    /// Keep its disk as it is before the first start, as a snapshot named `initial`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub snapshot_initial: bool,
    /// Ports of the host that lead to ports of the machine, by TCP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishPort>,
    /// One more, from the server's range, that leads to port 22.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ssh: bool,
    /// The machine's port behind its URL; 8080 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_port: Option<u16>,
    /// Further ports that have URLs, `{port}-{name}`: a list, or `all`.
    #[serde(default, skip_serializing_if = "Expose::is_empty")]
    pub expose: Expose,
    /// Who may reach it by its URLs.
    #[serde(default, skip_serializing_if = "Access::is_private")]
    pub access: Access,
}

/// What is the case with a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// On its way to `running`.
    Starting,
    /// Its agent answers, or did until a moment ago.
    Running,
    /// On its way to `paused`.
    Pausing,
    /// It does not execute, and its memory is kept. Whatever uses it lets it go on: a command, a file, a connection to a
    /// port or a URL of it.
    Paused,
    /// On its way to `stopped`.
    Stopping,
    /// Not running; its disk is kept.
    Stopped,
    /// It could not be brought to what was wanted; see `reason`.
    Failed,
    /// The identity of its process cannot be proved; nothing is done to it.
    Unknown,
    /// On its way out.
    Deleting,
}

impl Status {
    /// All of them, in the order of a life.
    pub const ALL: [Status; 9] = [
        Status::Starting,
        Status::Running,
        Status::Pausing,
        Status::Paused,
        Status::Stopping,
        Status::Stopped,
        Status::Failed,
        Status::Unknown,
        Status::Deleting,
    ];

    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Starting => "starting",
            Status::Running => "running",
            Status::Pausing => "pausing",
            Status::Paused => "paused",
            Status::Stopping => "stopping",
            Status::Stopped => "stopped",
            Status::Failed => "failed",
            Status::Unknown => "unknown",
            Status::Deleting => "deleting",
        }
    }
}

/// How a machine came to stop running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Exit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reboot.
    Reboot,
    /// The guest's kernel gave up.
    Panic,
    /// We ended it, as was wanted.
    Killed,
    /// The VMM ended by itself, with this code.
    Code {
        /// Exit code of the VMM.
        code: i32,
    },
    /// The VMM was ended by a signal that was not ours.
    Signal {
        /// Number of the signal.
        signal: i32,
    },
    /// It is gone and nobody saw how, such as after a reboot of the host.
    Lost,
}

/// How well a machine is kept apart from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Its own kernel on hardware virtualization.
    Hardware,
    /// Its own kernel in an emulator: not a security boundary.
    Emulation,
    /// The host's kernel, shared.
    SharedKernel,
    /// None: tests only.
    None,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Machine {
    /// Its id.
    pub id: MachineId,
    /// Its name, unique among the owner's machines.
    pub name: Name,
    /// What is the case.
    pub status: Status,
    /// Why it is `failed` or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How it last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// The image it was made from.
    pub image: ImageId,
    /// What the image was called then.
    pub image_name: Name,
    /// What runs it.
    pub runtime: String,
    /// How well it was to be kept apart from the host when it was made.
    pub isolation: Isolation,
    /// What its runtime can do with it on this host now; nothing where the server does not have the runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// The kernel that it asked for by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Root disk in GiB.
    pub disk_gib: u32,
    /// Environment of every process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The owner's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<MachineNetwork>,
    /// Times it was started since it was created.
    pub starts: u32,
    /// Its last start went on from a template instead of booting.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
    /// When it was created, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// When it last came to run, UTC, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_ms: Option<u64>,
    /// When it rests or ends by itself.
    #[serde(default, skip_serializing_if = "Lifetime::is_default")]
    pub lifetime: Lifetime,
    /// When `ttl_action` is done to it, UTC, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<u64>,
    /// The operation that is being done to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// What its guest could not apply of its identity.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unapplied: Vec<String>,
    /// How long each step of the last start took.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timings: Vec<Timing>,
    /// Where HTTP reaches it; none when the server has no HTTP gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Where HTTP reaches further ports of it, by port.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub urls: BTreeMap<u16, String>,
    /// The port behind `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_port: Option<u16>,
    /// Which further ports have URLs.
    #[serde(default, skip_serializing_if = "Expose::is_empty")]
    pub expose: Expose,
    /// Who may reach it by its URLs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Changes with each change of the machine.
    pub version: u64,
}

/// A step and its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Timing {
    /// The step.
    pub phase: String,
    /// When it began, in microseconds since the operation began.
    pub start_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}
