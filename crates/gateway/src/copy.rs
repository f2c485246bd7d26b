//! Copies two streams into each other until both directions have ended, or until nothing has moved for a while.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};
use tokio::time::{Instant, sleep_until};

/// Bytes of each direction's buffer.
const BUFFER: usize = 8 * 1024;

/// How a copy ended.
#[derive(Debug)]
pub(crate) struct Copied {
    /// Bytes from the first stream to the second.
    pub(crate) forth: u64,
    /// Bytes from the second stream to the first.
    pub(crate) back: u64,
    /// In which way.
    pub(crate) end: io::Result<()>,
}

/// Copies until both have ended, one of them breaks, or neither has moved a byte for `idle`.
pub(crate) async fn both(
    a: impl AsyncRead + AsyncWrite + Unpin,
    b: impl AsyncRead + AsyncWrite + Unpin,
    idle: Duration,
) -> Copied {
    let began = Instant::now();
    let moved = Arc::new(AtomicU64::new(0));
    let (forth, back) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let mut a = Watched {
        io: a,
        read: forth.clone(),
        moved: moved.clone(),
        began,
    };
    let mut b = Watched {
        io: b,
        read: back.clone(),
        moved: moved.clone(),
        began,
    };
    let quiet = async {
        loop {
            let last = began + Duration::from_millis(moved.load(Ordering::Relaxed));
            if Instant::now() >= last + idle {
                return;
            }
            sleep_until(last + idle).await;
        }
    };
    let end = tokio::select! {
        copied = copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER, BUFFER) => copied.map(drop),
        () = quiet => Err(io::Error::new(io::ErrorKind::TimedOut, "nothing moved for too long")),
    };
    Copied {
        forth: forth.load(Ordering::Relaxed),
        back: back.load(Ordering::Relaxed),
        end,
    }
}

/// Notes when bytes move, and counts those that are read.
struct Watched<S> {
    io: S,
    read: Arc<AtomicU64>,
    /// Milliseconds after `began`.
    moved: Arc<AtomicU64>,
    began: Instant,
}

impl<S> Watched<S> {
    fn note(&self) {
        let now = self.began.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        self.note();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(context, data))?;
        self.note();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
