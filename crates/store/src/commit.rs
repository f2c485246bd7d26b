//! What goes into a commit and what comes out of reads. Owns the limits that every backend keeps.

use std::collections::HashSet;
use std::fmt;

use crate::{Error, Key};

/// Most checks in one commit (etcd's default limit of a transaction).
pub const MAX_COMMIT_CHECKS: usize = 128;
/// Most writes in one commit (etcd's default limit of a transaction).
pub const MAX_COMMIT_WRITES: usize = 128;
/// Most bytes of keys and values in one commit (etcd takes requests of 1.5 MiB by default).
pub const MAX_COMMIT_BYTES: usize = 1 << 20;

/// Counts the commits of a store that changed something: the first one makes revision 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Revision {
    /// Refuses a revision that a log from `compacted` to `newest` cannot be asked with.
    pub(crate) fn within(self, compacted: u64, newest: u64) -> Result<(), Error> {
        if self.0 < compacted {
            return Err(Error::Compacted {
                oldest: Revision(compacted),
            });
        }
        if self.0 > newest {
            return Err(Error::FutureRevision {
                asked: self,
                newest: Revision(newest),
            });
        }
        Ok(())
    }
}

/// A record as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub key: Key,
    /// Revision of its last change.
    pub version: u64,
    /// Its content.
    pub value: Vec<u8>,
}

impl Entry {
    /// The check that nobody has changed this entry since it was read.
    pub fn unchanged(&self) -> Check {
        Check::Version(self.key.clone(), self.version)
    }
}

/// A condition of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// The key does not exist.
    Absent(Key),
    /// The key exists and was last changed at this revision.
    Version(Key, u64),
}

impl Check {
    /// The key that is looked at.
    pub fn key(&self) -> &Key {
        match self {
            Self::Absent(key) | Self::Version(key, _) => key,
        }
    }

    /// Compares with the version that the key has now.
    pub(crate) fn hold(&self, found: Option<u64>) -> Result<(), Error> {
        let wanted = match self {
            Self::Absent(_) => None,
            Self::Version(_, version) => Some(*version),
        };
        if wanted == found {
            return Ok(());
        }
        Err(Error::Conflict {
            key: self.key().clone(),
            found,
        })
    }
}

/// One change that a commit makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces a record.
    Put(Key, Vec<u8>),
    /// Removes a record; an absent one is left absent.
    Delete(Key),
}

impl Write {
    /// The key that is changed.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Put(key, value) => key.as_str().len() + value.len(),
            Self::Delete(key) => key.as_str().len(),
        }
    }
}

/// A line of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Revision of the commit that made it.
    pub revision: Revision,
    /// What changed.
    pub key: Key,
    /// The new content; `None`: deleted.
    pub value: Option<Vec<u8>>,
}

/// Refuses what no backend may be asked to do.
pub(crate) fn validate(checks: &[Check], writes: &[Write]) -> Result<(), Error> {
    within("checks", checks.len(), MAX_COMMIT_CHECKS)?;
    within("writes", writes.len(), MAX_COMMIT_WRITES)?;
    within(
        "bytes",
        writes.iter().map(Write::size).sum(),
        MAX_COMMIT_BYTES,
    )?;
    let mut seen = HashSet::with_capacity(writes.len());
    match writes.iter().find(|write| !seen.insert(write.key())) {
        Some(write) => Err(Error::DuplicateWrite {
            key: write.key().clone(),
        }),
        None => Ok(()),
    }
}

fn within(unit: &'static str, size: usize, limit: usize) -> Result<(), Error> {
    if size > limit {
        Err(Error::TooLarge { unit, size, limit })
    } else {
        Ok(())
    }
}
