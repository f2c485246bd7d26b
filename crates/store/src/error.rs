//! What can go wrong, which kind of trouble it is and what helps.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{Key, Revision};

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Somebody else was faster: read again and decide anew.
    Conflict,
    /// The request cannot be met as it is.
    Invalid,
    /// No room; the same request works once there is some.
    Exhausted,
    /// Not now; nothing is known to be lost.
    Unavailable,
    /// A fault of the disk, the file or the program: a person must look.
    Internal,
}

/// Why a store did not do what it was asked. Cheap to clone: one failed transaction has many
/// waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A check of the commit does not hold.
    #[error("{key} {}", describe(*found))]
    Conflict {
        /// Key of the first check that does not hold.
        key: Key,
        /// Version found there; `None`: absent.
        found: Option<u64>,
    },
    /// Not a key.
    #[error("key {key:?} {problem}")]
    InvalidKey {
        /// Its beginning.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two writes of one commit have the same key.
    #[error("{key} is written twice in one commit")]
    DuplicateWrite {
        /// That key.
        key: Key,
    },
    /// The commit is over a limit.
    #[error("commit has {size} {unit}, at most {limit} are allowed")]
    TooLarge {
        /// What was counted.
        unit: &'static str,
        /// How many there are.
        size: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The change log does not reach back to the asked revision.
    #[error("changes up to revision {oldest} were dropped from the log")]
    Compacted {
        /// The oldest revision that may still be asked with.
        oldest: Revision,
    },
    /// The asked revision does not exist yet.
    #[error("revision {asked} was never made here, the newest is {newest}")]
    FutureRevision {
        /// The asked revision.
        asked: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// A record cannot be written as JSON.
    #[error("encode {key}")]
    Encode {
        /// Its key.
        key: Key,
        /// Why.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// A record is not the JSON that was expected.
    #[error("decode {key} of version {version}")]
    Decode {
        /// Its key.
        key: Key,
        /// Its version.
        version: u64,
        /// Why.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// The disk or the allowed size is used up. Nothing was written.
    #[error("no room left for {path}")]
    Full {
        /// The database.
        path: PathBuf,
        /// SQLite's own words.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// Another process holds the database.
    #[error("{path} is locked")]
    Locked {
        /// The database.
        path: PathBuf,
        /// SQLite's own words.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// Reading or writing the file failed; commits are refused from here on.
    #[error("i/o on {path}")]
    Io {
        /// The database.
        path: PathBuf,
        /// SQLite's own words.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// The file is not what was written to it.
    #[error("{path} is damaged")]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// SQLite refused for another reason.
    #[error("use {path}")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// SQLite's own words.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// The writer's thread cannot be started.
    #[error("start a thread")]
    Thread {
        /// Why.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// No commit is possible any more in this process.
    #[error("the store takes no more commits")]
    Stopped {
        /// The error that ended it, where known.
        #[source]
        cause: Option<Arc<Error>>,
    },
    /// A newer program has written the database.
    #[error("{path} has schema {found}, this program knows {known}")]
    NewerSchema {
        /// The database.
        path: PathBuf,
        /// Schema of the file.
        found: i64,
        /// Newest schema of this program.
        known: i64,
    },
    /// The linked SQLite is one that can lose data.
    #[error("SQLite {found} is not safe to use")]
    UnsafeSqlite {
        /// Its version.
        found: &'static str,
    },
    /// A setting that durability depends on did not take, as on some network filesystems.
    #[error("{path} has {setting} {found:?} instead of {wanted:?}")]
    Setting {
        /// The database.
        path: PathBuf,
        /// Name of the pragma.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The value that is needed.
        wanted: &'static str,
    },
}

fn describe(found: Option<u64>) -> String {
    match found {
        Some(version) => format!("exists at version {version}"),
        None => "does not exist".to_owned(),
    }
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Conflict { .. } => Kind::Conflict,
            Self::InvalidKey { .. }
            | Self::DuplicateWrite { .. }
            | Self::TooLarge { .. }
            | Self::Compacted { .. }
            | Self::FutureRevision { .. }
            | Self::NewerSchema { .. } => Kind::Invalid,
            Self::Full { .. } => Kind::Exhausted,
            Self::Locked { .. } | Self::Thread { .. } | Self::Stopped { .. } => Kind::Unavailable,
            Self::Encode { .. }
            | Self::Decode { .. }
            | Self::Io { .. }
            | Self::Damaged { .. }
            | Self::Sqlite { .. }
            | Self::UnsafeSqlite { .. }
            | Self::Setting { .. } => Kind::Internal,
        }
    }

    /// What helps, where it is known.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Compacted { .. } | Self::FutureRevision { .. } => {
                "list again and follow from the revision read before that"
            }
            Self::Full { .. } => "free space on its filesystem; no restart is needed",
            Self::Locked { .. } => "stop the other program that has it open",
            Self::Io { .. } | Self::Stopped { .. } => {
                "look at the kernel log for disk errors, then restart the server"
            }
            Self::Damaged { .. } => "restore it from a backup; keep the damaged file",
            Self::NewerSchema { .. } => "start the version of hutch that wrote it, or a newer one",
            Self::UnsafeSqlite { .. } => "build with SQLite 3.51.3 or newer, but not 3.52.0",
            Self::Setting { .. } => "put the data directory on a local filesystem",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
