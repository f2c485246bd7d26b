//! Options of netlink sockets, for which rustix has no function. Everything `unsafe` of this crate is here.
#![expect(
    unsafe_code,
    reason = "setsockopt at SOL_NETLINK has no safe interface"
)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Refusals bring the kernel's words, and not the whole message that is refused (`NETLINK_EXT_ACK`, `NETLINK_CAP_ACK`).
pub(crate) fn explain_refusals(socket: impl AsFd) -> Result<(), Errno> {
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
        let on: libc::c_int = 1;
        // SAFETY: the value is an int that lives through the call, and its length is its own.
        let set = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set != 0 {
            let error = std::io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
        }
    }
    Ok(())
}
