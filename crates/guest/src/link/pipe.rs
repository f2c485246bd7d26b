//! One session's two directions between the stream that its user holds and the pump that moves frames. It checks the
//! order of what comes and numbers what goes; it does no IO.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::End;
use super::frame::{self, Frame, Kind};

/// Framed bytes that may wait for the port before a writer has to wait.
const OUTBOUND: usize = 64 * 1024;
/// Capacity that an empty queue keeps.
const INBOUND_KEPT: usize = 256 * 1024;

/// The state that stream and pump share.
pub(super) struct Pipe {
    session: u32,
    state: Mutex<State>,
    /// Wakes the pump's writer: bytes to send, or the stream was dropped.
    pub(super) outgoing: Arc<Notify>,
    /// Wakes the pump's reader: the queue has room again.
    pub(super) room: Notify,
    /// Tells that the stream was dropped.
    pub(super) gone: Notify,
}

#[derive(Default)]
struct State {
    /// Copied out of the frames: what a tiny payload would hold on to is the whole buffer that it was read into.
    inbound: BytesMut,
    expected: u32,
    outbound: BytesMut,
    next: u32,
    fin_sent: bool,
    dropped: bool,
    /// Why nothing more comes in.
    end: Option<End>,
    /// Why nothing more goes out.
    broken: Option<End>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn finish_writing(&mut self, session: u32) {
        if !self.fin_sent {
            frame::encode(&mut self.outbound, Kind::Fin, session, self.next, &[]);
            self.fin_sent = true;
        }
    }

    fn wake_all(&mut self) {
        for waker in [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }
}

impl Pipe {
    pub(super) fn open(session: u32, outgoing: Arc<Notify>) -> (Arc<Self>, LinkStream) {
        let pipe = Arc::new(Self {
            session,
            state: Mutex::default(),
            outgoing,
            room: Notify::new(),
            gone: Notify::new(),
        });
        (pipe.clone(), LinkStream { pipe })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding it")
    }

    pub(super) fn session(&self) -> u32 {
        self.session
    }

    /// Takes a DATA or FIN of this session. An error ends the session.
    pub(super) fn deliver(&self, frame: Frame, limit: usize) -> Result<(), End> {
        let mut state = self.lock();
        if state.end.is_some() {
            return Ok(());
        }
        let result = if frame.sequence != state.expected {
            Err(End::Gap {
                expected: state.expected,
                found: frame.sequence,
            })
        } else if state.inbound.len() > limit {
            Err(End::Overflow)
        } else {
            Ok(())
        };
        if result.is_ok() {
            state.expected = state.expected.wrapping_add(1);
            match frame.kind {
                Kind::Fin => state.end = Some(End::Closed),
                _ if state.dropped => {}
                _ => state.inbound.extend_from_slice(&frame.payload),
            }
            if let Some(reader) = state.reader.take() {
                reader.wake();
            }
        }
        drop(state);
        result.inspect_err(|end| self.end(*end))
    }

    /// Ends the session: the stream's writes fail, its reads too once what came before is read. The other side gets a
    /// FIN if the line still serves this session.
    pub(super) fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(end);
        }
        if state.broken.is_none() {
            state.broken = Some(end);
            state.finish_writing(self.session);
        }
        if matches!(end, End::Replaced | End::Overflow) {
            state.inbound = BytesMut::new();
        }
        state.wake_all();
        drop(state);
        self.outgoing.notify_one();
        self.room.notify_one();
    }

    /// Whether the session was ended by anything but the other side's orderly close.
    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// Whether the stream is gone.
    #[cfg(feature = "host")]
    pub(super) fn is_dropped(&self) -> bool {
        self.lock().dropped
    }

    /// Whether more than `limit` waits for the reader.
    #[cfg(feature = "host")]
    pub(super) fn is_full(&self, limit: usize) -> bool {
        self.lock().inbound.len() > limit
    }

    /// Appends the framed bytes that wait to be sent to `batch`.
    pub(super) fn take_outbound(&self, batch: &mut BytesMut) {
        let mut state = self.lock();
        if batch.is_empty() {
            std::mem::swap(batch, &mut state.outbound);
        } else {
            batch.extend_from_slice(&state.outbound);
        }
        state.outbound.clear();
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }
}

/// One connection over a line: a byte stream for HTTP/2.
///
/// After an orderly close by the other side reads give the end of file. After anything else reads and writes fail with
/// an error whose source is the [`End`].
pub struct LinkStream {
    pipe: Arc<Pipe>,
}

impl LinkStream {
    /// Why the connection is over, or `None` while it lasts.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        self.pipe.lock().end
    }
}

impl AsyncRead for LinkStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.pipe.lock();
        if state.inbound.is_empty() {
            return match state.end {
                None => {
                    state.reader = Some(context.waker().clone());
                    Poll::Pending
                }
                Some(End::Closed) => Poll::Ready(Ok(())),
                Some(end) => Poll::Ready(Err(end.into())),
            };
        }
        let length = state.inbound.len().min(buffer.remaining());
        buffer.put_slice(&state.inbound[..length]);
        state.inbound.advance(length);
        if state.inbound.is_empty() && state.inbound.capacity() > INBOUND_KEPT {
            state.inbound = BytesMut::new();
        }
        drop(state);
        self.pipe.room.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LinkStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.pipe.lock();
        if let Some(end) = state.broken {
            return Poll::Ready(Err(end.into()));
        }
        if state.fin_sent {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = OUTBOUND.saturating_sub(state.outbound.len());
        if room == 0 {
            state.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let data = &data[..data.len().min(room)];
        for payload in data.chunks(frame::PAYLOAD) {
            let sequence = state.next;
            frame::encode(
                &mut state.outbound,
                Kind::Data,
                self.pipe.session,
                sequence,
                payload,
            );
            state.next = sequence.wrapping_add(1);
        }
        drop(state);
        self.pipe.outgoing.notify_one();
        Poll::Ready(Ok(data.len()))
    }

    /// Bytes are on their way once written: the pump sends all it has, also after the stream is gone.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.pipe.lock().finish_writing(self.pipe.session);
        self.pipe.outgoing.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for LinkStream {
    fn drop(&mut self) {
        let mut state = self.pipe.lock();
        state.dropped = true;
        state.inbound = BytesMut::new();
        state.finish_writing(self.pipe.session);
        drop(state);
        self.pipe.outgoing.notify_one();
        self.pipe.room.notify_one();
        self.pipe.gone.notify_one();
    }
}
