//! Waits until a file or directory changes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// An inotify instance with one watch. Needs a tokio runtime with I/O.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    pub(crate) fn new(path: &Path, what: WatchFlags) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&inotify, path, what)?;
        Ok(Self {
            inotify: sys::readable(inotify)?,
        })
    }

    /// Resolves when something has happened since it was made or last asked. Dropping the future loses nothing.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
            match rustix::io::read(self.inotify.get_ref(), &mut buffer) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
