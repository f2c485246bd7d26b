//! Connections that the host asks the agent for, to listeners of the test.

use std::io::ErrorKind;

use hutch_guest::session::{Configure, Kind, Session};
use hutch_guest::{limits, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, split};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tonic::Code;

use crate::harness::*;

async fn session(agent: &Agent) -> Session {
    // Once somebody has been greeted the agent listens.
    drop(agent.connect().await);
    let stream = UnixStream::connect(agent.dir.path().join("sock"));
    let session = Session::open(stream.await.unwrap(), BOUND).await.unwrap();
    session.configure(&Configure::default()).await.unwrap();
    session
}

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port where nobody listens, for as long as the socket is kept.
fn deaf_port() -> (std::net::UdpSocket, u16) {
    // Its TCP namesake is free, since nobody else asks for this very number.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_for_itself() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let mut host = session.dial("", port).await.unwrap();
    let (mut peer, _) = listener.accept().await.unwrap();
    host.write_all(b"question").await.unwrap();
    host.shutdown().await.unwrap();
    let mut question = String::new();
    peer.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    // The other way still works, long after.
    peer.write_all(b"ans").await.unwrap();
    let mut some = [0; 3];
    host.read_exact(&mut some).await.unwrap();
    peer.write_all(b"wer").await.unwrap();
    drop(peer);
    let mut rest = String::new();
    host.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "wer");
}

#[tokio::test]
async fn a_peer_that_has_no_more_to_say_still_listens() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let mut host = session.dial("127.0.0.1", port).await.unwrap();
    let (mut peer, _) = listener.accept().await.unwrap();
    peer.shutdown().await.unwrap();
    assert_eq!(host.read(&mut [0; 8]).await.unwrap(), 0);
    host.write_all(&vec![7; 1_000_000]).await.unwrap();
    host.shutdown().await.unwrap();
    let mut all = Vec::new();
    peer.read_to_end(&mut all).await.unwrap();
    assert!(all == vec![7; 1_000_000]);
}

#[tokio::test]
async fn much_goes_both_ways_at_once() {
    const SIZE: usize = 32 * 1024 * 1024;
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let echoing = tokio::spawn(async move {
        let (mut peer, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = peer.split();
        copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
    });
    let (mut read, mut write) = split(session.dial("", port).await.unwrap());
    let content: Vec<u8> = (0..SIZE).map(|at| (at * 7 % 251) as u8).collect();
    let sent = content.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut all = Vec::new();
    read.read_to_end(&mut all).await.unwrap();
    assert!(all == content);
    writing.await.unwrap();
    echoing.await.unwrap();
}

#[tokio::test]
async fn where_nobody_listens_the_connection_is_refused() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (_socket, port) = deaf_port();
    for host in ["", "127.0.0.1", "::1"] {
        let error = session.dial(host, port).await.err().unwrap();
        // A host without IPv6 has no way to ::1.
        let expected = match (host, error.kind()) {
            ("::1", Kind::Unreachable) => Kind::Unreachable,
            _ => Kind::NothingListens,
        };
        assert_eq!(error.kind(), expected, "{host}: {error}");
    }
    let nowhere = session.dial("255.255.255.255", port).await.err().unwrap();
    assert_eq!(nowhere.kind(), Kind::Unreachable, "{nowhere}");
    let name = session.dial("localhost", port).await.err().unwrap();
    assert_eq!(name.kind(), Kind::Invalid);
}

#[tokio::test]
async fn a_connection_that_the_host_drops_is_closed_in_the_machine() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let mut host = session.dial("", port).await.unwrap();
    let (mut peer, _) = listener.accept().await.unwrap();
    host.write_all(b"x").await.unwrap();
    assert_eq!(peer.read_u8().await.unwrap(), b'x');
    drop(host);
    let ended = tokio::time::timeout(BOUND, peer.read(&mut [0])).await;
    assert!(matches!(ended.unwrap(), Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_connection_that_the_peer_resets_is_an_error_and_no_end() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let mut host = session.dial("", port).await.unwrap();
    let (peer, _) = listener.accept().await.unwrap();
    reset(peer);
    let error = host.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    session.processes().await.unwrap();
}

/// Closed with unread bytes to come: the kernel answers those with a reset.
fn reset(peer: TcpStream) {
    let peer = peer.into_std().unwrap();
    let linger = rustix::net::sockopt::set_socket_linger(&peer, Some(std::time::Duration::ZERO));
    linger.unwrap();
}

#[tokio::test]
async fn connections_end_with_their_session_and_leave_room_for_calls() {
    let agent = Agent::start();
    let session = session(&agent).await;
    let (listener, port) = listener().await;
    let (mut hosts, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..limits::DIALS {
        hosts.push(session.dial("", port).await.unwrap());
        peers.push(listener.accept().await.unwrap().0);
    }
    session.processes().await.unwrap();
    // Greeted: this connection takes the place of the session, and all that it carried ends.
    let _newer = agent.greet().await;
    for mut peer in peers {
        let ended = tokio::time::timeout(BOUND, peer.read(&mut [0])).await;
        assert!(matches!(ended.unwrap(), Ok(0) | Err(_)));
    }
    for mut host in hosts {
        assert!(host.read(&mut [0]).await.is_err());
    }
}

#[tokio::test]
async fn no_connection_before_configure_or_without_a_port() {
    let agent = Agent::start();
    let open = |port| pb::DialRequest {
        part: Some(pb::dial_request::Part::Open(pb::DialOpen {
            host: String::new(),
            port,
        })),
    };
    let ask = |request| futures::stream::iter([request]);
    let mut client = agent.greet().await;
    let early = client.dial(ask(open(80))).await;
    assert_eq!(code(early), Code::FailedPrecondition);
    let mut client = agent.client().await;
    assert_eq!(code(client.dial(ask(open(0))).await), Code::InvalidArgument);
    let nothing = pb::DialRequest { part: None };
    assert_eq!(code(client.dial(ask(nothing)).await), Code::InvalidArgument);
}
