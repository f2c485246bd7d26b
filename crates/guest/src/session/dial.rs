//! Connections into the machine: each one a call, with the ends of both directions told apart from its loss.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::channel::mpsc;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

use super::Session;
use super::call::Incoming;
use crate::error::{Error, Kind, Result, TEXT, inert};
use crate::pb::{self, dial_failed::Reason, dial_reply::Part as Reply, dial_request::Part};
use crate::{deadlines, limits};

const CALL: &str = "Dial";

/// A TCP connection inside the machine, seen from the host.
///
/// `shutdown` ends our direction and leaves the other one open, as with a socket. Dropping it before both have ended
/// breaks the connection off.
pub struct DialStream {
    replies: Incoming<pb::DialReply>,
    /// Bytes that came and were not read yet: one message at most.
    rest: Bytes,
    read: ReadSide,
    requests: mpsc::Sender<pb::DialRequest>,
    _place: OwnedSemaphorePermit,
}

#[derive(Clone, Copy, PartialEq)]
enum ReadSide {
    Open,
    Ended,
    Failed,
}

impl Session {
    /// Connects to TCP port `port` of `host`, an IP address as the machine sees it; empty for its loopback.
    ///
    /// # Errors
    /// [`Kind::NothingListens`], [`Kind::Unreachable`] and [`Kind::Timeout`] are what the guest's kernel said of the
    /// address. [`Error::TooOld`] from agents before generation 2, [`Error::Crowded`] when [`limits::DIALS`] connections
    /// are open and none ends in time.
    pub async fn dial(&self, host: &str, port: u16) -> Result<DialStream> {
        self.needs(CALL, limits::GENERATION_DIAL)?;
        let deadline = tokio::time::Instant::now() + deadlines::DIAL;
        let place = self.inner.dials.clone().acquire_owned();
        let place = tokio::time::timeout_at(deadline, place)
            .await
            .map_err(|_| Error::Crowded {
                limit: limits::DIALS,
            })?
            .expect("the semaphore is never closed");
        // One message waits here beside the one that the sender may always add.
        let (mut requests, outgoing) = mpsc::channel(0);
        let open = pb::DialOpen {
            host: host.into(),
            port: port.into(),
        };
        requests
            .try_send(request(Part::Open(open)))
            .expect("a new channel has room");
        let dialled = async {
            let mut replies = self
                .streaming(CALL, deadlines::DIAL, |mut agent| async move {
                    agent.dial(outgoing).await
                })
                .await?;
            opened(std::future::poll_fn(|context| replies.poll_message(context)).await)?;
            Ok(replies)
        };
        let replies = tokio::time::timeout_at(deadline, dialled)
            .await
            .map_err(|_| Error::Timeout { call: CALL })??;
        Ok(DialStream {
            replies,
            rest: Bytes::new(),
            read: ReadSide::Open,
            requests,
            _place: place,
        })
    }
}

fn request(part: Part) -> pb::DialRequest {
    pb::DialRequest { part: Some(part) }
}

fn lie(what: &'static str) -> Error {
    Error::Protocol { call: CALL, what }
}

/// What the first reply says.
fn opened(first: Option<Result<pb::DialReply>>) -> Result<()> {
    let failed = match first.transpose()?.and_then(|reply| reply.part) {
        Some(Reply::Opened(_)) => return Ok(()),
        Some(Reply::Failed(failed)) => failed,
        Some(Reply::Data(_) | Reply::End(_)) => return Err(lie("data before the connection")),
        None => return Err(lie("neither a connection nor a reason")),
    };
    let kind = match failed.reason() {
        Reason::Refused => Kind::NothingListens,
        Reason::Unreachable => Kind::Unreachable,
        Reason::TimedOut => Kind::Timeout,
        Reason::Other => Kind::Unavailable,
    };
    Err(Error::Refused {
        call: CALL,
        kind,
        message: inert(&failed.message, TEXT),
    })
}

impl DialStream {
    /// The next bytes; none when the peer has ended its direction.
    fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes>> {
        if self.read == ReadSide::Ended {
            return Poll::Ready(Ok(Bytes::new()));
        }
        let part = match ready!(self.replies.poll_message(context)) {
            Some(reply) => reply?.part,
            None => return Poll::Ready(Err(lie("a connection that ends without an end"))),
        };
        Poll::Ready(match part {
            Some(Reply::Data(data)) if !data.is_empty() => Ok(data),
            Some(Reply::End(_)) => {
                self.read = ReadSide::Ended;
                Ok(Bytes::new())
            }
            _ => Err(lie("neither data nor an end")),
        })
    }
}

impl AsyncRead for DialStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            if self.read == ReadSide::Failed {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            match ready!(self.poll_data(context)) {
                Ok(data) => self.rest = data,
                Err(error) => {
                    self.read = ReadSide::Failed;
                    return Poll::Ready(Err(broken(error)));
                }
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..length]);
        self.rest.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for DialStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.requests.poll_ready(context)).map_err(|_| closed())?;
        let length = data.len().min(limits::CHUNK);
        let part = Part::Data(Bytes::copy_from_slice(&data[..length]));
        let sent = self.requests.start_send(request(part));
        Poll::Ready(sent.map(|()| length).map_err(|_| closed()))
    }

    /// The connection sends by itself; there is nothing to push.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whether it is we who closed it or the other side: there is nothing left to end.
        if self.requests.is_closed() {
            return Poll::Ready(Ok(()));
        }
        if ready!(self.requests.poll_ready(context)).is_ok() {
            let _gone = self.requests.start_send(request(Part::End(pb::DialEnd {})));
        }
        self.requests.close_channel();
        Poll::Ready(Ok(()))
    }
}

fn closed() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

fn broken(error: Error) -> io::Error {
    let kind = match error {
        Error::Protocol { .. } => io::ErrorKind::InvalidData,
        _ => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error)
}
