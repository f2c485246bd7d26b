//! Clones of disk files: shared blocks where the filesystem can (reflink), else a copy that keeps
//! holes.

use crate::Error;
use rustix::fs::{FileType, SeekFrom};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// How a clone was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Blocks are shared until one side writes (`FICLONE`; btrfs, XFS).
    Reflink,
    /// Data was copied; holes stayed holes.
    SparseCopy,
}

/// A finished clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cloned {
    /// How it was made.
    pub method: Method,
    /// Bytes that were really copied: 0 for a reflink.
    pub bytes_copied: u64,
}

/// Makes `to` a clone of the regular file `from`, mode 0600.
///
/// Fails with [`Kind::Exists`](crate::Kind::Exists) when `to` exists; removes what it made when
/// it fails later. Does not sync: an unfinished clone has no value after a power cut.
pub fn clone_file(from: &Path, to: &Path) -> Result<Cloned, Error> {
    let source = File::open(from).map_err(Error::io("open", from))?;
    let meta = source
        .metadata()
        .map_err(Error::io("read the size of", from))?;
    if !meta.is_file() {
        return Err(Error::NotAFile {
            path: from.to_owned(),
        });
    }
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(Error::io("create", to))?;
    fill(&source, &target, meta.len()).map_err(|errno| {
        // The first error is the one to report; a leftover is swept with its directory.
        let _ = std::fs::remove_file(to);
        Error::io("copy to", to)(errno.into())
    })
}

/// Whether files in `dir` can be cloned by reflink; `false` also when `dir` cannot be written.
pub fn reflink_supported(dir: &Path) -> bool {
    let attempt = || -> std::io::Result<()> {
        let source = tempfile::tempfile_in(dir)?;
        source.write_all_at(&[1; 4096], 0)?;
        Ok(rustix::fs::ioctl_ficlone(
            tempfile::tempfile_in(dir)?,
            &source,
        )?)
    };
    attempt().is_ok()
}

fn fill(source: &File, target: &File, len: u64) -> Result<Cloned, Errno> {
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => {
            return Ok(Cloned {
                method: Method::Reflink,
                bytes_copied: 0,
            });
        }
        Err(full @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => return Err(full),
        // Every other errno has meant "not here" on some filesystem.
        Err(_) => {}
    }
    rustix::fs::ftruncate(target, len)?;
    let bytes_copied = copy_data(source, target, len)?;
    Ok(Cloned {
        method: Method::SparseCopy,
        bytes_copied,
    })
}

/// Copies the data extents of the first `len` bytes; what the source has as holes is skipped.
fn copy_data(source: &File, target: &File, len: u64) -> Result<u64, Errno> {
    let mut copied = 0;
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) if start < len => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?.min(len);
        copy_range(source, target, start, end)?;
        copied += end - start;
        at = end;
    }
    Ok(copied)
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> Result<(), Errno> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let want = usize::try_from(end - from)
            .unwrap_or(usize::MAX)
            .min(1 << 30);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
            // The source became shorter meanwhile: a clone of it would be a lie.
            Ok(0) => return Err(Errno::IO),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                return copy_by_buffer(source, target, from, end);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// For pairs of filesystems between which the kernel does not copy.
fn copy_by_buffer(source: &File, target: &File, start: u64, end: u64) -> Result<(), Errno> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        source.read_exact_at(&mut buffer[..want], at).map_err(io)?;
        target.write_all_at(&buffer[..want], at).map_err(io)?;
        at += want as u64;
    }
    Ok(())
}

/// Whether `file` is a regular file.
pub(crate) fn is_regular(file: &File) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::RegularFile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::test_support::SmallFilesystem;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn sparse_file(path: &Path, len: u64, chunks: &[(u64, Vec<u8>)]) {
        let file = File::create(path).unwrap();
        for (at, bytes) in chunks {
            file.write_all_at(bytes, *at).unwrap();
        }
        file.set_len(len).unwrap();
    }

    #[test]
    fn an_existing_target_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert_eq!(clone_file(&from, &to).unwrap_err().kind(), Kind::Exists);
        assert_eq!(std::fs::read(&to).unwrap(), b"old");
    }

    #[test]
    fn a_missing_source_and_a_directory_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("b");
        assert_eq!(
            clone_file(&dir.path().join("a"), &to).unwrap_err().kind(),
            Kind::NotFound
        );
        assert_eq!(
            clone_file(dir.path(), &to).unwrap_err().kind(),
            Kind::Invalid
        );
        assert!(!to.exists());
    }

    #[test]
    fn a_full_filesystem_is_reported_as_full_and_leaves_nothing() {
        let source = tempfile::tempdir().unwrap();
        let from = source.path().join("a");
        std::fs::write(&from, vec![7; 4 << 20]).unwrap();
        let Some(small) = SmallFilesystem::mount("1m") else {
            return;
        };
        let to = small.path().join("b");
        assert_eq!(clone_file(&from, &to).unwrap_err().kind(), Kind::Full);
        assert!(!to.exists());
    }

    #[test]
    fn holes_are_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        sparse_file(&from, 1 << 30, &[(256 << 20, vec![1; 65536])]);
        let cloned = clone_file(&from, &to).unwrap();
        assert!(cloned.bytes_copied <= 1 << 20, "{cloned:?}");
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 <= 1 << 20);
        assert_eq!(std::fs::metadata(&to).unwrap().len(), 1 << 30);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_clone_equals_its_source(
            len in 0u64..2_000_000,
            chunks in prop::collection::vec((0u64..1_900_000, prop::collection::vec(any::<u8>(), 1..9000)), 0..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (from, to) = (dir.path().join("a"), dir.path().join("b"));
            sparse_file(&from, len, &chunks);
            clone_file(&from, &to).unwrap();
            prop_assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
            let by_buffer = File::create(dir.path().join("c")).unwrap();
            copy_by_buffer(&File::open(&from).unwrap(), &by_buffer, 0, len).unwrap();
            prop_assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(dir.path().join("c")).unwrap());
        }
    }
}
