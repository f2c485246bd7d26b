//! Descriptors that the runtime watches, and reading from them without clearing the buffer first.
#![expect(
    unsafe_code,
    reason = "tokio trusts its caller to keep a watched descriptor open, and to have read what it says"
)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

/// Lets the runtime watch a non-blocking descriptor.
///
/// # Errors
/// It cannot be polled.
pub fn watch(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open until it is dropped, and stays inside the AsyncFd until then.
    Ok(unsafe { AsyncFd::register_with_interest(fd.into(), interest)? })
}

/// Reads once into what is free of `buf`, and says how many bytes came.
///
/// # Errors
/// The kernel's.
pub fn read(fd: impl AsFd, buf: &mut ReadBuf<'_>) -> rustix::io::Result<usize> {
    // SAFETY: nothing is made uninitialised; the kernel only writes, and rustix says how much of it.
    let (came, _) = rustix::io::read(fd, unsafe { buf.unfilled_mut() })?;
    let length = came.len();
    // SAFETY: the kernel has just written these bytes.
    unsafe { buf.assume_init(length) };
    buf.advance(length);
    Ok(length)
}
