//! Files in machines. Paths are the guest's and resolved there; the host only passes bytes on.

mod tree;

pub use tree::{ChangeFile, ListFiles};

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use hutch_contract::file::{FileInfo, FileKind, Written};
use hutch_guest::session;
use hutch_runtime::MachineDir;
use hutch_runtime::ring::{Follower, RingReader};
use tokio::time::sleep;

use crate::access::{self, Access};
use crate::drive::blocking;
use crate::exec::ready;
use crate::lifetime::Used;
use crate::{Engine, Error, Principal, prepare};

/// Longest path in bytes, as Linux has it (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Bytes of console output read at a time.
const LOG_PIECE: usize = 32 * 1024;
/// Between two looks for a console that is not there yet.
const LOG_AGAIN: Duration = Duration::from_millis(100);

/// A file that is being read.
pub struct FileBytes {
    /// What it is.
    pub info: FileInfo,
    /// Its content.
    pub bytes: BoxStream<'static, Result<Bytes, Error>>,
}

/// Where and how a file is to be written.
#[derive(Debug, Clone, Default)]
pub struct WriteFile {
    /// Path in the machine.
    pub path: String,
    /// Permission bits; those of the file it replaces, else 0644, when absent.
    pub mode: Option<u32>,
    /// Owner, or `owner:group`; root when absent.
    pub owner: Option<String>,
    /// Make the directories that are missing.
    pub make_parents: bool,
    /// Bytes to come, when known: then a file that ends early is not put in place.
    pub size: Option<u64>,
    /// Add to the file that is there: then what has arrived is in it.
    pub append: bool,
}

impl Engine {
    /// Reads a file, or `length` bytes of it from `offset` on.
    ///
    /// # Errors
    /// What the guest says of the path; that the machine does not run.
    pub async fn read_file(
        &self,
        who: &Principal,
        reference: &str,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<FileBytes, Error> {
        let session = self.files_of(who, Access::Read, reference, path).await?;
        let (found, bytes) = session.read_file(path, offset, length.unwrap_or(0)).await?;
        Ok(FileBytes {
            info: info(found),
            bytes: session.with(bytes.map_err(Error::from).boxed()).boxed(),
        })
    }

    /// Writes a file from `bytes`; it appears in its place when all of them have arrived, unless they are added to it.
    ///
    /// # Errors
    /// What the guest says of the path; that the machine does not run; that the upload broke off.
    pub async fn write_file(
        &self,
        who: &Principal,
        reference: &str,
        file: WriteFile,
        bytes: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<Written, Error> {
        let session = self
            .files_of(who, Access::Write, reference, &file.path)
            .await?;
        let open = session::WriteFile {
            path: file.path,
            mode: file.mode.unwrap_or(0),
            owner: file.owner.unwrap_or_default(),
            make_parents: file.make_parents,
            size: file.size,
            append: file.append,
        };
        let size_bytes = session.write_file(&open, bytes).await?;
        Ok(Written { size_bytes })
    }

    /// Describes what a path names; a link itself, not what it points to.
    ///
    /// # Errors
    /// What the guest says of the path; that the machine does not run.
    pub async fn stat_file(
        &self,
        who: &Principal,
        reference: &str,
        path: &str,
    ) -> Result<FileInfo, Error> {
        let session = self.files_of(who, Access::Read, reference, path).await?;
        Ok(info(session.stat(path, false).await?))
    }

    /// Removes a file, or a directory with all in it.
    ///
    /// # Errors
    /// What the guest says of the path; that the machine does not run.
    pub async fn remove_file(
        &self,
        who: &Principal,
        reference: &str,
        path: &str,
        recursive: bool,
    ) -> Result<(), Error> {
        let session = self.files_of(who, Access::Write, reference, path).await?;
        Ok(session.remove(path, recursive).await?)
    }

    /// Makes a directory; 0755 where no mode is given.
    ///
    /// # Errors
    /// What the guest says of the path; that the machine does not run.
    pub async fn make_dir(
        &self,
        who: &Principal,
        reference: &str,
        path: &str,
        mode: Option<u32>,
        parents: bool,
    ) -> Result<(), Error> {
        let session = self.files_of(who, Access::Write, reference, path).await?;
        let mode = mode.unwrap_or(0o755);
        Ok(session.make_dir(path, mode, parents).await?)
    }

    async fn files_of(
        &self,
        who: &Principal,
        access: Access,
        reference: &str,
        path: &str,
    ) -> Result<Used<session::Session>, Error> {
        access::check(who, access)?;
        check_path("path", path)?;
        let machine = self.find_machine(who, reference)?;
        ready(&machine, "reach its files").await
    }

    /// What the machine's serial console has said, from byte `from` of its life on; what is older than the ring is
    /// left out. `follow`: go on until the machine is gone.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn logs(
        &self,
        who: &Principal,
        reference: &str,
        from: u64,
        follow: bool,
    ) -> Result<BoxStream<'static, Result<Bytes, Error>>, Error> {
        access::check(who, Access::Read)?;
        let machine = self.find_machine(who, reference)?;
        let dir = MachineDir::new(self.shared.machine_dir(&machine.cell.id));
        let path = dir.console();
        if !follow {
            let now = blocking("read the console", move || all_output(&path, from)).await?;
            return Ok(futures::stream::once(async move { Ok(now) }).boxed());
        }
        let mut records = machine.cell.watch();
        let gone = async move { drop(records.wait_for(Option::is_none).await) };
        let lines = futures::stream::unfold(None, move |follower: Option<Follower>| {
            let path = path.clone();
            async move {
                let next = async {
                    let mut follower = match follower {
                        Some(follower) => follower,
                        None => follow_from(&path, from).await?,
                    };
                    let piece = follower.next(LOG_PIECE).await?;
                    Ok((Bytes::from(piece.bytes), follower))
                };
                Some(match next.await {
                    Ok((bytes, follower)) => (Ok(bytes), Some(follower)),
                    Err(source) => (Err(prepare::io_error("read", &path, source)), None),
                })
            }
        });
        Ok(lines.take_until(Box::pin(gone)).boxed())
    }
}

fn check_path(field: &'static str, path: &str) -> Result<(), Error> {
    if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
        let must = format!("must have 1 to {MAX_PATH} bytes and no NUL");
        return Err(Error::invalid(field, must));
    }
    Ok(())
}

/// Follows a console that may not be there before the machine is started.
async fn follow_from(path: &Path, from: u64) -> std::io::Result<Follower> {
    loop {
        match Follower::open(path, from) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => sleep(LOG_AGAIN).await,
            opened => return opened,
        }
    }
}

/// What the ring holds from `from` on; nothing when the machine has never been started.
fn all_output(path: &Path, from: u64) -> Result<Bytes, Error> {
    match RingReader::open(path).and_then(|ring| ring.read_from(from, usize::MAX)) {
        Ok(piece) => Ok(Bytes::from(piece.bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Bytes::new()),
        Err(source) => Err(prepare::io_error("read", path, source)),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn info(found: session::FileInfo) -> FileInfo {
    FileInfo {
        name: text(&found.name),
        path: None,
        kind: match found.kind {
            session::FileKind::File => FileKind::File,
            session::FileKind::Directory => FileKind::Directory,
            session::FileKind::Symlink => FileKind::Symlink,
            session::FileKind::Other => FileKind::Other,
        },
        size_bytes: found.size,
        mode: found.mode,
        uid: found.uid,
        gid: found.gid,
        modified_at_ms: found.modified_unix_ms,
        link_target: (!found.link_target.is_empty()).then(|| text(&found.link_target)),
    }
}
