//! What can go wrong with a disk file, and how a caller tells the cases apart.

use std::io;
use std::path::{Path, PathBuf};

/// The class of an error; decides status, exit code and retry at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The filesystem or the quota is full; worth a retry once space was freed.
    Full,
    /// A file or directory that must exist does not.
    NotFound,
    /// Something stands where a new file or directory must go; nothing was replaced.
    Exists,
    /// The request makes no sense for this file.
    Invalid,
    /// The host cannot do it as it is.
    Unavailable,
    /// Anything else the operating system said.
    Other,
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on a path was refused.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or directory it was tried on.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A disk was asked to become smaller.
    #[error("{} holds {size_bytes} bytes and cannot shrink to {wanted_bytes}", .path.display())]
    Shrink {
        /// The disk.
        path: PathBuf,
        /// Its size now.
        size_bytes: u64,
        /// The size that was asked for.
        wanted_bytes: u64,
    },
    /// There is no pool, or it cannot be reached.
    #[error("pool {}: {reason}", .path.display())]
    Pool {
        /// The file that it is in.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What helps.
        hint: &'static str,
    },
    /// An object of an export is not what it should be, or not to be had.
    #[error("{key} {problem}")]
    Object {
        /// Its key.
        key: String,
        /// What sort of failure it is.
        kind: Kind,
        /// What is wrong.
        problem: String,
    },
    /// What was read is not what was once written.
    #[error("{what} {problem}")]
    Damaged {
        /// A disk, or the key of a chunk.
        what: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A disk that is exported or imported cannot be read or written.
    #[error("cannot {action}")]
    Content {
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Only regular files are disks here.
    #[error("{} is not a regular file", .path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn read(source: io::Error) -> Error {
        let action = "read the disk";
        Error::Content { action, source }
    }

    pub(crate) fn write(source: io::Error) -> Error {
        let action = "write the disk";
        Error::Content { action, source }
    }

    pub(crate) fn pack(source: io::Error) -> Error {
        let action = "pack a chunk of the disk";
        Error::Content { action, source }
    }

    /// The class of this error.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Io { source, .. } | Error::Content { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Full,
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Kind::Exists,
                _ => Kind::Other,
            },
            Error::Object { kind, .. } => *kind,
            Error::Shrink { .. } | Error::NotAFile { .. } | Error::Damaged { .. } => Kind::Invalid,
            Error::Pool { .. } => Kind::Unavailable,
        }
    }

    /// What the user can do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match (self.kind(), self) {
            (Kind::Full, _) => {
                Some("free some space, or remove images and machines that are not needed".into())
            }
            (_, Error::Pool { hint, .. }) => Some((*hint).into()),
            (_, Error::Shrink { .. }) => {
                Some("disks only grow; copy the files to a machine with a smaller disk".into())
            }
            _ => None,
        }
    }
}
