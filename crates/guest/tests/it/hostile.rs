//! The session with agents that lie, stall and vanish: each call ends in a clear error, and other calls go on.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_guest::hostile::{self, Behaviour};
use hutch_guest::session::{Error, ExitStatus, Kind, Output, Result, Session, StartProcess};
use hutch_guest::{link, session};
use tokio::io::duplex;
use tokio::net::{UnixListener, UnixStream};

use crate::SOON;

async fn open(behaviour: Behaviour) -> Result<Session> {
    let (host, guest) = duplex(64 * 1024);
    tokio::spawn(hostile::serve(guest, behaviour));
    Session::open(host, SOON).await
}

async fn victim(behaviour: Behaviour) -> Session {
    open(behaviour).await.unwrap()
}

fn lie<T>(result: Result<T>) -> &'static str {
    match result {
        Err(Error::Protocol { what, .. }) => what,
        Err(other) => panic!("{other:?} instead of a lie found out"),
        Ok(_) => panic!("a lie believed"),
    }
}

async fn read(session: &Session, path: &str, offset: u64, length: u64) -> Result<u64> {
    let (_, content) = session.read_file(path, offset, length).await?;
    content
        .try_fold(0, async |size, piece| Ok(size + piece.len() as u64))
        .await
}

async fn output(session: &Session) -> Result<Vec<Output>> {
    session.attach("p", 0, true).await?.try_collect().await
}

async fn write(session: &Session) -> Result<u64> {
    let content = stream::repeat_with(|| Ok(Bytes::from(vec![0; 10_000]))).take(100);
    session
        .write_file(&session::WriteFile::default(), content)
        .await
}

#[tokio::test(start_paused = true)]
async fn what_is_no_agent_is_no_session() {
    for behaviour in [Behaviour::Silent, Behaviour::Deaf] {
        let error = open(behaviour).await.unwrap_err();
        assert!(
            matches!(error, Error::Timeout { call: "Hello" }),
            "{behaviour:?}: {error:?}"
        );
    }
    for behaviour in [Behaviour::Garbage, Behaviour::HangsUp] {
        let error = open(behaviour).await.unwrap_err();
        assert!(
            matches!(error, Error::Disconnected { .. }),
            "{behaviour:?}: {error:?}"
        );
    }
    for behaviour in [
        Behaviour::GenerationZero,
        Behaviour::HugeNonce,
        Behaviour::RawText,
    ] {
        lie(open(behaviour).await);
    }
}

#[tokio::test]
async fn the_link_believes_no_wrong_answer_and_no_garbage() {
    for behaviour in [
        Behaviour::WrongAck,
        Behaviour::Garbage,
        Behaviour::Silent,
        Behaviour::Deaf,
    ] {
        let (host, guest) = duplex(64 * 1024);
        tokio::spawn(hostile::serve(guest, behaviour));
        let error = link::connect(host, Duration::from_millis(300))
            .await
            .err()
            .unwrap();
        assert!(
            matches!(error, Error::Timeout { .. }),
            "{behaviour:?}: {error:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_ends_each_call_at_its_deadline() {
    let session = victim(Behaviour::Mute).await;
    let timeout = |result: Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    };
    timeout(session.start(&StartProcess::default()).await.map(drop));
    timeout(session.attach("p", 0, true).await.map(drop));
    timeout(session.wait("p", SOON).await.map(drop));
    timeout(session.signal("p", 9, false).await);
    timeout(session.processes().await.map(drop));
    timeout(session.forget("p").await);
    timeout(read(&session, "/zeros/1", 0, 0).await.map(drop));
    timeout(write(&session).await.map(drop));
    timeout(session.stat("/a", false).await.map(drop));
    timeout(session.list_dir("/", b"", 10).await.map(drop));
    timeout(session.remove("/a", false).await);
    timeout(session.make_dir("/a", 0, false).await);
    timeout(session.move_file("/a", "/b", false).await);
    timeout(session.change_file(&session::Change::default()).await);
    timeout(session.walk(&session::Walk::default()).await.map(drop));
    timeout(session.dial("", 7).await.map(drop));
    assert!(!session.is_closed());

    let session = victim(Behaviour::StallsUpload).await;
    timeout(write(&session).await.map(drop));
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_vanishes_in_a_call_ends_it_at_once() {
    let began = tokio::time::Instant::now();
    let error = output(&victim(Behaviour::HangsUpInCall).await)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    let error = write(&victim(Behaviour::HangsUpInCall).await)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "no timer was needed"
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_that_the_agent_breaks_off_leaves_the_session() {
    let session = victim(Behaviour::Panics).await;
    lie(session.stat("/a", false).await);
    lie(output(&session).await);
    session.quiesce().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn lies_about_processes_are_found_out() {
    lie(output(&victim(Behaviour::OutputGap).await).await);
    lie(output(&victim(Behaviour::NoExit).await).await);

    let session = victim(Behaviour::ImpossibleNumbers).await;
    lie(session.start(&StartProcess::default()).await);
    let exit = session.wait("p", SOON).await.unwrap();
    assert_eq!(exit.status, ExitStatus::Code(255));

    let session = victim(Behaviour::MiscountsUpload).await;
    lie(session
        .input("p", stream::iter([Bytes::from("x")]), true)
        .await);

    let session = victim(Behaviour::HugeReplies).await;
    assert_eq!(
        lie(session.processes().await),
        "a message larger than the limit"
    );
    assert_eq!(
        lie(output(&session).await),
        "a message larger than the limit"
    );
    session.stat("/a", false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn lies_about_files_are_found_out() {
    let session = victim(Behaviour::LongFile).await;
    lie(read(&session, "/zeros/1000000", 0, 0).await);
    let session = victim(Behaviour::Honest).await;
    assert_eq!(
        lie(read(&session, "/zeros/1000000", 0, 5).await),
        "more bytes than declared"
    );
    let session = victim(Behaviour::ShortFile).await;
    assert_eq!(
        lie(read(&session, "/zeros/1000000", 0, 0).await),
        "fewer bytes than declared"
    );
    lie(read(&victim(Behaviour::NamelessFile).await, "/zeros/1", 0, 0).await);
    lie(write(&victim(Behaviour::MiscountsUpload).await).await);
    lie(victim(Behaviour::PathsAsNames)
        .await
        .list_dir("/", b"", 10)
        .await);

    let session = victim(Behaviour::EndlessDirectory).await;
    let page = session.list_dir("/", b"", 10).await.unwrap();
    let last = &page.entries.last().unwrap().name;
    lie(session.list_dir("/", last, 10).await);
    lie(session.list_dir("/", b"", 1).await);

    let walk = session::Walk::default();
    lie(victim(Behaviour::PathsAsNames).await.walk(&walk).await);
    let session = victim(Behaviour::EndlessWalk).await;
    let after = session.walk(&walk).await.unwrap().next.unwrap();
    lie(session.walk(&session::Walk { after, ..walk }).await);
}

#[tokio::test(start_paused = true)]
async fn an_old_agent_is_not_asked_for_what_it_would_misunderstand() {
    let session = victim(Behaviour::GenerationOne).await;
    let append = session::WriteFile {
        append: true,
        ..Default::default()
    };
    let content = stream::iter([Ok(Bytes::from_static(b"x"))]);
    let refused = [
        session.write_file(&append, content).await.map(drop),
        session.move_file("/a", "/b", false).await,
        session.change_file(&session::Change::default()).await,
        session.walk(&session::Walk::default()).await.map(drop),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::TooOld { .. }), "{error:?}");
        assert!(error.hint().unwrap().starts_with("restart the machine"));
    }
}

#[tokio::test(start_paused = true)]
async fn endless_output_is_delivered_as_slowly_as_it_is_read() {
    let session = victim(Behaviour::Honest).await;
    let mut output = session.attach("endless", 0, true).await.unwrap();
    let mut next = 0;
    for _ in 0..1000 {
        let Output::Chunk(chunk) = output.next().await.unwrap().unwrap() else {
            panic!("a chunk")
        };
        assert_eq!(chunk.sequence, next);
        next += chunk.data.len() as u64;
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_inert_text() {
    let error = victim(Behaviour::RudeRefusal)
        .await
        .stat("/a", false)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let text = error.to_string();
    assert!(
        !text.contains(char::is_control) && text.len() < 1100,
        "{text}"
    );
}

#[tokio::test]
async fn a_double_serves_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("hutch-double-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(hostile::listen(listener, Behaviour::Honest));
    for _ in 0..2 {
        let stream = UnixStream::connect(&path).await.unwrap();
        let session = Session::open(stream, SOON).await.unwrap();
        session.stat("/a", false).await.unwrap();
    }
    server.abort();
    std::fs::remove_file(&path).unwrap();
}
