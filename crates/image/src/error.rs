//! What can go wrong while an image, a disk or a boot set is made, and what a user can do about it.

use crate::refusal::Refusal;
use std::io;
use std::path::{Path, PathBuf};

/// The class of an error; decides status, exit code and retry at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The input is not acceptable; the same input will never be.
    Invalid,
    /// A file that must exist does not.
    NotFound,
    /// The disk, or a limit of the machine, is full.
    Exhausted,
    /// Something outside is missing: a program, a package list, the network.
    Unavailable,
    /// The caller asked to stop.
    Cancelled,
    /// Our own mistake, or an operating system that behaves as no other.
    Internal,
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An archive was refused. `entry` is already safe to print.
    #[error("{}", refused(*.layer, .entry.as_deref(), .why))]
    Refused {
        /// Which of the given archives, from 0.
        layer: usize,
        /// The entry at fault, when one is.
        entry: Option<String>,
        /// What is wrong with it.
        why: Refusal,
    },
    /// A file could not be read or written.
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
    /// A stream without a path could not be read or written.
    #[error("cannot {action}")]
    Stream {
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// An archive is another one in the second reading than in the first.
    #[error("archive {layer} changed while it was read")]
    Changed {
        /// Which of the given archives, from 0.
        layer: usize,
    },
    /// The ext4 writer refused a tree that passed all our checks.
    #[error("the ext4 writer refused the tree")]
    Writer {
        /// What it said.
        #[source]
        source: mkext4::Error,
    },
    /// The given disk holds no ext4 filesystem, or not a whole one.
    #[error("not an ext4 disk: {why}")]
    NotExt4 {
        /// What was found instead.
        why: &'static str,
    },
    /// `e2fsck` found the filesystem dirty or damaged.
    #[error("the filesystem is not clean: {report}")]
    Unclean {
        /// What `e2fsck` said, shortened and safe to print.
        report: String,
    },
    /// A program that we call is not installed.
    #[error("the program {program} was not found")]
    MissingProgram {
        /// Its name.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program that we call gave up.
    #[error("{program} ended with {status}: {words}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Exit code or signal.
        status: String,
        /// The end of what it said, safe to print.
        words: String,
        /// What would help, where we know.
        hint: Option<String>,
    },
    /// The child that writes disks reported an error of its own.
    #[error("{message}")]
    Child {
        /// The class of the child's error.
        kind: Kind,
        /// Its text with all its causes.
        message: String,
        /// Its hint.
        hint: Option<String>,
    },
    /// The child that writes disks ended without an answer.
    #[error("the disk writer ended with {status}")]
    ChildDied {
        /// Exit code or signal.
        status: String,
        /// Whether it met a limit (memory, file size) rather than a bug.
        limited: bool,
    },
    /// A package is not what a kernel package looks like.
    #[error("{}: {why}", .path.display())]
    Package {
        /// The package or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A kernel module is needed that the kernel package does not have.
    #[error("the kernel {release} has no module {module}, and it is not built in")]
    MissingModule {
        /// The kernel's release.
        release: String,
        /// The module's name.
        module: String,
    },
    /// A busybox that needs shared libraries is of no use in an empty root.
    #[error("{} is not a static program", .path.display())]
    NotStatic {
        /// The program.
        path: PathBuf,
    },
    /// No way to make a Debian root without privilege was found.
    #[error("mmdebstrap needs root, or a range of subordinate user ids")]
    NoSubordinateIds,
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

fn refused(layer: usize, entry: Option<&str>, why: &Refusal) -> String {
    let layer = if layer == 0 {
        String::new()
    } else {
        format!(" {layer}")
    };
    match entry {
        Some(entry) => format!("archive{layer}, entry {entry}: {why}"),
        None => format!("archive{layer}: {why}"),
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn stream(action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Stream { action, source }
    }

    /// The class of this error.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Refused { why, .. } => why.kind(),
            Error::Io { source, .. } | Error::Stream { source, .. } => io_kind(source),
            Error::Writer {
                source: mkext4::Error::Io(source),
            } => io_kind(source),
            Error::Child { kind, .. } => *kind,
            Error::ChildDied { limited: true, .. } => Kind::Exhausted,
            Error::Changed { .. }
            | Error::NotExt4 { .. }
            | Error::Unclean { .. }
            | Error::Package { .. }
            | Error::MissingModule { .. }
            | Error::NotStatic { .. } => Kind::Invalid,
            Error::MissingProgram { .. } | Error::Program { .. } | Error::NoSubordinateIds => {
                Kind::Unavailable
            }
            Error::Cancelled => Kind::Cancelled,
            Error::Writer { .. } | Error::ChildDied { .. } => Kind::Internal,
        }
    }

    /// What the user can do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::MissingProgram { package, .. } => {
                return Some(format!("install it: apt-get install {package}"));
            }
            Error::Child { hint, .. } | Error::Program { hint, .. } => return hint.clone(),
            Error::NotExt4 { .. } => {
                "give a raw disk that begins with an ext4 filesystem (no partition table)"
            }
            Error::Unclean { .. } => "repair it first: e2fsck -f DISK, on a copy",
            Error::NotStatic { .. } => "install the static one: apt-get install busybox-static",
            Error::NoSubordinateIds => {
                "run as root, or add a range to /etc/subuid and /etc/subgid (apt-get install uidmap)"
            }
            Error::MissingModule { .. } => "give a kernel package that has virtio and ext4",
            Error::Changed { .. } => "let nothing write to the archive during the import",
            Error::Refused { why, .. } => why.hint()?,
            _ if self.kind() == Kind::Exhausted => {
                "free some space, or remove images and machines that are not needed"
            }
            _ => return None,
        };
        Some(text.into())
    }
}

fn io_kind(source: &io::Error) -> Kind {
    match source.kind() {
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::FileTooLarge
        | io::ErrorKind::OutOfMemory => Kind::Exhausted,
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Kind::Invalid,
        _ => Kind::Internal,
    }
}

/// Text from outside (names in archives, words of programs) made safe for a terminal and a log:
/// control characters escaped, at most `max` characters.
pub(crate) fn printable(bytes: &[u8], max: usize) -> String {
    let mut text = String::new();
    for (count, c) in String::from_utf8_lossy(bytes).chars().enumerate() {
        if count == max {
            text.push('…');
            break;
        }
        match c {
            ' ' => text.push(' '),
            c => text.extend(c.escape_debug()),
        }
    }
    text
}
