//! Connections to ports of machines. The stub's guests see the host's loopback, so the test is the server.

use hutch_contract::error::Kind;
use hutch_contract::machine::Status;
use rustix::process::{Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, split};
use tokio::net::TcpListener;

use crate::lab::{LONG, Lab};

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_a_machine_is_reached_and_each_way_ends_for_itself() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let (listener, port) = listener().await;
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = peer.split();
                copy(&mut from, &mut to).await.unwrap();
                to.write_all(b"bye").await.unwrap();
            });
        }
    });
    let stream = lab.engine.dial(&lab.who, "a", port).await.unwrap();
    let (mut read, mut write) = split(stream);
    let content: Vec<u8> = (0..4_000_000_u32).map(|at| (at % 251) as u8).collect();
    let sent = content.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut all = Vec::new();
    read.read_to_end(&mut all).await.unwrap();
    writing.await.unwrap();
    assert!(all[..content.len()] == content && &all[content.len()..] == b"bye");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nothing_listens_is_told_from_a_machine_that_does_not_run() {
    let Some(lab) = Lab::new().await else { return };
    lab.create("a").await.unwrap();
    // Nobody listens on a port that is somebody's for UDP alone.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    // It is still starting; that is waited for.
    let refused = lab.engine.dial(&lab.who, "a", port).await.err().unwrap();
    assert_eq!(refused.code(), "nothing_listens", "{refused}");
    assert_eq!(refused.kind(), Kind::Unavailable);
    let zero = lab.engine.dial(&lab.who, "a", 0).await.err().unwrap();
    assert_eq!(zero.kind(), Kind::Invalid);
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    let stopped = lab.engine.dial(&lab.who, "a", port).await.err().unwrap();
    assert_eq!(stopped.code(), "wrong_status");
    let missing = lab.engine.dial(&lab.who, "b", port).await.err().unwrap();
    assert_eq!(missing.kind(), Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_breaks_when_its_machine_dies() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    let (listener, port) = listener().await;
    let mut stream = lab.engine.dial(&lab.who, "a", port).await.unwrap();
    let (mut peer, _) = listener.accept().await.unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(peer.read_u8().await.unwrap(), b'x');
    kill_process(lab.pid(&machine, "vmm"), Signal::KILL).unwrap();
    let read = tokio::time::timeout(LONG, stream.read_u8()).await;
    assert!(read.unwrap().is_err());
    lab.wait("a", Status::Stopped).await.unwrap();
}
