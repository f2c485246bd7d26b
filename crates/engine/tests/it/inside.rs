//! What is done in a machine: commands, files, console.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use hutch_contract::error::Kind;
use hutch_contract::machine::Status;
use hutch_engine::{ExecOutput, ListFiles, WriteFile};
use rustix::process::{Signal, kill_process};

use crate::lab::{LONG, Lab, body, sh};

#[tokio::test(flavor = "multi_thread")]
async fn output_comes_in_order_and_then_the_exit() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let script = "for n in 1 2 3 4 5 6 7 8; do echo $n; echo $n >&2; done; exit 3";
    let execution = lab.engine.exec(&lab.who, "a", sh(script)).await.unwrap();
    let output: Vec<_> = execution.output.try_collect().await.unwrap();
    let (mut out, mut err, mut next) = (Vec::new(), Vec::new(), 0);
    for piece in &output[..output.len() - 1] {
        let (to, sequence, data) = match piece {
            ExecOutput::Stdout { sequence, data } => (&mut out, sequence, data),
            ExecOutput::Stderr { sequence, data } => (&mut err, sequence, data),
            other => panic!("{other:?}"),
        };
        assert_eq!(*sequence, next);
        next += data.len() as u64;
        to.extend_from_slice(data);
    }
    assert_eq!(out, b"1\n2\n3\n4\n5\n6\n7\n8\n");
    assert_eq!(out, err);
    let Some(ExecOutput::Exit(exit)) = output.last() else {
        panic!("{output:?}");
    };
    assert_eq!((exit.exit_code, exit.timed_out), (3, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_get_input_and_end_by_code_signal_or_timeout() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let mut cat = sh("cat; exit 5");
    cat.stdin_base64 = Some("aGVsbG8=".into());
    let result = lab.engine.exec_blocking(&lab.who, "a", cat).await.unwrap();
    assert_eq!(
        (result.stdout.as_str(), result.exit.exit_code),
        ("hello", 5)
    );
    let killed = lab.sh("a", "kill -KILL $$").await.unwrap();
    assert_eq!((killed.exit.exit_code, killed.exit.signal), (137, Some(9)));
    let mut slow = sh("sleep 1000");
    slow.timeout_ms = Some(50);
    let result = lab.engine.exec_blocking(&lab.who, "a", slow).await.unwrap();
    assert!(result.exit.timed_out);
    let mut empty = sh("");
    empty.command.clear();
    let refused = lab.engine.exec_blocking(&lab.who, "a", empty).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_waits_for_a_machine_that_is_starting() {
    let Some(lab) = Lab::new().await else { return };
    lab.create("a").await.unwrap();
    assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(
        lab.sh("a", "true").await.unwrap_err().code(),
        "wrong_status"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_with_an_error_when_its_machine_dies() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    let execution = lab.engine.exec(&lab.who, "a", sh("echo; sleep 1000"));
    let mut output = execution.await.unwrap().output;
    output.next().await.unwrap().unwrap();
    kill_process(lab.pid(&machine, "vmm"), Signal::KILL).unwrap();
    let rest = tokio::time::timeout(LONG, output.collect::<Vec<_>>()).await;
    let rest = rest.unwrap();
    assert!(
        rest.iter()
            .all(|piece| !matches!(piece, Ok(ExecOutput::Exit(_))))
    );
    lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(
        lab.sh("a", "true").await.unwrap_err().kind(),
        Kind::Conflict
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_written_read_listed_and_removed() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let work = format!("{}/work", lab.home.shared());
    let (deep, path) = (format!("{work}/deep"), format!("{work}/deep/file"));
    let file = WriteFile {
        path: path.clone(),
        make_parents: true,
        size: Some(300_000),
        ..WriteFile::default()
    };
    let (engine, who) = (&lab.engine, &lab.who);
    let content = b"0123456789".repeat(30_000);
    let written = engine
        .write_file(who, "a", file, body(content.clone()))
        .await;
    assert_eq!(written.unwrap().size_bytes, 300_000);
    let read = engine.read_file(who, "a", &path, 0, None).await.unwrap();
    assert_eq!(
        read.bytes.try_collect::<Vec<_>>().await.unwrap().concat(),
        content
    );
    let part = engine.read_file(who, "a", &path, 3, Some(4)).await.unwrap();
    assert_eq!(
        part.bytes.try_collect::<Vec<_>>().await.unwrap().concat(),
        b"3456"
    );
    let list = |depth, pattern: Option<&str>, cursor| ListFiles {
        path: work.clone(),
        depth,
        pattern: pattern.map(str::to_owned),
        cursor,
        limit: 1,
    };
    let page = engine.list_files(who, "a", list(Some(1), None, None)).await;
    let page = page.unwrap();
    assert_eq!((page.items.len(), page.next), (1, None));
    // The rest of a walk is where its first page ended.
    let first = engine.list_files(who, "a", list(None, None, None)).await;
    let first = first.unwrap();
    assert_eq!(first.items[0].path.as_ref(), Some(&deep));
    let rest = engine
        .list_files(who, "a", list(None, None, first.next))
        .await;
    assert_eq!(rest.unwrap().items[0].path.as_ref(), Some(&path));
    let found = engine
        .list_files(who, "a", list(None, Some("**/f*"), None))
        .await;
    assert_eq!(found.unwrap().items[0].path.as_ref(), Some(&path));
    for cursor in ["%", "../x"] {
        let wrong = list(None, None, Some(cursor.to_owned()));
        let refused = engine.list_files(who, "a", wrong).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Invalid, "{cursor}: {refused}");
    }
    let missing = engine
        .stat_file(who, "a", &format!("{work}/none"))
        .await
        .unwrap_err();
    assert_eq!(missing.kind(), Kind::NotFound);
    assert!(engine.remove_file(who, "a", &work, false).await.is_err());
    engine.remove_file(who, "a", &work, true).await.unwrap();
    assert!(engine.stat_file(who, "a", &work).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_can_be_followed_from_before_the_start_to_the_end() {
    let Some(lab) = Lab::new().await else { return };
    lab.create("a").await.unwrap();
    let logs = lab.engine.logs(&lab.who, "a", 0, true).await.unwrap();
    let following = tokio::spawn(logs.collect::<Vec<_>>());
    lab.wait("a", Status::Running).await.unwrap();
    let now = lab.engine.logs(&lab.who, "a", 0, false).await.unwrap();
    let now = now.try_collect::<Vec<_>>().await.unwrap().concat();
    assert!(String::from_utf8_lossy(&now).contains("guest boots"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.delete("a").await;
    let pieces = tokio::time::timeout(LONG, following)
        .await
        .unwrap()
        .unwrap();
    let followed: Vec<_> = pieces.into_iter().flatten().collect();
    assert!(String::from_utf8_lossy(&followed.concat()).contains("guest boots"));
}
