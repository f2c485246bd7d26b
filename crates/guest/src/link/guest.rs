//! The guest's end of a line: one pump that owns the port for as long as the [`Listener`] lives, whatever hosts come
//! and go.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::frame::{self, Decoder, Found, Frame, Kind};
use super::pipe::{LinkStream, Pipe};
use super::{End, GUEST_QUEUE};

/// Bytes asked of the port at once.
const READ: usize = 64 * 1024;

/// Waits for hosts on a port. Dropping it ends the stream in force.
pub struct Listener {
    line: Arc<Line>,
    pump: AbortHandle,
}

/// Takes over the port `io`: it is read from now on until the [`Listener`] is dropped, or until the port gives an error
/// or the end of file.
///
/// Must be called in a tokio runtime.
pub fn listen(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Listener {
    let line = Arc::new(Line::default());
    let pump = tokio::spawn(run(io, line.clone())).abort_handle();
    Listener { line, pump }
}

impl Listener {
    /// The next host's connection. The older one is over by then: its reads and writes fail with [`End::Replaced`].
    ///
    /// Only the newest is yielded when several came since the last call. Safe to cancel.
    ///
    /// # Errors
    /// The port failed or ended; it must be opened again and listened to anew.
    pub async fn accept(&mut self) -> io::Result<LinkStream> {
        loop {
            {
                let mut state = self.line.lock();
                if let Some(stream) = state.arrived.take() {
                    return Ok(stream);
                }
                if let Some(kind) = state.lost {
                    return Err(End::Lost(kind).into());
                }
            }
            self.line.arrival.notified().await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.pump.abort();
        self.line.lose(io::ErrorKind::NotConnected);
    }
}

/// What the pump's two directions and the listener share.
#[derive(Default)]
struct Line {
    state: Mutex<LineState>,
    arrival: Notify,
    outgoing: Arc<Notify>,
}

#[derive(Default)]
struct LineState {
    current: Option<Current>,
    arrived: Option<LinkStream>,
    /// The session in force is to be acknowledged before anything else is sent.
    acknowledge: bool,
    lost: Option<io::ErrorKind>,
}

struct Current {
    pipe: Arc<Pipe>,
    nonce: [u8; frame::NONCE],
}

async fn run(io: impl AsyncRead + AsyncWrite, line: Arc<Line>) {
    let (reader, writer) = tokio::io::split(io);
    let ended = tokio::select! {
        result = read(reader, &line) => result,
        result = write(writer, &line) => result,
    };
    line.lose(
        ended
            .err()
            .map_or(io::ErrorKind::UnexpectedEof, |error| error.kind()),
    );
}

async fn read(mut port: ReadHalf<impl AsyncRead>, line: &Line) -> io::Result<()> {
    let mut decoder = Decoder::default();
    loop {
        decoder.buffer().reserve(READ);
        if port.read_buf(decoder.buffer()).await? == 0 {
            return Ok(());
        }
        while let Some(found) = decoder.next_found() {
            line.handle(found);
        }
    }
}

async fn write(mut port: WriteHalf<impl AsyncWrite>, line: &Line) -> io::Result<()> {
    let mut batch = BytesMut::new();
    loop {
        line.take_outgoing(&mut batch);
        if batch.is_empty() {
            line.outgoing.notified().await;
            continue;
        }
        port.write_all(&batch).await?;
        port.flush().await?;
        batch.clear();
    }
}

impl Line {
    fn lock(&self) -> std::sync::MutexGuard<'_, LineState> {
        self.state.lock().expect("nothing panics while holding it")
    }

    fn handle(&self, found: Found) {
        let frame = match found {
            Found::Frame(frame) => frame,
            Found::Garbage => {
                if let Some(current) = &self.lock().current {
                    current.pipe.end(End::Damaged);
                }
                return;
            }
        };
        match frame.kind {
            Kind::Syn => self.begin(&frame),
            Kind::Ack => {}
            Kind::Data | Kind::Fin => {
                let state = self.lock();
                let current = state.current.as_ref().map(|current| current.pipe.clone());
                drop(state);
                if let Some(pipe) = current.filter(|pipe| pipe.session() == frame.session) {
                    // The pipe has told its stream and the host about an error.
                    let _ended = pipe.deliver(frame, GUEST_QUEUE);
                }
            }
        }
    }

    /// A SYN: a new session, or the same one asked for again because the answer was late.
    fn begin(&self, syn: &Frame) {
        let Ok(nonce) = <[u8; frame::NONCE]>::try_from(&syn.payload[..]) else {
            return;
        };
        let mut state = self.lock();
        let repeated = state.current.as_ref().is_some_and(|current| {
            current.nonce == nonce
                && current.pipe.session() == syn.session
                && !current.pipe.is_broken()
        });
        if !repeated {
            let (pipe, stream) = Pipe::open(syn.session, self.outgoing.clone());
            let older = state.current.replace(Current { pipe, nonce });
            if let Some(older) = older {
                older.pipe.end(End::Replaced);
            }
            // A stream that nobody accepted is dropped here; its pipe locks itself only.
            state.arrived = Some(stream);
            self.arrival.notify_one();
        }
        state.acknowledge = true;
        drop(state);
        self.outgoing.notify_one();
    }

    fn take_outgoing(&self, batch: &mut BytesMut) {
        let mut state = self.lock();
        let Some(Current { pipe, nonce }) = &state.current else {
            return;
        };
        if state.acknowledge {
            frame::encode_handshake(batch, Kind::Ack, pipe.session(), nonce);
        }
        pipe.take_outbound(batch);
        state.acknowledge = false;
    }

    fn lose(&self, kind: io::ErrorKind) {
        let mut state = self.lock();
        state.lost.get_or_insert(kind);
        if let Some(current) = state.current.take() {
            current.pipe.end(End::Lost(kind));
        }
        drop(state);
        self.arrival.notify_one();
    }
}
