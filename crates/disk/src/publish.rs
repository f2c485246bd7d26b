//! Publishing: a file or directory appears whole under its name, or not at all, and stays after a
//! power cut.

use crate::Error;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Renames the directory `tmp` to `target` once everything in it is on disk. Both must be on one
/// filesystem. Never replaces: an existing `target` is [`Kind::Exists`](crate::Kind::Exists) and
/// `tmp` stays for the caller to remove.
pub fn publish_dir(tmp: &Path, target: &Path) -> Result<(), Error> {
    sync_tree(tmp)?;
    renameat_with(CWD, tmp, CWD, target, RenameFlags::NOREPLACE)
        .map_err(|errno| Error::io("publish", target)(errno.into()))?;
    sync_dir(parent(target))
}

/// Renames the file `tmp` to `target` once it is on disk. Both must be on one filesystem. Replaces what was there.
pub fn publish_file(tmp: &Path, target: &Path) -> Result<(), Error> {
    File::open(tmp)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("sync", tmp))?;
    std::fs::rename(tmp, target).map_err(Error::io("publish", target))?;
    sync_dir(parent(target))
}

/// Makes the names in `dir` durable.
pub fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("sync", dir))
}

/// Writes `bytes` as `path` with exactly the permission bits `mode`, replacing what was there, so
/// that a reader or a crash sees either the old or the new content.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let dir = parent(path);
    let mut tmp = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(dir)
        .map_err(Error::io("create a file in", dir))?;
    tmp.write_all(bytes)
        .and_then(|()| tmp.as_file().set_permissions(Permissions::from_mode(mode)))
        .and_then(|()| tmp.as_file().sync_all())
        .map_err(Error::io("write", path))?;
    tmp.persist(path)
        .map_err(|error| Error::io("write", path)(error.error))?;
    sync_dir(dir)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) => Path::new("."),
        None => path,
    }
}

fn sync_tree(dir: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(Error::io("sync", &path))?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn a_file_is_published_whole_and_replaces() {
        let root = tempfile::tempdir().unwrap();
        let (tmp, target) = (root.path().join("tmp"), root.path().join("final"));
        std::fs::write(&target, "old").unwrap();
        std::fs::write(&tmp, "new").unwrap();
        publish_file(&tmp, &target).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert!(!tmp.exists());
        assert!(publish_file(&tmp, &target).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn a_directory_is_published_once() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("final");
        for (name, outcome) in [("one", None), ("two", Some(Kind::Exists))] {
            let tmp = root.path().join(name);
            std::fs::create_dir_all(tmp.join("sub")).unwrap();
            std::fs::write(tmp.join("sub/file"), name).unwrap();
            std::os::unix::fs::symlink("nowhere", tmp.join("link")).unwrap();
            assert_eq!(
                publish_dir(&tmp, &target).err().map(|error| error.kind()),
                outcome
            );
        }
        assert_eq!(std::fs::read(target.join("sub/file")).unwrap(), b"one");
        assert!(!root.path().join("one").exists());
    }

    #[test]
    fn an_empty_directory_is_not_replaced_either() {
        let root = tempfile::tempdir().unwrap();
        let (tmp, target) = (root.path().join("tmp"), root.path().join("final"));
        std::fs::create_dir(&tmp).unwrap();
        std::fs::create_dir(&target).unwrap();
        assert_eq!(publish_dir(&tmp, &target).unwrap_err().kind(), Kind::Exists);
    }

    #[test]
    fn a_written_file_is_replaced_whole_with_its_mode() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("machine.json");
        write_atomic(&path, b"a long first version", 0o600).unwrap();
        write_atomic(&path, b"second", 0o640).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
        let missing = root.path().join("no/file");
        assert_eq!(
            write_atomic(&missing, b"", 0o600).unwrap_err().kind(),
            Kind::NotFound
        );
    }
}
