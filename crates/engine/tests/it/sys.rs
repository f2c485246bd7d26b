//! Mounts of a test's own.
#![expect(unsafe_code, reason = "unsharing has no safe interface")]

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread, and those that it starts from now on, mounts which nobody else sees.
pub fn own_mounts() -> rustix::io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS)? };
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
}
