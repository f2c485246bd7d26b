//! What readers see of a ring, whatever a writer does meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Byte `n` of the endless output that these tests write.
fn byte(n: u64) -> u8 {
    (n ^ (n >> 8) ^ (n >> 16)) as u8
}

fn output(from: u64, length: u64) -> Vec<u8> {
    (from..from + length).map(byte).collect()
}

#[test]
fn the_last_bytes_are_kept_and_the_others_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    let mut ring = RingWriter::open(&path, 1000).unwrap();
    let reader = RingReader::open(&path).unwrap();
    assert_eq!(reader.read_from(0, 10).unwrap(), Piece::default());

    let mut total = 0;
    for length in [1, 999, 1, 70_000, 3, 200_000, 65_536, 17] {
        ring.append(&output(total, length)).unwrap();
        total += length;
        let all = reader.read_from(0, usize::MAX).unwrap();
        assert_eq!(all.first, total.saturating_sub(1000));
        assert_eq!(all.dropped, all.first);
        assert_eq!(all.bytes, output(all.first, total.min(1000)));
    }
    let some = reader.read_from(total - 10, 4).unwrap();
    assert_eq!((some.first, some.dropped), (total - 10, 0));
    assert_eq!(some.bytes, output(total - 10, 4));
    assert_eq!(reader.read_from(total + 5, 4).unwrap().bytes, b"");
    assert_eq!(reader.tail(total - 3, 100).unwrap(), output(total - 3, 3));
    assert!(std::fs::metadata(&path).unwrap().len() <= DATA + 1000 + SLACK);
}

#[test]
fn a_ring_goes_on_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    RingWriter::open(&path, 100)
        .unwrap()
        .append(&output(0, 150))
        .unwrap();
    let mut ring = RingWriter::open(&path, 999).unwrap();
    assert_eq!((ring.total(), ring.capacity), (150, 100));
    ring.append(&output(150, 10)).unwrap();
    let all = RingReader::open(&path)
        .unwrap()
        .read_from(60, 1000)
        .unwrap();
    assert_eq!((all.first, all.dropped), (60, 0));
    assert_eq!(all.bytes, output(60, 100));
}

#[test]
fn what_is_no_ring_reads_as_empty_and_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    for damage in [vec![], vec![1; 5], vec![0; 9000], vec![255; 9000]] {
        std::fs::write(&path, damage).unwrap();
        let reader = RingReader::open(&path).unwrap();
        assert_eq!(reader.read_from(0, 10).unwrap().bytes, b"");
        let mut ring = RingWriter::open(&path, 10).unwrap();
        ring.append(b"new").unwrap();
        assert_eq!(reader.read_from(0, 10).unwrap().bytes, b"new");
    }
}

#[test]
fn a_planted_link_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (target, link) = (dir.path().join("target"), dir.path().join("ring"));
    std::fs::write(&target, "precious").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    assert!(RingWriter::open(&link, 10).is_err());
    assert!(RingReader::open(&link).is_err());
    assert_eq!(std::fs::read(&target).unwrap(), b"precious");
}

#[test]
fn readers_never_see_a_wrong_byte_while_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    let mut ring = RingWriter::open(&path, 5000).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..3000 {
                let length = 1 + (n * 7919) % 9000;
                ring.append(&output(ring.total(), length)).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        let reader = RingReader::open(&path).unwrap();
        let mut next = 0;
        let (mut seen, mut dropped) = (0, 0);
        loop {
            let last = done.load(Ordering::Acquire);
            let piece = reader.read_from(next, 4096).unwrap();
            assert_eq!(piece.first, next + piece.dropped);
            assert_eq!(piece.bytes, output(piece.first, piece.bytes.len() as u64));
            seen += piece.bytes.len() as u64;
            dropped += piece.dropped;
            next = piece.next();
            if last && piece.bytes.is_empty() {
                break;
            }
        }
        assert_eq!(seen + dropped, reader.end().unwrap());
    });
}

#[tokio::test]
async fn a_follower_sees_what_comes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ring");
    let mut ring = RingWriter::open(&path, 1000).unwrap();
    ring.append(b"old new").unwrap();
    let mut follower = Follower::open(&path, 4).unwrap();
    assert_eq!(follower.next(100).await.unwrap().bytes, b"new");
    let writer = tokio::spawn(async move {
        tokio::task::yield_now().await;
        ring.append(b"newer").unwrap();
        ring
    });
    assert_eq!(follower.next(100).await.unwrap().bytes, b"newer");
    drop(writer);
}
