//! The one thing that a test cannot ask for safely.
#![expect(unsafe_code, reason = "namespaces have no safe interface")]

use rustix::thread::UnshareFlags;

/// Gives the calling thread, and all threads and processes that it starts from now on, a network of their own, which goes
/// with the last of them.
pub fn own_network() -> rustix::io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}
