//! The directory of a machine: which file has which name, and how its sockets are reached. What is in the files is
//! decided elsewhere.
//!
//! ```text
//! disk.raw kernel initramfs modules.img   put there before a start (modules.img may be missing)
//! console.log vmm.log                     rings: what the guest and the VMM said (ring.rs)
//! run/                                    0700; of the present or last run
//!   lock        held by the shim for as long as it lives
//!   launch.json what the shim is to do
//!   shim.json   who runs                  written once the VMM is there
//!   exit.json   how the VMM ended
//!   killed      we wanted it to end
//!   events.log  ring: what the VMM's event monitor said
//!   agent.sock qmp.sock api.sock
//!   vmm/        the VMM's own: sockets that it makes itself
//!   container.json console.at console.lock  of a container: its run, how far its output is copied, by whom
//! workspace/                              a container's: /workspace in it
//! ```

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::net::UnixStream;

use crate::Error;

/// The directory of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineDir {
    path: PathBuf,
}

impl MachineDir {
    /// The root disk.
    pub const DISK: &'static str = "disk.raw";
    /// The guest's kernel.
    pub const KERNEL: &'static str = "kernel";
    /// The initramfs with the agent.
    pub const INITRAMFS: &'static str = "initramfs";
    /// The read-only disk of kernel modules; may be missing.
    pub const MODULES: &'static str = "modules.img";
    /// What the guest's console printed, a [ring](crate::ring).
    pub const CONSOLE: &'static str = "console.log";
    /// What the VMM itself printed, a [ring](crate::ring).
    pub const VMM_LOG: &'static str = "vmm.log";

    pub(crate) const RUN: &'static str = "run";
    pub(crate) const LOCK: &'static str = "run/lock";
    pub(crate) const LAUNCH: &'static str = "run/launch.json";
    pub(crate) const SHIM: &'static str = "run/shim.json";
    pub(crate) const EXIT: &'static str = "run/exit.json";
    pub(crate) const KILLED: &'static str = "run/killed";
    pub(crate) const EVENTS: &'static str = "run/events.log";
    /// Belongs to the VMM's user: nothing in it is believed to be what it was.
    pub(crate) const VMM: &'static str = "run/vmm";
    pub(crate) const CONTAINER: &'static str = "run/container.json";
    pub(crate) const CONSOLE_AT: &'static str = "run/console.at";
    pub(crate) const CONSOLE_LOCK: &'static str = "run/console.lock";
    pub(crate) const WORKSPACE: &'static str = "workspace";
    pub(crate) const AGENT_SOCKET: &'static str = "run/agent.sock";
    pub(crate) const MONITOR_SOCKET: &'static str = "run/qmp.sock";

    /// Names a directory, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it, by one of the names above.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.file(Self::CONSOLE)
    }

    /// The VMM's own words.
    pub fn vmm_log(&self) -> PathBuf {
        self.file(Self::VMM_LOG)
    }

    /// Connects to one of its sockets that is where only we can put something.
    ///
    /// The address of a unix socket has room for 108 bytes, so it is named through a descriptor of the directory.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when nothing listens.
    pub(crate) async fn connect(&self, socket: &str) -> Result<UnixStream, Error> {
        let dir = self.open()?;
        let address = format!("/proc/self/fd/{}/{socket}", dir.as_raw_fd());
        let connected = UnixStream::connect(address).await;
        connected.map_err(|source| self.unconnected(socket, source))
    }

    /// Connects to a socket in `own`, a directory that belongs to the VMM's user and has no links on its way. A VMM
    /// that was taken over can put anything there: what is connected to is a socket of that very user, not where a
    /// link points.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when nothing listens, [`Error::Monitor`] when it is something else.
    pub(crate) async fn connect_in(&self, own: &str, socket: &str) -> Result<UnixStream, Error> {
        let open = |dir: &OwnedFd, name: &str| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let fd = rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve)?;
            let stat = rustix::fs::fstat(&fd)?;
            Ok((fd, stat))
        };
        let found = open(&self.open()?, own).and_then(|(dir, owner)| {
            let (socket, stat) = open(&dir, socket)?;
            let is_its = stat.st_uid == owner.st_uid
                && FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
            if is_its { Ok(socket) } else { Err(Errno::LOOP) }
        });
        let found = match found {
            Ok(found) => found,
            Err(Errno::LOOP) => {
                return Err(Error::Monitor {
                    command: "connect",
                    answer: format!("{own}/{socket} is no socket of the VMM's user"),
                });
            }
            Err(error) => return Err(self.unconnected(socket, error.into())),
        };
        let address = format!("/proc/self/fd/{}", found.as_raw_fd());
        let connected = UnixStream::connect(address).await;
        connected.map_err(|source| self.unconnected(socket, source))
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.path, flags, Mode::empty());
        dir.map_err(|error| Error::io("open", &self.path)(error.into()))
    }

    fn unconnected(&self, socket: &str, source: std::io::Error) -> Error {
        match source.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => Error::NotRunning {
                dir: self.path.clone(),
            },
            _ => Error::io("connect to", self.file(socket))(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_vmm_cannot_point_us_elsewhere() {
        let files = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(files.path());
        let own = dir.file(MachineDir::VMM);
        std::fs::create_dir_all(&own).unwrap();
        let _elsewhere = UnixListener::bind(files.path().join("elsewhere.sock")).unwrap();
        let _right = UnixListener::bind(own.join("right.sock")).unwrap();
        symlink("../../elsewhere.sock", own.join("link.sock")).unwrap();
        symlink("right.sock", own.join("own-link.sock")).unwrap();
        std::fs::write(own.join("file.sock"), "").unwrap();

        dir.connect_in(MachineDir::VMM, "right.sock").await.unwrap();
        for trap in ["link.sock", "own-link.sock", "file.sock"] {
            let error = dir.connect_in(MachineDir::VMM, trap).await.unwrap_err();
            assert!(matches!(error, Error::Monitor { .. }), "{trap}: {error}");
        }
        for gone in ["missing.sock", "missing/x.sock"] {
            let error = dir.connect_in(MachineDir::VMM, gone).await.unwrap_err();
            assert!(matches!(error, Error::NotRunning { .. }), "{gone}: {error}");
        }
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&own, Some(4711), None).unwrap();
            let error = dir
                .connect_in(MachineDir::VMM, "right.sock")
                .await
                .unwrap_err();
            assert!(matches!(error, Error::Monitor { .. }), "{error}");
        } else {
            println!("skipped: a socket of another user, which only root can make");
        }
    }
}
