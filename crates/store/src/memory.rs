//! A store that forgets: for tests and for servers that want to keep nothing.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::commit::validate;
use crate::{Change, Check, Entry, Error, Key, Revision, Store, Write};

/// Keeps the promises of [`Store`] except durability.
#[derive(Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    news: watch::Sender<Revision>,
}

#[derive(Default)]
struct State {
    revision: u64,
    compacted: u64,
    entries: BTreeMap<Key, (u64, Vec<u8>)>,
    log: BTreeMap<u64, BTreeMap<Key, Option<Vec<u8>>>>,
}

impl MemoryStore {
    /// An empty store at revision 0.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two steps of a commit, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn entry(&self, key: &Key) -> Option<Entry> {
        let (version, value) = self.entries.get(key)?;
        Some(Entry {
            key: key.clone(),
            version: *version,
            value: value.clone(),
        })
    }

    fn commit(&mut self, checks: &[Check], writes: Vec<Write>) -> Result<(), Error> {
        for check in checks {
            check.hold(self.entries.get(check.key()).map(|(version, _)| *version))?;
        }
        let next = self.revision + 1;
        let mut changed = BTreeMap::new();
        for write in writes {
            match write {
                Write::Put(key, value) => {
                    self.entries.insert(key.clone(), (next, value.clone()));
                    changed.insert(key, Some(value));
                }
                Write::Delete(key) => {
                    if self.entries.remove(&key).is_some() {
                        changed.insert(key, None);
                    }
                }
            }
        }
        if !changed.is_empty() {
            self.revision = next;
            self.log.insert(next, changed);
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn commit(&self, checks: Vec<Check>, writes: Vec<Write>) -> Result<Revision, Error> {
        validate(&checks, &writes)?;
        let mut state = self.state();
        state.commit(&checks, writes)?;
        let revision = Revision(state.revision);
        // Under the lock, so that the newest revision never goes back.
        self.news.send_replace(revision);
        Ok(revision)
    }

    async fn get(&self, key: &Key) -> Result<Option<Entry>, Error> {
        Ok(self.state().entry(key))
    }

    async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, Error> {
        let state = self.state();
        Ok(keys.iter().map(|key| state.entry(key)).collect())
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        let from = match after {
            Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix),
        };
        let state = self.state();
        let range = state.entries.range::<str, _>((from, Bound::Unbounded));
        Ok(range
            .take_while(|(key, _)| key.as_str().starts_with(prefix))
            .take(limit)
            .map(|(key, (version, value))| Entry {
                key: key.clone(),
                version: *version,
                value: value.clone(),
            })
            .collect())
    }

    async fn changes(
        &self,
        after: Revision,
        prefix: &str,
        limit: usize,
    ) -> Result<Vec<Change>, Error> {
        let state = self.state();
        after.within(state.compacted, state.revision)?;
        let mut page = Vec::new();
        for (revision, changed) in state
            .log
            .range((Bound::Excluded(after.0), Bound::Unbounded))
        {
            if page.len() >= limit {
                break;
            }
            page.extend(
                changed
                    .iter()
                    .filter(|(key, _)| key.as_str().starts_with(prefix))
                    .map(|(key, value)| Change {
                        revision: Revision(*revision),
                        key: key.clone(),
                        value: value.clone(),
                    }),
            );
        }
        Ok(page)
    }

    async fn compact(&self, keep_revisions: u64) -> Result<Revision, Error> {
        let mut state = self.state();
        state.compacted = state
            .compacted
            .max(state.revision.saturating_sub(keep_revisions));
        let kept = state.compacted + 1;
        state.log = state.log.split_off(&kept);
        Ok(Revision(state.compacted))
    }

    async fn revision(&self) -> Result<Revision, Error> {
        Ok(Revision(self.state().revision))
    }

    fn subscribe(&self) -> watch::Receiver<Revision> {
        self.news.subscribe()
    }
}
