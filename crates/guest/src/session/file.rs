//! The calls about files, and the checks of what a guest says of them. Names and link targets are bytes of the guest's
//! choosing: labels, never a path on the host, and to be escaped before they are shown.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::Stream;

use super::Session;
use super::call::Incoming;
use super::upload::Upload;
use crate::error::{Error, Result};
use crate::{deadlines, limits, pb};

/// Longest name or link target, in bytes.
pub(super) const NAME: usize = 4096;
/// 9999-12-31, in milliseconds since 1970.
const LATEST: i64 = 253_402_300_799_999;
/// Most bytes read from a file that says it is empty: those of /proc do, and have content.
const SIZELESS: u64 = 64 * 1024 * 1024;

/// What a path names in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, pipe or socket.
    Other,
}

/// A file, as the guest tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// Its name without the directory, at most 4096 bytes without `/` or NUL.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: FileKind,
    /// Its size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, UTC in milliseconds since 1970, within the years 1970 to 9999.
    pub modified_unix_ms: i64,
    /// Where a link points, at most 4096 bytes; empty for anything else.
    pub link_target: Vec<u8>,
}

/// One page of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirPage {
    /// By name, ascending.
    pub entries: Vec<FileInfo>,
    /// Whether there are names after the last one.
    pub more: bool,
}

/// A file to write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteFile {
    /// Where.
    pub path: String,
    /// Permission bits; 0 for those of the file that it replaces, else 0644.
    pub mode: u32,
    /// Name or number, `user:group` allowed; empty for root.
    pub owner: String,
    /// Make the directories above it.
    pub make_parents: bool,
    /// How many bytes will come, where known. Neither more nor fewer are accepted then.
    pub size: Option<u64>,
    /// Add to the file that is there.
    pub append: bool,
}

impl Session {
    /// Reads `length` bytes of a file from `offset` on, or with `length` 0 all up to its end.
    ///
    /// The stream gives at most what was asked for and what the file's size says, and an error when the guest sends
    /// fewer. A file that claims to be empty (as those of /proc do) may give up to 64 MiB.
    pub async fn read_file(
        &self,
        path: &str,
        offset: u64,
        length: u64,
    ) -> Result<(FileInfo, FileStream)> {
        let request = pb::ReadFileRequest {
            path: path.into(),
            offset,
            length,
        };
        let mut data = self
            .streaming("ReadFile", deadlines::STREAM, |mut agent| async move {
                agent.read_file(request).await
            })
            .await?;
        let message = std::future::poll_fn(|context| data.poll_message(context));
        let first = tokio::time::timeout(deadlines::STREAM, message)
            .await
            .map_err(|_| Error::Timeout { call: "ReadFile" })?
            .ok_or_else(|| lie("an empty reply"))??;
        let info = first.info.ok_or_else(|| lie("no file information"))?;
        let info = FileInfo::check("ReadFile", info)?;
        let mut bounds = Bounds::new(info.size, offset, length);
        let first = (!first.data.is_empty())
            .then(|| bounds.check(first.data))
            .transpose()?;
        Ok((
            info,
            FileStream {
                data,
                first,
                bounds,
                done: false,
            },
        ))
    }

    /// Writes a file. It appears whole or not at all: not when `content` gives an error, nor when the future is dropped.
    /// With `append`, what has arrived by then is in it. Answers how many bytes were written.
    pub async fn write_file(
        &self,
        file: &WriteFile,
        content: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<u64> {
        use pb::write_file_chunk::Part;
        const CALL: &str = "WriteFile";
        let open = pb::WriteFileOpen {
            path: file.path.clone(),
            mode: file.mode,
            owner: file.owner.clone(),
            make_parents: file.make_parents,
            size: file.size,
            append: file.append,
        };
        if file.append {
            self.needs("WriteFile", limits::GENERATION_FILES)?;
        }
        let (upload, progress) = Upload::new(
            pb::WriteFileChunk {
                part: Some(Part::Open(open)),
            },
            content,
            |data| pb::WriteFileChunk {
                part: Some(Part::Data(data)),
            },
            None,
            file.size,
        );
        let call = async {
            let _slot = self.slot().await;
            let reply = self.client().write_file(upload).await;
            reply.map_err(|status| Error::from_status(CALL, status))
        };
        let reply = progress
            .watch(CALL, Some(deadlines::WRITE_STALL), Box::pin(call))
            .await?;
        let size = reply.into_inner().size;
        if size != progress.sent() {
            return Err(Error::Protocol {
                call: CALL,
                what: "a size other than what was sent",
            });
        }
        Ok(size)
    }

    /// What a path names; with `follow`, what a link there points to.
    pub async fn stat(&self, path: &str, follow: bool) -> Result<FileInfo> {
        let request = pb::StatRequest {
            path: path.into(),
            follow,
        };
        let info = self
            .unary("Stat", deadlines::STAT, |mut agent| async move {
                agent.stat(request).await
            })
            .await?;
        FileInfo::check("Stat", info)
    }

    /// Names of a directory after `after` (empty for the first page), at most `limit` of them and never more than 1000.
    pub async fn list_dir(&self, path: &str, after: &[u8], limit: u32) -> Result<DirPage> {
        let limit = limit.clamp(1, limits::LIST_ENTRIES);
        let after = Bytes::copy_from_slice(after);
        let request = pb::ListDirRequest {
            path: path.into(),
            after: after.clone(),
            limit,
        };
        let reply = self
            .unary("ListDir", deadlines::LIST_DIR, |mut agent| async move {
                agent.list_dir(request).await
            })
            .await?;
        page(reply, &after, limit)
    }

    /// Removes a file or an empty directory; with `recursive`, all below it as well.
    pub async fn remove(&self, path: &str, recursive: bool) -> Result<()> {
        let request = pb::RemoveRequest {
            path: path.into(),
            recursive,
        };
        self.unary("Remove", deadlines::REMOVE, |mut agent| async move {
            agent.remove(request).await
        })
        .await
        .map(drop)
    }

    /// Makes a directory, with `parents` those above it as well.
    pub async fn make_dir(&self, path: &str, mode: u32, parents: bool) -> Result<()> {
        let request = pb::MakeDirRequest {
            path: path.into(),
            mode,
            parents,
        };
        self.unary("MakeDir", deadlines::MAKE_DIR, |mut agent| async move {
            agent.make_dir(request).await
        })
        .await
        .map(drop)
    }
}

impl FileInfo {
    pub(super) fn check(call: &'static str, info: pb::FileInfo) -> Result<Self> {
        let named = info.name.len() <= NAME && !info.name.iter().any(|byte| b"/\0".contains(byte));
        if !named || info.link_target.len() > NAME {
            return Err(Error::Protocol {
                call,
                what: "an impossible file name",
            });
        }
        let kind = match pb::file_info::Kind::try_from(info.kind) {
            Ok(pb::file_info::Kind::File) => FileKind::File,
            Ok(pb::file_info::Kind::Directory) => FileKind::Directory,
            Ok(pb::file_info::Kind::Symlink) => FileKind::Symlink,
            Ok(pb::file_info::Kind::Other) | Err(_) => FileKind::Other,
        };
        Ok(Self {
            name: info.name.into(),
            kind,
            size: info.size,
            mode: info.mode & 0o7777,
            uid: info.uid,
            gid: info.gid,
            modified_unix_ms: sane_time(info.modified_unix_ms),
            link_target: info.link_target.into(),
        })
    }
}

/// A guest's time of day, cut to what everybody can print.
pub(super) fn sane_time(unix_ms: i64) -> i64 {
    unix_ms.clamp(0, LATEST)
}

fn page(reply: pb::ListDirReply, after: &[u8], limit: u32) -> Result<DirPage> {
    let lie = |what| Error::Protocol {
        call: "ListDir",
        what,
    };
    if reply.entries.len() > limit as usize {
        return Err(lie("more names than asked for"));
    }
    if reply.more && reply.entries.is_empty() {
        return Err(lie("an empty page before the last"));
    }
    let check = |info| FileInfo::check("ListDir", info);
    let entries = reply
        .entries
        .into_iter()
        .map(check)
        .collect::<Result<Vec<_>>>()?;
    // Without this a guest could keep us paging for ever.
    let names = entries.iter().map(|entry| &entry.name[..]);
    let ascending = std::iter::once(after)
        .chain(names.clone())
        .zip(names)
        .all(|(a, b)| a < b);
    if !ascending
        || entries
            .iter()
            .any(|entry| matches!(&entry.name[..], b"." | b".."))
    {
        return Err(lie("names out of order"));
    }
    Ok(DirPage {
        entries,
        more: reply.more,
    })
}

/// A file's content. After an error nothing follows.
pub struct FileStream {
    data: Incoming<pb::FileData>,
    first: Option<Bytes>,
    bounds: Bounds,
    done: bool,
}

impl Stream for FileStream {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if self.done {
            return Poll::Ready(None);
        }
        let item = match ready!(self.data.poll_message(context)) {
            Some(Ok(message)) if message.info.is_some() => Some(Err(lie("information twice"))),
            Some(Ok(message)) => Some(self.bounds.check(message.data)),
            Some(Err(error)) => Some(Err(error)),
            None => self.bounds.check_end().err().map(Err),
        };
        self.done = !matches!(item, Some(Ok(_)));
        Poll::Ready(item)
    }
}

/// How many bytes may and must still come.
struct Bounds {
    most: u64,
    least: u64,
}

impl Bounds {
    fn new(size: u64, offset: u64, length: u64) -> Self {
        let asked = if length == 0 { u64::MAX } else { length };
        let declared = size.saturating_sub(offset);
        let possible = if size == 0 { SIZELESS } else { declared };
        Self {
            most: possible.min(asked),
            least: declared.min(asked),
        }
    }

    fn check(&mut self, data: Bytes) -> Result<Bytes> {
        if data.is_empty() {
            return Err(lie("an empty piece of a file"));
        }
        let length = data.len() as u64;
        self.most = self
            .most
            .checked_sub(length)
            .ok_or_else(|| lie("more bytes than declared"))?;
        self.least = self.least.saturating_sub(length);
        Ok(data)
    }

    fn check_end(&self) -> Result<()> {
        if self.least == 0 {
            Ok(())
        } else {
            Err(lie("fewer bytes than declared"))
        }
    }
}

fn lie(what: &'static str) -> Error {
    Error::Protocol {
        call: "ReadFile",
        what,
    }
}
