//! One suite for all stores: each case gets a new, empty store.

use std::sync::Arc;
use std::time::Duration;

use hutch_store::{
    Change, Check, Error, Feed, Key, Kind, MAX_COMMIT_BYTES, MAX_COMMIT_CHECKS, MAX_COMMIT_WRITES,
    MemoryStore, Record, Revision, SqliteStore, Store, Write,
};
use tokio::task::JoinSet;

/// A bound for events that surely come; reached only when one is missed.
const SOON: Duration = Duration::from_secs(60);

/// A store that takes its directory with it.
pub struct Fresh {
    pub store: Arc<dyn Store>,
    _dir: Option<tempfile::TempDir>,
}

pub fn memory() -> Fresh {
    Fresh {
        store: Arc::new(MemoryStore::new()),
        _dir: None,
    }
}

pub fn sqlite() -> Fresh {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path().join("store.db")).unwrap();
    Fresh {
        store: Arc::new(store),
        _dir: Some(dir),
    }
}

/// One test per store and case.
macro_rules! conformance {
    ($store:ident: $($case:ident),* $(,)?) => {
        mod $store {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let fresh = super::$store();
                super::$case(fresh.store.clone()).await;
            })*

            #[test]
            fn equals_the_model() {
                crate::model::check(super::$store);
            }
        }
    };
    ($($store:ident),*) => {
        $(conformance! { $store:
            a_put_is_read_back_with_its_revision,
            checks_guard_a_commit,
            a_failed_check_undoes_nothing_and_does_nothing,
            a_commit_that_changes_nothing_moves_nothing,
            commits_that_no_store_takes_are_refused,
            limits_themselves_are_allowed,
            lists_page_in_order_of_keys,
            lists_are_stable_while_others_write,
            changes_tell_every_commit_whole,
            a_compacted_log_says_where_it_begins,
            an_unknown_future_is_refused,
            compare_and_swap_counts_exactly,
            commits_are_seen_whole,
            a_subscriber_never_misses_the_last_commit,
            a_feed_gets_every_change_once,
            a_quiet_feed_is_not_overtaken_by_compaction,
            json_goes_in_and_out,
        })*
    };
}
conformance!(memory, sqlite);

pub fn key(name: &str) -> Key {
    Key::new(name).unwrap()
}

pub fn put(name: &str, value: impl AsRef<[u8]>) -> Write {
    Write::Put(key(name), value.as_ref().to_vec())
}

fn names<'a>(keys: impl IntoIterator<Item = &'a Key>) -> Vec<&'a str> {
    keys.into_iter().map(Key::as_str).collect()
}

async fn a_put_is_read_back_with_its_revision(store: Arc<dyn Store>) {
    assert_eq!(store.revision().await.unwrap(), Revision(0));
    let first = store
        .commit(vec![], vec![put("a", "1"), put("b", "")])
        .await
        .unwrap();
    let second = store
        .commit(vec![], vec![put("b", [0, 255])])
        .await
        .unwrap();
    assert_eq!((first, second), (Revision(1), Revision(2)));
    assert_eq!(store.revision().await.unwrap(), second);
    let found = store
        .get_many(&[key("b"), key("none"), key("a")])
        .await
        .unwrap();
    let found: Vec<_> = found
        .into_iter()
        .map(|e| e.map(|e| (e.version, e.value)))
        .collect();
    assert_eq!(
        found,
        [Some((2, vec![0, 255])), None, Some((1, b"1".to_vec()))]
    );
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().version, 1);
    store
        .commit(vec![], vec![Write::Delete(key("a"))])
        .await
        .unwrap();
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    // A key that comes again has a new version: an old check must not fit it.
    let again = store
        .commit(vec![Check::Absent(key("a"))], vec![put("a", "1")])
        .await
        .unwrap();
    assert_eq!(
        store.get(&key("a")).await.unwrap().unwrap().version,
        again.0
    );
}

async fn checks_guard_a_commit(store: Arc<dyn Store>) {
    store
        .commit(vec![Check::Absent(key("a"))], vec![put("a", "1")])
        .await
        .unwrap();
    let version = |name: &str, version| Check::Version(key(name), version);
    for (checks, guilty, found) in [
        (vec![Check::Absent(key("a"))], "a", Some(1)),
        (vec![version("a", 0)], "a", Some(1)),
        (vec![version("a", 2)], "a", Some(1)),
        (vec![version("a", u64::MAX)], "a", Some(1)),
        (vec![version("b", 1)], "b", None),
        (vec![version("b", 0)], "b", None),
        (
            vec![version("a", 1), Check::Absent(key("b")), version("c", 9)],
            "c",
            None,
        ),
        (vec![version("b", 7), version("a", 7)], "b", None),
    ] {
        let error = store.commit(checks, vec![put("x", "x")]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        let Error::Conflict {
            key,
            found: version,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!((key.as_str(), *version), (guilty, found));
        assert!(error.to_string().starts_with(guilty), "{error}");
    }
    let checks = vec![version("a", 1), Check::Absent(key("b"))];
    assert_eq!(
        store.commit(checks, vec![put("b", "")]).await.unwrap(),
        Revision(2)
    );
}

async fn a_failed_check_undoes_nothing_and_does_nothing(store: Arc<dyn Store>) {
    store.commit(vec![], vec![put("a", "1")]).await.unwrap();
    let writes = vec![put("b", "2"), Write::Delete(key("a"))];
    store
        .commit(vec![Check::Absent(key("a"))], writes)
        .await
        .unwrap_err();
    assert_eq!(
        names(
            store
                .list("", None, 9)
                .await
                .unwrap()
                .iter()
                .map(|e| &e.key)
        ),
        ["a"]
    );
    assert_eq!(store.changes(Revision(0), "", 9).await.unwrap().len(), 1);
    assert_eq!(store.revision().await.unwrap(), Revision(1));
}

async fn a_commit_that_changes_nothing_moves_nothing(store: Arc<dyn Store>) {
    store.commit(vec![], vec![put("a", "1")]).await.unwrap();
    let same = Revision(1);
    let gone = Write::Delete(key("none"));
    assert_eq!(
        store.commit(vec![], vec![gone.clone()]).await.unwrap(),
        same
    );
    assert_eq!(
        store
            .commit(vec![Check::Version(key("a"), 1)], vec![])
            .await
            .unwrap(),
        same
    );
    store
        .commit(vec![Check::Absent(key("a"))], vec![])
        .await
        .unwrap_err();
    assert_eq!(store.changes(same, "", 9).await.unwrap(), []);
    // Beside a real write the delete of nothing leaves no trace; an equal put does.
    let next = store
        .commit(vec![], vec![gone, put("a", "1")])
        .await
        .unwrap();
    assert_eq!(next, Revision(2));
    let change = Change {
        revision: next,
        key: key("a"),
        value: Some(b"1".to_vec()),
    };
    assert_eq!(store.changes(same, "", 9).await.unwrap(), [change]);
}

async fn commits_that_no_store_takes_are_refused(store: Arc<dyn Store>) {
    let many = |n: usize| (0..n).map(|i| put(&i.to_string(), "")).collect::<Vec<_>>();
    let checks = (0..=MAX_COMMIT_CHECKS)
        .map(|i| Check::Absent(key(&i.to_string())))
        .collect();
    for (checks, writes) in [
        (
            vec![],
            vec![put("a", "1"), put("b", ""), Write::Delete(key("a"))],
        ),
        (vec![], vec![put("a", "1"), put("a", "1")]),
        (vec![], many(MAX_COMMIT_WRITES + 1)),
        (checks, many(1)),
        (vec![], vec![put("a", vec![0; MAX_COMMIT_BYTES])]),
    ] {
        let error = store.commit(checks, writes).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
    }
    assert_eq!(store.revision().await.unwrap(), Revision(0));
}

async fn limits_themselves_are_allowed(store: Arc<dyn Store>) {
    let each = MAX_COMMIT_BYTES / MAX_COMMIT_WRITES;
    let names: Vec<_> = (0..MAX_COMMIT_WRITES)
        .map(|i| format!("{i:0256}"))
        .collect();
    let checks = names.iter().map(|name| Check::Absent(key(name))).collect();
    let writes = names
        .iter()
        .map(|name| put(name, vec![7; each - 256]))
        .collect();
    store.commit(checks, writes).await.unwrap();
    let found = store.list("", None, usize::MAX).await.unwrap();
    assert_eq!(found.len(), MAX_COMMIT_WRITES);
    assert_eq!(
        store
            .changes(Revision(0), "", usize::MAX)
            .await
            .unwrap()
            .len(),
        MAX_COMMIT_WRITES
    );
}

async fn lists_page_in_order_of_keys(store: Arc<dyn Store>) {
    let all = [
        "a", "m", "m/", "m/1", "m/10", "m/2", "m/A", "m/~~", "m0", "n",
    ];
    store
        .commit(
            vec![],
            all.iter().rev().map(|name| put(name, name)).collect(),
        )
        .await
        .unwrap();
    let list = async |prefix: &str, after: Option<&str>, limit: usize| {
        let found = store
            .list(prefix, after.map(key).as_ref(), limit)
            .await
            .unwrap();
        assert!(found.iter().all(|e| e.key.as_str().as_bytes() == e.value));
        found
            .into_iter()
            .map(|e| e.key.as_str().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(list("", None, 99).await, all);
    assert_eq!(list("m/", None, 99).await, all[2..8]);
    assert_eq!(list("m/", Some("a"), 2).await, all[2..4]);
    assert_eq!(list("m/", Some("m/1"), 99).await, all[4..8]);
    assert_eq!(list("m/", Some("m/1x"), 1).await, all[5..6]);
    assert_eq!(list("m/", Some("m/~~"), 99).await, [""; 0]);
    assert_eq!(list("m/", Some("n"), 99).await, [""; 0]);
    for (prefix, limit) in [("m/", 0), ("zz", 9), ("m/\u{ff}", 9), ("\n", 9)] {
        assert_eq!(list(prefix, None, limit).await, [""; 0], "{prefix:?}");
    }
}

async fn lists_are_stable_while_others_write(store: Arc<dyn Store>) {
    let steady: Vec<_> = (0..100).map(|i| format!("k/{i:03}")).collect();
    store
        .commit(vec![], steady.iter().map(|name| put(name, "")).collect())
        .await
        .unwrap();
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for i in 0..200 {
                let name = format!("k/{:03}x", i % 100);
                store.commit(vec![], vec![put(&name, "")]).await.unwrap();
                store
                    .commit(vec![], vec![Write::Delete(key(&name))])
                    .await
                    .unwrap();
            }
        })
    };
    let mut rounds = 0;
    while !writer.is_finished() || rounds < 3 {
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = store.list("k/", after.as_ref(), 7).await.unwrap();
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            seen.extend(page.into_iter().map(|e| e.key.as_str().to_owned()));
        }
        assert!(seen.is_sorted_by(|a, b| a < b), "in order, none twice");
        seen.retain(|name| !name.ends_with('x'));
        assert_eq!(seen, steady);
        rounds += 1;
    }
    writer.await.unwrap();
}

async fn changes_tell_every_commit_whole(store: Arc<dyn Store>) {
    store
        .commit(vec![], vec![put("b", "1"), put("a", "1"), put("m/1", "1")])
        .await
        .unwrap();
    store.commit(vec![], vec![put("m/2", "2")]).await.unwrap();
    store
        .commit(vec![], vec![Write::Delete(key("a")), put("m/3", "3")])
        .await
        .unwrap();
    let changes = async |after, prefix: &str, limit| {
        let found = store.changes(Revision(after), prefix, limit).await.unwrap();
        found
            .iter()
            .map(|c| format!("{}{}", c.revision, c.key))
            .collect::<Vec<_>>()
    };
    let all = ["1a", "1b", "1m/1", "2m/2", "3a", "3m/3"];
    assert_eq!(changes(0, "", 99).await, all);
    assert_eq!(changes(1, "", 99).await, all[3..]);
    assert_eq!(changes(3, "", 99).await, all[..0]);
    assert_eq!(changes(0, "m/", 99).await, ["1m/1", "2m/2", "3m/3"]);
    // A page never ends in the middle of a commit.
    for limit in 1..=3 {
        assert_eq!(changes(0, "", limit).await, all[..3]);
    }
    assert_eq!(changes(0, "", 4).await, all[..4]);
    assert_eq!(changes(0, "", 5).await, all);
    assert_eq!(changes(0, "", 0).await, all[..0]);
    assert_eq!(changes(0, "m/", 1).await, ["1m/1"]);
    let last = store.changes(Revision(2), "", 99).await.unwrap();
    assert_eq!(last[0].value, None, "a deletion");
    assert_eq!(last[1].value.as_deref(), Some(&b"3"[..]));
}

async fn a_compacted_log_says_where_it_begins(store: Arc<dyn Store>) {
    assert_eq!(store.compact(0).await.unwrap(), Revision(0));
    for i in 1..=10 {
        store
            .commit(vec![], vec![put("a", i.to_string())])
            .await
            .unwrap();
    }
    assert_eq!(store.compact(100).await.unwrap(), Revision(0));
    assert_eq!(store.changes(Revision(0), "", 99).await.unwrap().len(), 10);
    assert_eq!(store.compact(4).await.unwrap(), Revision(6));
    for after in [0, 5] {
        let error = store
            .changes(Revision(after), "none", 99)
            .await
            .unwrap_err();
        let Error::Compacted {
            oldest: Revision(6),
        } = error
        else {
            panic!("{error}")
        };
        assert!(error.hint().is_some());
    }
    assert_eq!(store.changes(Revision(6), "", 99).await.unwrap().len(), 4);
    // What is gone does not come back, and the entries stay.
    assert_eq!(store.compact(8).await.unwrap(), Revision(6));
    assert_eq!(store.compact(0).await.unwrap(), Revision(10));
    assert_eq!(store.changes(Revision(10), "", 99).await.unwrap(), []);
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().version, 10);
    assert_eq!(
        store.commit(vec![], vec![put("a", "")]).await.unwrap(),
        Revision(11)
    );
    assert_eq!(store.changes(Revision(10), "", 99).await.unwrap().len(), 1);
}

async fn an_unknown_future_is_refused(store: Arc<dyn Store>) {
    store.commit(vec![], vec![put("a", "")]).await.unwrap();
    for after in [2, u64::MAX] {
        let error = store.changes(Revision(after), "", 9).await.unwrap_err();
        assert!(
            matches!(
                error,
                Error::FutureRevision {
                    newest: Revision(1),
                    ..
                }
            ),
            "{error}"
        );
    }
}

async fn compare_and_swap_counts_exactly(store: Arc<dyn Store>) {
    const TASKS: u64 = 16;
    const TIMES: u64 = 20;
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let store = store.clone();
        tasks.spawn(async move {
            let mut conflicts = 0;
            for _ in 0..TIMES {
                loop {
                    let found = store.get_json::<u64>(&key("sum")).await.unwrap();
                    let (check, sum) = match found {
                        Some(record) => (record.unchanged(), record.value),
                        None => (Check::Absent(key("sum")), 0),
                    };
                    // Lets the others in between the read and the commit.
                    tokio::task::yield_now().await;
                    let write = Write::json(key("sum"), &(sum + 1)).unwrap();
                    match store.commit(vec![check], vec![write]).await {
                        Ok(_) => break,
                        Err(Error::Conflict { .. }) => conflicts += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            conflicts
        });
    }
    let conflicts: u64 = tasks.join_all().await.into_iter().sum();
    let sum = store.get_json::<u64>(&key("sum")).await.unwrap().unwrap();
    assert_eq!((sum.value, sum.version), (TASKS * TIMES, TASKS * TIMES));
    assert!(conflicts > 0, "the tasks never met");
}

async fn commits_are_seen_whole(store: Arc<dyn Store>) {
    let pair = [key("left"), key("right")];
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for i in 0..200 {
                let value = i.to_string();
                store
                    .commit(vec![], vec![put("left", &value), put("right", &value)])
                    .await
                    .unwrap();
            }
        })
    };
    while !writer.is_finished() {
        let many = store.get_many(&pair).await.unwrap();
        let values: Vec<_> = many.iter().map(|e| e.as_ref().map(|e| &e.value)).collect();
        assert_eq!(values[0], values[1]);
        let list = store.list("", None, 9).await.unwrap();
        assert!(list.is_empty() || list[0].value == list[1].value);
    }
    writer.await.unwrap();
}

async fn a_subscriber_never_misses_the_last_commit(store: Arc<dyn Store>) {
    const COMMITS: u64 = 200;
    let mut news = store.subscribe();
    let watcher = {
        let store = store.clone();
        tokio::spawn(async move {
            let mut seen = Revision(0);
            while seen < Revision(COMMITS) {
                news.changed().await.unwrap();
                let now = *news.borrow_and_update();
                assert!(now >= seen, "the newest revision went back");
                assert!(
                    store.revision().await.unwrap() >= now,
                    "told before it can be read"
                );
                seen = now;
            }
        })
    };
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for _ in 0..COMMITS / 8 {
                let made = store
                    .commit(vec![], vec![put(&task.to_string(), "")])
                    .await
                    .unwrap();
                let told = *store.subscribe().borrow();
                assert!(told >= made, "answered before it was told");
            }
        });
    }
    tasks.join_all().await;
    tokio::time::timeout(SOON, watcher)
        .await
        .expect("the last commit was missed")
        .unwrap();
    let late = store.subscribe();
    assert!(!late.has_changed().unwrap(), "woken by what was before");
}

async fn a_feed_gets_every_change_once(store: Arc<dyn Store>) {
    const COMMITS: usize = 300;
    store
        .commit(vec![], vec![put("k/before", "")])
        .await
        .unwrap();
    let mut feed = Feed::new(store.clone(), "k/", Revision(1));
    let follower = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < 2 * COMMITS {
            seen.extend(feed.next().await.unwrap());
        }
        seen
    });
    let mut tasks = JoinSet::new();
    for task in 0..6 {
        let store = store.clone();
        tasks.spawn(async move {
            for i in 0..COMMITS / 6 {
                let name = format!("k/{task}-{i}");
                let writes = vec![
                    put(&name, ""),
                    put(&format!("{name}b"), ""),
                    put("other", ""),
                ];
                store.commit(vec![], writes).await.unwrap();
                store.commit(vec![], vec![put("other", "")]).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let seen = tokio::time::timeout(SOON, follower)
        .await
        .expect("a change was missed")
        .unwrap();
    let expected = store.changes(Revision(1), "k/", usize::MAX).await.unwrap();
    assert_eq!(expected.len(), 2 * COMMITS);
    assert_eq!(seen, expected);
}

async fn a_quiet_feed_is_not_overtaken_by_compaction(store: Arc<dyn Store>) {
    let mut feed = Feed::new(store.clone(), "quiet/", Revision(0));
    for i in 1..=5 {
        store
            .commit(vec![], vec![put("loud", i.to_string())])
            .await
            .unwrap();
    }
    // The feed has looked once when it goes to sleep.
    tokio::select! {
        biased;
        found = feed.next() => panic!("{found:?}"),
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
    }
    assert_eq!(feed.position(), Revision(5));
    store.compact(0).await.unwrap();
    store
        .commit(vec![], vec![put("quiet/1", "")])
        .await
        .unwrap();
    let found = tokio::time::timeout(SOON, feed.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(names(found.iter().map(|c| &c.key)), ["quiet/1"]);
}

async fn json_goes_in_and_out(store: Arc<dyn Store>) {
    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Machine {
        format: u32,
        name: String,
    }
    let machine = || Machine {
        format: 1,
        name: "wéb".to_owned(),
    };
    let write = Write::json(key("machine/1"), &machine()).unwrap();
    store
        .commit(vec![], vec![write, put("machine/2", "no json")])
        .await
        .unwrap();
    let found: Record<Machine> = store.get_json(&key("machine/1")).await.unwrap().unwrap();
    assert_eq!(
        found,
        Record {
            key: key("machine/1"),
            version: 1,
            value: machine()
        }
    );
    assert_eq!(found.unchanged(), Check::Version(key("machine/1"), 1));
    assert_eq!(
        store
            .list_json::<Machine>("machine/", None, 1)
            .await
            .unwrap(),
        [found]
    );
    assert_eq!(store.get_json::<Machine>(&key("none")).await.unwrap(), None);
    let error = store
        .list_json::<Machine>("machine/", None, 9)
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "decode machine/2 of version 1");
    let no_json = std::collections::HashMap::from([((1, 2), 3)]);
    assert!(matches!(
        Write::json(key("a"), &no_json),
        Err(Error::Encode { .. })
    ));
}
