//! Byte streams that outlive connections: a virtio-serial port and a UART. Nodes may appear late; the kernel tells.
//!
//! A virtio-serial port reads as ended and polls as hung up for as long as no host has connected. Tokio keeps a hang-up
//! for good, so that one look at such a port would make a busy loop of it. Hence the port stands in an epoll set of its
//! own, edge-triggered, and tokio watches that set, which knows no hang-ups: each edge (host comes, goes, sends, takes)
//! wakes both directions, and a read of zero bytes only means to wait for the next.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use rustix::event::{Timespec, epoll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, SpecialCodeIndex};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::task::AbortHandle;

use super::socket::Socket;
use crate::error::{Context as _, Result};
use crate::sys::poll;
use crate::uevent::{self, Uevents};

/// Opens the virtio-serial port of that name, once there is one.
///
/// # Errors
/// It cannot be opened, or the kernel sends no news.
pub async fn virtio_port(name: &str) -> Result<Port> {
    let node = appear(|| find_port(name)).await?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(&node, flags, Mode::empty()).path("open", &node)?;
    Port::new(fd).path("watch", node)
}

/// Opens a serial line, once there is one, and makes it carry bytes as they are.
///
/// # Errors
/// It cannot be opened, or is no terminal line.
pub async fn uart(path: &Path) -> Result<Socket> {
    let node = appear(|| path.exists().then(|| path.to_owned())).await?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(&node, flags, Mode::empty()).path("open", &node)?;
    let mut line = rustix::termios::tcgetattr(&fd).path("set up", &node)?;
    line.make_raw();
    line.control_modes |= rustix::termios::ControlModes::CLOCAL;
    line.special_codes[SpecialCodeIndex::VMIN] = 1;
    line.special_codes[SpecialCodeIndex::VTIME] = 0;
    rustix::termios::tcsetattr(&fd, OptionalActions::Now, &line).path("set up", &node)?;
    Socket::new(fd).path("watch", node)
}

fn find_port(name: &str) -> Option<PathBuf> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let mut ports = ports.filter(|port| {
        let found = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
        found.trim_end() == name
    });
    let node = Path::new("/dev").join(ports.next()?.file_name());
    node.exists().then_some(node)
}

async fn appear(look: impl Fn() -> Option<PathBuf>) -> Result<PathBuf> {
    if let Some(found) = look() {
        return Ok(found);
    }
    let news = Uevents::open().what("listen for devices")?;
    let news = poll::watch(news, Interest::READABLE).what("listen for devices")?;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        let mut ready = news.readable().await.what("listen for devices")?;
        uevent::drain(news.get_ref());
        ready.clear_ready();
    }
}

/// A virtio-serial port.
pub struct Port {
    fd: OwnedFd,
    wakers: Arc<[AtomicWaker; 2]>,
    watcher: AbortHandle,
}

impl Port {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&set, &fd, epoll::EventData::new_u64(0), edges)?;
        let set = poll::watch(set, Interest::READABLE)?;
        let wakers = Arc::new([AtomicWaker::new(), AtomicWaker::new()]);
        let watcher = tokio::spawn(watch(set, wakers.clone())).abort_handle();
        Ok(Self {
            fd,
            wakers,
            watcher,
        })
    }
}

async fn watch(set: AsyncFd<OwnedFd>, wakers: Arc<[AtomicWaker; 2]>) {
    while let Ok(mut ready) = set.readable().await {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
        let _ = epoll::wait(set.get_ref(), &mut events, Some(&Timespec::default()));
        ready.clear_ready();
        for waker in wakers.iter() {
            waker.wake();
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Before looking, so that an edge in between is not lost.
        self.wakers[0].register(cx.waker());
        match poll::read(&self.fd, buf) {
            Ok(0) | Err(Errno::AGAIN) => Poll::Pending,
            Ok(_) => Poll::Ready(Ok(())),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wakers[1].register(cx.waker());
        match rustix::io::write(&self.fd, data) {
            Err(Errno::AGAIN) => Poll::Pending,
            result => Poll::Ready(result.map_err(io::Error::from)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
