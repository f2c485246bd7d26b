//! Saved memory of guests, for VMMs to map: each file is read once into memory that nobody can change any more, and that
//! all machines share which go on from it. How it is saved is in `memory/pages.rs`.
//!
//! QEMU opens what it maps for writing, also where it maps it privately, and its user may not write a snapshot's file.
//! It may open this: the seals refuse every change of it.

pub(crate) mod pages;

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use crate::Error;

/// The name of the file in the directory of a snapshot.
pub(crate) const FILE: &str = "memory";
/// The state of the devices, beside it.
pub(crate) const STATE: &str = "state";
/// How long after its last use one is kept in memory: for whoever makes many machines of it, one after another.
const KEPT: Duration = Duration::from_secs(60);
/// What is read and written at a time.
const CHUNK: usize = 1 << 20;

/// Which file it is, and that it has not been written since. Links to it are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl FileId {
    /// Of a file.
    pub(crate) fn of(path: &Path) -> Result<Self, Error> {
        let metadata = std::fs::symlink_metadata(path);
        Ok(Self::new(&metadata.map_err(Error::io("look at", path))?))
    }

    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }

    /// Its bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

/// What a file held, in memory.
#[derive(Debug)]
pub(crate) struct Memory {
    of: FileId,
    sealed: OnceCell<OwnedFd>,
}

impl Memory {
    /// The file that it was read from.
    pub(crate) fn of(&self) -> FileId {
        self.of
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let sealed = self.sealed.get();
        sealed.expect("it is given out filled only").as_fd()
    }
}

/// Those that are in use.
#[derive(Debug, Default)]
pub(crate) struct Memories(Mutex<HashMap<FileId, Weak<Memory>>>);

impl Memories {
    /// Reads a file, unless that has been done. Several at once wait for the one that does it.
    pub(crate) async fn read(&self, path: &Path) -> Result<Arc<Memory>, Error> {
        let memory = self.of(FileId::of(path)?);
        let read = memory.sealed.get_or_try_init(|| async {
            let (from, of) = (path.to_owned(), memory.of);
            let read = tokio::task::spawn_blocking(move || sealed(&from, of));
            read.await.expect("reading memory does not panic")
        });
        read.await.map_err(Error::io("read", path))?;
        let kept = memory.clone();
        drop(tokio::spawn(async move {
            tokio::time::sleep(KEPT).await;
            drop(kept);
        }));
        Ok(memory)
    }

    fn of(&self, of: FileId) -> Arc<Memory> {
        // Nothing panics while it is held, and no state between two statements is wrong.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = all.get(&of).and_then(Weak::upgrade) {
            return memory;
        }
        all.retain(|_, memory| memory.strong_count() > 0);
        let memory = Arc::new(Memory {
            of,
            sealed: OnceCell::new(),
        });
        all.insert(of, Arc::downgrade(&memory));
        memory
    }
}

fn sealed(path: &Path, of: FileId) -> io::Result<OwnedFd> {
    let from = File::open(path)?;
    if FileId::new(&from.metadata()?) != of {
        return Err(io::Error::other("another file took its place"));
    }
    let to = memory_file("hutch-memory")?;
    to.set_len(of.size)?;
    copy(&from, &to, of.size)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&to, seals)?;
    Ok(to.into())
}

/// Makes a file for memory to be saved in.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Makes a file that holds what another one does: with its blocks, where the file system can share them.
pub(crate) fn clone(from: &Path, to: &Path) -> io::Result<File> {
    let (from, to) = (File::open(from)?, create(to)?);
    match rustix::fs::ioctl_ficlone(&to, &from) {
        Ok(()) => {}
        Err(full @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => return Err(full.into()),
        // Every other errno has meant "not here" on some file system.
        Err(_) => {
            let size = from.metadata()?.len();
            to.set_len(size)?;
            copy(&from, &to, size)?;
        }
    }
    Ok(to)
}

/// A file that is nowhere but in memory, and ends with its last user.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create(name, flags)?.into())
}

/// Copies what is data and not zero.
fn copy(from: &File, to: &File, size: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < size => data - data % pages::PAGE as u64,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(data))?.min(size);
        at = data;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            from.read_exact_at(&mut buffer[..want], at)?;
            pages::write_changed(to, at, &buffer[..want], None)?;
            at += want as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
