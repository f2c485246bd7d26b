//! Machines of the stub runtime, through the client: every route as a user would meet it.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_contract::client::{Body, Client, Download, Until};
use hutch_contract::error::Kind;
use hutch_contract::exec::{Exec, ExecEvent};
use hutch_contract::id::OperationId;
use hutch_contract::image::ImportFormat;
use hutch_contract::machine::{CreateMachine, Status};
use hutch_contract::operation::OperationState;
use hutch_server::Running;

use crate::{Home, by_socket, programs};

/// Generous: a bound for broken code, not a measure.
pub const LONG: Duration = Duration::from_secs(60);

/// A server with an image `tiny`, or nothing when this build has no stub.
pub async fn bench() -> Option<(Home, Running, Client)> {
    for program in ["hutch", "hutch-stub-vmm", "guest/hutch-agent"] {
        if !programs().join(program).is_file() {
            eprintln!("skipped: {program} is not built; run `cargo xtask test`");
            return None;
        }
    }
    let home = Home::new();
    let running = home.start().await;
    let client = by_socket(running.socket());
    if !client
        .runtimes()
        .await
        .unwrap()
        .iter()
        .any(|runtime| runtime.name == "stub")
    {
        eprintln!("skipped: built without the feature `stub`; run `cargo xtask test`");
        running.shutdown().await;
        return None;
    }
    import(&client, "tiny").await;
    Some((home, running, client))
}

async fn import(client: &Client, name: &str) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(6);
    header.set_mode(0o644);
    tar.append_data(&mut header, "etc/hello", &b"hello\n"[..])
        .unwrap();
    let tar = tar.into_inner().unwrap();
    let name = name.parse().unwrap();
    let accepted = client
        .import_image(&name, ImportFormat::Tar, Some(tar.len() as u64), body(tar))
        .await
        .unwrap();
    finish(client, &accepted.operation).await;
}

/// Follows an operation to its good end.
async fn finish(client: &Client, id: &OperationId) {
    let mut version = 0;
    loop {
        let operation = client.wait_operation(id, version, LONG).await.unwrap();
        match operation.state {
            OperationState::Running { .. } => version = operation.version,
            OperationState::Succeeded => return,
            OperationState::Failed { message, .. } => panic!("{message}"),
        }
    }
}

pub fn body(bytes: Vec<u8>) -> Body {
    let chunks: Vec<_> = bytes
        .chunks(100_000)
        .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
        .collect();
    stream::iter(chunks).boxed()
}

pub fn spec(name: &str) -> CreateMachine {
    serde_json::from_value(
        serde_json::json!({ "image": "tiny", "name": name, "runtime": "stub", "memory_mib": 128 }),
    )
    .unwrap()
}

pub fn command(script: &str) -> Exec {
    serde_json::from_value(serde_json::json!({ "command": ["sh", "-c", script] })).unwrap()
}

pub async fn bytes_of(download: Download) -> Vec<u8> {
    let chunks: Vec<Bytes> = download.bytes.try_collect().await.unwrap();
    chunks.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_through_all_of_its_states() {
    let Some((_home, running, client)) = bench().await else {
        return;
    };
    let machine = client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    assert_eq!(machine.status, Status::Running);
    assert_eq!(client.machine("a").await.unwrap().id, machine.id);
    assert_eq!(
        client
            .machine(machine.id.as_str())
            .await
            .unwrap()
            .name
            .as_str(),
        "a"
    );
    assert_eq!(
        client
            .create(&spec("a"), None, None)
            .await
            .unwrap_err()
            .kind(),
        Kind::Conflict
    );

    assert_eq!(
        client.stop("a", Some(LONG)).await.unwrap().status,
        Status::Stopped
    );
    assert_eq!(
        client.exec("a", &command("true")).await.unwrap_err().kind(),
        Kind::Conflict
    );
    assert_eq!(
        client.all_machines(Some(Status::Running)).await.unwrap(),
        []
    );
    assert_eq!(
        client
            .all_machines(Some(Status::Stopped))
            .await
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        client.start("a", Some(LONG)).await.unwrap().status,
        Status::Running
    );
    let again = client.restart("a", Some(LONG)).await.unwrap();
    assert_eq!((again.status, again.starts), (Status::Running, 3));
    client.stop("a", None).await.unwrap();
    let stopped = client
        .wait("a", Until::Status(Status::Stopped), LONG)
        .await
        .unwrap();
    assert_eq!(stopped.unwrap().status, Status::Stopped);
    let never = client
        .wait("a", Until::Status(Status::Running), LONG)
        .await
        .unwrap_err();
    assert_eq!(
        never.kind(),
        Kind::Conflict,
        "nobody wants it to run: {never}"
    );
    client.start("a", Some(LONG)).await.unwrap();
    let short = Duration::from_millis(50);
    let late = client.wait("a", Until::Gone, short).await.unwrap_err();
    assert_eq!(late.kind(), Kind::Timeout, "{late}");

    let (gone, deleted) = tokio::join!(
        client.wait("a", Until::Gone, LONG),
        client.delete("a", Some(LONG))
    );
    assert!(gone.unwrap().is_none() && deleted.unwrap().is_none());
    assert_eq!(
        client.machine("a").await.unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(
        client.delete("a", None).await.unwrap_err().code(),
        Some("machine_not_found")
    );
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_idempotency_key_makes_one_machine() {
    let Some((_home, running, client)) = bench().await else {
        return;
    };
    let one = spec("one");
    let storm = (0..20).map(|_| client.create(&one, Some("key-1"), None));
    let made = futures::future::try_join_all(storm).await.unwrap();
    assert!(made.iter().all(|machine| machine.id == made[0].id));
    assert_eq!(client.all_machines(None).await.unwrap().len(), 1);
    let other = client
        .create(&spec("two"), Some("key-1"), None)
        .await
        .unwrap_err();
    assert_eq!(other.kind(), Kind::Conflict, "{other}");
    client.delete("one", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages_without_gaps_or_doubles() {
    let Some((_home, running, client)) = bench().await else {
        return;
    };
    for name in ["a", "b", "c", "d", "e"] {
        client.create(&spec(name), None, None).await.unwrap();
    }
    let (mut names, mut cursor, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        let page = client
            .machines(None, cursor.as_deref(), Some(2))
            .await
            .unwrap();
        names.extend(
            page.items
                .into_iter()
                .map(|machine| machine.name.to_string()),
        );
        pages += 1;
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    names.sort();
    assert_eq!((names.join(""), pages), ("abcde".to_owned(), 3));
    assert_eq!(
        client
            .machines(None, Some("garbage"), None)
            .await
            .unwrap_err()
            .kind(),
        Kind::Invalid
    );
    for name in names {
        client.delete(&name, Some(LONG)).await.unwrap();
    }
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_s_streams_and_its_end_arrive_either_way() {
    let Some((_home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let script = command("echo out; echo err >&2; exit 3");
    let result = client.exec("a", &script).await.unwrap();
    assert_eq!(
        (result.stdout.as_str(), result.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!((result.exit.exit_code, result.exit.signal), (3, None));

    let events: Vec<ExecEvent> = client
        .exec_stream("a", &script)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert!(
        matches!(events.first(), Some(ExecEvent::Started { .. })),
        "{events:?}"
    );
    assert!(
        matches!(events.last(), Some(ExecEvent::Exit(exit)) if exit.exit_code == 3),
        "{events:?}"
    );
    let out = events.iter().any(
        |event| matches!(event, ExecEvent::Stdout { data_base64, .. } if data_base64 == "b3V0Cg=="),
    );
    let err = events.iter().any(
        |event| matches!(event, ExecEvent::Stderr { data_base64, .. } if data_base64 == "ZXJyCg=="),
    );
    assert!(out && err, "{events:?}");

    let missing =
        serde_json::from_value(serde_json::json!({ "command": ["/no/such/program"] })).unwrap();
    let refused = client.exec_stream("a", &missing).await;
    assert!(
        refused.is_err_and(|error| error.kind() != Kind::Bug),
        "a bad command has a status, not a broken stream"
    );
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_does_not_end_the_command() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let here = home.shared().join("went-on");
    let mut events = client
        .exec_stream(
            "a",
            &command(&format!(
                "echo x; read -t 1 line; sleep 1; echo y; touch {}",
                here.display()
            )),
        )
        .await
        .unwrap();
    events.next().await.unwrap().unwrap();
    drop(events);
    let seen = async {
        while !here.exists() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LONG, seen).await.expect("it went on");
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_and_followed_logs_do_not_keep_a_server_from_ending() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    let machine = client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let said = client
        .exec("a", &command("echo $PPID"))
        .await
        .unwrap()
        .stdout;
    let mut logs = client.logs("a", 0, true).await.unwrap().bytes;
    let wait = tokio::spawn({
        let client = client.clone();
        async move { client.wait("a", Until::Gone, LONG).await }
    });
    assert!(
        bytes_of(client.logs("a", 0, false).await.unwrap())
            .await
            .len()
            < 1 << 20
    );
    running.shutdown().await;
    while let Some(piece) = logs.next().await {
        if piece.is_err() {
            break;
        }
    }
    let waited = wait.await.unwrap().unwrap_err();
    assert_eq!(waited.kind(), Kind::Unavailable, "{waited:?}");

    let next = home.start().await;
    let client = by_socket(next.socket());
    let found = client
        .wait("a", Until::Status(Status::Running), LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((found.id, found.starts), (machine.id, 1));
    assert_eq!(
        client
            .exec("a", &command("echo $PPID"))
            .await
            .unwrap()
            .stdout,
        said,
        "the same agent"
    );
    client.delete("a", Some(LONG)).await.unwrap();
    next.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_can_be_looked_at_and_deleted() {
    let Some((_home, running, client)) = bench().await else {
        return;
    };
    let image = client.image("tiny").await.unwrap();
    assert_eq!(
        client.all_images().await.unwrap(),
        std::slice::from_ref(&image)
    );
    client.delete_image(image.id.as_str()).await.unwrap();
    assert_eq!(
        client.image("tiny").await.unwrap_err().code(),
        Some("image_not_found")
    );
    let garbage = client
        .import_image(
            &"bad".parse().unwrap(),
            ImportFormat::Tar,
            None,
            body(vec![9; 4096]),
        )
        .await;
    if let Ok(accepted) = garbage {
        let operation = client
            .wait_operation(&accepted.operation, 0, LONG)
            .await
            .unwrap();
        let mut version = operation.version;
        let mut state = operation.state;
        while matches!(state, OperationState::Running { .. }) {
            let next = client
                .wait_operation(&accepted.operation, version, LONG)
                .await
                .unwrap();
            (version, state) = (next.version, next.state);
        }
        assert!(matches!(state, OperationState::Failed { .. }), "{state:?}");
    }
    assert!(client.all_images().await.unwrap().is_empty());
    running.shutdown().await;
}
