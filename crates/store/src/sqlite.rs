//! A store in one SQLite file: the store of a single node.
//!
//! Commits go through one thread (`writer.rs`), reads through read-only connections
//! (`reader.rs`); `file.rs` opens and checks. Two stores on one file, also in two processes, do
//! not harm each other, but the subscribers of one do not hear of the other's commits. A server
//! therefore locks its data directory; that is not done here.

mod file;
mod reader;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot, watch};

use crate::commit::validate;
use crate::{Change, Check, Entry, Error, Key, Revision, Store, Write};
use file::{Head, open_writer};
use reader::Readers;
use writer::{Counters, Job, Work, Writer};

/// Commits that wait for the writer; more wait for room in the queue.
const QUEUE: usize = 1_024;

/// How to open a [`SqliteStore`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SqliteOptions {
    /// Most pages of 4 KiB that the file may have; a commit beyond is [`Error::Full`].
    pub max_pages: Option<u32>,
}

/// What a [`SqliteStore`] has done since it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Commits that made a revision.
    pub commits: u64,
    /// Transactions that were made durable, one fsync each, for these commits and compactions.
    pub transactions: u64,
}

/// Keeps the promises of [`Store`] in a SQLite file (WAL, `synchronous=FULL`).
///
/// Dropping it waits until the queued commits are made and the file is closed.
pub struct SqliteStore {
    path: PathBuf,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
    news: watch::Receiver<Revision>,
    counters: Arc<Counters>,
}

impl SqliteStore {
    /// Opens or creates the store at `path`. Blocks: a file is migrated, and checked when small.
    ///
    /// # Errors
    /// [`Error::NewerSchema`], [`Error::Damaged`], [`Error::Locked`], [`Error::Setting`],
    /// [`Error::UnsafeSqlite`], and others of SQLite's, as when the directory does not exist.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(path, SqliteOptions::default())
    }

    /// [`SqliteStore::open`] with options.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open_with(path: impl AsRef<Path>, options: SqliteOptions) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let conn = open_writer(&path, options.max_pages)?;
        let head = Head::read(&conn).map_err(|source| Error::sqlite(&path, source))?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (sender, news) = watch::channel(Revision(head.revision));
        let counters = Arc::<Counters>::default();
        let writer = Writer {
            conn,
            path: path.clone(),
            news: sender,
            counters: counters.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|source| Error::Thread {
                source: Arc::new(source),
            })?;
        let readers = Arc::new(Readers::new(&path));
        Ok(Self {
            path,
            jobs: Some(jobs),
            thread: Some(thread),
            readers,
            news,
            counters,
        })
    }

    /// What was done since it was opened.
    pub fn stats(&self) -> Stats {
        Stats {
            commits: self.counters.commits.load(Ordering::Relaxed),
            transactions: self.counters.transactions.load(Ordering::Relaxed),
        }
    }

    async fn ask(&self, work: Work) -> Result<Revision, Error> {
        // Both fail only when the thread is gone, that is when it has panicked.
        let gone = || Error::Stopped { cause: None };
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(Job { work, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        // The last connection to close copies the log: that shall be the writer's.
        self.readers.close();
        self.jobs = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(path = %self.path.display(), "the writer panicked");
        }
    }
}

#[async_trait::async_trait]
impl Store for SqliteStore {
    async fn commit(&self, checks: Vec<Check>, writes: Vec<Write>) -> Result<Revision, Error> {
        validate(&checks, &writes)?;
        self.ask(Work::Commit { checks, writes }).await
    }

    async fn get(&self, key: &Key) -> Result<Option<Entry>, Error> {
        let key = key.clone();
        self.readers.run(move |reader| reader.get(&key)).await
    }

    async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, Error> {
        let keys = keys.to_vec();
        self.readers
            .run(move |reader| keys.iter().map(|key| reader.get(key)).collect())
            .await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.readers
            .run(move |reader| reader.list(&prefix, after.as_ref(), limit))
            .await
    }

    async fn changes(
        &self,
        after: Revision,
        prefix: &str,
        limit: usize,
    ) -> Result<Vec<Change>, Error> {
        let prefix = prefix.to_owned();
        self.readers
            .run(move |reader| reader.changes(after, &prefix, limit))
            .await
    }

    async fn compact(&self, keep_revisions: u64) -> Result<Revision, Error> {
        self.ask(Work::Compact { keep_revisions }).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        let head = self.readers.run(|reader| reader.head()).await?;
        Ok(Revision(head.revision))
    }

    fn subscribe(&self) -> watch::Receiver<Revision> {
        let mut news = self.news.clone();
        // The store's own receiver never looks, so its clone would wake for what is long past.
        news.mark_unchanged();
        news
    }
}
