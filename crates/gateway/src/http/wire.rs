//! A client's connection under the HTTP parser: guarded bytes in, no waiting for ever out, and an end that lets the
//! last answer arrive.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_util::io::poll_read_buf;

use super::clients::Conn;
use super::guard::{self, Guard};

/// Bytes asked of the socket at once.
const READ: usize = 16 * 1024;
/// How long, and for how many bytes, a client may go on sending after its connection's last answer. A socket that is
/// closed with unread bytes is reset, and the client would lose the answer that says why its upload was refused.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 64 * 1024 * 1024;

pub(super) struct Wire<S> {
    io: S,
    conn: Arc<Conn>,
    guard: Guard,
    /// What came, `good` bytes of which may be handed out.
    input: BytesMut,
    good: usize,
    /// Bytes came before the guard was there.
    unseen: bool,
    stall: Duration,
    writing: Option<Pin<Box<Sleep>>>,
    lingering: Option<(Pin<Box<Sleep>>, u64)>,
}

impl<S> Wire<S> {
    /// `input` was read from `io` before. A client that takes no byte for `stall` is cut.
    pub(super) fn new(
        io: S,
        input: BytesMut,
        guard: Guard,
        conn: Arc<Conn>,
        stall: Duration,
    ) -> Self {
        Self {
            io,
            conn,
            guard,
            unseen: !input.is_empty(),
            input,
            good: 0,
            stall,
            writing: None,
            lingering: None,
        }
    }

    fn look(&mut self) -> io::Result<()> {
        let raw = self.guard.is_raw();
        let looked = self.guard.advance(&mut self.input, self.good);
        let (good, refusal) =
            looked.map_err(|bad| io::Error::new(io::ErrorKind::InvalidData, bad))?;
        self.good = good;
        if let Some(refusal) = refusal {
            self.conn.refuse(refusal);
        }
        if !raw && self.guard.is_raw() {
            self.conn.raw.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What a write that makes no progress comes to.
    fn wait<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        // A WebSocket may be silent for longer; who copies it looks after that.
        if self.conn.raw.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        let stall = self.stall;
        let timer = self.writing.get_or_insert_with(|| Box::pin(sleep(stall)));
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unseen {
            this.unseen = false;
            this.look()?;
        }
        loop {
            if this.good > 0 {
                guard::take(&mut this.input, &mut this.good, buffer);
                return Poll::Ready(Ok(()));
            }
            if this.guard.is_shut() {
                // Its refusal is being answered; an end here would look like the client's.
                return Poll::Pending;
            }
            if this.guard.is_raw() {
                return Pin::new(&mut this.io).poll_read(context, buffer);
            }
            this.input.reserve(READ);
            let read = ready!(poll_read_buf(
                Pin::new(&mut this.io),
                context,
                &mut this.input
            ))?;
            if read == 0 {
                return Poll::Ready(Ok(()));
            }
            this.look()?;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Poll::Ready(written) = Pin::new(&mut self.io).poll_write(context, data) else {
            return self.wait(context);
        };
        self.writing = None;
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Poll::Ready(written) = Pin::new(&mut self.io).poll_write_vectored(context, data) else {
            return self.wait(context);
        };
        self.writing = None;
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
            this.lingering = Some((Box::pin(sleep(LINGER)), 0));
        }
        if this.conn.raw.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let Some((timer, swallowed)) = &mut this.lingering else {
            return Poll::Ready(Ok(()));
        };
        loop {
            if timer.as_mut().poll(context).is_ready() || *swallowed > LINGER_BYTES {
                return Poll::Ready(Ok(()));
            }
            this.input.clear();
            this.input.reserve(READ);
            let io = Pin::new(&mut this.io);
            match ready!(poll_read_buf(io, context, &mut this.input)) {
                Ok(0) | Err(_) => return Poll::Ready(Ok(())),
                Ok(read) => *swallowed += read as u64,
            }
        }
    }
}
