//! Removing trees of any depth, without following links and with few descriptors: one directory is open at a time, and
//! the way up is `..`, checked against where we came from.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, statat, unlinkat};
use rustix::io::{self, Errno};
use tonic::Status;

use super::{failed, is_dots};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// How often directories may be found filled again before we give up against whoever does it.
const REFILLS: usize = 1000;

/// Removes what is at `path`: a file, a link, an empty directory, or with `recursive` a tree.
///
/// # Errors
/// The kernel's; the root directory is refused.
pub fn remove(path: &Path, recursive: bool) -> Result<(), Status> {
    let refuse = || Status::invalid_argument(format!("{}: will not be removed", path.display()));
    let name = path.file_name().ok_or_else(refuse)?;
    if path.canonicalize().is_ok_and(|path| path == Path::new("/")) && !path.is_symlink() {
        return Err(refuse());
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let failed = failed("remove", path);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat(CWD, parent.unwrap_or(Path::new(".")), flags, Mode::empty());
    let parent = parent.map_err(&failed)?;
    remove_at(&parent, name, recursive).map_err(&failed)
}

/// Removes `name` in `parent`.
fn remove_at(parent: &OwnedFd, name: &OsStr, recursive: bool) -> io::Result<()> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return unlinkat(parent, name, AtFlags::empty());
    }
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) if recursive => {}
        result => return result,
    }
    let dir = openat(parent, name, DIRECTORY, Mode::empty())?;
    empty(dir, None)?;
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes all below `dir`; with `device`, only of that file system: the first mount in it ends the removal.
///
/// # Errors
/// The first that the kernel refuses.
pub fn empty(dir: OwnedFd, device: Option<u64>) -> io::Result<()> {
    let mut at = dir;
    // Name of each directory on the way down, with the identity of the one above it.
    let mut way: Vec<(CString, (u64, u64))> = Vec::new();
    let mut refilled = 0;
    loop {
        if let Some(name) = clear(&at, device)? {
            let below = openat(&at, name.as_c_str(), DIRECTORY, Mode::empty())?;
            way.push((name, identity(&at)?));
            at = below;
            continue;
        }
        let Some((name, above)) = way.pop() else {
            return Ok(());
        };
        let parent = openat(&at, c"..", DIRECTORY, Mode::empty())?;
        if identity(&parent)? != above {
            // Somebody moved the directory away while we were in it.
            return Err(Errno::STALE);
        }
        at = parent;
        match unlinkat(&at, name.as_c_str(), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            // Written to meanwhile: emptied again by the next look.
            Err(Errno::NOTEMPTY) if refilled < REFILLS => refilled += 1,
            Err(errno) => return Err(errno),
        }
    }
}

/// Removes what can be removed from one directory at once; answers with a directory that has to be emptied first.
fn clear(dir: &OwnedFd, device: Option<u64>) -> io::Result<Option<CString>> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        if let Some(device) = device {
            let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if stat.st_dev != device {
                return Err(Errno::XDEV);
            }
        }
        match unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(errno),
        }
        match unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY) => return Ok(Some(name.to_owned())),
            Err(errno) => return Err(errno),
        }
    }
    Ok(None)
}

fn identity(dir: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exists(path: &Path) -> bool {
        path.symlink_metadata().is_ok()
    }

    #[test]
    fn links_go_and_what_they_point_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir_all(outside.join("deep")).unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b/c")).unwrap();
        std::fs::write(tree.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        assert!(remove(&tree, false).is_err());
        remove(&tree, true).unwrap();
        assert!(!exists(&tree));
        assert!(exists(&outside.join("deep")));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        remove(&link, true).unwrap();
        assert!(!exists(&link) && exists(&outside));
    }

    #[test]
    fn the_root_is_refused_under_every_name() {
        for root in ["/", "/..", "/./", "/proc/..", "/proc/../."] {
            assert!(remove(Path::new(root), true).is_err(), "{root}");
        }
    }

    #[test]
    fn a_tree_deeper_than_any_path_or_stack_goes() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut at = openat(CWD, &top, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&at, c"d", Mode::RWXU).unwrap();
            at = openat(&at, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        remove(&top, true).unwrap();
        assert!(!exists(&top));
    }
}
