//! Random commits against a model that keeps nothing but the history and derives all from it.

use std::collections::BTreeMap;

use hutch_store::{Change, Check, Entry, Error, Key, Revision, Store, Write};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::conformance::{Fresh, key};

const NAMES: [&str; 6] = ["a", "a/", "a/1", "a/10", "a/2", "b"];
const PREFIXES: [&str; 4] = ["", "a/", "a/1", "c"];

#[derive(Clone, Debug)]
enum Step {
    /// Per check: the name, and how far the checked version lies from the true one.
    Commit {
        checks: Vec<(usize, u64)>,
        writes: Vec<(usize, Option<u8>)>,
    },
    Compact {
        keep: u64,
    },
    List {
        prefix: usize,
        after: Option<usize>,
        limit: usize,
    },
    Changes {
        back: u64,
        prefix: usize,
        limit: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..NAMES.len();
    // Mostly true checks, else hardly a commit with several would pass.
    let lie = prop_oneof![8 => Just(0_u64), 1 => 1..3_u64, 1 => Just(u64::MAX)];
    prop_oneof![
        8 => (vec((name.clone(), lie), 0..3), vec((name.clone(), any::<Option<u8>>()), 0..4))
            .prop_map(|(checks, writes)| Step::Commit { checks, writes }),
        1 => (0..8_u64).prop_map(|keep| Step::Compact { keep }),
        2 => (0..PREFIXES.len(), proptest::option::of(name), 0..5_usize)
            .prop_map(|(prefix, after, limit)| Step::List { prefix, after, limit }),
        2 => (0..12_u64, 0..PREFIXES.len(), 0..5_usize)
            .prop_map(|(back, prefix, limit)| Step::Changes { back, prefix, limit }),
    ]
}

#[derive(Default)]
struct Model {
    history: Vec<Change>,
    compacted: u64,
}

impl Model {
    fn revision(&self) -> u64 {
        self.history.last().map_or(0, |change| change.revision.0)
    }

    fn entries(&self) -> BTreeMap<&Key, Entry> {
        let mut entries = BTreeMap::new();
        for Change {
            revision,
            key,
            value,
        } in &self.history
        {
            entries.remove(key);
            if let Some(value) = value.clone() {
                entries.insert(
                    key,
                    Entry {
                        key: key.clone(),
                        version: revision.0,
                        value,
                    },
                );
            }
        }
        entries
    }

    fn commit(&mut self, checks: &[Check], writes: &[Write]) -> Result<u64, String> {
        for (i, write) in writes.iter().enumerate() {
            if writes[..i].iter().any(|other| other.key() == write.key()) {
                return Err(format!("{} is written twice in one commit", write.key()));
            }
        }
        let entries = self.entries();
        for check in checks {
            let found = entries.get(check.key()).map(|entry| entry.version);
            match (check, found) {
                (Check::Absent(key), Some(version)) => {
                    return Err(format!("{key} exists at version {version}"));
                }
                (Check::Version(key, _), None) => return Err(format!("{key} does not exist")),
                (Check::Version(key, wanted), Some(version)) if *wanted != version => {
                    return Err(format!("{key} exists at version {version}"));
                }
                _ => {}
            }
        }
        let revision = Revision(self.revision() + 1);
        let mut changes: Vec<_> = writes
            .iter()
            .filter_map(|write| match write {
                Write::Put(key, value) => Some((key.clone(), Some(value.clone()))),
                Write::Delete(key) => entries.contains_key(key).then(|| (key.clone(), None)),
            })
            .map(|(key, value)| Change {
                revision,
                key,
                value,
            })
            .collect();
        changes.sort_by(|a, b| a.key.cmp(&b.key));
        self.history.extend(changes);
        Ok(self.revision())
    }

    fn changes(&self, after: u64, prefix: &str, limit: usize) -> Result<Vec<Change>, String> {
        if after < self.compacted {
            return Err(format!(
                "changes up to revision {} were dropped from the log",
                self.compacted
            ));
        }
        let all: Vec<_> = self
            .history
            .iter()
            .filter(|c| c.revision.0 > after && c.key.as_str().starts_with(prefix))
            .cloned()
            .collect();
        let last = limit
            .checked_sub(1)
            .map(|i| all.get(i).map_or(u64::MAX, |c| c.revision.0));
        Ok(all
            .into_iter()
            .filter(|c| last.is_some_and(|last| c.revision.0 <= last))
            .collect())
    }
}

/// Runs random steps over new stores and compares every answer and, at the end, everything.
pub fn check(fresh: fn() -> Fresh) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let config = Config {
        cases: 48,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&vec(step(), 1..40), |steps| {
            let fresh = fresh();
            runtime.block_on(run(&*fresh.store, steps))
        })
        .unwrap();
}

async fn run(store: &dyn Store, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Commit { checks, writes } => {
                let (checks, writes) = concrete(&model, checks, writes);
                let made = store.commit(checks.clone(), writes.clone()).await;
                prop_assert_eq!(plain(made.map(|r| r.0)), model.commit(&checks, &writes));
            }
            Step::Compact { keep } => {
                model.compacted = model.compacted.max(model.revision().saturating_sub(keep));
                prop_assert_eq!(
                    store.compact(keep).await.unwrap(),
                    Revision(model.compacted)
                );
            }
            Step::List {
                prefix,
                after,
                limit,
            } => {
                let (prefix, after) = (PREFIXES[prefix], after.map(|name| key(NAMES[name])));
                let expected: Vec<_> = model
                    .entries()
                    .into_values()
                    .filter(|e| e.key.as_str().starts_with(prefix))
                    .filter(|e| after.as_ref().is_none_or(|after| e.key > *after))
                    .take(limit)
                    .collect();
                let found = store.list(prefix, after.as_ref(), limit).await.unwrap();
                prop_assert_eq!(found, expected);
            }
            Step::Changes {
                back,
                prefix,
                limit,
            } => {
                let after = model.revision().saturating_sub(back);
                let found = store
                    .changes(Revision(after), PREFIXES[prefix], limit)
                    .await;
                let expected = model.changes(after, PREFIXES[prefix], limit);
                prop_assert_eq!(plain(found), expected);
            }
        }
    }
    prop_assert_eq!(store.revision().await.unwrap(), Revision(model.revision()));
    let names = NAMES.map(key);
    let expected = model.entries();
    let expected: Vec<_> = names
        .iter()
        .map(|name| expected.get(name).cloned())
        .collect();
    prop_assert_eq!(store.get_many(&names).await.unwrap(), expected);
    let log = store
        .changes(Revision(model.compacted), "", usize::MAX)
        .await
        .unwrap();
    prop_assert_eq!(log, model.changes(model.compacted, "", usize::MAX).unwrap());
    Ok(())
}

fn concrete(
    model: &Model,
    checks: Vec<(usize, u64)>,
    writes: Vec<(usize, Option<u8>)>,
) -> (Vec<Check>, Vec<Write>) {
    let entries = model.entries();
    let check = |(name, lie): (usize, u64)| {
        let key = key(NAMES[name]);
        match (entries.get(&key), lie) {
            (None, 0) | (Some(_), u64::MAX) => Check::Absent(key),
            (found, lie) => {
                let version = found.map_or(0, |entry| entry.version);
                Check::Version(key, version.wrapping_add(lie))
            }
        }
    };
    let write = |(name, value): (usize, Option<u8>)| match value {
        Some(value) => Write::Put(key(NAMES[name]), vec![value]),
        None => Write::Delete(key(NAMES[name])),
    };
    (
        checks.into_iter().map(check).collect(),
        writes.into_iter().map(write).collect(),
    )
}

fn plain<T>(result: Result<T, Error>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
