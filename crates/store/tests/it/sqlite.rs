//! What only the SQLite store promises: grouping, refusals at open, a full disk, damage.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hutch_store::{
    Check, Error, Feed, Kind, MAX_COMMIT_BYTES, Revision, SqliteOptions, SqliteStore, Store, Write,
};
use rusqlite::Connection;
use tokio::task::JoinSet;

use crate::conformance::{key, put};

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    (dir, path)
}

#[tokio::test]
async fn waiting_commits_share_a_transaction() {
    const COMMITS: u64 = 400;
    let (_dir, path) = place();
    let store = Arc::new(SqliteStore::open(&path).unwrap());
    let mut tasks = JoinSet::new();
    for i in 0..COMMITS {
        let store = store.clone();
        // Every fourth one conflicts and must harm nobody.
        let checks = if i % 4 == 0 {
            vec![Check::Version(key("none"), 1)]
        } else {
            vec![]
        };
        tasks.spawn(async move { store.commit(checks, vec![put(&i.to_string(), "")]).await });
    }
    let (made, refused): (Vec<_>, Vec<_>) =
        tasks.join_all().await.into_iter().partition(Result::is_ok);
    assert!(
        refused
            .iter()
            .all(|r| r.as_ref().unwrap_err().kind() == Kind::Conflict)
    );
    assert_eq!(
        (made.len() as u64, refused.len() as u64),
        (COMMITS / 4 * 3, COMMITS / 4)
    );
    let stats = store.stats();
    assert_eq!(stats.commits, COMMITS / 4 * 3);
    assert!(
        stats.transactions > 0 && stats.transactions < stats.commits / 2,
        "{stats:?}"
    );
    let mut revisions: Vec<_> = made.into_iter().map(|r| r.unwrap().0).collect();
    revisions.sort();
    assert_eq!(
        revisions,
        (1..=COMMITS / 4 * 3).collect::<Vec<_>>(),
        "one revision each"
    );
}

#[tokio::test]
async fn all_is_there_after_opening_again() {
    let (_dir, path) = place();
    let store = SqliteStore::open(&path).unwrap();
    store
        .commit(vec![], vec![put("a", "1"), put("b", "1")])
        .await
        .unwrap();
    store
        .commit(vec![], vec![Write::Delete(key("a"))])
        .await
        .unwrap();
    store.compact(1).await.unwrap();
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(*store.subscribe().borrow(), Revision(2));
    assert_eq!(store.list("", None, 9).await.unwrap().len(), 1);
    assert_eq!(
        store.changes(Revision(1), "", 9).await.unwrap()[0].value,
        None
    );
    assert!(matches!(
        store.changes(Revision(0), "", 9).await,
        Err(Error::Compacted {
            oldest: Revision(1)
        })
    ));
}

#[tokio::test]
async fn dropping_the_store_finishes_queued_commits() {
    let (_dir, path) = place();
    let store = SqliteStore::open(&path).unwrap();
    for i in 0..50 {
        // Polled once, it is queued; then its caller goes away.
        let commit = store.commit(vec![], vec![put(&i.to_string(), "")]);
        tokio::select! { biased; _ = commit => {}, () = std::future::ready(()) => {} }
    }
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.list("", None, 99).await.unwrap().len(), 50);
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() {
    let (_dir, path) = place();
    let conn = Connection::open(&path).unwrap();
    conn.execute_batch("CREATE TABLE future (x); PRAGMA user_version = 9")
        .unwrap();
    drop(conn);
    let before = fs::read(&path).unwrap();
    let error = SqliteStore::open(&path).err().unwrap();
    assert!(
        matches!(
            error,
            Error::NewerSchema {
                found: 9,
                known: 1,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.hint().unwrap().contains("newer"));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_is_no_database_is_refused() {
    let (dir, path) = place();
    fs::write(&path, "not a database, but long enough to look at").unwrap();
    let error = SqliteStore::open(&path).err().unwrap();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    let error = SqliteStore::open(dir.path().join("none/store.db"))
        .err()
        .unwrap();
    assert!(matches!(error, Error::Sqlite { .. }), "{error}");
}

#[tokio::test]
async fn a_full_disk_stops_nothing_for_good() {
    let (_dir, path) = place();
    let small = SqliteOptions {
        max_pages: Some(64),
    };
    let store = Arc::new(SqliteStore::open_with(&path, small).unwrap());
    let mut made = 0;
    let error = loop {
        match store
            .commit(vec![], vec![put(&format!("k/{made}"), vec![7; 5_000])])
            .await
        {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    assert!(made > 5);
    assert!(matches!(error, Error::Full { .. }), "{error}");
    assert_eq!(error.kind(), Kind::Exhausted);
    // Nothing of the refused commit is there, and what was there still is.
    assert_eq!(store.revision().await.unwrap(), Revision(made));
    assert_eq!(store.list("k/", None, 99).await.unwrap().len() as u64, made);
    // In one group, those that fit are made although another does not.
    let mut group = JoinSet::new();
    for i in 0..9 {
        let store = store.clone();
        let size = if i == 4 { MAX_COMMIT_BYTES / 2 } else { 1 };
        let write = put(&format!("group/{i}"), vec![7; size]);
        group.spawn(async move { store.commit(vec![], vec![write]).await });
    }
    let refused: Vec<_> = group
        .join_all()
        .await
        .into_iter()
        .filter_map(Result::err)
        .collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].kind(), Kind::Exhausted);
    // Room in the file, then a larger file.
    store.compact(0).await.unwrap();
    store
        .commit(vec![], vec![put("k/after", vec![7; 5_000])])
        .await
        .unwrap();
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    store
        .commit(vec![], vec![put("big", vec![7; MAX_COMMIT_BYTES / 2])])
        .await
        .unwrap();
    assert_eq!(
        store.list("k/", None, 99).await.unwrap().len() as u64,
        made + 1
    );
}

#[tokio::test]
async fn two_stores_on_one_file_do_not_harm_each_other() {
    const EACH: u64 = 100;
    let (_dir, path) = place();
    let stores = [(); 2].map(|()| Arc::new(SqliteStore::open(&path).unwrap()) as Arc<dyn Store>);
    let mut tasks = JoinSet::new();
    for store in stores.clone() {
        tasks.spawn(async move {
            let mut done = 0;
            while done < EACH {
                let found = store.get_json::<u64>(&key("sum")).await.unwrap();
                let (check, sum) = match found {
                    Some(record) => (record.unchanged(), record.value),
                    None => (Check::Absent(key("sum")), 0),
                };
                let write = Write::json(key("sum"), &(sum + 1)).unwrap();
                done += u64::from(store.commit(vec![check], vec![write]).await.is_ok());
            }
        });
    }
    tasks.join_all().await;
    for store in &stores {
        let sum = store.get_json::<u64>(&key("sum")).await.unwrap().unwrap();
        assert_eq!((sum.value, sum.version), (2 * EACH, 2 * EACH));
    }
    drop(stores);
    intact(&path);
}

#[tokio::test]
async fn the_log_does_not_grow_for_ever() {
    let (_dir, path) = place();
    let store = SqliteStore::open(&path).unwrap();
    for i in 0..60 {
        store
            .commit(vec![], vec![put("a", vec![i; MAX_COMMIT_BYTES / 2])])
            .await
            .unwrap();
        store.compact(0).await.unwrap();
    }
    let log = fs::metadata(path.with_extension("db-wal")).unwrap().len();
    // 60 times two copies of half a MiB went through it; it is copied from 4 MiB on.
    assert!(log < 16 << 20, "{log}");
}

/// The store must never return anything but what was written, whichever byte of the file is lost.
#[tokio::test]
async fn a_flipped_byte_is_seen_or_harmless() {
    let (dir, path) = place();
    let store = SqliteStore::open(&path).unwrap();
    for i in 0..40_u8 {
        let writes = vec![
            put(&format!("k/{i}"), vec![i; 150]),
            put(&format!("l/{}", i % 7), [i]),
        ];
        store.commit(vec![], writes).await.unwrap();
    }
    store.compact(20).await.unwrap();
    let read = async |store: &SqliteStore| -> Result<_, Error> {
        let head = store.revision().await?;
        let entries = store.list("", None, usize::MAX).await?;
        let mut again = Vec::new();
        for entry in &entries {
            again.extend(store.get(&entry.key).await?);
        }
        assert_eq!(again, entries);
        Ok((
            head,
            entries,
            store.changes(Revision(20), "", usize::MAX).await?,
        ))
    };
    let expected = read(&store).await.unwrap();
    drop(store);
    let good = fs::read(&path).unwrap();
    let damaged = dir.path().join("damaged.db");
    let mut seen = 0;
    for at in (0..good.len()).step_by(37) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&damaged, bytes).unwrap();
        let found = match SqliteStore::open(&damaged) {
            Ok(store) => read(&store).await,
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => assert_eq!(found, expected, "byte {at} changed what is read"),
            Err(_) => seen += 1,
        }
        for log in ["db-wal", "db-shm"] {
            let _ = fs::remove_file(damaged.with_extension(log));
        }
    }
    assert!(seen > 50, "only {seen} seen");
}

#[tokio::test]
async fn a_row_changed_behind_the_store_is_seen_when_read() {
    let (_dir, path) = place();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path).unwrap());
    store
        .commit(vec![], vec![put("a", "1"), put("b", "1")])
        .await
        .unwrap();
    let conn = Connection::open(&path).unwrap();
    conn.execute("UPDATE entry SET value = x'32' WHERE key = 'a'", [])
        .unwrap();
    conn.execute("UPDATE change SET value = NULL WHERE key = 'a'", [])
        .unwrap();
    let error = store.get(&key("a")).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert!(store.list("", None, 9).await.is_err());
    assert!(
        Feed::new(store.clone(), "", Revision(0))
            .next()
            .await
            .is_err()
    );
    store.get(&key("b")).await.unwrap().unwrap();
    drop(store);
    assert!(matches!(
        SqliteStore::open(&path),
        Err(Error::Damaged { .. })
    ));
}

/// SQLite's own full check.
pub fn intact(path: &Path) {
    let conn = Connection::open(path).unwrap();
    let verdict: String = conn
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(verdict, "ok");
}
