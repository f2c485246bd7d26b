//! Exports in a directory of the host, which may be a mount of something else. Whoever else writes there can at most
//! spoil exports: no link is followed, and nothing outside of it is touched.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::blocking;
use super::objects::{Key, Objects};
use crate::{Error, Kind};

/// Directory, below the id of whoever writes, of what is not whole yet.
const PARTIAL: &str = "partial";

/// A directory with exports.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
    writer: String,
}

impl Directory {
    /// The directory at `path`, which may come to be there later. `writer` is the name of something that only one server
    /// at a time is, and that can be a file's.
    pub fn new(path: PathBuf, writer: &str) -> Directory {
        Directory {
            path,
            writer: writer.to_owned(),
        }
    }

    /// Removes what a writer of this name had not finished when it ended. Only while there is none.
    ///
    /// # Errors
    /// Something is there that cannot be removed; not that the directory is not there.
    pub fn sweep(&self) -> Result<(), Error> {
        let swept = || -> Result<(), Errno> {
            let partial = walk(&self.root()?, &[&self.writer, PARTIAL])?;
            for entry in Dir::read_from(&partial)? {
                let name = entry?.file_name().to_owned();
                if ![c".", c".."].contains(&name.as_c_str()) {
                    rustix::fs::unlinkat(&partial, &name, AtFlags::empty())?;
                }
            }
            Ok(())
        };
        match swept() {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io("remove unfinished exports in", &self.path)(
                errno.into(),
            )),
        }
    }

    fn root(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &self.path, flags, Mode::empty())
    }

    fn has_now(&self, key: &Key) -> Result<bool, Errno> {
        let parents: Vec<_> = key.parents().collect();
        let found = walk(&self.root()?, &parents).and_then(|parent| is_file(&parent, key.name()));
        match found {
            Err(Errno::NOENT) => Ok(false),
            found => found,
        }
    }

    fn get_now(&self, key: &Key, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let parents: Vec<_> = key.parents().collect();
        let parent = walk(&self.root()?, &parents)?;
        // Without waiting: what stands there may be anything.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(
            &parent,
            key.name(),
            flags,
            Mode::empty(),
        )?);
        if !file.metadata()?.is_file() {
            return Err(Errno::ACCESS.into());
        }
        let mut bytes = Vec::new();
        let more = limit as u64 + 1;
        file.take(more).read_to_end(&mut bytes)?;
        Ok((bytes.len() <= limit).then_some(bytes))
    }

    fn add_now(&self, key: &Key, bytes: &[u8]) -> io::Result<bool> {
        let root = self.root()?;
        let parents: Vec<_> = key.parents().collect();
        let parent = make_all(&root, &parents)?;
        let partial = make_all(&root, &[&self.writer, PARTIAL])?;
        let name = CString::new(format!("{:032x}", random()?)).expect("digits have no zero byte");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&partial, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(file);
        // A link, as opposed to a rename, replaces nothing on any file system.
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let linked = written.and_then(|()| {
            match rustix::fs::linkat(&partial, &name, &parent, key.name(), AtFlags::empty()) {
                Ok(()) => Ok(true),
                Err(Errno::EXIST) => Ok(false),
                Err(errno) => Err(errno.into()),
            }
        });
        rustix::fs::unlinkat(&partial, &name, AtFlags::empty())?;
        let added = linked?;
        rustix::fs::fsync(&parent)?;
        Ok(added)
    }

    fn error(&self, action: &'static str, key: &Key) -> impl FnOnce(io::Error) -> Error {
        let path = self.path.join(key.to_string());
        move |source| Error::io(action, &path)(source)
    }
}

#[async_trait]
impl Objects for Directory {
    async fn has(&self, key: &Key) -> Result<bool, Error> {
        let (this, key) = (self.clone(), key.clone());
        blocking(move || {
            let found = this.has_now(&key).map_err(io::Error::from);
            found.map_err(this.error("look for", &key))
        })
        .await
    }

    async fn get(&self, key: &Key, limit: usize) -> Result<Vec<u8>, Error> {
        let (this, key) = (self.clone(), key.clone());
        blocking(move || {
            let found = this.get_now(&key, limit);
            let found = found.map_err(this.error("read", &key))?;
            found.ok_or_else(|| Error::Object {
                key: key.to_string(),
                kind: Kind::Invalid,
                problem: format!("is larger than {limit} bytes"),
            })
        })
        .await
    }

    async fn add(&self, key: &Key, bytes: Bytes) -> Result<bool, Error> {
        let (this, key) = (self.clone(), key.clone());
        blocking(move || {
            let added = this.add_now(&key, &bytes);
            added.map_err(this.error("write", &key))
        })
        .await
    }
}

fn random() -> io::Result<u128> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}

fn is_file(dir: &OwnedFd, name: &str) -> Result<bool, Errno> {
    let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => Ok(true),
        // Not ours, and in the way.
        _ => Err(Errno::EXIST),
    }
}

fn open_dir(dir: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// The directory at the end of `names`, each in the one before.
fn walk(root: &OwnedFd, names: &[&str]) -> Result<OwnedFd, Errno> {
    let mut dir = root.try_clone().map_err(|_| Errno::MFILE)?;
    for name in names {
        dir = open_dir(&dir, name)?;
    }
    Ok(dir)
}

/// The same, and makes those that are not there, for good.
fn make_all(root: &OwnedFd, names: &[&str]) -> Result<OwnedFd, Errno> {
    let mut dir = root.try_clone().map_err(|_| Errno::MFILE)?;
    for name in names {
        match rustix::fs::mkdirat(&dir, *name, Mode::RWXU) {
            Ok(()) => rustix::fs::fsync(&dir)?,
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        dir = open_dir(&dir, name)?;
    }
    Ok(dir)
}
