//! Images as the API shows them.

use serde::{Deserialize, Serialize};

use crate::id::{ImageId, OperationId};
use crate::name::Name;

/// An image: immutable, with a bootable disk made from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name, unique among the owner's images.
    pub name: Name,
    /// Where it came from.
    pub source: ImageSource,
    /// sha256 of its disk, in hexadecimal.
    pub sha256: String,
    /// Size of its disk in bytes.
    pub size_bytes: u64,
    /// Bytes of it that hold something.
    pub used_bytes: u64,
    /// When it was made, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
}

/// Where an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum ImageSource {
    /// A root filesystem tar.
    Tar,
    /// A raw ext4 disk.
    Ext4,
    /// The packages of a distribution.
    Bootstrap {
        /// Such as `debian`.
        distribution: String,
        /// Such as `bookworm`.
        suite: String,
    },
    /// The host's static busybox.
    Busybox,
    /// The disk of a snapshot.
    Snapshot {
        /// What the machine was called.
        machine: Name,
        /// What the snapshot was called.
        snapshot: Name,
    },
}

/// What the body of an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImportFormat {
    /// A root filesystem tar, plain or compressed by gzip, xz or zstd.
    Tar,
    /// A raw ext4 disk without a partition table.
    Ext4,
}

/// Makes an image from what the server's host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BootstrapImage {
    /// `debian` (packages of the distribution) or `busybox` (the host's static busybox).
    pub distribution: String,
    /// Release of the distribution, such as `bookworm`; the host's own, else the newest known, when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// Name of the image; `debian-base` or `busybox` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
}

/// The answer to a request that takes long: look at the operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Accepted {
    /// What to follow.
    pub operation: OperationId,
}
