//! Connections that the host asks for: made here, inside the machine, and copied between socket and call.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use hutch_guest::limits;
use hutch_guest::pb::{self, dial_failed::Reason, dial_reply, dial_request};
use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use crate::status;

/// How long the kernel may try; less than the host waits.
const CONNECT: Duration = Duration::from_secs(10);

/// What the host gets. Dropped, it takes the connection along.
pub struct Replies {
    replies: mpsc::Receiver<Result<pb::DialReply, Status>>,
    /// Nothing of a connection outlives its call.
    _copying: JoinSet<()>,
}

impl Stream for Replies {
    type Item = Result<pb::DialReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.replies.poll_recv(context)
    }
}

/// Connects, and copies both ways from then on.
///
/// # Errors
/// A malformed request. That there is no connection is a reply.
pub async fn dial(
    open: &pb::DialOpen,
    requests: Streaming<pb::DialRequest>,
    place: OwnedSemaphorePermit,
) -> Result<Replies, Status> {
    let addresses = addresses(open)?;
    // One message waits here, one is made, one lies in the connection's buffer.
    let (sender, replies) = mpsc::channel(1);
    let mut copying = JoinSet::new();
    let (first, socket) = match connect(&addresses).await {
        Ok(socket) => (dial_reply::Part::Opened(pb::DialOpened {}), Some(socket)),
        Err(error) => (dial_reply::Part::Failed(failed(&error)), None),
    };
    sender
        .try_send(Ok(reply(first)))
        .map_err(|_| Status::internal("a new channel has no room"))?;
    if let Some(socket) = socket {
        copying.spawn(async move {
            let _place = place;
            copy(socket, requests, sender).await;
        });
    }
    Ok(Replies {
        replies,
        _copying: copying,
    })
}

/// Where to try, in this order.
fn addresses(open: &pb::DialOpen) -> Result<Vec<SocketAddr>, Status> {
    let port = u16::try_from(open.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Status::invalid_argument("ports are 1 to 65535"))?;
    let hosts = match &open.host[..] {
        "" => vec![
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ],
        host => {
            let host = host.parse();
            vec![host.map_err(|_| Status::invalid_argument("the host must be an IP address"))?]
        }
    };
    let addresses = hosts.into_iter().map(|host| SocketAddr::new(host, port));
    Ok(addresses.collect())
}

/// The first that answers; else what the first one said, which is the address that people mean.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut failure = None;
    for address in addresses {
        let connected = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(socket) => {
                // Small writes have been gathered by who sent them, or not on purpose.
                let _ = socket.set_nodelay(true);
                return Ok(socket);
            }
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

fn failed(error: &io::Error) -> pb::DialFailed {
    let reason = match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED) => Reason::Refused,
        Some(
            Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::NETDOWN
            | Errno::ADDRNOTAVAIL
            | Errno::AFNOSUPPORT,
        ) => Reason::Unreachable,
        Some(Errno::TIMEDOUT) => Reason::TimedOut,
        _ if error.kind() == io::ErrorKind::TimedOut => Reason::TimedOut,
        _ => Reason::Other,
    };
    pb::DialFailed {
        reason: reason.into(),
        message: status::text(error),
    }
}

fn reply(part: dial_reply::Part) -> pb::DialReply {
    pb::DialReply { part: Some(part) }
}

/// Copies until both directions have ended, or one of them has broken: then there is no end in the call, only its end.
async fn copy(
    socket: TcpStream,
    requests: Streaming<pb::DialRequest>,
    replies: mpsc::Sender<Result<pb::DialReply, Status>>,
) {
    let (from_peer, to_peer) = socket.into_split();
    let copied = tokio::try_join!(inward(requests, to_peer), outward(from_peer, &replies));
    if let Err(status) = copied {
        // The host may be gone.
        let _ = replies.send(Err(status)).await;
    }
}

async fn inward(
    mut requests: Streaming<pb::DialRequest>,
    mut to_peer: OwnedWriteHalf,
) -> Result<(), Status> {
    use dial_request::Part;
    loop {
        let part = requests.message().await?.and_then(|message| message.part);
        match part {
            Some(Part::Data(data)) => {
                let written = to_peer.write_all(&data).await;
                written.map_err(|error| lost(&error))?;
            }
            Some(Part::End(_)) => {
                let ended = to_peer.shutdown().await;
                return ended.map_err(|error| lost(&error));
            }
            Some(Part::Open(_)) | None => {
                return Err(Status::aborted("the host broke the connection off"));
            }
        }
    }
}

async fn outward(
    from_peer: OwnedReadHalf,
    replies: &mpsc::Sender<Result<pb::DialReply, Status>>,
) -> Result<(), Status> {
    let gone = |_| Status::aborted("the host broke the connection off");
    loop {
        // Room first: an idle connection holds no buffer.
        let readable = from_peer.readable().await;
        readable.map_err(|error| lost(&error))?;
        let room = replies.reserve().await.map_err(|_| gone(()))?;
        let mut data = BytesMut::with_capacity(limits::CHUNK);
        let read = from_peer.try_read_buf(&mut data);
        let part = match read {
            Ok(0) => dial_reply::Part::End(pb::DialEnd {}),
            Ok(_) => dial_reply::Part::Data(fitted(data)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(lost(&error)),
        };
        let ended = matches!(part, dial_reply::Part::End(_));
        room.send(Ok(reply(part)));
        if ended {
            return Ok(());
        }
    }
}

/// Gives the unused part of the buffer back when that is most of it.
fn fitted(data: BytesMut) -> Bytes {
    if data.len() * 2 > data.capacity() {
        return data.freeze();
    }
    Bytes::copy_from_slice(&data)
}

fn lost(error: &io::Error) -> Status {
    Status::unavailable(format!("the connection broke: {}", status::text(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(host: &str, port: u32) -> Result<Vec<SocketAddr>, Status> {
        addresses(&pb::DialOpen {
            host: host.into(),
            port,
        })
    }

    #[test]
    fn only_addresses_and_ports_that_exist_are_dialled() {
        let loopback = open("", 80).unwrap();
        assert_eq!(loopback[0], "127.0.0.1:80".parse().unwrap());
        assert_eq!(loopback[1], "[::1]:80".parse().unwrap());
        assert_eq!(
            open("10.0.0.7", 65535).unwrap(),
            ["10.0.0.7:65535".parse().unwrap()]
        );
        for (host, port) in [("", 0), ("", 65536), ("example.net", 80), ("1.2.3.4:5", 80)] {
            assert!(open(host, port).is_err(), "{host} {port}");
        }
    }

    #[test]
    fn refused_and_unreachable_are_told_apart() {
        let reason = |errno: Errno| failed(&io::Error::from(errno)).reason();
        assert_eq!(reason(Errno::CONNREFUSED), Reason::Refused);
        assert_eq!(reason(Errno::NETUNREACH), Reason::Unreachable);
        assert_eq!(reason(Errno::TIMEDOUT), Reason::TimedOut);
        assert_eq!(reason(Errno::MFILE), Reason::Other);
    }
}
