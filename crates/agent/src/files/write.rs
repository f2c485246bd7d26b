//! Writing a file: into a temporary one beside it, put in place by rename only when all of it has arrived. Adding to a
//! file is the exception: what has arrived is in it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use hutch_guest::pb::{self, write_file_chunk::Part};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use tonic::{Status, Streaming};

use super::read::refuse;
use super::{beside, blocking, failed, make_parents, through_links};
use crate::accounts;

/// Bytes collected before a visit to the blocking pool. So much is added to a file at once or not at all.
const COLLECT: usize = 256 * 1024;

/// A file that is being written. Dropped before [`Writing::finish`], it leaves nothing behind.
struct Writing {
    path: PathBuf,
    temporary: Option<PathBuf>,
    file: File,
    mode: u32,
    owner: Option<accounts::Account>,
    written: u64,
    declared: Option<u64>,
}

/// Takes the rest of a stream whose first message was `open`, for a file at `path`.
///
/// # Errors
/// A stream that breaks off, has another size than declared, or the kernel's. The old file is untouched then.
pub async fn receive(
    path: PathBuf,
    open: pb::WriteFileOpen,
    mut stream: Streaming<pb::WriteFileChunk>,
) -> Result<u64, Status> {
    let mut writing = blocking(move || Writing::begin(path, &open)).await?;
    let mut collected = BytesMut::new();
    while let Some(message) = stream.message().await? {
        match message.part {
            Some(Part::Data(data)) => collected.extend_from_slice(&data),
            Some(Part::Open(_)) => return Err(Status::invalid_argument("a second open message")),
            None => {}
        }
        writing.check(collected.len())?;
        if collected.len() >= COLLECT {
            let data = collected.split();
            writing = blocking(move || writing.append(&data)).await?;
        }
    }
    writing.check_end(collected.len())?;
    blocking(move || writing.append(&collected)?.finish()).await
}

impl Writing {
    fn begin(path: PathBuf, open: &pb::WriteFileOpen) -> Result<Self, Status> {
        if path.file_name().is_none() {
            return Err(refuse(&path, "is a directory"));
        }
        let owner = match open.owner.as_str() {
            "" => None,
            owner => Some(accounts::find(owner)?),
        };
        if open.append {
            return Self::begin_appending(&path, open, owner);
        }
        let path = through_links(path);
        if let (true, Some(parent)) = (open.make_parents, path.parent()) {
            make_parents(parent)?;
        }
        let old = match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => return Err(refuse(&path, "is a directory")),
            Ok(meta) if !meta.is_file() && !meta.is_symlink() => {
                return Err(refuse(&path, "is not a regular file"));
            }
            Ok(meta) if meta.is_file() => Some(std::os::unix::fs::MetadataExt::mode(&meta)),
            _ => None,
        };
        let mode = match open.mode {
            0 => old.unwrap_or(0o644) & 0o7777,
            mode => mode & 0o7777,
        };
        let temporary = beside(&path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&temporary, flags, Mode::from_raw_mode(0o600));
        let fd = fd.map_err(|errno: Errno| failed("write", &path)(errno))?;
        Ok(Self {
            path,
            temporary: Some(temporary),
            file: fd.into(),
            mode,
            owner,
            written: 0,
            declared: open.size,
        })
    }

    /// Opens a file to add to it, or makes it.
    fn begin_appending(
        path: &Path,
        open: &pb::WriteFileOpen,
        owner: Option<accounts::Account>,
    ) -> Result<Self, Status> {
        if let (true, Some(parent)) = (open.make_parents, path.parent()) {
            make_parents(parent)?;
        }
        let failed = failed("write", path);
        let mode = match open.mode {
            0 => 0o644,
            mode => mode & 0o7777,
        };
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CLOEXEC;
        let there = || {
            let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
            rustix::fs::open(path, flags, Mode::empty())
        };
        let (fd, is_new) = match there() {
            Err(Errno::NOENT) => {
                let flags = flags | OFlags::CREATE | OFlags::EXCL;
                match rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)) {
                    // Somebody else was faster, or it is a link to nowhere.
                    Err(Errno::EXIST) => (there().map_err(&failed)?, false),
                    made => (made.map_err(&failed)?, true),
                }
            }
            // Nobody reads that pipe.
            Err(Errno::NXIO) => return Err(refuse(path, "is not a regular file")),
            opened => (opened.map_err(&failed)?, false),
        };
        let stat = rustix::fs::fstat(&fd).map_err(&failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refuse(path, "is not a regular file"));
        }
        let writing = Self {
            path: path.to_owned(),
            temporary: None,
            file: fd.into(),
            mode,
            owner,
            written: 0,
            declared: open.size,
        };
        if is_new {
            writing.set_attributes()?;
        }
        Ok(writing)
    }

    fn set_attributes(&self) -> Result<(), Status> {
        let failed = failed("write", &self.path);
        if let Some(owner) = &self.owner {
            let identity = &owner.identity;
            rustix::fs::fchown(&self.file, Some(identity.uid), Some(identity.gid))
                .map_err(&failed)?;
        }
        // After the change of owner, which clears the set-user-id bits.
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(self.mode)).map_err(failed)
    }

    /// Refuses more than was declared as soon as it comes.
    fn check(&self, pending: usize) -> Result<(), Status> {
        let size = self.written + pending as u64;
        match self.declared {
            Some(declared) if size > declared => Err(Status::invalid_argument(format!(
                "{}: more than the {declared} bytes that were declared",
                self.path.display(),
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses fewer than were declared.
    fn check_end(&self, pending: usize) -> Result<(), Status> {
        let size = self.written + pending as u64;
        match self.declared {
            Some(declared) if size != declared => Err(Status::invalid_argument(format!(
                "{}: {size} bytes came, {declared} were declared",
                self.path.display(),
            ))),
            _ => Ok(()),
        }
    }

    fn append(mut self, data: &[u8]) -> Result<Self, Status> {
        self.file
            .write_all(data)
            .map_err(failed("write", &self.path))?;
        self.written += data.len() as u64;
        Ok(self)
    }

    fn finish(mut self) -> Result<u64, Status> {
        if self.temporary.is_some() {
            self.set_attributes()?;
        }
        let failed = failed("write", &self.path);
        self.file.sync_all().map_err(&failed)?;
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, &self.path).map_err(failed)?;
        }
        self.temporary = None;
        Ok(self.written)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}
