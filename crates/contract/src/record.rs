//! Records in the store. Each carries a `format`; a newer one than we know is refused, never guessed at.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::expose::Exposure;
use crate::id::{ImageId, KeyId, MachineId, OperationId, OwnerId};
use crate::image::{Image, ImageSource, ImportFormat};
use crate::key::Scope;
use crate::machine::{Exit, Isolation, Timing};
use crate::name::Name;
use crate::network::NetworkPolicy;
use crate::operation::OperationState;

/// The format of the records written by this version.
pub const FORMAT: u32 = 1;

/// The level that a machine is wanted at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Executing.
    Running,
    /// Not executing, memory kept.
    Paused,
    /// Not executing, disk kept.
    Stopped,
    /// Gone.
    Deleted,
}

/// What was last seen of a machine. What can be seen again (a live process) is looked at, not believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Observed {
    /// Nothing of it is on the host yet, or nothing any more.
    Absent,
    /// Its process runs and its agent has been configured.
    Running,
    /// The same, and it does not execute.
    Paused,
    /// Not running; the disk is there.
    Stopped,
    /// Given up until somebody asks again.
    Failed {
        /// A stable word.
        code: String,
        /// Why, for people.
        reason: String,
    },
    /// A process may be there, and we cannot prove whose it is.
    Unknown {
        /// Why, for people.
        reason: String,
    },
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: MachineId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Its name, reserved in the same commit.
    pub name: Name,
    /// Its slot on this node, reserved in the same commit: addresses, ports and uids derive from it.
    pub slot: u16,
    /// The image that its disk is cloned from.
    pub image: ImageId,
    /// What that was called.
    pub image_name: Name,
    /// What runs it.
    pub runtime: String,
    /// How well it is kept apart from the host.
    pub isolation: Isolation,
    /// The name of its kernel; the server's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Root disk in GiB.
    pub disk_gib: u32,
    /// Environment of every process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The owner's labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whom it may talk to.
    #[serde(default, skip_serializing_if = "NetworkPolicy::is_default")]
    pub network: NetworkPolicy,
    /// The level it is wanted at.
    pub wanted: Wanted,
    /// What was last seen.
    pub observed: Observed,
    /// Counts requests for a level, so that "stop, then start" is not taken for "already running".
    pub generation: u64,
    /// The generation that the last finished start or stop served.
    pub served: u64,
    /// Stop first, although `running` is wanted; cleared once it has stopped.
    #[serde(default)]
    pub restart: bool,
    /// How it last ended.
    #[serde(default)]
    pub exit: Option<Exit>,
    /// Starts since creation.
    pub starts: u32,
    /// Starts in a row that failed; none once it runs.
    #[serde(default)]
    pub failed_starts: u32,
    /// When it was created, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// When it last came to run.
    #[serde(default)]
    pub started_at_ms: Option<u64>,
    /// What its guest could not apply.
    #[serde(default)]
    pub unapplied: Vec<String>,
    /// Steps of the last start.
    #[serde(default)]
    pub timings: Vec<Timing>,
    /// How it is reached from outside.
    #[serde(default, skip_serializing_if = "Exposure::is_default")]
    pub exposure: Exposure,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: ImageId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Its name.
    pub name: Name,
    /// Where it came from.
    pub source: ImageSource,
    /// sha256 of the disk.
    pub sha256: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that hold something.
    pub used_bytes: u64,
    /// When it was made, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
}

impl From<ImageRecord> for Image {
    fn from(record: ImageRecord) -> Image {
        Image {
            id: record.id,
            name: record.name,
            source: record.source,
            sha256: record.sha256,
            size_bytes: record.size_bytes,
            used_bytes: record.used_bytes,
            created_at_ms: record.created_at_ms,
        }
    }
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: OperationId,
    /// Whose it is.
    pub owner: OwnerId,
    /// What is being done.
    pub kind: String,
    /// Id of what it is done to.
    pub target: String,
    /// How far it is; progress within a step is not stored.
    pub state: OperationState,
    /// When it began, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// What a next server needs to go on with it; an operation without is ended as interrupted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<ImageWork>,
}

/// An image that is being made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageWork {
    /// As it will be, but for what only its content tells.
    pub image: ImageRecord,
    /// What it is made from.
    pub input: ImageInput,
    /// How many servers have begun with it.
    pub tries: u32,
}

/// What an image is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ImageInput {
    /// An upload that lies in the data directory.
    Upload {
        /// What it is.
        format: ImportFormat,
        /// Its size.
        bytes: u64,
    },
    /// Packages of Debian.
    Debian {
        /// The release; by default the host's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        suite: Option<String>,
    },
    /// The host's static busybox.
    Busybox,
}

/// A key. The secret itself is nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: KeyId,
    /// Whose it is.
    pub owner: OwnerId,
    /// What it may do.
    pub scope: Scope,
    /// sha256 of the secret, in hexadecimal. The secret has 256 random bits, so no salt is needed.
    pub secret_sha256: String,
    /// When it was made, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// When it ends, UTC, in milliseconds since 1970.
    #[serde(default)]
    pub expires_at_ms: Option<u64>,
}
