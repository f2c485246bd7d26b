//! The link layer: what gets through, what ends a session, what can never stop a new one.

use std::io;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use hutch_guest::Error;
use hutch_guest::link::frame::{self, Decoder, Found, Frame, Kind};
use hutch_guest::link::{self, End, LinkStream, Listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::sleep;

use crate::SOON;
use crate::port::Port;

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

async fn both(port: DuplexStream, guest: DuplexStream) -> (LinkStream, LinkStream, Listener) {
    let mut listener = link::listen(guest);
    let host = link::connect(port, SOON).await.unwrap();
    let guest = listener.accept().await.unwrap();
    (host, guest, listener)
}

/// Proves that bytes go both ways between these two and that nothing else is in the way.
async fn talk(host: &mut LinkStream, guest: &mut LinkStream) {
    say(host, guest).await;
    say(guest, host).await;
}

async fn say(from: &mut LinkStream, to: &mut LinkStream) {
    let sent = pattern(20_000);
    let mut came = vec![0; sent.len()];
    let (written, read) = tokio::join!(from.write_all(&sent), to.read_exact(&mut came));
    written.unwrap();
    read.unwrap();
    assert!(came == sent);
}

fn end(error: &io::Error) -> End {
    *error
        .get_ref()
        .unwrap()
        .downcast_ref()
        .expect("the end is the cause")
}

#[tokio::test(start_paused = true)]
async fn bytes_go_both_ways_and_each_way_closes_for_itself() {
    let (port, guest) = duplex(5_000);
    let (mut host, mut guest, _listener) = both(port, guest).await;
    talk(&mut host, &mut guest).await;

    host.write_all(b"last").await.unwrap();
    host.shutdown().await.unwrap();
    let mut came = Vec::new();
    guest.read_to_end(&mut came).await.unwrap();
    assert_eq!(came, b"last");

    guest.write_all(b"answer").await.unwrap();
    drop(guest);
    came.clear();
    host.read_to_end(&mut came).await.unwrap();
    assert_eq!((&came[..], host.end()), (&b"answer"[..], Some(End::Closed)));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_boots_late_is_found() {
    let (port, guest) = duplex(100_000);
    let host = tokio::spawn(link::connect(port, Duration::from_secs(60)));
    sleep(Duration::from_secs(30)).await;
    let mut listener = link::listen(guest);
    let mut guest = listener.accept().await.unwrap();
    let mut host = host.await.unwrap().unwrap();
    talk(&mut host, &mut guest).await;
    // All the SYNs that waited ask for the same session.
    assert!(tokio::time::timeout(SOON, listener.accept()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_silent_port_ends_in_a_timeout_and_a_closed_one_at_once() {
    let (port, _guest) = duplex(100);
    assert!(matches!(
        link::connect(port, SOON).await,
        Err(Error::Timeout { .. })
    ));
    let (port, _) = duplex(100);
    assert!(matches!(
        link::connect(port, SOON).await,
        Err(Error::Disconnected { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn rests_of_older_connections_do_not_matter_on_either_side() {
    let mut rest = BytesMut::from(&frame::MAGIC[1..]);
    frame::encode(&mut rest, Kind::Data, 1, 0, &pattern(frame::PAYLOAD));
    frame::encode(&mut rest, Kind::Ack, 1, 0, &[1; frame::NONCE]);
    frame::encode(&mut rest, Kind::Fin, 1, 1, &[]);
    let whole = rest.len();
    frame::encode(&mut rest, Kind::Data, 1, 2, &pattern(frame::PAYLOAD));
    for cut in [
        3,
        frame::HEADER,
        frame::HEADER + 4,
        whole + 1,
        whole + 30,
        rest.len() - 1,
    ] {
        let (mut port, mut guest) = duplex(100_000);
        port.write_all(&rest[..cut]).await.unwrap();
        guest.write_all(&rest[..cut]).await.unwrap();
        let (mut host, mut guest, _listener) = both(port, guest).await;
        talk(&mut host, &mut guest).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_host_takes_over_in_the_middle_of_transfers() {
    let (mut port, guest) = Port::new();
    let mut listener = link::listen(guest);
    for _ in 0..30 {
        let mut host = link::connect(port.plug().await, SOON).await.unwrap();
        let mut guest = listener.accept().await.unwrap();
        talk(&mut host, &mut guest).await;

        let flood = tokio::spawn(async move {
            loop {
                if let Err(error) = guest.write_all(&pattern(9_999)).await {
                    return (error, guest);
                }
            }
        });
        let mut some = vec![0; 123_456];
        host.write_all(&some).await.unwrap();
        host.read_exact(&mut some).await.unwrap();

        let mut newer = link::connect(port.plug().await, SOON).await.unwrap();
        let mut accepted = listener.accept().await.unwrap();
        let (error, mut old) = flood.await.unwrap();
        assert_eq!(
            (end(&error), old.end()),
            (End::Replaced, Some(End::Replaced))
        );
        assert_eq!(end(&old.read_u8().await.unwrap_err()), End::Replaced);
        assert!(
            host.read_to_end(&mut some).await.is_err(),
            "the old host was cut off"
        );
        talk(&mut newer, &mut accepted).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stalls_keeps_no_new_host_out() {
    let (mut port, guest) = Port::new();
    let mut listener = link::listen(guest);
    let mut host = link::connect(port.plug().await, SOON).await.unwrap();
    let stalled = listener.accept().await.unwrap();
    host.write_all(&pattern(5_000_000)).await.unwrap();

    let mut host = link::connect(port.plug().await, SOON).await.unwrap();
    // The cut may have gone through a frame.
    assert!(matches!(stalled.end(), Some(End::Replaced | End::Damaged)));
    let stalled = listener.accept().await.unwrap();
    // Far more than honest HTTP/2 can have under way: the guest gives the session up instead of growing.
    let flood = tokio::spawn(async move {
        while host.write_all(&pattern(100_000)).await.is_ok() && host.end().is_none() {}
        host.end()
    });
    assert_eq!(flood.await.unwrap(), Some(End::Closed));
    assert_eq!(stalled.end(), Some(End::Overflow));

    let mut host = link::connect(port.plug().await, SOON).await.unwrap();
    let mut guest = listener.accept().await.unwrap();
    talk(&mut host, &mut guest).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_does_not_read_is_not_grown_by_its_guest() {
    let (port, guest) = duplex(5_000);
    let (mut host, mut guest, _listener) = both(port, guest).await;
    let flood = async { while guest.write_all(&pattern(10_000)).await.is_ok() {} };
    assert!(
        tokio::time::timeout(SOON, flood).await.is_err(),
        "the writer waits"
    );
    let mut all = vec![0; 2 * link::HOST_QUEUE];
    let (more, read) = tokio::join!(
        guest.write_all(&[0; 2 * link::HOST_QUEUE]),
        host.read_exact(&mut all)
    );
    more.unwrap();
    read.unwrap();
}

/// A host made by hand, past its handshake.
async fn by_hand() -> (DuplexStream, Listener, LinkStream) {
    let (mut port, guest) = duplex(100_000);
    let mut listener = link::listen(guest);
    let mut syn = BytesMut::new();
    frame::encode(&mut syn, Kind::Syn, 9, 0, &[9; frame::NONCE]);
    port.write_all(&syn).await.unwrap();
    let stream = listener.accept().await.unwrap();
    assert_eq!(next_frame(&mut port).await.kind, Kind::Ack);
    (port, listener, stream)
}

async fn next_frame(port: &mut DuplexStream) -> Frame {
    let mut decoder = Decoder::default();
    loop {
        // Byte by byte, so that nothing of a next frame is lost with the decoder.
        decoder.buffer().put_u8(port.read_u8().await.unwrap());
        if let Some(Found::Frame(frame)) = decoder.next_found() {
            return frame;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_repeated_syn_and_another_sessions_frames_disturb_nothing() {
    let (mut port, mut listener, mut stream) = by_hand().await;
    let mut bytes = BytesMut::new();
    frame::encode(&mut bytes, Kind::Data, 9, 0, b"on");
    frame::encode(&mut bytes, Kind::Data, 8, 1, b"no");
    frame::encode(&mut bytes, Kind::Fin, 8, 1, &[]);
    frame::encode_handshake(&mut bytes, Kind::Syn, 9, &[9; frame::NONCE]);
    frame::encode(&mut bytes, Kind::Data, 9, 1, b"ly");
    frame::encode(&mut bytes, Kind::Fin, 9, 2, &[]);
    port.write_all(&bytes).await.unwrap();
    let mut came = String::new();
    stream.read_to_string(&mut came).await.unwrap();
    assert_eq!(came, "only");
    assert_eq!(next_frame(&mut port).await.kind, Kind::Ack);
    assert!(tokio::time::timeout(SOON, listener.accept()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lost_or_damaged_frame_ends_the_session_and_the_host_is_told() {
    let mut gap = BytesMut::new();
    frame::encode(&mut gap, Kind::Data, 9, 1, b"second");
    let mut damaged = BytesMut::new();
    frame::encode(&mut damaged, Kind::Data, 9, 0, b"first");
    damaged[frame::HEADER] ^= 1;
    let foreign = BytesMut::from("login: ");
    let cases = [
        (
            gap,
            End::Gap {
                expected: 0,
                found: 1,
            },
        ),
        (damaged, End::Damaged),
        (foreign, End::Damaged),
    ];
    for (bytes, expected) in cases {
        let (mut port, mut listener, mut stream) = by_hand().await;
        port.write_all(&bytes).await.unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(end(&error), expected);
        assert_eq!(next_frame(&mut port).await.kind, Kind::Fin);
        assert!(stream.write_all(b"x").await.is_err());
        // The same host may try again, even with the same numbers.
        let mut syn = BytesMut::new();
        frame::encode_handshake(&mut syn, Kind::Syn, 9, &[9; frame::NONCE]);
        port.write_all(&syn).await.unwrap();
        listener.accept().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn streams_end_with_the_port_and_with_the_listener() {
    let (port, guest) = duplex(5_000);
    let (host, mut guest, mut listener) = both(port, guest).await;
    drop(host);
    assert_eq!(guest.read(&mut [0; 1]).await.unwrap(), 0, "an orderly end");
    assert!(
        listener.accept().await.is_err(),
        "the port is closed with the host's stream"
    );

    let (port, guest) = duplex(5_000);
    let (mut host, mut guest, listener) = both(port, guest).await;
    drop(listener);
    assert!(matches!(
        end(&guest.read_u8().await.unwrap_err()),
        End::Lost(_)
    ));
    assert!(matches!(
        end(&host.read_u8().await.unwrap_err()),
        End::Lost(_)
    ));
}
