//! JSON records over the bytes of a store.
//!
//! Does not own formats: a record carries a `format` number, and who reads one refuses a newer
//! number than it knows. Fields that this program does not know do not survive a rewrite here.

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Check, Entry, Error, Key, Store, Write};

/// A decoded [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<T> {
    /// Its name.
    pub key: Key,
    /// Revision of its last change.
    pub version: u64,
    /// Its content.
    pub value: T,
}

impl<T> Record<T> {
    /// The check that nobody has changed this record since it was read.
    pub fn unchanged(&self) -> Check {
        Check::Version(self.key.clone(), self.version)
    }
}

impl Write {
    /// A put of `record` as JSON.
    ///
    /// # Errors
    /// [`Error::Encode`] when serde refuses, as for maps with keys that are no strings.
    pub fn json<T: Serialize + ?Sized>(key: Key, record: &T) -> Result<Self, Error> {
        match serde_json::to_vec(record) {
            Ok(value) => Ok(Self::Put(key, value)),
            Err(source) => Err(Error::Encode {
                key,
                source: Arc::new(source),
            }),
        }
    }
}

impl Entry {
    /// Decodes the JSON that [`Write::json`] wrote.
    ///
    /// # Errors
    /// [`Error::Decode`] when it is something else.
    pub fn json<T: DeserializeOwned>(self) -> Result<Record<T>, Error> {
        let Self {
            key,
            version,
            value,
        } = self;
        match serde_json::from_slice(&value) {
            Ok(value) => Ok(Record {
                key,
                version,
                value,
            }),
            Err(source) => Err(Error::Decode {
                key,
                version,
                source: Arc::new(source),
            }),
        }
    }
}

impl dyn Store {
    /// [`Store::get`], decoded.
    ///
    /// # Errors
    /// Those of `get`, and [`Error::Decode`].
    pub async fn get_json<T: DeserializeOwned>(
        &self,
        key: &Key,
    ) -> Result<Option<Record<T>>, Error> {
        self.get(key).await?.map(Entry::json).transpose()
    }

    /// [`Store::list`], decoded.
    ///
    /// # Errors
    /// Those of `list`, and [`Error::Decode`] for the first record that is something else.
    pub async fn list_json<T: DeserializeOwned>(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Record<T>>, Error> {
        self.list(prefix, after, limit)
            .await?
            .into_iter()
            .map(Entry::json)
            .collect()
    }
}
