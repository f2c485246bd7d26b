//! The session with an honest agent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_guest::hostile::{Behaviour, Double};
use hutch_guest::session::{
    Configure, Error, Exit, ExitStatus, Kind, Output, OutputStream, Session, StartProcess, Stream,
    WriteFile,
};
use hutch_guest::{limits, link, serve};
use tokio::io::duplex;

use crate::SOON;
use crate::port::Port;

async fn honest() -> (Session, Arc<Double>) {
    let (host, guest) = duplex(64 * 1024);
    let double = Arc::new(Double::new(Behaviour::Honest));
    tokio::spawn(double.clone().serve(guest));
    (Session::open(host, SOON).await.unwrap(), double)
}

const EXIT: Exit = Exit {
    status: ExitStatus::Code(3),
    timed_out: false,
    output_end: 6,
};

#[tokio::test(start_paused = true)]
async fn every_call_reaches_an_honest_agent() {
    let (session, _) = honest().await;
    assert_eq!(session.hello().boot_nonce, [7; 16]);
    let unapplied = session.configure(&Configure::default()).await.unwrap();
    assert_eq!(
        (&unapplied[0].field[..], &unapplied[0].reason[..]),
        ("hostname", "a\\ndouble")
    );
    session.quiesce().await.unwrap();
    session.thaw(0).await.unwrap();

    let process = StartProcess {
        process_id: "p".into(),
        ..Default::default()
    };
    assert_eq!(session.start(&process).await.unwrap(), 42);
    let output: Vec<_> = session
        .attach("p", 0, true)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let chunks = output.iter().map(|output| match output {
        Output::Chunk(chunk) => (Some(chunk.stream), chunk.sequence, &chunk.data[..]),
        other => panic!("{other:?} before the exit"),
    });
    let expected = [
        (Some(Stream::Stdout), 0, &b"out"[..]),
        (Some(Stream::Stderr), 3, b"err"),
    ];
    assert!(chunks.take(2).eq(expected));
    assert_eq!(output[2..], [Output::Exit(EXIT)]);
    assert_eq!(session.wait("p", SOON).await.unwrap(), EXIT);
    let input = stream::iter(["a", "bc"]).map(Bytes::from);
    assert_eq!(session.input("p", input, true).await.unwrap(), 3);
    session.signal("p", 9, true).await.unwrap();
    assert_eq!(session.processes().await.unwrap()[0].exit, Some(EXIT));
    session.forget("p").await.unwrap();

    assert_eq!(session.stat("/a", false).await.unwrap().name, b"a");
    assert_eq!(
        session.stat("/none", false).await.unwrap_err().kind(),
        Kind::NotFound
    );
    let page = session.list_dir("/", b"a", 10).await.unwrap();
    assert_eq!((&page.entries[0].name[..], page.more), (&b"b"[..], false));
    session.remove("/a", true).await.unwrap();
    session.make_dir("/a/b", 0o755, true).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn files_of_any_size_go_in_and_out() {
    let (session, double) = honest().await;
    for size in [0, 1, limits::CHUNK, 10 * 1024 * 1024 + 7] {
        let (info, content) = session
            .read_file(&format!("/zeros/{size}"), 0, 0)
            .await
            .unwrap();
        assert_eq!(info.size, size as u64);
        let file = WriteFile {
            path: "/f".into(),
            size: Some(size as u64),
            ..Default::default()
        };
        let content = content.map_err(io::Error::other);
        assert_eq!(
            session.write_file(&file, content).await.unwrap(),
            size as u64
        );
        assert!(double.written()["/f"] == vec![0; size]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_is_not_whole_is_never_taken_for_a_file() {
    let (session, double) = honest().await;
    let some = || stream::iter([Ok(Bytes::from(vec![1; 100_000]))]);
    let file = |size| WriteFile {
        path: "/f".into(),
        size,
        ..Default::default()
    };

    let failing = some().chain(stream::iter([Err(io::ErrorKind::BrokenPipe.into())]));
    let error = session.write_file(&file(None), failing).await.unwrap_err();
    assert!(matches!(error, Error::Source { .. }), "{error:?}");
    double.broken_upload.notified().await;

    for wrong in [99_999, 100_001] {
        let error = session
            .write_file(&file(Some(wrong)), some())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Source { .. }), "{error:?}");
        double.broken_upload.notified().await;
    }

    let target = file(None);
    let dropped = session.write_file(&target, some().chain(stream::pending()));
    assert!(
        tokio::time::timeout(10 * SOON, dropped).await.is_err(),
        "a slow source is no fault"
    );
    double.broken_upload.notified().await;
    assert!(double.written().is_empty());
}

async fn stalled(session: &Session) -> OutputStream {
    let mut output = session.attach("endless", 0, true).await.unwrap();
    assert!(matches!(
        output.next().await.unwrap().unwrap(),
        Output::Chunk(_)
    ));
    output
}

#[tokio::test(start_paused = true)]
async fn streams_that_nobody_reads_stall_nothing_else() {
    let (session, _) = honest().await;
    let mut all = Vec::new();
    for _ in 0..limits::STREAMS - 1 {
        all.push(stalled(&session).await);
    }
    let (_, content) = session.read_file("/zeros/3000000", 0, 0).await.unwrap();
    let size = content
        .try_fold(0, async |size, piece| Ok(size + piece.len()))
        .await
        .unwrap();
    assert_eq!(size, 3_000_000);
    session.stat("/a", false).await.unwrap();

    // The last slot: one more call waits for its own deadline, and goes on once another ends.
    all.push(stalled(&session).await);
    let error = session.stat("/a", false).await.unwrap_err();
    assert!(
        matches!(error, Error::Timeout { call: "Stat" }),
        "{error:?}"
    );
    all.pop();
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn two_hundred_calls_at_once_are_all_answered() {
    let (session, _) = honest().await;
    let calls = (0..200).map(|_| session.wait("p", SOON));
    let answers = futures::future::join_all(calls).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap() == EXIT));
}

#[tokio::test(start_paused = true)]
async fn streams_and_calls_may_be_dropped_any_number_of_times() {
    let (session, _) = honest().await;
    for _ in 0..3000 {
        drop(stalled(&session).await);
        let wait = session.wait("quiet", SOON);
        let first = futures::future::select(Box::pin(wait), std::future::ready(())).await;
        assert!(matches!(first, futures::future::Either::Right(_)));
    }
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_ends_every_call_and_the_session() {
    let (host, guest) = duplex(64 * 1024);
    let double = Arc::new(Double::new(Behaviour::Honest));
    let agent = tokio::spawn(double.serve(guest));
    let session = Session::open(host, SOON).await.unwrap();
    let closed = tokio::spawn(session.closed());
    let mut output = stalled(&session).await;
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { session.wait("quiet", SOON).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!session.is_closed());
    agent.abort();

    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    closed.await.unwrap();
    assert!(session.is_closed());
    let last = loop {
        match output.next().await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(last, Error::Disconnected { .. }), "{last:?}");
    let error = session.stat("/a", false).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_closes_lets_calls_in_flight_end() {
    let (host, guest) = duplex(64 * 1024);
    let (close, closing) = tokio::sync::oneshot::channel::<()>();
    let double = Arc::new(Double::new(Behaviour::Honest));
    let agent = tokio::spawn(serve::serve(guest, double, async {
        let _dropped = closing.await;
    }));
    let session = Session::open(host, SOON).await.unwrap();
    close.send(()).unwrap();
    session.closed().await;
    agent.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn over_the_link_a_new_session_begins_while_the_old_one_is_busy() {
    let (mut port, guest) = Port::new();
    let double = Arc::new(Double::new(Behaviour::Honest));
    let mut listener = link::listen(guest);
    tokio::spawn(async move {
        while let Ok(stream) = listener.accept().await {
            tokio::spawn(double.clone().serve(stream));
        }
    });
    let mut older = None;
    for _ in 0..10 {
        let line = link::connect(port.plug().await, SOON).await.unwrap();
        let session = Session::open(line, SOON).await.unwrap();
        let (_, content) = session.read_file("/zeros/1000000", 0, 0).await.unwrap();
        let size = content
            .try_fold(0, async |size, piece| Ok(size + piece.len()))
            .await
            .unwrap();
        assert_eq!(size, 1_000_000);
        let output = stalled(&session).await;
        if let Some((session, _)) = older.replace((session, output)) {
            let session: Session = session;
            session.closed().await;
        }
    }
}
