//! The only writer of a file: a thread that makes one transaction, and so one fsync, of all the
//! commits that wait.
//!
//! ```text
//! queue ─► BEGIN ─► checks and writes of each ─► COMMIT ─► news ─► answers ─► checkpoint
//!            ▲        (a conflict writes             │                           │
//!            │         nothing, harms nobody)        │ full: each alone          │ i/o error
//!            └───────────────────────────────────────┴──► i/o error ──► stopped ◄┘
//! ```
//!
//! A commit looks at all its checks before its first write, so a conflict leaves nothing to undo
//! and no savepoint is needed. No answer, not even a conflict, leaves before COMMIT: it may rest
//! on another commit of the same transaction.
//!
//! After an i/o error nothing more is written: the kernel reports a failed write-back once and may
//! then call the lost pages clean, so that a retry would lie. For the same reason the log is left
//! as it is for the next start.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use super::file::{Head, keep_log_on_close, sum};
use crate::{Check, Error, Key, Revision, Write};

/// Most commits in one transaction.
const GROUP: usize = 256;

/// Pages in the write-ahead log from which on it is copied into the database.
const CHECKPOINT_PAGES: i64 = 1_000;

/// Pages from which on readers are waited for, so that the log starts again from its beginning
/// although there is always somebody reading.
const RESTART_PAGES: i64 = 16_000;

/// What the thread is asked to do.
pub(super) enum Work {
    Commit {
        checks: Vec<Check>,
        writes: Vec<Write>,
    },
    Compact {
        keep_revisions: u64,
    },
}

/// Work and who waits for it.
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: oneshot::Sender<Result<Revision, Error>>,
}

/// What the writer has done since it was opened.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) commits: AtomicU64,
    pub(super) transactions: AtomicU64,
}

/// State of the thread.
pub(super) struct Writer {
    pub(super) conn: Connection,
    pub(super) path: PathBuf,
    pub(super) news: watch::Sender<Revision>,
    pub(super) counters: Arc<Counters>,
}

impl Writer {
    /// Works until all senders of `jobs` are gone and the queue is empty.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut group = Vec::new();
        let cause = loop {
            if jobs.blocking_recv_many(&mut group, GROUP) == 0 {
                return;
            }
            let done = self
                .handle(std::mem::take(&mut group))
                .and_then(|()| self.checkpoint());
            if let Err(cause) = done {
                break Arc::new(cause);
            }
        };
        tracing::error!(path = %self.path.display(), error = %chain(&cause), "no more commits are taken");
        if let Err(error) = keep_log_on_close(&self.conn) {
            tracing::error!(%error, "the log may be copied on close");
        }
        drop(self.news);
        // The connection stays: if it closed, the next reader would read the log anew and find
        // there the commit that was just said to have failed.
        while let Some(job) = jobs.blocking_recv() {
            answer(
                job,
                Err(Error::Stopped {
                    cause: Some(cause.clone()),
                }),
            );
        }
    }

    /// Answers every job of the group; fails when the file can no longer be trusted.
    fn handle(&mut self, group: Vec<Job>) -> Result<(), Error> {
        match self.transact(&group) {
            Ok(answers) => {
                for (job, result) in group.into_iter().zip(answers) {
                    answer(job, result);
                }
                Ok(())
            }
            // One commit that is too large for the room that is left must not fail the others.
            Err(Error::Full { .. } | Error::Sqlite { .. }) if group.len() > 1 => {
                group.into_iter().try_for_each(|job| self.handle(vec![job]))
            }
            Err(error) => {
                for job in group {
                    answer(job, Err(error.clone()));
                }
                match error {
                    Error::Io { .. } | Error::Damaged { .. } => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Does a group in one transaction; an error means that nothing of it was done.
    fn transact(&mut self, group: &[Job]) -> Result<Vec<Result<Revision, Error>>, Error> {
        let path = &self.path;
        let at = |source| Error::sqlite(path, source);
        let tx = self
            .conn
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(at)?;
        let before = Head::read(&tx).map_err(at)?;
        let mut head = before;
        let mut answers = Vec::with_capacity(group.len());
        for job in group {
            answers.push(match &job.work {
                Work::Compact { keep_revisions } => {
                    compact(&tx, &mut head, *keep_revisions).map_err(at)?;
                    Ok(Revision(head.compacted))
                }
                Work::Commit { checks, writes } => match check(&tx, checks).map_err(at)? {
                    Ok(()) => {
                        write(&tx, &mut head, writes).map_err(at)?;
                        Ok(Revision(head.revision))
                    }
                    Err(conflict) => Err(conflict),
                },
            });
        }
        if head == before {
            return Ok(answers);
        }
        head.update(&tx).map_err(at)?;
        tx.commit().map_err(at)?;
        self.counters.transactions.fetch_add(1, Ordering::Relaxed);
        self.counters
            .commits
            .fetch_add(head.revision - before.revision, Ordering::Relaxed);
        self.news.send_replace(Revision(head.revision));
        Ok(answers)
    }

    /// Copies a long log into the database. SQLite would do so by itself, and hide a failed fsync.
    fn checkpoint(&self) -> Result<(), Error> {
        let pages = |mode: &str| {
            let pragma = format!("PRAGMA wal_checkpoint({mode})");
            self.conn
                .prepare_cached(&pragma)
                .and_then(|mut query| query.query_row([], |row| row.get::<_, i64>(1)))
                .map_err(|source| Error::sqlite(&self.path, source))
        };
        let done = pages("NOOP").and_then(|log| match log {
            RESTART_PAGES.. => pages("RESTART"),
            CHECKPOINT_PAGES.. => pages("PASSIVE"),
            _ => Ok(log),
        });
        match done {
            Ok(_) | Err(Error::Locked { .. }) => Ok(()),
            Err(error @ (Error::Io { .. } | Error::Damaged { .. })) => Err(error),
            // The commits are safe in the log; the next group tries again.
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the log was not copied");
                Ok(())
            }
        }
    }
}

fn answer(job: Job, result: Result<Revision, Error>) {
    // Who no longer waits does not need the answer.
    drop(job.reply.send(result));
}

fn chain(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn check(conn: &Connection, checks: &[Check]) -> rusqlite::Result<Result<(), Error>> {
    let mut query = conn.prepare_cached("SELECT version FROM entry WHERE key = ?1")?;
    for check in checks {
        let found: Option<i64> = query
            .query_row([check.key().as_str()], |row| row.get(0))
            .optional()?;
        if let Err(conflict) = check.hold(found.map(i64::cast_unsigned)) {
            return Ok(Err(conflict));
        }
    }
    Ok(Ok(()))
}

fn write(conn: &Connection, head: &mut Head, writes: &[Write]) -> rusqlite::Result<()> {
    let next = head.revision + 1;
    let version = next.cast_signed();
    let log = |key: &Key, value: Option<&[u8]>, sum: u32| {
        conn.prepare_cached(
            "INSERT INTO change (revision, key, value, sum) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute((version, key.as_str(), value, sum))
    };
    for write in writes {
        match write {
            Write::Put(key, value) => {
                let sum = sum(key.as_str(), next, Some(value));
                conn.prepare_cached(
                    "REPLACE INTO entry (key, version, value, sum) VALUES (?1, ?2, ?3, ?4)",
                )?
                .execute((key.as_str(), version, value, sum))?;
                log(key, Some(value), sum)?;
            }
            Write::Delete(key) => {
                let deleted = conn
                    .prepare_cached("DELETE FROM entry WHERE key = ?1")?
                    .execute([key.as_str()])?;
                if deleted == 0 {
                    continue;
                }
                log(key, None, sum(key.as_str(), next, None))?;
            }
        }
        head.revision = next;
    }
    Ok(())
}

fn compact(conn: &Connection, head: &mut Head, keep_revisions: u64) -> rusqlite::Result<()> {
    let to = head.revision.saturating_sub(keep_revisions);
    if to > head.compacted {
        conn.prepare_cached("DELETE FROM change WHERE revision <= ?1")?
            .execute([to.cast_signed()])?;
        head.compacted = to;
    }
    Ok(())
}
