//! Where exports lie: something that keeps objects under keys, whole or not at all. Keys are made of ids and names of
//! ours alone.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use hutch_contract::id::OwnerId;
use hutch_contract::name::Name;

use super::chunk::ChunkId;
use crate::Error;

/// The key of an object: `OWNER/chunks/AB/ABCD….zst` or `OWNER/disks/NAME.json`. All of an owner is below the owner's id.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    owner: String,
    group: String,
    name: String,
}

impl Key {
    pub(super) fn chunk(owner: &OwnerId, id: ChunkId) -> Key {
        let id = id.to_string();
        Key {
            owner: owner.to_string(),
            group: format!("chunks/{}", &id[..2]),
            name: format!("{id}.zst"),
        }
    }

    pub(super) fn manifest(owner: &OwnerId, name: &Name) -> Key {
        Key {
            owner: owner.to_string(),
            group: "disks".into(),
            name: format!("{name}.json"),
        }
    }

    /// Its parts but the last: directories, where there are such.
    pub(super) fn parents(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.owner.as_str()).chain(self.group.split('/'))
    }

    /// Its last part.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { owner, group, name } = self;
        write!(f, "{owner}/{group}/{name}")
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A store of objects. Each call ends by itself: one that hangs is given up.
#[async_trait]
pub trait Objects: fmt::Debug + Send + Sync {
    /// Whether there is an object of that key.
    async fn has(&self, key: &Key) -> Result<bool, Error>;

    /// The object, when it has no more than `limit` bytes.
    ///
    /// # Errors
    /// Of kind [`NotFound`](crate::Kind::NotFound) when there is none, [`Invalid`](crate::Kind::Invalid) when it is larger.
    async fn get(&self, key: &Key, limit: usize) -> Result<Vec<u8>, Error>;

    /// Adds an object: after that it is there whole, also after a power cut, or not at all. Never replaces one; `false`
    /// when there was one.
    async fn add(&self, key: &Key, bytes: Bytes) -> Result<bool, Error>;
}
