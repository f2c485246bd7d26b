//! Readers that are slow, gone, late or many.

use std::time::Duration;

use hutch_guest::pb;
use tonic::Code;

use crate::harness::*;

/// Bytes that the process `id` has written into its log file, which it does after each write to stdout.
fn progress(agent: &Agent) -> u64 {
    std::fs::metadata(agent.root().join("progress")).map_or(0, |meta| meta.len())
}

/// Writes 64 KiB blocks, noting each.
const WRITER: &str =
    "i=0; while [ $i -lt 200 ]; do head -c 65536 /dev/zero; echo >> progress; i=$((i+1)); done";
const TOTAL: u64 = 200 * 65536;

#[tokio::test]
async fn a_slow_reader_blocks_the_writer_and_loses_nothing() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = shell("p", WRITER);
    request.ring_bytes = 256 * 1024;
    client.start(request).await.unwrap();
    let mut events = attach(&mut client, "p", 0).await;
    let mut seen = Seen::default();
    seen.take(events.message().await.unwrap().unwrap());
    // Well beyond the grace for an absent reader: an attached one is waited for without end.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let stalled = progress(&agent);
    assert!(
        stalled < 20,
        "{stalled} blocks were written without being read"
    );
    // Others go on meanwhile.
    assert_eq!(
        exec(&mut client, shell("q", "echo hi")).await.stdout,
        b"hi\n"
    );
    while let Some(event) = events.message().await.unwrap() {
        seen.take(event);
    }
    assert_eq!((seen.end, seen.dropped, seen.code()), (TOTAL, 0, Some(0)));
}

#[tokio::test]
async fn without_a_reader_the_oldest_bytes_go_and_are_counted() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = shell("p", &format!("{WRITER}; echo the end"));
    request.ring_bytes = 256 * 1024;
    client.start(request).await.unwrap();
    let exit = client
        .wait(pb::WaitRequest {
            process_id: "p".into(),
        })
        .await
        .unwrap();
    assert_eq!(exit.into_inner().output_end, TOTAL + 8);
    let seen = follow(&mut client, "p").await;
    assert!(seen.stdout.ends_with(b"the end\n"));
    assert!(seen.dropped > 0 && seen.stdout.len() <= 256 * 1024);
    assert_eq!(seen.end, TOTAL + 8);
}

#[tokio::test]
async fn nothing_is_lost_between_start_and_attach() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    client
        .start(start("p", &["head", "-c", "5000000", "/dev/zero"]))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let seen = follow(&mut client, "p").await;
    assert_eq!((seen.stdout.len(), seen.dropped), (5_000_000, 0));
}

#[tokio::test]
async fn a_lost_connection_loses_no_output() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    client.start(shell("p", "seq 1 400000")).await.unwrap();
    let mut seen = Seen::default();
    let mut connections = 0;
    while seen.exit.is_none() {
        connections += 1;
        let mut client = agent.greet().await;
        let mut events = attach(&mut client, "p", seen.end).await;
        for _ in 0..10 {
            match events.message().await.unwrap() {
                Some(event) => seen.take(event),
                None => break,
            }
        }
    }
    let expected: String = (1..=400_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(seen.dropped, 0);
    assert!(seen.stdout == expected.as_bytes());
    assert!(connections > 3);
}

#[tokio::test]
async fn many_readers_see_the_same() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    client
        .start(shell("p", "seq 1 200000; seq 1 1000 >&2"))
        .await
        .unwrap();
    let (mut second, mut third) = (client.clone(), client.clone());
    let (a, b, c) = tokio::join!(
        follow(&mut client, "p"),
        follow(&mut second, "p"),
        follow(&mut third, "p"),
    );
    assert!(a.stdout == b.stdout && b.stdout == c.stdout && a.stdout.ends_with(b"\n200000\n"));
    assert_eq!(
        (a.stderr.len(), a.dropped + b.dropped + c.dropped),
        (c.stderr.len(), 0)
    );
}

#[tokio::test]
async fn a_reader_that_does_not_follow_ends_at_what_is_there() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    client
        .start(shell("p", "echo one; sleep 1000"))
        .await
        .unwrap();
    let mut follower = attach(&mut client, "p", 0).await;
    follower.message().await.unwrap().expect("its first line");
    let request = |from| pb::AttachRequest {
        process_id: "p".into(),
        from,
        no_follow: true,
    };
    let mut events = client.attach(request(0)).await.unwrap().into_inner();
    let mut seen = Seen::default();
    while let Some(event) = events.message().await.unwrap() {
        seen.take(event);
    }
    assert_eq!((seen.stdout.as_slice(), seen.exit), (&b"one\n"[..], None));
    assert_eq!(code(client.attach(request(5)).await), Code::OutOfRange);
}

#[tokio::test]
async fn a_process_that_changes_streams_with_every_byte_keeps_its_order() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let script = "i=0; while [ $i -lt 20000 ]; do printf a; printf b >&2; i=$((i+1)); done";
    let mut request = shell("p", script);
    request.ring_bytes = 4096;
    let seen = exec(&mut client, request).await;
    assert_eq!(
        (seen.stdout.len(), seen.stderr.len(), seen.dropped),
        (20_000, 20_000, 0)
    );
}
