//! How much an image may ask of us.

use serde::{Deserialize, Serialize};

/// Limits for everything that is read from outside. `Default` is right for a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Content of all files together, bytes. Default 20 GiB.
    pub max_content_bytes: u64,
    /// Size of a disk that is written or imported, bytes. Default 32 GiB.
    pub max_disk_bytes: u64,
    /// Entries of all archives together, removed ones included. Default 1,000,000.
    pub max_entries: u64,
    /// Memory for names, links, attributes and directories, bytes; also bounds what the ext4
    /// writer holds. Default 1.5 GiB, enough for a million ordinary files.
    pub max_metadata_bytes: u64,
    /// One extended header (long name, PAX), bytes. Default 1 MiB.
    pub max_header_bytes: u64,
    /// Levels of directories. Default 256.
    pub max_depth: usize,
    /// What one archive may unpack to, bytes. Default 24 GiB.
    pub max_unpacked_bytes: u64,
    /// Unpacked bytes per packed byte, looked at beyond the first GiB. Default 1000.
    pub max_ratio: u64,
    /// Window of a decoder, bytes, rounded down to a power of two. Default 128 MiB.
    pub max_window_bytes: u64,
    /// Address space of the child that writes disks, bytes. Default 6 GiB.
    pub max_memory_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            max_content_bytes: 20 * GIB,
            max_disk_bytes: 32 * GIB,
            max_entries: 1_000_000,
            max_metadata_bytes: 3 * GIB / 2,
            max_header_bytes: 1 << 20,
            max_depth: 256,
            max_unpacked_bytes: 24 * GIB,
            max_ratio: 1000,
            max_window_bytes: 128 << 20,
            max_memory_bytes: 6 * GIB,
        }
    }
}
