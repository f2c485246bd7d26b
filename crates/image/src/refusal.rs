//! Why an archive is refused. Each case names one rule, so that a user can mend the archive.

use crate::error::Kind;

/// The rule that an archive, or one entry of it, breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Names must be relative to the root of the archive.
    #[error("the path is absolute")]
    AbsolutePath,
    /// `..` could leave the tree.
    #[error("the path has a `..` component")]
    ParentPath,
    /// Only the root directory itself may have an empty path.
    #[error("the path is empty")]
    EmptyPath,
    /// No filesystem can hold such a name.
    #[error("the name holds a NUL byte")]
    NulInName,
    /// The ext4 writer takes UTF-8 names only.
    #[error("the name is not UTF-8")]
    NotUtf8,
    /// One component is longer than ext4 allows.
    #[error("a name is longer than 255 bytes")]
    NameTooLong,
    /// The whole path is longer than Linux allows.
    #[error("the path is longer than 4096 bytes")]
    PathTooLong,
    /// More levels than any real tree has.
    #[error("the path has more than {limit} levels")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// Its parent is a file, a device or a symbolic link; links are never followed.
    #[error("its parent `{parent}` is {kind}, not a directory")]
    BelowNonDirectory {
        /// The parent, safe to print.
        parent: String,
        /// What the parent is.
        kind: &'static str,
    },
    /// A hard link names a target outside of the tree.
    #[error("the hard link leads out of the tree, to `{target}`")]
    LinkOutside {
        /// The target, safe to print.
        target: String,
    },
    /// A hard link names a target that did not come before it.
    #[error("the hard link's target `{target}` does not exist")]
    LinkTargetMissing {
        /// The target, safe to print.
        target: String,
    },
    /// Directories have one name only.
    #[error("the hard link leads to the directory `{target}`")]
    LinkToDirectory {
        /// The target, safe to print.
        target: String,
    },
    /// ext4 counts at most 65000 names of one file.
    #[error("a file has more than 65000 names")]
    TooManyLinks,
    /// One archive gives two different kinds of thing for one name.
    #[error("it is {now} here but {before} earlier in the archive")]
    Conflict {
        /// What came first.
        before: &'static str,
        /// What came now.
        now: &'static str,
    },
    /// A whiteout that names nothing that can be removed.
    #[error("the whiteout names nothing")]
    BadWhiteout,
    /// `lost+found` of the root belongs to the filesystem.
    #[error("`lost+found` of the root must be an empty directory")]
    LostAndFound,
    /// A symbolic link's target is empty, too long or holds a NUL byte.
    #[error("the symbolic link's target is not usable")]
    BadSymlink,
    /// Linux has 12 bits for a major and 20 for a minor number.
    #[error("the device number is out of range")]
    DeviceOutOfRange,
    /// A number is negative, too large, or no number.
    #[error("the header's {field} is not a usable number")]
    BadNumber {
        /// Which field.
        field: &'static str,
    },
    /// Links, devices and directories carry no content.
    #[error("it carries content, which {kind} cannot have")]
    UnexpectedContent {
        /// What it is.
        kind: &'static str,
    },
    /// A kind of entry that no root filesystem needs.
    #[error("entries of type `{code}` are not supported")]
    UnsupportedType {
        /// The type byte, safe to print.
        code: String,
    },
    /// Sparse files in PAX form.
    #[error("sparse files in PAX form are not supported")]
    PaxSparse,
    /// A sparse map that overlaps, runs backwards or past the end.
    #[error("the sparse map makes no sense")]
    BadSparseMap,
    /// A PAX record that cannot be parsed.
    #[error("the PAX header cannot be parsed")]
    BadPax,
    /// A global PAX header that would change later entries.
    #[error("a global PAX header sets `{key}`")]
    GlobalPax {
        /// The record, safe to print.
        key: String,
    },
    /// Long names and PAX headers are held in memory, so they have a limit.
    #[error("an extended header is larger than {limit} bytes")]
    HeaderTooLarge {
        /// The limit.
        limit: u64,
    },
    /// An extended attribute that ext4 cannot hold under that name or with that value.
    #[error("the extended attribute `{name}` is not usable")]
    BadXattr {
        /// The attribute, safe to print.
        name: String,
    },
    /// ext4 keeps the attributes of a file in one block.
    #[error("its extended attributes are larger than one block")]
    XattrsTooLarge,
    /// More entries than the limit.
    #[error("the archives have more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// More content than the limit.
    #[error("the files are larger than {limit} bytes together")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// Names, links, attributes and directories that need too much memory.
    #[error("its names and attributes need more than {limit} bytes of memory")]
    TooMuchMetadata {
        /// The limit.
        limit: u64,
    },
    /// The stream grows too far when unpacked.
    #[error("it unpacks to more than {limit} bytes")]
    UnpacksTooLarge {
        /// The limit.
        limit: u64,
    },
    /// The stream is nearly empty but unpacks to a lot.
    #[error("it is a compression bomb (more than {limit} times its size)")]
    Bomb {
        /// The limit.
        limit: u64,
    },
    /// The compressed stream cannot be read: damaged, cut, or wants too large a window.
    #[error("the compressed stream cannot be read: {words}")]
    BadCompression {
        /// What the decoder said.
        words: String,
    },
    /// The header's checksum is wrong, so this is no tar archive, or a damaged one.
    #[error("it is not a tar archive, or it is damaged")]
    BadChecksum,
    /// The archive ends before its end mark.
    #[error("the archive is cut short")]
    Truncated,
    /// Something other than zeros follows the end mark.
    #[error("there is something after the end of the archive")]
    TrailingGarbage,
}

impl Refusal {
    /// Always [`Kind::Invalid`]: the same archive meets the same rule again.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }

    /// What the user can do about it, where we know.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Refusal::AbsolutePath => "make the archive with relative names: tar -C ROOT -cf FILE .",
            Refusal::PaxSparse => "make the archive without --sparse",
            Refusal::BadChecksum | Refusal::Truncated => {
                "give a whole tar archive, plain or packed with gzip, xz or zstd"
            }
            Refusal::TooLarge { .. } | Refusal::UnpacksTooLarge { .. } => {
                "raise the limit on image sizes, or make the archive smaller"
            }
            _ => return None,
        })
    }
}
