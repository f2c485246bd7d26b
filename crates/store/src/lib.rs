//! Durable records with versions, changed only by commits over many keys.
//!
//! Owns: keys, versions, the one atomic write ([`Store::commit`]), the change log and the event
//! that a commit has happened. Does not own: what the values mean (they are bytes; [`Write::json`]
//! and `get_json` are conveniences), who may write, when the log is compacted, nor the lock that
//! keeps a second server off a data directory.
//!
//! ```text
//!            commit(checks, writes)             get / list              changes(after)
//!                    │                              │                         │
//!   every check holds, or nothing happens   newest value, and the    what changed, in order,
//!   one revision for all of its writes ───► revision that wrote it   until compact() drops it
//!                    │
//!                    └──► subscribe(): the newest revision; wakes who waits, nobody polls
//! ```
//!
//! The rules are those of an etcd transaction and watch, so that every backend can keep them:
//! a version is the revision of the last change of its key (`mod_revision`), a put always counts
//! as a change, deleting an absent key does not, and a commit that changes nothing moves nothing.

mod commit;
mod error;
mod feed;
mod key;
mod memory;
mod sqlite;
mod typed;

pub use commit::{
    Change, Check, Entry, MAX_COMMIT_BYTES, MAX_COMMIT_CHECKS, MAX_COMMIT_WRITES, Revision, Write,
};
pub use error::{Error, Kind};
pub use feed::Feed;
pub use key::{Key, MAX_KEY_BYTES};
pub use memory::MemoryStore;
pub use sqlite::{SqliteOptions, SqliteStore, Stats};
pub use typed::Record;

use tokio::sync::watch;

/// Records of a data directory or a cluster. All methods may be called from many tasks at once.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// Applies all `writes` at one new revision if every one of `checks` holds, else nothing.
    ///
    /// Returns the revision once the commit is durable. A commit that changes nothing (no writes,
    /// or only deletes of absent keys) returns the current revision.
    /// Dropping the returned future does not take back a commit that is already queued.
    ///
    /// # Errors
    /// [`Error::Conflict`] names the first check that does not hold; [`Error::DuplicateWrite`] and
    /// [`Error::TooLarge`] refuse the commit as such. After [`Error::Io`] and [`Error::Stopped`]
    /// it is unknown until the next start whether the commit was made; after all others it was not.
    async fn commit(&self, checks: Vec<Check>, writes: Vec<Write>) -> Result<Revision, Error>;

    /// The entry of `key`, or `None` when absent.
    async fn get(&self, key: &Key) -> Result<Option<Entry>, Error>;

    /// The entries of `keys`, in that order, all as of one revision.
    async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, Error>;

    /// Up to `limit` entries whose keys start with `prefix` and come behind `after`, by key.
    ///
    /// One page is of one revision; an entry that exists while all pages are read is in exactly
    /// one of them. To follow a list without a gap, read [`Store::revision`] first, then list,
    /// then follow from that revision.
    async fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Entry>, Error>;

    /// Changes later than revision `after` of keys that start with `prefix`, by revision, then key.
    ///
    /// A commit is never split over two calls: the answer ends with a whole commit, and so may be
    /// longer than `limit`. A shorter answer holds everything up to the newest revision.
    /// [`Feed`] is this call in a loop.
    ///
    /// # Errors
    /// [`Error::Compacted`] when the log does not reach back to `after`;
    /// [`Error::FutureRevision`] when the store has not come to `after` yet (it is another store,
    /// or was restored from a backup).
    async fn changes(
        &self,
        after: Revision,
        prefix: &str,
        limit: usize,
    ) -> Result<Vec<Change>, Error>;

    /// Drops all but the last `keep_revisions` revisions from the change log, not from the
    /// entries. Returns the oldest revision that [`Store::changes`] may still be asked with.
    async fn compact(&self, keep_revisions: u64) -> Result<Revision, Error>;

    /// The revision of the newest commit; 0 when there was none.
    async fn revision(&self) -> Result<Revision, Error>;

    /// The newest revision, to sleep on. It moves after a commit has become visible to reads and
    /// before that commit's caller has its answer. Closed when the store can commit no more.
    fn subscribe(&self) -> watch::Receiver<Revision>;
}
