//! Moves what a process writes from its pipes or terminal into its ring, as fast as the ring has room.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::output::Output;
use super::ring::Stream;
use crate::sys::poll;

/// Bytes of one read.
const READ: usize = 32 * 1024;
/// More than a terminal can hold back: 64 KiB in its buffers and 4 KiB in its line discipline.
const TERMINAL: usize = 128 * 1024;

/// The reading end of one stream.
pub struct Source {
    fd: Arc<AsyncFd<OwnedFd>>,
    terminal: bool,
}

impl Source {
    /// Takes a non-blocking descriptor.
    ///
    /// # Errors
    /// It cannot be polled.
    pub fn new(fd: OwnedFd, terminal: bool) -> io::Result<Self> {
        let fd = Arc::new(poll::watch(fd, Interest::READABLE)?);
        Ok(Self { fd, terminal })
    }

    /// The descriptor itself.
    pub fn fd(&self) -> Arc<AsyncFd<OwnedFd>> {
        self.fd.clone()
    }

    /// Moves at most `room` bytes; none at the end of the stream.
    async fn pass(&self, room: usize, stream: Stream, output: &Output) -> io::Result<usize> {
        loop {
            let mut ready = self.fd.readable().await?;
            // On the stack, so that a thousand idle streams hold no buffers.
            let mut buffer = [MaybeUninit::uninit(); READ];
            let limit = room.min(READ);
            let read = ready.try_io(|fd| {
                let (data, _) = rustix::io::read(fd.get_ref(), &mut buffer[..limit])?;
                output.push(stream, data);
                Ok(data.len())
            });
            if let Ok(result) = read {
                return result;
            }
        }
    }

    /// The leader has just ended: how many bytes are still in the pipe. Those of a terminal, which cannot be counted,
    /// are moved to `output` at once.
    pub fn left_at_exit(&self, output: &Output) -> usize {
        if !self.terminal {
            let left = rustix::io::ioctl_fionread(self.fd.get_ref()).unwrap_or(0);
            return usize::try_from(left).unwrap_or(usize::MAX);
        }
        let mut moved = 0;
        let mut buffer = vec![0; READ];
        while moved < TERMINAL {
            // Polling makes the kernel hand over what the other side has written but its worker not yet passed on.
            let mut poll = [PollFd::new(self.fd.get_ref(), PollFlags::IN)];
            let _ = rustix::event::poll(&mut poll, Some(&Timespec::default()));
            match rustix::io::read(self.fd.get_ref(), &mut *buffer) {
                Ok(length) if length > 0 => {
                    output.push(Stream::Stdout, &buffer[..length]);
                    moved += length;
                }
                Err(Errno::INTR) => {}
                _ => break,
            }
        }
        0
    }
}

/// Runs until the last writer has closed the stream.
pub async fn run(source: Arc<Source>, stream: Stream, output: Arc<Output>) {
    loop {
        let room = output.room(READ).await;
        match source.pass(room, stream, &output).await {
            Ok(length) if length > 0 => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal answers EIO when its last user has closed it.
            _ => break,
        }
    }
    output.close(stream);
}
