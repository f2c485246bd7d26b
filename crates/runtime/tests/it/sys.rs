//! What tests cannot ask for safely.
#![expect(unsafe_code, reason = "namespaces and taps have no safe interface")]

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::thread::UnshareFlags;

/// Gives the calling thread, and all threads and processes that it starts from now on, a network of their own, which goes
/// with the last of them.
pub fn own_network() -> rustix::io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Opens a tap that is there, as a shim does.
pub fn open_tap(name: &str) -> File {
    let mut options = File::options();
    let tun = options.read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..15].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request outlives the call, which reads and writes no more than it.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(done, 0, "{name}: {}", std::io::Error::last_os_error());
    tun
}
