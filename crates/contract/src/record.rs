//! Records in the store. Each carries a `format`; a newer one than we know is refused, never guessed at.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::expose::Exposure;
use crate::id::{ImageId, KeyId, MachineId, OperationId, OwnerId, SnapshotId};
use crate::image::{Image, ImageSource, ImportFormat};
use crate::key::Scope;
use crate::lifetime::Lifetime;
use crate::machine::{Exit, Isolation, Timing};
use crate::name::Name;
use crate::network::NetworkPolicy;
use crate::operation::OperationState;
use crate::snapshot::{Snapshot, SnapshotState};

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
    /// When it rests or ends by itself.
    #[serde(default, skip_serializing_if = "Lifetime::is_default")]
    pub lifetime: Lifetime,
    /// When its time is over, UTC, in milliseconds since 1970; none when it has none, or after it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<u64>,
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
    /// What is to be done to its process and disk besides bringing it to its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
    /// The snapshot that its disk was first cloned from, instead of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<SnapshotId>,
    /// The snapshot that it comes from, or was last taken of it or restored: the parent of the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<SnapshotId>,
    /// Snapshots that were ever begun of it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub snapshots: u64,
    /// Its next start goes on from the memory of this snapshot; none once it has come to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_from: Option<SnapshotId>,
    /// Its disk is to be kept as the snapshot `initial` before anything runs on it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_initial: bool,
    /// It boots also where it could start warm.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold: bool,
    /// Its last start went on from a template instead of booting.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What is to be done to a machine's process and disk besides bringing it to its level. One thing at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Work {
    /// Take a snapshot. It does not survive the server that began it.
    Snapshot {
        /// Which.
        snapshot: SnapshotId,
        /// With its memory.
        memory: bool,
        /// Whom it is told.
        operation: OperationId,
    },
    /// Go back to a snapshot. It is gone on with after a crash.
    Restore {
        /// Which.
        snapshot: SnapshotId,
        /// Without its memory.
        disk_only: bool,
        /// Whom it is told.
        operation: OperationId,
    },
}

impl Work {
    /// Whom it is told.
    pub fn operation(&self) -> &OperationId {
        match self {
            Work::Snapshot { operation, .. } | Work::Restore { operation, .. } => operation,
        }
    }

    /// The snapshot that it is about.
    pub fn snapshot(&self) -> &SnapshotId {
        match self {
            Work::Snapshot { snapshot, .. } | Work::Restore { snapshot, .. } => snapshot,
        }
    }
}

/// A snapshot. The copy of it in its directory is its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: SnapshotId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Its name, reserved in the same commit.
    pub name: Name,
    /// How far it is.
    pub state: SnapshotState,
    /// The machine that it is of.
    pub machine: MachineId,
    /// What that is called.
    pub machine_name: Name,
    /// The image that the machine was made from.
    pub image: ImageId,
    /// What that was called.
    pub image_name: Name,
    /// The snapshot before it in the machine's life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// Counts the machine's snapshots.
    pub sequence: u64,
    /// Made for something that needs it for a while: it goes with the last who does, and is not shown.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passing: bool,
    /// Whether it holds the memory too.
    pub memory: bool,
    /// Whether the guest stood still by itself, not only because its processors did.
    #[serde(default)]
    pub frozen: bool,
    /// What ran the machine.
    pub runtime: String,
    /// The name of the machine's kernel; the server's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Root disk in GiB.
    pub disk_gib: u32,
    /// What its memory can be restored with; none without memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit: Option<Fit>,
    /// Its files.
    #[serde(default)]
    pub files: Vec<SnapshotFile>,
    /// sha256 of the manifest's file, in hexadecimal; empty in that file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub manifest_sha256: String,
    /// How long what runs in the machine stood still, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// When it was asked for, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// How long each step took.
    #[serde(default)]
    pub timings: Vec<Timing>,
    /// The operation that takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
}

/// What a machine's memory depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// Version of the VMM.
    pub vmm: String,
    /// What accelerates it.
    pub acceleration: String,
    /// The host's processor: maker, family, model and features, digested.
    pub cpu: String,
    /// Version of the agent, told by the guest.
    pub agent: String,
    /// The guest's kernel, told by the guest.
    pub kernel: String,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFile {
    /// Its name in the directory.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are not zeros, in whole blocks.
    pub used_bytes: u64,
    /// sha256, in hexadecimal, as of an image's disk: over the blocks that are not zeros and where they are, so that a hole
    /// costs nothing and is the same as zeros.
    pub sha256: String,
}

impl From<SnapshotRecord> for Snapshot {
    fn from(record: SnapshotRecord) -> Snapshot {
        Snapshot {
            id: record.id,
            name: record.name,
            state: record.state,
            machine: record.machine,
            machine_name: record.machine_name,
            image: record.image,
            image_name: record.image_name,
            parent: record.parent,
            sequence: record.sequence,
            memory: record.memory,
            frozen: record.frozen,
            runtime: record.runtime,
            vcpu: record.vcpu,
            memory_mib: record.memory_mib,
            disk_gib: record.disk_gib,
            size_bytes: record.files.iter().map(|file| file.size_bytes).sum(),
            used_bytes: record.files.iter().map(|file| file.used_bytes).sum(),
            pause_us: record.pause_us,
            created_at_ms: record.created_at_ms,
            timings: record.timings,
            operation: record.operation,
        }
    }
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
    /// The disk of a snapshot.
    Snapshot {
        /// Which.
        snapshot: SnapshotId,
    },
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
