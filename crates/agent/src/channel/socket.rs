//! A stream over a non-blocking descriptor whose end is a read of zero bytes: a vsock connection, a UART.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys::poll;

/// The stream.
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Takes a non-blocking descriptor.
    ///
    /// # Errors
    /// It cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(poll::watch(
            fd,
            Interest::READABLE | Interest::WRITABLE,
        )?))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            if let Ok(result) = guard.try_io(|fd| Ok(poll::read(fd.get_ref(), buf)?)) {
                return Poll::Ready(result.map(|_| ()));
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            let written = guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?));
            if let Ok(result) = written {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Not a socket in the case of a UART; that one has no end.
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}
