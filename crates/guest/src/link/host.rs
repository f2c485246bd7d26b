//! The host's end of a line: the handshake, and a pump that lives as long as the stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::frame::{self, Decoder, Found, Kind};
use super::pipe::{LinkStream, Pipe};
use super::{End, HOST_QUEUE};
use crate::error::{Error, Result};

/// Bytes asked of the port at once.
const READ: usize = 64 * 1024;
/// The first wait for an answer to a SYN; it doubles up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(400);
/// Time to send what is left once the stream is gone; a port that nobody reads would keep it for ever.
const LINGER: Duration = Duration::from_secs(1);
/// Name of the handshake in errors.
const CALL: &str = "link handshake";

/// Begins a connection with the guest on the other side of `io`, ending any older one.
///
/// The SYN is repeated until the guest answers, since nothing announces when it has come up. The line belongs to the
/// stream from then on and is closed soon after it.
///
/// # Errors
/// [`Error::Timeout`] when no answer came within `deadline`; [`Error::Disconnected`] when the line broke or ended.
pub async fn connect(
    mut io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    deadline: Duration,
) -> Result<LinkStream> {
    let mut decoder = Decoder::default();
    let session = timeout(deadline, shake(&mut io, &mut decoder))
        .await
        .map_err(|_| Error::Timeout { call: CALL })?
        .map_err(Error::disconnected)?;
    let (pipe, stream) = Pipe::open(session, Arc::default());
    tokio::spawn(run(io, decoder, pipe));
    Ok(stream)
}

async fn shake(
    io: &mut (impl AsyncRead + AsyncWrite + Unpin),
    decoder: &mut Decoder,
) -> io::Result<u32> {
    let mut drawn = [0; 4 + frame::NONCE];
    getrandom::fill(&mut drawn).map_err(io::Error::other)?;
    let (session, nonce) = drawn.split_first_chunk().expect("it is longer than that");
    let session = u32::from_be_bytes(*session);
    let nonce = nonce.try_into().expect("the rest is a nonce");
    let mut syn = BytesMut::new();
    frame::encode_handshake(&mut syn, Kind::Syn, session, nonce);
    let mut retry = RETRY;
    loop {
        io.write_all(&syn).await?;
        io.flush().await?;
        let until = Instant::now() + retry;
        retry = RETRY_MAX.min(2 * retry);
        while let Ok(read) = {
            decoder.buffer().reserve(READ);
            timeout_at(until, io.read_buf(decoder.buffer())).await
        } {
            if read? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What comes before the answer belongs to an older connection.
            while let Some(found) = decoder.next_found() {
                if let Found::Frame(frame) = found
                    && (frame.kind, frame.session) == (Kind::Ack, session)
                    && frame.payload[..] == nonce[..]
                {
                    return Ok(session);
                }
            }
        }
    }
}

async fn run(io: impl AsyncRead + AsyncWrite, decoder: Decoder, pipe: Arc<Pipe>) {
    // Also when the runtime drops this task.
    let ended = EndOnDrop(&pipe);
    let (reader, writer) = tokio::io::split(io);
    let linger = async {
        pipe.gone.notified().await;
        sleep(LINGER).await;
        Ok(())
    };
    let result = tokio::select! {
        result = read(reader, decoder, &pipe) => result,
        result = write(writer, &pipe) => result,
        result = linger => result,
    };
    let kind = result
        .err()
        .map_or(io::ErrorKind::UnexpectedEof, |error| error.kind());
    pipe.end(End::Lost(kind));
    drop(ended);
}

struct EndOnDrop<'a>(&'a Pipe);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(End::Lost(io::ErrorKind::NotConnected));
    }
}

/// Delivers frames until the port ends. A session that breaks closes the port by returning.
async fn read(
    mut port: ReadHalf<impl AsyncRead>,
    mut decoder: Decoder,
    pipe: &Pipe,
) -> io::Result<()> {
    loop {
        while let Some(found) = decoder.next_found() {
            let result = match found {
                Found::Garbage => {
                    pipe.end(End::Damaged);
                    Err(End::Damaged)
                }
                Found::Frame(frame)
                    if frame.session == pipe.session()
                        && matches!(frame.kind, Kind::Data | Kind::Fin) =>
                {
                    pipe.deliver(frame, usize::MAX)
                }
                // A late answer to a repeated SYN, or a rest of an older session.
                Found::Frame(_) => Ok(()),
            };
            result?;
        }
        while pipe.is_full(HOST_QUEUE) {
            pipe.room.notified().await;
        }
        decoder.buffer().reserve(READ);
        if port.read_buf(decoder.buffer()).await? == 0 {
            return Ok(());
        }
    }
}

/// Sends frames until the stream is gone and all that it wrote is sent.
async fn write(mut port: WriteHalf<impl AsyncWrite>, pipe: &Pipe) -> io::Result<()> {
    let mut batch = BytesMut::new();
    loop {
        let last = pipe.is_dropped();
        pipe.take_outbound(&mut batch);
        if !batch.is_empty() {
            port.write_all(&batch).await?;
            port.flush().await?;
            batch.clear();
        } else if last {
            return Ok(());
        } else {
            pipe.outgoing.notified().await;
        }
    }
}
