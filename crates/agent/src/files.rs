//! The file calls: what a path means, looking, listing, making and removing. Reading and writing contents are below.
//! All of it blocks and runs on the blocking pool.
//!
//! Paths come from the host, which may do anything in the guest; what is defended against are trees made by the
//! guest's users: links swapped while we walk, endless depth, fifos that would block, directories without an end.

pub mod change;
pub mod glob;
pub mod read;
pub mod remove;
pub mod walk;
pub mod write;

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use hutch_guest::{limits, pb};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tonic::Status;

use crate::status;

/// Bytes that one page of a listing may have; names and link targets are up to 4 KiB each.
const PAGE: usize = limits::MESSAGE / 2;

/// The absolute form of a path from the host.
///
/// # Errors
/// Empty, with a NUL byte, or longer than the kernel takes.
pub fn path(base: &Path, path: &str) -> Result<PathBuf, Status> {
    if path.is_empty() {
        return Err(Status::invalid_argument("the path is empty"));
    }
    if path.contains('\0') {
        return Err(Status::invalid_argument("a NUL byte in the path"));
    }
    let path = base.join(path);
    if path.as_os_str().len() >= 4096 {
        return Err(Status::invalid_argument(
            "the path has more than 4095 bytes",
        ));
    }
    Ok(path)
}

/// `verb path: what the kernel says`.
pub fn failed<E: Into<io::Error>>(verb: &str, path: &Path) -> impl Fn(E) -> Status {
    move |error| status::of_io(&format!("{verb} {}", path.display()), &error.into())
}

/// Runs blocking work on the pool.
///
/// # Errors
/// Those of the work.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Status::cancelled("the agent ends")))
}

/// Describes what is at `path`.
///
/// # Errors
/// The kernel's.
pub fn stat(path: &Path, follow: bool) -> Result<pb::FileInfo, Status> {
    let flags = if follow {
        AtFlags::empty()
    } else {
        AtFlags::SYMLINK_NOFOLLOW
    };
    let stat = rustix::fs::statat(CWD, path, flags).map_err(failed("stat", path))?;
    let target = match kind(&stat) {
        pb::file_info::Kind::Symlink => rustix::fs::readlink(path, Vec::new()).ok(),
        _ => None,
    };
    let name = path.file_name().map_or(&b"/"[..], |name| name.as_bytes());
    Ok(info(name, &stat, target))
}

fn kind(stat: &Stat) -> pb::file_info::Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => pb::file_info::Kind::File,
        FileType::Directory => pb::file_info::Kind::Directory,
        FileType::Symlink => pb::file_info::Kind::Symlink,
        _ => pb::file_info::Kind::Other,
    }
}

/// In the protocol's words.
pub fn info(name: &[u8], stat: &Stat, target: Option<CString>) -> pb::FileInfo {
    let modified_ms = i128::from(stat.st_mtime) * 1000 + i128::from(stat.st_mtime_nsec) / 1_000_000;
    pb::FileInfo {
        name: Bytes::copy_from_slice(name),
        kind: kind(stat).into(),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_unix_ms: i64::try_from(modified_ms).unwrap_or(i64::MAX),
        link_target: target.map(CString::into_bytes).unwrap_or_default().into(),
    }
}

/// One page of a directory: names after `after`, in byte order. Memory is bounded by the page, not by the directory.
///
/// # Errors
/// The kernel's; `limit` is cut to what fits into one message.
pub fn list(path: &Path, after: &[u8], limit: u32) -> Result<pb::ListDirReply, Status> {
    let failed = failed("list", path);
    let limit = match limit {
        0 => limits::LIST_ENTRIES,
        limit => limit.min(limits::LIST_ENTRIES),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(&failed)?;
    let (names, mut more) = walk::names(&dir, after, limit as usize).map_err(&failed)?;
    let mut entries = Vec::new();
    let mut bytes = 0;
    for name in names {
        let stat = rustix::fs::statat(&dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
        let stat = match stat {
            Ok(stat) => stat,
            // Removed meanwhile.
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(failed(errno)),
        };
        let target = match kind(&stat) {
            pb::file_info::Kind::Symlink => {
                rustix::fs::readlinkat(&dir, name.as_slice(), Vec::new()).ok()
            }
            _ => None,
        };
        bytes += name.len() + target.as_ref().map_or(0, |t| t.as_bytes().len()) + 64;
        if bytes > PAGE {
            more = true;
            break;
        }
        entries.push(info(&name, &stat, target));
    }
    Ok(pb::ListDirReply { entries, more })
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// Makes a directory, with `parents` those above it too, and then its being there already is no error.
///
/// # Errors
/// The kernel's.
pub fn make_dir(path: &Path, mode: u32, parents: bool) -> Result<(), Status> {
    let mode = match mode {
        0 => 0o755,
        mode => mode & 0o7777,
    };
    if parents {
        if let Some(parent) = path.parent() {
            make_parents(parent)?;
        }
        if path.is_dir() {
            return Ok(());
        }
    }
    rustix::fs::mkdir(path, Mode::from_raw_mode(mode)).map_err(failed("make directory", path))?;
    // The umask has taken its part of the mode.
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).map_err(failed("make directory", path))
}

/// Makes `path` and all above it with mode 0755.
///
/// # Errors
/// The kernel's.
pub fn make_parents(path: &Path) -> Result<(), Status> {
    let mut missing = Vec::new();
    let mut at = Some(path);
    while let Some(dir) = at {
        if dir.as_os_str().is_empty() || dir.is_dir() {
            break;
        }
        missing.push(dir);
        at = dir.parent();
    }
    for dir in missing.into_iter().rev() {
        match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
            Err(Errno::EXIST) if dir.is_dir() => {}
            result => result.map_err(failed("make directory", dir))?,
        }
    }
    Ok(())
}

/// Where writing to `path` ends up when its last part is a link.
pub fn through_links(path: PathBuf) -> PathBuf {
    let is_link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    match is_link.then(|| path.canonicalize()) {
        Some(Ok(target)) => target,
        // A link to nowhere is replaced.
        _ => path,
    }
}

/// A new name that nobody uses, beside `path`.
pub fn beside(path: &Path) -> Result<PathBuf, Status> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(failed("name a temporary file for", path))?;
    let name = format!(".hutch-{:016x}", u64::from_ne_bytes(random));
    let parent = path.parent().unwrap_or(Path::new("/"));
    Ok(parent.join(name))
}
