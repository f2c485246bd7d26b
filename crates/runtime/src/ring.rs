//! Files that keep the last bytes of an endless output, written by one process and read by others at the same time.
//!
//! ```text
//! 0     magic, 8 bytes
//! 8     capacity, u64          most bytes a reader can rely on
//! 16    total, u64             bytes ever appended: the sequence number of the next one
//! 24    !total, u64            differs from the complement while `total` is being written
//! 4096  data, capacity + SLACK bytes; byte n stands at 4096 + n mod (capacity + SLACK)
//! ```
//! All numbers are little endian. A ring goes on across runs of a machine: the count never goes back.
//!
//! The writer puts the data before the header; a reader takes the header, the data and the header again, and drops what
//! may have been overwritten meanwhile. One append is at most [`SLACK`] bytes, so an append that is under way spoils
//! nothing that the last header promised. This assumes of the kernel that a `pread` which begins after a `pwrite` of
//! another process has ended sees it (Linux's page cache does), not that either is atomic. After a crash of the host
//! the file may hold old or zero bytes where the newest should be, never a wrong length.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::WatchFlags;

use crate::watch::Watch;

const MAGIC: &[u8; 8] = b"hutchrng";
const DATA: u64 = 4096;
/// Bytes by which the file is larger than what it promises: the most that one append writes.
const SLACK: u64 = 64 * 1024;
/// Followers look this often when the host has no inotify instance left for them.
const WITHOUT_EVENTS: Duration = Duration::from_millis(250);

/// The only writer of a ring.
#[derive(Debug)]
pub(crate) struct RingWriter {
    file: File,
    capacity: u64,
    total: u64,
}

impl RingWriter {
    /// Opens a ring and goes on where it ended. One that is missing or damaged is begun; the capacity of one that
    /// exists stays.
    pub(crate) fn open(path: &Path, capacity: u64) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        if let Some(header) = Header::read(&file)? {
            return Ok(Self {
                file,
                capacity: header.capacity,
                total: header.total,
            });
        }
        file.set_len(0)?;
        let ring = Self {
            file,
            capacity: capacity.max(1),
            total: 0,
        };
        // All of it at once, as a hole: a reader never meets the end of the file.
        ring.file.set_len(DATA + ring.capacity + SLACK)?;
        ring.write_total()?;
        let mut start = [0; 16];
        start[..8].copy_from_slice(MAGIC);
        start[8..].copy_from_slice(&ring.capacity.to_le_bytes());
        ring.file.write_all_at(&start, 0)?;
        Ok(ring)
    }

    /// The sequence number of the next byte.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Adds bytes. After an error some of them may be missing; the ring stays whole.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let size = self.capacity + SLACK;
        for piece in bytes.chunks(SLACK as usize) {
            let at = self.total % size;
            let to_end = usize::try_from(size - at).unwrap_or(usize::MAX);
            let (first, wrapped) = piece.split_at(piece.len().min(to_end));
            self.file.write_all_at(first, DATA + at)?;
            self.file.write_all_at(wrapped, DATA)?;
            self.total += piece.len() as u64;
            self.write_total()?;
        }
        Ok(())
    }

    fn write_total(&self) -> io::Result<()> {
        let mut both = [0; 16];
        both[..8].copy_from_slice(&self.total.to_le_bytes());
        both[8..].copy_from_slice(&(!self.total).to_le_bytes());
        self.file.write_all_at(&both, 16)
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    capacity: u64,
    total: u64,
}

impl Header {
    /// `None` for what is no ring.
    fn read(file: &File) -> io::Result<Option<Self>> {
        // The writer is between two stores for an instant only: a header torn for longer is damaged.
        for _ in 0..1000 {
            let mut bytes = [0; 32];
            match file.read_exact_at(&mut bytes, 0) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                other => other?,
            }
            let number = |at: usize| {
                let field = bytes[at..at + 8].try_into().expect("eight bytes");
                u64::from_le_bytes(field)
            };
            let (capacity, total) = (number(8), number(16));
            let size = capacity.checked_add(DATA + SLACK);
            if &bytes[..8] != MAGIC || capacity == 0 || size != Some(file.metadata()?.len()) {
                return Ok(None);
            }
            if number(24) == !total {
                return Ok(Some(Self { capacity, total }));
            }
            std::thread::yield_now();
        }
        Ok(None)
    }
}

/// Bytes of a ring.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Sequence number of the first byte.
    pub first: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Bytes between those asked for and these that are gone.
    pub dropped: u64,
}

impl Piece {
    /// The sequence number to ask for next.
    pub fn next(&self) -> u64 {
        self.first + self.bytes.len() as u64
    }
}

/// Reads a ring while another process writes it.
#[derive(Debug)]
pub struct RingReader {
    file: File,
}

impl RingReader {
    /// Opens a ring.
    ///
    /// # Errors
    /// Those of opening a file. A file that is no ring (yet) reads as empty.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        Ok(Self { file })
    }

    /// The sequence number that the next byte will have.
    ///
    /// # Errors
    /// Those of reading a file.
    pub fn end(&self) -> io::Result<u64> {
        Ok(Header::read(&self.file)?.map_or(0, |header| header.total))
    }

    /// At most `limit` bytes from the sequence number `from` on, or from the oldest byte that is still there.
    /// Nothing when `from` is at the end or beyond it.
    ///
    /// # Errors
    /// Those of reading a file.
    pub fn read_from(&self, from: u64, limit: usize) -> io::Result<Piece> {
        let nothing = Piece {
            first: from,
            ..Piece::default()
        };
        let Some(before) = Header::read(&self.file)? else {
            return Ok(nothing);
        };
        let first = from.max(before.total.saturating_sub(before.capacity));
        let Some(length) = before.total.checked_sub(first) else {
            return Ok(nothing);
        };
        let mut bytes = self.bytes(first, length.min(limit as u64) as usize, before)?;
        let after = Header::read(&self.file)?.unwrap_or(before);
        let oldest = after.total.saturating_sub(after.capacity);
        let spoiled = oldest.saturating_sub(first).min(bytes.len() as u64);
        bytes.drain(..spoiled as usize);
        let first = first + spoiled;
        Ok(Piece {
            first,
            dropped: first - from,
            bytes,
        })
    }

    /// The last bytes, at most `limit`, of those from the sequence number `from` on.
    ///
    /// # Errors
    /// Those of reading a file.
    pub fn tail(&self, from: u64, limit: usize) -> io::Result<Vec<u8>> {
        let start = self.end()?.saturating_sub(limit as u64).max(from);
        Ok(self.read_from(start, limit)?.bytes)
    }

    fn bytes(&self, first: u64, length: usize, header: Header) -> io::Result<Vec<u8>> {
        let size = header.capacity + SLACK;
        let at = first % size;
        let mut bytes = vec![0; length];
        let to_end = usize::try_from(size - at).unwrap_or(usize::MAX);
        let (head, wrapped) = bytes.split_at_mut(length.min(to_end));
        self.file.read_exact_at(head, DATA + at)?;
        self.file.read_exact_at(wrapped, DATA)?;
        Ok(bytes)
    }
}

/// Reads a ring as it grows.
#[derive(Debug)]
pub struct Follower {
    reader: RingReader,
    watch: Option<Watch>,
    next: u64,
}

impl Follower {
    /// Follows a ring from the sequence number `from` on.
    ///
    /// # Errors
    /// Those of opening a file.
    pub fn open(path: impl Into<PathBuf>, from: u64) -> io::Result<Self> {
        let path = path.into();
        // The watch first, so that nothing is missed between the first look and it. The number of watches is limited
        // for each user; a follower that gets none looks again and again.
        let watch = Watch::new(&path, WatchFlags::MODIFY).ok();
        Ok(Self {
            reader: RingReader::open(&path)?,
            watch,
            next: from,
        })
    }

    /// The next bytes, at most `limit`, as soon as there are any. Dropping the future loses nothing.
    ///
    /// # Errors
    /// Those of reading a file.
    pub async fn next(&mut self, limit: usize) -> io::Result<Piece> {
        loop {
            let piece = self.reader.read_from(self.next, limit)?;
            if !piece.bytes.is_empty() {
                self.next = piece.next();
                return Ok(piece);
            }
            match &mut self.watch {
                Some(watch) => watch.changed().await?,
                None => tokio::time::sleep(WITHOUT_EVENTS).await,
            }
        }
    }
}

#[cfg(test)]
mod tests;
