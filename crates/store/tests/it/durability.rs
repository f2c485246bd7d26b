//! Commits of a process that is killed, or whose disk fails under it.
//!
//! The child is this test binary again, told by the environment which part it plays.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use hutch_store::{Error, Kind, Revision, SqliteStore, Store};
use tokio::task::JoinSet;

use crate::conformance::put;
use crate::sqlite::intact;
use crate::sys::{fail_fsync, has_failed};

const PART: &str = "HUTCH_STORE_TEST_PART";
const FILE: &str = "HUTCH_STORE_TEST_FILE";

/// Names that one commit writes together.
const TOGETHER: [&str; 3] = ["a", "b", "c"];
const KILLS: u32 = 12;

/// Not a test of its own: what the child runs.
#[test]
fn child() {
    let (Ok(part), Ok(file)) = (std::env::var(PART), std::env::var(FILE)) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = Arc::new(SqliteStore::open(file).unwrap());
    match part.as_str() {
        "commit" => runtime.block_on(commit_until_killed(store)),
        nth => {
            if let Ok(nth) = nth.parse() {
                fail_fsync(nth);
            }
            runtime.block_on(commit_until_i_o_fails(store));
            assert!(nth == "limited" || has_failed());
        }
    }
}

fn spawn(mut command: Command, part: &str, file: &Path) -> (Child, BufReader<ChildStdout>) {
    let mut child = command
        .args(["--exact", "durability::child", "--nocapture"])
        .env(PART, part)
        .env(FILE, file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

/// The number behind `word` on a line that the child prints.
fn told(line: &str, word: &str) -> Option<u64> {
    line.strip_prefix(word)?.trim().parse().ok()
}

async fn commit_until_killed(store: Arc<SqliteStore>) {
    let start = store.revision().await.unwrap().0;
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for i in 0_u64.. {
                // Unique over all rounds: a round begins behind the last revision.
                let number = (start + i) * 8 + task;
                let value = number.to_string();
                let writes = TOGETHER.map(|name| put(&format!("{name}/{number}"), &value));
                store.commit(vec![], writes.to_vec()).await.unwrap();
                println!("\nmade {number}");
            }
        });
    }
    tasks.join_all().await;
}

#[tokio::test]
async fn killed_at_any_moment_it_keeps_every_acknowledged_commit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.db");
    let mut acknowledged = Vec::new();
    for round in 0..KILLS {
        let command = Command::new(std::env::current_exe().unwrap());
        let (mut child, out) = spawn(command, "commit", &file);
        // A different number of acknowledgements each time; the commits in flight then are random.
        let mut left = 1 + (round * 53) % 211;
        for line in out.lines() {
            let line = line.unwrap();
            acknowledged.extend(told(&line, "made "));
            left = left.saturating_sub(u32::from(line.starts_with("made ")));
            if left == 0 {
                // What it has said before it died is still read to the end.
                child.kill().unwrap();
            }
        }
        assert!(!child.wait().unwrap().success());
        assert_eq!(left, 0, "the child ended by itself");
        check(&file, &acknowledged).await;
    }
}

async fn check(file: &Path, acknowledged: &[u64]) {
    let store = SqliteStore::open(file).unwrap();
    let mut found = Vec::new();
    for name in TOGETHER {
        let entries = store
            .list(&format!("{name}/"), None, usize::MAX)
            .await
            .unwrap();
        found.push(
            entries
                .into_iter()
                .map(|e| {
                    (
                        String::from_utf8(e.value).unwrap().trim_end().to_owned(),
                        e.version,
                    )
                })
                .collect::<std::collections::BTreeMap<_, _>>(),
        );
    }
    assert!(
        found[0] == found[1] && found[1] == found[2],
        "half a commit"
    );
    for number in acknowledged {
        assert!(
            found[0].contains_key(&number.to_string()),
            "{number} is lost"
        );
    }
    let revision = store.revision().await.unwrap();
    assert_eq!(revision, Revision(found[0].len() as u64));
    let log = store.changes(Revision(0), "", usize::MAX).await.unwrap();
    let told: Vec<_> = log.iter().map(|change| change.revision.0).collect();
    let expected: Vec<_> = (1..=revision.0).flat_map(|n| [n; TOGETHER.len()]).collect();
    assert_eq!(told, expected);
    drop(store);
    intact(file);
}

async fn commit_until_i_o_fails(store: Arc<SqliteStore>) {
    let news = store.subscribe();
    let mut number = 0;
    let error = loop {
        // So large that the log is copied every few commits.
        let value = format!("{number:<40000}");
        let writes = TOGETHER.map(|name| put(&format!("{name}/{number}"), &value));
        match store.commit(vec![], writes.to_vec()).await {
            Ok(_) if number > 1_000 => panic!("nothing fails"),
            Ok(_) => println!("\nmade {number}"),
            Err(error) => break error,
        }
        number += 1;
    };
    match &error {
        Error::Io { .. } => assert_eq!(error.kind(), Kind::Internal),
        // It failed behind the last acknowledged commit, when the log was copied.
        Error::Stopped { cause: Some(cause) } if matches!(**cause, Error::Io { .. }) => {
            println!("\ncopying {number}");
        }
        _ => panic!("{error}"),
    }
    // However small the next one is, nothing is tried again.
    for _ in 0..3 {
        let error = store.commit(vec![], vec![put("a", "")]).await.unwrap_err();
        assert!(
            matches!(&error, Error::Stopped { cause: Some(_) }),
            "{error}"
        );
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.hint().is_some());
    }
    assert!(
        news.has_changed().is_err(),
        "subscribers are told by the end of the channel"
    );
    assert_eq!(
        store.revision().await.unwrap(),
        Revision(number),
        "reads go on"
    );
    println!("\nstopped {number}");
}

#[tokio::test]
async fn after_a_failed_write_it_takes_no_more_commits() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.db");
    // A write beyond the limit of file sizes fails like one to a broken disk (EFBIG, not ENOSPC).
    let mut shell = Command::new("sh");
    let limited = r#"trap "" XFSZ; ulimit -f 2000; exec "$0" "$@""#;
    shell
        .args(["-c", limited])
        .arg(std::env::current_exe().unwrap());
    let (mut child, out) = spawn(shell, "limited", &file);
    stopped_well(&mut child, out, &file).await;
}

#[tokio::test]
async fn after_a_failed_fsync_it_takes_no_more_commits() {
    let mut copying = 0;
    for nth in 1..42 {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store.db");
        let command = Command::new(std::env::current_exe().unwrap());
        let (mut child, out) = spawn(command, &nth.to_string(), &file);
        copying += u32::from(stopped_well(&mut child, out, &file).await);
    }
    assert!(
        (2..20).contains(&copying),
        "{copying} of the failures hit the copying of the log"
    );
}

/// Checks what the child leaves; returns whether it failed while the log was copied.
async fn stopped_well(child: &mut Child, out: BufReader<ChildStdout>, file: &Path) -> bool {
    let lines: Vec<_> = out.lines().map(Result::unwrap).collect();
    assert!(child.wait().unwrap().success(), "{lines:#?}");
    let acknowledged: Vec<_> = lines
        .iter()
        .filter_map(|line| told(line, "made "))
        .collect();
    assert!(
        lines.iter().any(|line| told(line, "stopped ").is_some()),
        "{lines:#?}"
    );
    check(file, &acknowledged).await;
    lines.iter().any(|line| told(line, "copying ").is_some())
}
