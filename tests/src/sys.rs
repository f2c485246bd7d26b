//! Network namespaces of tests.
#![expect(unsafe_code, reason = "unsharing is unsafe in general")]

/// Gives the calling thread a network namespace of its own, which goes with the last thread and descriptor in it.
pub fn own_network() -> rustix::io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
}
