//! Descriptors that the runtime watches.
#![expect(
    unsafe_code,
    reason = "tokio trusts its caller to keep a watched descriptor open"
)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Lets the runtime watch a non-blocking descriptor.
///
/// # Errors
/// It cannot be polled.
pub fn watch(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open until it is dropped, and stays inside the AsyncFd until then.
    Ok(unsafe { AsyncFd::register_with_interest(fd.into(), interest)? })
}
