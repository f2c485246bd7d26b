//! Bytes go on as they come, in both directions, and nothing is kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::town::{Lab, next, stage};

#[tokio::test]
async fn the_first_bytes_arrive_before_the_last_are_sent_both_ways_at_once() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let guest = tokio::spawn(async move {
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        // The answer begins in the middle of the request.
        assert_eq!(guest.chunk().await, b"one");
        guest
            .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nONE\r\n")
            .await;
        assert_eq!(guest.chunk().await, b"two");
        guest.send("3\r\nTWO\r\n").await;
        assert_eq!(guest.chunk().await, b"");
        guest.send("0\r\n\r\n").await;
        guest
    });
    let mut client = lab.client().await;
    client
        .send("POST / HTTP/1.1\r\nHost: web.vms.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        .await;
    let head = client.head().await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(client.chunk().await, b"ONE");
    client.send("3\r\ntwo\r\n").await;
    assert_eq!(client.chunk().await, b"TWO");
    client.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await, b"");
    guest.await.unwrap();
}

#[tokio::test]
async fn large_bodies_go_both_ways() {
    const SIZE: usize = 48 * 1024 * 1024;
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    // Echoes the body as it comes.
    tokio::spawn(async move {
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        guest
            .send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n"))
            .await;
        let early = std::mem::take(&mut guest.rest);
        guest.send(early).await;
        let (mut from, mut to) = guest.stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
    });
    let mut client = lab.client().await;
    client
        .send(format!(
            "POST / HTTP/1.1\r\nHost: web.vms.test\r\nContent-Length: {SIZE}\r\n\r\n"
        ))
        .await;
    let (mut from, mut to) = client.stream.into_split();
    let byte = |at: usize| (at * 7 % 251) as u8;
    let sending = tokio::spawn(async move {
        let piece: Vec<u8> = (0..251 * 1000).map(byte).collect();
        let mut left = SIZE;
        while left > 0 {
            let length = left.min(piece.len());
            to.write_all(&piece[..length]).await.unwrap();
            left -= length;
        }
        to
    });
    let mut all = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let head = all.windows(4).position(|window| window == b"\r\n\r\n");
        if head.is_some_and(|at| all.len() == at + 4 + SIZE) {
            let body = &all[head.unwrap() + 4..];
            assert!(
                body.iter()
                    .enumerate()
                    .all(|(at, b)| *b == byte(at % (251 * 1000)))
            );
            break;
        }
        // Only the head is searched again.
        let read = from.read(&mut buffer).await.unwrap();
        assert!(read > 0, "{} bytes", all.len());
        all.extend_from_slice(&buffer[..read]);
    }
    sending.await.unwrap();
}

#[tokio::test]
async fn what_the_guest_does_not_take_is_not_kept_for_it() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client
        .send("POST / HTTP/1.1\r\nHost: web.vms.test\r\nContent-Length: 1000000000\r\n\r\n")
        .await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let sending = tokio::spawn(async move {
        let piece = vec![0; 64 * 1024];
        while client.stream.write_all(&piece).await.is_ok() {
            counter.fetch_add(piece.len(), Ordering::Relaxed);
        }
    });
    // Until nothing moves any more: what there is then, is in sockets.
    let mut last = usize::MAX;
    while last != sent.load(Ordering::Relaxed) {
        last = sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(last < 64 * 1024 * 1024, "{last} bytes");
    drop(guest);
    sending.await.unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_request_in_the_guest() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
        .await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    drop(client);
    assert!(guest.head().await.is_none());
}

#[tokio::test]
async fn a_guest_that_dies_in_an_answer_is_no_whole_answer() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    tokio::spawn(async move {
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        guest
            .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            .await;
    });
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
        .await;
    client.head().await.unwrap();
    assert_eq!(client.chunk().await, b"abc");
    assert_eq!(client.until_the_end().await, b"", "no last chunk");
}
