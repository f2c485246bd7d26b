//! News from the kernel about devices: a wake-up to look again, nothing more. The messages are not parsed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// A subscription. What happens between opening it and waiting is not lost: open first, then look, then wait.
pub struct Uevents(OwnedFd);

impl Uevents {
    /// Subscribes to what the kernel itself sends.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 1))?;
        Ok(Self(fd))
    }

    /// Waits for news; false when `deadline` came first.
    pub fn wait(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut poll = [PollFd::new(&self.0, PollFlags::IN)];
        let came = rustix::event::poll(&mut poll, Some(&left)) != Ok(0);
        drain(&self.0);
        came
    }
}

impl From<Uevents> for OwnedFd {
    fn from(events: Uevents) -> Self {
        events.0
    }
}

/// Takes all news that have come. Lost ones (`ENOBUFS`) are news as well.
pub fn drain(events: &OwnedFd) {
    let mut ignored = [0; 4096];
    loop {
        match rustix::net::recv(events, &mut ignored, RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
