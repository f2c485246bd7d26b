//! Connections into the machine: with an honest agent, and with agents that lie about them.

use std::io::ErrorKind;
use std::sync::Arc;

use hutch_guest::hostile::{self, Behaviour, Double};
use hutch_guest::limits;
use hutch_guest::session::{DialStream, Error, Kind, Session};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};

use crate::SOON;

async fn open(behaviour: Behaviour) -> Session {
    let (host, guest) = duplex(64 * 1024);
    tokio::spawn(hostile::serve(guest, behaviour));
    Session::open(host, SOON).await.unwrap()
}

async fn dial(behaviour: Behaviour) -> DialStream {
    open(behaviour).await.dial("", 7).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_connection_carries_bytes_both_ways_until_each_way_has_ended() {
    let mut stream = dial(Behaviour::Honest).await;
    stream.write_all(b"hello").await.unwrap();
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello");
    // Our way ends, the other one still brings what is on the way.
    stream.write_all(b"and more").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "and more");
    let error = stream.write_all(b"late").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    stream.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn much_goes_both_ways_at_once() {
    const SIZE: usize = 16 * 1024 * 1024;
    let (mut read, mut write) = split(dial(Behaviour::Honest).await);
    let byte = |at: usize| (at * 7 % 251) as u8;
    let writing = tokio::spawn(async move {
        let mut at = 0;
        while at < SIZE {
            // Pieces of many sizes, larger than a message too.
            let length = (at % 100_003 + 1).min(SIZE - at);
            let piece: Vec<_> = (at..at + length).map(byte).collect();
            write.write_all(&piece).await.unwrap();
            at += length;
        }
        write.shutdown().await.unwrap();
    });
    let mut all = Vec::new();
    read.read_to_end(&mut all).await.unwrap();
    writing.await.unwrap();
    assert!(all.len() == SIZE && all.iter().enumerate().all(|(at, b)| *b == byte(at)));
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_is_told_from_a_fault() {
    let session = open(Behaviour::Honest).await;
    let error = session.dial("", 8).await.err().unwrap();
    assert_eq!(error.kind(), Kind::NothingListens);
    assert!(!error.to_string().contains('\n'), "{error}");
    session.dial("", 7).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_without_the_call_is_not_asked() {
    let session = open(Behaviour::GenerationOne).await;
    let error = session.dial("", 7).await.err().unwrap();
    assert!(matches!(
        error,
        Error::TooOld {
            has: 1,
            needs: 2,
            ..
        }
    ));
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.hint().unwrap().starts_with("restart the machine"));
}

#[tokio::test(start_paused = true)]
async fn connections_leave_room_for_calls_and_wait_for_each_other() {
    let session = open(Behaviour::Honest).await;
    let mut all = Vec::new();
    for _ in 0..limits::DIALS {
        // Nobody reads any of these.
        all.push(session.dial("", 19).await.unwrap());
    }
    session.stat("/a", false).await.unwrap();
    let error = session.dial("", 7).await.err().unwrap();
    assert!(matches!(
        error,
        Error::Crowded {
            limit: limits::DIALS
        }
    ));
    all.pop();
    let mut stream = session.dial("", 7).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
}

#[tokio::test(start_paused = true)]
async fn connections_may_be_dropped_any_number_of_times() {
    let session = open(Behaviour::Honest).await;
    for _ in 0..2000 {
        let mut stream = session.dial("", 19).await.unwrap();
        stream.read_u8().await.unwrap();
    }
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn lies_about_connections_are_found_out() {
    let early = open(Behaviour::DialsEarly).await.dial("", 7).await;
    assert!(matches!(early, Err(Error::Protocol { .. })));
    for behaviour in [
        Behaviour::DialsNoEnd,
        Behaviour::DialsEmpty,
        Behaviour::DialsTwice,
        Behaviour::HugeReplies,
    ] {
        let session = open(behaviour).await;
        let mut stream = session.dial("", 7).await.unwrap();
        let error = stream.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{behaviour:?}");
        let again = stream.read_u8().await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::ConnectionReset, "{behaviour:?}");
        session.stat("/a", false).await.unwrap();
    }
    let rude = open(Behaviour::RudeRefusal).await.dial("", 7).await;
    let error = rude.err().unwrap();
    assert!(!error.to_string().contains(char::is_control), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_a_guest_does_not_take_is_not_kept_for_it() {
    let session = open(Behaviour::DialsDeaf).await;
    let mut stream = session.dial("", 7).await.unwrap();
    let piece = vec![0; limits::CHUNK];
    let mut taken = 0;
    while tokio::time::timeout(SOON, stream.write_all(&piece))
        .await
        .is_ok()
    {
        taken += piece.len();
        assert!(taken < 1024 * 1024, "it is all kept");
    }
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_with_its_machine() {
    let (host, guest) = duplex(64 * 1024);
    let agent = tokio::spawn(Arc::new(Double::new(Behaviour::Honest)).serve(guest));
    let session = Session::open(host, SOON).await.unwrap();
    let mut stream = session.dial("", 7).await.unwrap();
    agent.abort();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    session.closed().await;
    while stream.write_all(b"x").await.is_ok() {
        tokio::task::yield_now().await;
    }
}
