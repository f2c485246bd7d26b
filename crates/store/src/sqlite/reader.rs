//! Reads: connections that cannot write, off the async runtime.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension, Transaction};
use tokio::sync::Semaphore;

use super::file::{Head, change, entry, open_reader};
use crate::{Change, Entry, Error, Key, Revision};

/// Most reads at once; more wait.
const READERS: usize = 4;

/// Idle connections and the right to use one.
pub(super) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Connection>>,
    slots: Arc<Semaphore>,
}

impl Readers {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            idle: Mutex::default(),
            slots: Arc::new(Semaphore::new(READERS)),
        }
    }

    /// Runs `read` in one snapshot of the database.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Reader<'_>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let slot = self
            .slots
            .clone()
            .acquire_owned()
            .await
            .expect("nobody closes the semaphore");
        let pool = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _slot = slot;
            pool.run_here(read)
        });
        match task.await {
            Ok(result) => result,
            Err(stopped) => match stopped.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down.
                Err(_) => Err(Error::Stopped { cause: None }),
            },
        }
    }

    /// Closes the idle connections.
    pub(super) fn close(&self) {
        self.idle().clear();
    }

    fn run_here<T>(&self, read: impl FnOnce(&Reader<'_>) -> Result<T, Error>) -> Result<T, Error> {
        let at = |source| Error::sqlite(&self.path, source);
        let idle = self.idle().pop();
        let conn = match idle {
            Some(conn) => conn,
            None => open_reader(&self.path).map_err(at)?,
        };
        let snapshot = conn.unchecked_transaction().map_err(at)?;
        let result = read(&Reader {
            snapshot: &snapshot,
            path: &self.path,
        })?;
        snapshot.finish().map_err(at)?;
        // Only a connection that has given no trouble is used again.
        self.idle().push(conn);
        Ok(result)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One snapshot.
pub(super) struct Reader<'a> {
    snapshot: &'a Transaction<'a>,
    path: &'a Path,
}

impl Reader<'_> {
    pub(super) fn head(&self) -> Result<Head, Error> {
        Head::read(self.snapshot).map_err(|source| Error::sqlite(self.path, source))
    }

    pub(super) fn get(&self, key: &Key) -> Result<Option<Entry>, Error> {
        self.snapshot
            .prepare_cached("SELECT key, version, value, sum FROM entry WHERE key = ?1")
            .and_then(|mut query| query.query_row([key.as_str()], entry).optional())
            .map_err(|source| Error::sqlite(self.path, source))
    }

    pub(super) fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        // The smallest text behind `after`: keys have no byte below 0x20.
        let from = after.map_or_else(String::new, |key| format!("{key}\x01"));
        self.rows(
            "SELECT key, version, value, sum FROM entry
             WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT ?3",
            (prefix.max(&from), end(prefix), rows(limit)),
            entry,
        )
    }

    pub(super) fn changes(
        &self,
        after: Revision,
        prefix: &str,
        limit: usize,
    ) -> Result<Vec<Change>, Error> {
        let head = self.head()?;
        after.within(head.compacted, head.revision)?;
        let mut page = self.rows(
            "SELECT revision, key, value, sum FROM change
             WHERE revision > ?1 AND key >= ?2 AND key < ?3 ORDER BY revision, key LIMIT ?4",
            (after.0.cast_signed(), prefix, end(prefix), rows(limit)),
            change,
        )?;
        if page.len() < limit {
            return Ok(page);
        }
        let Some(last) = page.last() else {
            return Ok(page);
        };
        let rest = self.rows(
            "SELECT revision, key, value, sum FROM change
             WHERE revision = ?1 AND key > ?2 AND key >= ?3 AND key < ?4 ORDER BY key",
            (
                last.revision.0.cast_signed(),
                last.key.as_str(),
                prefix,
                end(prefix),
            ),
            change,
        )?;
        page.extend(rest);
        Ok(page)
    }

    fn rows<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        decode: fn(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Error> {
        self.snapshot
            .prepare_cached(sql)
            .and_then(|mut query| query.query_map(params, decode)?.collect())
            .map_err(|source| Error::sqlite(self.path, source))
    }
}

/// The smallest text behind all keys that start with `prefix`: keys have no byte above 0x7e.
fn end(prefix: &str) -> String {
    format!("{prefix}\x7f")
}

fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
