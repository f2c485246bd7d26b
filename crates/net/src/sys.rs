//! The ioctls of `/dev/net/tun`. Facts: `linux/if_tun.h`, `linux/if.h`; the kernel's `drivers/net/tun.c`.
#![expect(
    unsafe_code,
    reason = "ioctls of the tun driver have no safe interface"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// An ethernet card; each packet has a `virtio_net_hdr` and no other header before it.
///
/// A guest's state that was saved with such a tap can only go on with one that has the same header.
pub(crate) const TAP: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Only a new one (`IFF_TUN_EXCL`).
pub(crate) const NEW: libc::c_int = 0x8000;
/// It stays when nobody has it open. The kernel tells it, and takes it only by [`set_persistent`].
pub(crate) const PERSISTENT: libc::c_int = 0x0800;

/// The kernel's `struct ifreq`. `name` is shorter than its field, as the caller has seen to.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let field = request.ifr_name.iter_mut();
    for (to, from) in field.take(crate::MAX_INTERFACE_NAME).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

/// Makes `tun`, an open `/dev/net/tun`, the way into the interface `name` (`TUNSETIFF`). One that is missing is made,
/// where the caller may make it, and is gone with `tun` again.
///
/// # Errors
/// `EINVAL`: that interface is of another kind. `EBUSY`: somebody has it open, or it is there with [`NEW`]. `EPERM`: it
/// belongs to another user, or is missing and the caller may make none.
pub(crate) fn attach(tun: impl AsFd, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = request(name, flags);
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: the request outlives the call, which reads and writes no more than it.
    match unsafe { libc::ioctl(tun, libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The flags of the interface that `tun` is attached to (`TUNGETIFF`).
pub(crate) fn flags(tun: impl AsFd) -> io::Result<libc::c_int> {
    let mut request = request("", 0);
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: the request outlives the call, which writes no more than it.
    match unsafe { libc::ioctl(tun, libc::TUNGETIFF, &raw mut request) } {
        // SAFETY: this member is the one that the call has written.
        0 => Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags })),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets that user attach to the interface, who needs no privilege then (`TUNSETOWNER`).
pub(crate) fn set_owner(tun: impl AsFd, uid: u32) -> io::Result<()> {
    set(tun, libc::TUNSETOWNER, libc::c_ulong::from(uid))
}

/// Whether the interface stays when nobody has it open (`TUNSETPERSIST`).
pub(crate) fn set_persistent(tun: impl AsFd, persistent: bool) -> io::Result<()> {
    set(tun, libc::TUNSETPERSIST, libc::c_ulong::from(persistent))
}

fn set(tun: impl AsFd, what: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: both of these take a number and no memory of ours.
    match unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), what, value) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread a network namespace of its own, which goes with the last thread and descriptor in it.
#[cfg(test)]
pub(crate) fn own_network() -> rustix::io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
}
