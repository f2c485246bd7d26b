//! Reading a file in pieces, each as the host asks for it, so that a slow host holds neither memory nor a thread.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use futures::stream;
use hutch_guest::{limits, pb};
use rustix::fs::{FileType, Mode, OFlags};
use tonic::Status;

use super::{blocking, failed, info};

/// Bytes fetched by one visit to the blocking pool.
const FETCH: usize = 8 * limits::CHUNK;

/// `SYSFS_MAGIC` of the kernel.
const SYSFS: rustix::fs::FsWord = 0x6265_6572;

/// An open file with what of it was asked for.
pub struct Reading {
    path: PathBuf,
    file: File,
    left: u64,
    fetched: Bytes,
    info: Option<pb::FileInfo>,
}

impl Reading {
    /// Opens a regular file; anything else could block or never end.
    ///
    /// # Errors
    /// The kernel's, and `FailedPrecondition` for what is no regular file.
    pub fn open(path: PathBuf, offset: u64, length: u64) -> Result<Self, Status> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("open", &path))?;
        let mut stat = rustix::fs::fstat(&fd).map_err(failed("stat", &path))?;
        // What is there says a page, and has less: the host is told nothing, as with those of /proc.
        if rustix::fs::fstatfs(&fd).is_ok_and(|place| place.f_type == SYSFS) {
            stat.st_size = 0;
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(refuse(&path, "is a directory")),
            _ => return Err(refuse(&path, "is not a regular file")),
        }
        let mut file = File::from(fd);
        if i64::try_from(offset).is_err() {
            return Err(Status::invalid_argument("no file has so many bytes"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut left = if length == 0 { u64::MAX } else { length };
        if size > 0 && offset >= size {
            // Some file systems refuse to go there.
            left = 0;
        } else if offset > 0 {
            file.seek(SeekFrom::Start(offset))
                .map_err(failed("seek in", &path))?;
        }
        let name = path.file_name().map(std::os::unix::ffi::OsStrExt::as_bytes);
        let info = info(name.unwrap_or_default(), &stat, None);
        Ok(Self {
            path,
            file,
            left,
            fetched: Bytes::new(),
            info: Some(info),
        })
    }

    /// The messages of the reply. An empty file has one, with its description.
    pub fn stream(self) -> impl Stream<Item = Result<pb::FileData, Status>> + Send {
        stream::unfold(Some(self), |reading| async {
            let mut reading = reading?;
            if reading.fetched.is_empty() {
                reading = match blocking(move || reading.fetch()).await {
                    Ok(reading) => reading,
                    Err(status) => return Some((Err(status), None)),
                };
            }
            let size = reading.fetched.len().min(limits::CHUNK);
            let data = reading.fetched.split_to(size);
            let info = reading.info.take();
            if data.is_empty() && info.is_none() {
                return None;
            }
            Some((Ok(pb::FileData { data, info }), Some(reading)))
        })
    }

    fn fetch(mut self) -> Result<Self, Status> {
        if self.left == 0 {
            return Ok(self);
        }
        let size = usize::try_from(self.left).unwrap_or(FETCH).min(FETCH);
        let mut buffer = Vec::with_capacity(size);
        let read = rustix::io::retry_on_intr(|| {
            rustix::io::read(&self.file, rustix::buffer::spare_capacity(&mut buffer))
        });
        read.map_err(failed("read", &self.path))?;
        // A vector may have more room than was asked for.
        buffer.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= buffer.len() as u64;
        self.fetched = buffer.into();
        Ok(self)
    }
}

/// `path: reason`
pub fn refuse(path: &Path, reason: &str) -> Status {
    Status::failed_precondition(format!("{}: {reason}", path.display()))
}
