//! Reading a disk chunk by chunk, without what is zeros.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::chunk::{CHUNK_BYTES, ChunkId, DiskDigest, is_zero};
use super::manifest::Chunks;
use crate::Error;

const CHUNK: u64 = CHUNK_BYTES as u64;

/// A chunk that is not all zeros.
pub(super) struct Chunk {
    pub id: ChunkId,
    pub bytes: Vec<u8>,
}

pub(super) fn size(disk: &File) -> Result<u64, Error> {
    Ok(disk.metadata().map_err(Error::read)?.len())
}

/// Bytes in chunks that are not holes: as many as [`chunks`] reads.
pub(super) fn content(disk: &File) -> Result<u64, Error> {
    let size = size(disk)?;
    let (mut at, mut total) = (0, 0);
    while let Some((from, to)) = next_data(disk, at, size)? {
        total += to - from;
        at = to;
    }
    Ok(total)
}

/// Sends each chunk that is not all zeros. Ends early when nobody receives any more.
pub(super) fn chunks(
    disk: &File,
    size: u64,
    found: &mpsc::Sender<Chunk>,
) -> Result<(Chunks, (String, u64)), Error> {
    let (mut all, mut digest) = (Chunks::default(), DiskDigest::default());
    let mut at = 0;
    while let Some((from, to)) = next_data(disk, at, size)? {
        at = from;
        while at < to {
            let mut bytes = vec![0; CHUNK.min(size - at) as usize];
            disk.read_exact_at(&mut bytes, at).map_err(Error::read)?;
            let offset = at;
            at += bytes.len() as u64;
            if is_zero(&bytes) {
                continue;
            }
            digest.add(offset, &bytes);
            let id = ChunkId::of(&bytes);
            all.add(offset / CHUNK, id);
            if found.blocking_send(Chunk { id, bytes }).is_err() {
                return Err(Error::read(std::io::ErrorKind::Interrupted.into()));
            }
        }
    }
    Ok((all, digest.finish(size)))
}

/// The next data at or after `at`, in whole chunks.
fn next_data(disk: &File, at: u64, size: u64) -> Result<Option<(u64, u64)>, Error> {
    let failed = |errno: Errno| Error::read(errno.into());
    if at >= size {
        return Ok(None);
    }
    let data = match rustix::fs::seek(disk, SeekFrom::Data(at)) {
        Ok(data) if data < size => data,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    let hole = rustix::fs::seek(disk, SeekFrom::Hole(data)).map_err(failed)?;
    let from = data - data % CHUNK;
    Ok(Some((from.max(at), hole.next_multiple_of(CHUNK).min(size))))
}
