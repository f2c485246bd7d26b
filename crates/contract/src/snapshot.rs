//! Snapshots of machines, and what is made of them.

use serde::{Deserialize, Serialize};

use crate::id::{ImageId, MachineId, OperationId, SnapshotId};
use crate::machine::{Machine, Timing};
use crate::name::Name;

/// The most machines that one fork makes.
pub const MAX_FORK: u32 = 100;
/// The most snapshots that one machine has.
pub const MAX_SNAPSHOTS: usize = 100;

/// What to keep of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Unique among the machine's snapshots; `s1`, `s2`, … when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Its memory too: what runs in it goes on from there after a restore.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory: bool,
}

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// Being taken. One that fails, or is interrupted by the end of the server, is gone.
    Creating,
    /// Whole, and can be restored.
    Ready,
}

/// A machine as it was at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique among the snapshots of the machine.
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
    /// The snapshot that the machine had been made from, or was last taken or restored, before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// Counts the machine's snapshots: the order in which they were taken, whatever the clock says.
    pub sequence: u64,
    /// Whether it holds the memory too.
    pub memory: bool,
    /// Whether the guest's file systems and processes stood still meanwhile. Otherwise the disk is as after a power cut.
    pub frozen: bool,
    /// What ran the machine.
    pub runtime: String,
    /// Virtual CPUs of the machine.
    pub vcpu: u32,
    /// Memory of the machine in MiB.
    pub memory_mib: u32,
    /// Root disk of the machine in GiB.
    pub disk_gib: u32,
    /// Size of its files in bytes.
    pub size_bytes: u64,
    /// Bytes of them that hold something; where the file system shares blocks, less than that is new.
    pub used_bytes: u64,
    /// How long what runs in the machine stood still, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// When it was asked for, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// How long each step took.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timings: Vec<Timing>,
    /// The operation that takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
}

/// What an image of a snapshot is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotImage {
    /// Unique among the owner's images.
    pub name: Name,
}

/// To which snapshot a machine goes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RestoreMachine {
    /// Id of a snapshot, or the name of one of the machine's.
    pub snapshot: String,
    /// Leave its memory out: the machine boots from the disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk_only: bool,
}

/// How many copies of a machine to make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ForkMachine {
    /// How many; 1, or as many as there are names, when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Go on from the machine's memory instead of booting from its disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory: bool,
    /// Id of a snapshot, or the name of one of the machine's; as it is now when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// One name per copy; three words each when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<Name>,
    /// Names `PREFIX-1`, `PREFIX-2`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_prefix: Option<Name>,
}

/// What became of a fork: one row per copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Forked {
    /// How long what runs in the machine stood still for it, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// The copies, in the order of their names.
    pub copies: Vec<Copied>,
}

/// A copy of a machine, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Copied {
    /// It was made. What comes of its start is told by it.
    Machine(Box<Machine>),
    /// It was not.
    Error {
        /// A stable word for programs.
        code: String,
        /// Why, for people.
        message: String,
        /// What to do about it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}
