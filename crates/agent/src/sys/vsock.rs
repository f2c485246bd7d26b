//! Listening on AF_VSOCK, and taking over descriptors that were passed by number.
//! Facts: `struct sockaddr_vm` and `VMADDR_CID_*` of `linux/vm_sockets.h`.
#![expect(unsafe_code, reason = "rustix has no vsock addresses")]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A non-blocking listener on `port` of every context id of this guest.
///
/// # Errors
/// The port is taken, or the kernel has no vsock.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    // SAFETY: the pointer and the length describe `address`, which outlives the call.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    if bound == -1 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// Accepts one connection with the context id of its peer.
///
/// # Errors
/// `EAGAIN` when none waits.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    let mut length = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `address`; the descriptor returned is new and ours.
    let socket = unsafe {
        let fd = libc::accept4(
            listener.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut length,
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        );
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    Ok((socket, address.svm_cid))
}

/// Takes over descriptor `fd`, which the starter of this process left open for it.
///
/// Must be called before anything else opens descriptors, so that the number cannot belong to somebody here.
///
/// # Errors
/// No such descriptor, or a standard one.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only the flags of the number are asked for.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as just seen, and by the contract above nothing in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
