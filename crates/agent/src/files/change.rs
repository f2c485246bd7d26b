//! Renaming, and other modes and owners. What is found below a directory may be swapped for a link by the guest's users
//! at any moment, so nothing is changed by name: it is opened as itself first.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use hutch_guest::pb;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, fstat, openat};
use rustix::io::{self, Errno};
use tonic::Status;

use super::failed;
use super::read::refuse;
use super::walk::Walk;
use crate::accounts;

/// Renames `from` to `to`.
///
/// # Errors
/// The kernel's; another file system is one of them.
pub fn rename(from: &Path, to: &Path, keep_existing: bool) -> Result<(), Status> {
    let flags = match keep_existing {
        true => RenameFlags::NOREPLACE,
        false => RenameFlags::empty(),
    };
    match rustix::fs::renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => Ok(()),
        Err(Errno::XDEV) => Err(refuse(
            from,
            &format!(
                "cannot be moved to another file system, that of {}",
                to.display()
            ),
        )),
        // Which of the two it is about, the kernel does not say.
        Err(Errno::EXIST) => Err(failed("move to", to)(Errno::EXIST)),
        Err(errno) => Err(failed("move", from)(errno)),
    }
}

/// What is to be set.
struct Wish {
    mode: Option<Mode>,
    owner: Option<accounts::Account>,
}

/// Sets mode and owner of `path`, and with `recursive` of all below it.
///
/// # Errors
/// The kernel's; an owner that does not exist.
pub fn change(path: &Path, request: &pb::ChangeRequest) -> Result<(), Status> {
    let failed = failed("change", path);
    if request.mode.is_some_and(|mode| mode > 0o7777) {
        return Err(Status::invalid_argument("a mode is at most 07777"));
    }
    let wish = Wish {
        mode: request.mode.map(Mode::from_raw_mode),
        owner: match request.owner.as_str() {
            "" => None,
            owner => Some(accounts::find(owner)?),
        },
    };
    let top = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let top = top.map_err(&failed)?;
    let stat = fstat(&top).map_err(&failed)?;
    if request.recursive && FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(&top, ".", flags, Mode::empty()).map_err(&failed)?;
        let mut walk = Walk::begin(dir, b"", 0, None)?;
        while let Some(step) = walk.next().map_err(&failed)? {
            match step.open().and_then(|opened| wish.fulfil(&opened)) {
                // Removed meanwhile.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
    wish.fulfil(&top).map_err(failed)
}

impl Wish {
    /// Changes what is open, be it by a descriptor that can do nothing else.
    fn fulfil(&self, opened: &OwnedFd) -> io::Result<()> {
        if let Some(owner) = &self.owner {
            let (uid, gid) = (owner.identity.uid, owner.identity.gid);
            rustix::fs::chownat(opened, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        let Some(mode) = self.mode else {
            return Ok(());
        };
        // A link has no mode. The others' are set after the change of owner, which clears the set-user-id bits.
        if FileType::from_raw_mode(fstat(opened)?.st_mode) == FileType::Symlink {
            return Ok(());
        }
        let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
        rustix::fs::chmod(path.as_str(), mode)
    }
}
