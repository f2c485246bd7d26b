//! Sizes: what a disk file holds and what its filesystem has left.

use crate::Error;
use crate::clone::is_regular;
use std::fs::OpenOptions;
use std::path::Path;

/// Makes the disk file `path` hold `size_bytes`; the new part is a hole. The same size again is
/// fine, a smaller one is [`Error::Shrink`].
pub fn grow(path: &Path, size_bytes: u64) -> Result<(), Error> {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(Error::io("open", path))?;
    if !is_regular(&file).map_err(|errno| Error::io("inspect", path)(errno.into()))? {
        return Err(Error::NotAFile {
            path: path.to_owned(),
        });
    }
    let now = file
        .metadata()
        .map_err(Error::io("read the size of", path))?
        .len();
    if size_bytes < now {
        let path = path.to_owned();
        return Err(Error::Shrink {
            path,
            size_bytes: now,
            wanted_bytes: size_bytes,
        });
    }
    file.set_len(size_bytes).map_err(Error::io("grow", path))
}

/// Bytes that this process may still write to the filesystem of `dir` (without root's reserve,
/// unless we are root and the kernel counts it for us).
pub fn free_bytes(dir: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(dir).map_err(|errno| Error::io("inspect", dir)(errno.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, "data").unwrap();
        grow(&disk, 8192).unwrap();
        grow(&disk, 8192).unwrap();
        let error = grow(&disk, 8191).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(
            error
                .to_string()
                .ends_with("holds 8192 bytes and cannot shrink to 8191")
        );
        let bytes = std::fs::read(&disk).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (8192, &b"data"[..]));
        assert_eq!(grow(dir.path(), 1).unwrap_err().kind(), Kind::Other);
    }

    #[test]
    fn free_space_is_known() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        assert_eq!(
            free_bytes(&dir.path().join("no")).unwrap_err().kind(),
            Kind::NotFound
        );
    }
}
