//! Exports and imports of disks: to and from a store of objects, in chunks that are named by their content.
//!
//! ```text
//! OWNER/chunks/AB/ABCD….zst   a chunk that is not all zeros, packed with zstd; never changed
//! OWNER/disks/NAME.json       the manifest: which chunks make up a disk; written last, never replaced
//! ```
//!
//! A chunk that is there is not sent again: so a second export of a disk that has changed a little, or one that was
//! interrupted, sends what is new. An export is there when its manifest is, and then whole. On the way back nothing is
//! believed: sizes are limited before anything is fetched, each chunk must be what its name says, and the disk must have
//! the digest that the manifest tells. All of an owner lies apart: chunks are not shared among owners, for who could name
//! those of another could read them.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_contract::id::OwnerId;
use hutch_contract::name::Name;
use tokio::sync::mpsc;

use crate::{Error, Kind};
use chunk::DiskDigest;
use manifest::Piece;

mod chunk;
mod directory;
mod manifest;
mod objects;
mod read;
#[cfg(test)]
mod tests;

pub use chunk::CHUNK_BYTES;
pub use directory::Directory;
pub use manifest::{About, Limits, Manifest};
pub use objects::{Key, Objects};

/// Chunks that are on their way at one time: most of the time each waits for a disk or a network.
const IN_FLIGHT: usize = 8;

/// The exports of one owner.
#[derive(Debug, Clone)]
pub struct Exports {
    objects: Arc<dyn Objects>,
    owner: OwnerId,
}

/// What is to be exported.
#[derive(Debug)]
pub struct Source {
    /// The disk. Nothing may change it meanwhile.
    pub disk: File,
    /// The digest that it must have.
    pub sha256: String,
    /// What else to tell of it.
    pub about: About,
}

/// What an export came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// What was written last.
    pub manifest: Manifest,
    /// Chunks that were not there before.
    pub sent_chunks: u64,
    /// Bytes of those, packed.
    pub sent_bytes: u64,
}

/// Writes into the disk of an import. What it does about a full disk is its own affair.
pub type Write = dyn Fn(&File, &[u8], u64) -> std::io::Result<()> + Send + Sync;

impl Exports {
    /// Those of `owner` in `objects`.
    pub fn new(objects: Arc<dyn Objects>, owner: OwnerId) -> Exports {
        Exports { objects, owner }
    }

    /// Whether there is an export of that name.
    pub async fn has(&self, name: &Name) -> Result<bool, Error> {
        self.objects.has(&Key::manifest(&self.owner, name)).await
    }

    /// Exports a disk. What was sent stays when this fails or is dropped, and is not sent again. `progress` is told bytes of
    /// the disk that are done with, and how many there are.
    ///
    /// # Errors
    /// Of kind [`Exists`](Kind::Exists) when another disk was exported by that name; [`Error::Damaged`] when the disk is not
    /// what `source` says; the store's.
    pub async fn export(
        &self,
        name: &Name,
        source: Source,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Exported, Error> {
        let total = read::content(&source.disk)?;
        let size_bytes = read::size(&source.disk)?;
        let (chunks, found) = mpsc::channel(2);
        let disk = source.disk;
        let reading = blocking(move || read::chunks(&disk, size_bytes, &chunks));
        let (done, sent_chunks, sent_bytes) = <(AtomicU64, AtomicU64, AtomicU64)>::default();
        let sending = async {
            let mut known = HashSet::new();
            received(found)
                .map(|chunk| {
                    let is_new = known.insert(chunk.id);
                    let (done, sent_chunks, sent_bytes) = (&done, &sent_chunks, &sent_bytes);
                    async move {
                        let len = chunk.bytes.len() as u64;
                        if is_new && let Some(bytes) = self.send(chunk).await? {
                            sent_chunks.fetch_add(1, Ordering::Relaxed);
                            sent_bytes.fetch_add(bytes, Ordering::Relaxed);
                        }
                        let before = done.fetch_add(len, Ordering::Relaxed);
                        progress((before + len).min(total), total);
                        Ok::<_, Error>(())
                    }
                })
                .buffer_unordered(IN_FLIGHT)
                .try_collect::<()>()
                .await
        };
        // When one fails the other is dropped; the reader ends when nobody receives.
        let ((chunks, digest), ()) = futures::try_join!(reading, sending)?;
        if digest.0 != source.sha256 {
            return Err(Error::Damaged {
                what: "the disk".into(),
                problem: "is not what was written",
            });
        }
        let manifest = Manifest::new(chunks, size_bytes, digest, source.about);
        self.publish(name, &manifest).await?;
        Ok(Exported {
            manifest,
            sent_chunks: sent_chunks.into_inner(),
            sent_bytes: sent_bytes.into_inner(),
        })
    }

    /// Sends a chunk unless it is there; how many bytes that took.
    async fn send(&self, chunk: read::Chunk) -> Result<Option<u64>, Error> {
        let key = Key::chunk(&self.owner, chunk.id);
        if self.objects.has(&key).await? {
            return Ok(None);
        }
        let packed = blocking(move || chunk::pack(&chunk.bytes).map_err(Error::pack)).await?;
        let len = packed.len() as u64;
        let added = self.objects.add(&key, Bytes::from(packed)).await?;
        Ok(added.then_some(len))
    }

    async fn publish(&self, name: &Name, manifest: &Manifest) -> Result<(), Error> {
        let key = Key::manifest(&self.owner, name);
        let bytes = Bytes::from(manifest.encode());
        if bytes.len() > manifest::MAX_BYTES {
            return Err(Error::Object {
                key: key.to_string(),
                kind: Kind::Invalid,
                problem: "would list too many chunks: the disk is too large".into(),
            });
        }
        if self.objects.add(&key, bytes.clone()).await? {
            return Ok(());
        }
        // The same is what an earlier attempt wrote whose end nobody heard of.
        match self.objects.get(&key, bytes.len()).await {
            Ok(there) if there == bytes => Ok(()),
            Ok(_) => Err(exists(&key)),
            Err(error) if error.kind() == Kind::Invalid => Err(exists(&key)),
            Err(error) => Err(error),
        }
    }

    /// Looks up an export.
    ///
    /// # Errors
    /// Of kind [`NotFound`](Kind::NotFound); of kind [`Invalid`](Kind::Invalid) when it is beyond the limits or makes no
    /// sense.
    pub async fn find(&self, name: &Name, limits: Limits) -> Result<Manifest, Error> {
        let key = Key::manifest(&self.owner, name);
        let bytes = self.objects.get(&key, manifest::MAX_BYTES).await?;
        let read = blocking(move || Ok(Manifest::decode(&bytes, &limits)));
        read.await?.map_err(|problem| Error::Object {
            key: key.to_string(),
            kind: Kind::Invalid,
            problem,
        })
    }

    /// Fills the empty file `into` with an exported disk; zeros become holes. Does not sync. `progress` is told bytes of the
    /// disk that are done with, and how many there are.
    ///
    /// # Errors
    /// [`Error::Damaged`]: what was fetched is not what was exported, and the file is of no use. A chunk that is not there;
    /// the store's; those of `write`.
    pub async fn import(
        &self,
        manifest: &Manifest,
        into: File,
        write: Arc<Write>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<(), Error> {
        let size_bytes = manifest.size_bytes;
        into.set_len(size_bytes).map_err(Error::write)?;
        let total = manifest.pieces().map(|piece| piece.len as u64).sum();
        let fetched = stream::iter(manifest.pieces()).map(|piece| self.fetch(piece));
        // In order, for the digest.
        let mut fetched = fetched.buffered(IN_FLIGHT);
        let (mut done, mut digest) = (0, DiskDigest::default());
        let into = Arc::new(into);
        while let Some((piece, chunk)) = fetched.try_next().await? {
            let (into, write) = (into.clone(), write.clone());
            digest = blocking(move || {
                digest.add(piece.offset, &chunk);
                for (at, block) in chunk::blocks(&chunk) {
                    write(&into, block, piece.offset + at).map_err(Error::write)?;
                }
                Ok(digest)
            })
            .await?;
            done += piece.len as u64;
            progress(done, total);
        }
        let damaged = |problem| Error::Damaged {
            what: "the disk".into(),
            problem,
        };
        let (sha256, used_bytes) = digest.finish(size_bytes);
        if sha256 != manifest.sha256 {
            return Err(damaged("is not what its manifest says"));
        }
        if used_bytes != manifest.used_bytes {
            return Err(damaged("has not in it what its manifest says"));
        }
        Ok(())
    }

    async fn fetch(&self, piece: Piece) -> Result<(Piece, Vec<u8>), Error> {
        let Piece { len, id, .. } = piece;
        let key = Key::chunk(&self.owner, id);
        let packed = self.objects.get(&key, chunk::packed_limit(len)).await?;
        let unpacked = blocking(move || Ok(chunk::unpack(&packed, len, id))).await?;
        let chunk = unpacked.map_err(|problem| Error::Damaged {
            what: key.to_string(),
            problem,
        })?;
        Ok((piece, chunk))
    }
}

/// Writes plainly.
pub fn plainly() -> Arc<Write> {
    Arc::new(|file, bytes, at| file.write_all_at(bytes, at))
}

fn exists(key: &Key) -> Error {
    Error::Object {
        key: key.to_string(),
        kind: Kind::Exists,
        problem: "is there already".into(),
    }
}

fn received<T>(receiver: mpsc::Receiver<T>) -> impl futures::Stream<Item = T> {
    stream::unfold(receiver, async |mut receiver| {
        let item = receiver.recv().await?;
        Some((item, receiver))
    })
}

/// Runs what waits for disks or computes for long in a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and nobody waits for this any more.
            Err(_) => Err(Error::write(std::io::ErrorKind::Interrupted.into())),
        },
    }
}
