//! Descriptors and limits that go from one process to the next: the only unsafe code of this
//! crate.
#![expect(
    unsafe_code,
    reason = "code between fork and exec, and descriptors known by number"
)]

use rustix::io::FdFlags;
use rustix::mount::MountPropagationFlags;
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Sends `at_our_end` to the command's process when our thread ends, and lets it inherit `files` under their own
/// numbers. `memory_bytes` bounds its address space.
pub(crate) fn bind(
    command: &mut Command,
    files: &[&File],
    memory_bytes: Option<u64>,
    at_our_end: Signal,
) {
    let numbers: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    let before_exec = move || -> io::Result<()> {
        for number in &numbers {
            // SAFETY: the parent's `files` outlive the spawn, so the number is open here.
            let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
            rustix::io::fcntl_setfd(file, FdFlags::empty())?;
        }
        if let Some(bytes) = memory_bytes {
            lower(Resource::As, bytes)?;
        }
        Ok(rustix::process::set_parent_process_death_signal(Some(
            at_our_end,
        ))?)
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor takes locks.
    unsafe { command.pre_exec(before_exec) };
}

/// Gives the command's process mounts of its own: what it mounts nobody else sees, and it goes with its last process,
/// however that ends. Needs root.
pub(crate) fn own_mounts(command: &mut Command) {
    let before_exec = || -> io::Result<()> {
        // SAFETY: the child has one thread and shares no open directory or root with anybody.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        match rustix::mount::mount_change(c"/", private) {
            // In a chroot the root is no mount, and whether mounts are shared was decided by who made it.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            result => Ok(result?),
        }
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor takes locks.
    unsafe { command.pre_exec(before_exec) };
}

/// Lowers a limit of this process, never raises it.
pub(crate) fn lower(resource: Resource, to: u64) -> io::Result<()> {
    let now = rustix::process::getrlimit(resource);
    let to = now.maximum.map_or(to, |maximum| maximum.min(to));
    let limit = Rlimit {
        current: Some(to),
        maximum: Some(to),
    };
    Ok(rustix::process::setrlimit(resource, limit)?)
}

/// Takes over the descriptor `number`, which the parent left open for us. Call once per number,
/// before anything else opens files.
pub(crate) fn inherited(number: RawFd) -> io::Result<File> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only looked at; a closed number gives an error.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the number is open, and by this function's contract nobody else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// Closes every descriptor above 2 that is not in `keep`. Call in a process with one thread that
/// holds no other files.
pub(crate) fn close_others(keep: &[&File]) -> io::Result<()> {
    let keep: Vec<RawFd> = keep.iter().map(|file| file.as_raw_fd()).collect();
    let mut open: Vec<RawFd> = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<RawFd>().ok()),
        );
    }
    for number in open
        .into_iter()
        .filter(|number| *number > 2 && !keep.contains(number))
    {
        // SAFETY: only looked at: the list's own descriptor is closed already and gives an error.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        if rustix::io::fcntl_getfd(borrowed).is_ok() {
            // SAFETY: by this function's contract no value in this process owns the number.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
    Ok(())
}
