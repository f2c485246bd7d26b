//! Boots, stops, pauses, snapshots, restores and adopts machines: one file per runtime, one table, and the shim.
//!
//! A runtime knows nothing of stores, images or owners. All state of a machine is files in its [`MachineDir`], so a
//! runtime itself is stateless and a restarted server can adopt what runs.

mod api;
mod breaker;
mod dir;
mod error;
mod identity;
mod kernel_line;
mod kvm;
mod launch;
mod memory;
mod passt;
mod process;
mod program;
mod qmp;
mod spec;
mod sys;
mod tap;
mod vsock;
mod watch;

pub mod cgroup;
pub mod ring;
pub mod shim;
pub mod table;

#[cfg(feature = "stub")]
pub mod stub;

mod cloud_hypervisor;
mod docker;
mod firecracker;
mod qemu;
mod virtualbox;

pub use dir::MachineDir;
pub use error::Error;
pub use passt::{NoUserNetwork, user_network};
pub use process::{Adopted, ExitReport, Process};
pub use spec::{ImageLayer, MachineSpec, Nic, Outside, Root, RuntimeConfig, User, UserNet};

use std::path::Path;

use async_trait::async_trait;
use hutch_contract::node::{Capabilities, RuntimeInfo};
use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream to a guest.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How the agent of a machine is reached.
pub enum Channel {
    /// Outlives connections on both sides and may carry half-sent bytes of an older one: needs the link layer.
    Wire(Box<dyn Stream>),
    /// A connection of its own: ends with either side.
    Connection(Box<dyn Stream>),
}

/// What runs machines.
///
/// No call waits for the guest; only `stop` speaks to it at all. Each call ends by itself within seconds unless the
/// host hangs; callers set deadlines all the same.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// The word for it in the API and the configuration.
    fn name(&self) -> &'static str;

    /// Whether it is usable here, why not, and what it can do. Cheap after the first call.
    async fn probe(&self) -> RuntimeInfo;

    /// What it can do here, as `probe` would say.
    fn capabilities(&self) -> Capabilities;

    /// Whether its machines boot a kernel of ours: then kernel, initramfs and modules disk lie in the directory.
    fn boots_kernel(&self) -> bool {
        true
    }

    /// Whether it takes a kernel only as an ELF file, having no boot loader.
    fn boots_elf_only(&self) -> bool {
        false
    }

    /// Whether its machines may have [`Nic::Filtered`]; [`user_network`] says whether that works on this host.
    fn has_user_network(&self) -> bool {
        false
    }

    /// What the root file systems of its machines are made from.
    fn root(&self) -> Root {
        Root::Disk
    }

    /// Makes what a machine has outside of its directory, once in its life, before the first start. What an earlier,
    /// broken attempt left is replaced. Takes as long as copying an image does; others are not held up.
    ///
    /// # Errors
    /// [`Error::WrongImage`] when the machine cannot be made from this image.
    async fn prepare(
        &self,
        _dir: &MachineDir,
        _spec: &MachineSpec,
        _image: &ImageLayer,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Removes what `prepare` made, of a machine that does not run. What is not there is removed already.
    async fn remove(&self, _spec: &MachineSpec) -> Result<(), Error> {
        Ok(())
    }

    /// All that exists outside of the directories of the server whose instance tag this is, and nothing of anybody
    /// else.
    async fn outside(&self, _tag: &str) -> Result<Vec<Outside>, Error> {
        Ok(Vec::new())
    }

    /// Removes one of those. One that is in use by another is left alone without an error: it is listed again.
    async fn remove_outside(&self, _what: &Outside) -> Result<(), Error> {
        Ok(())
    }

    /// Boots a machine whose directory is prepared: disk, kernel, initramfs and modules disk are in place and nothing
    /// of an earlier run is alive. Returns when the VMM runs; the guest is then still booting.
    ///
    /// # Errors
    /// [`Error::Locked`] when something of this machine is alive already; [`Error::Exited`] with the VMM's own words
    /// when it ended at once. Nothing is left running after an error. A future that is dropped leaves a start that goes
    /// on and can be adopted.
    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error>;

    /// Goes on from a memory snapshot in the directory `snapshot`, relative to the machine's, on a disk as it was then. The
    /// same spec as `start`: identity comes afterwards. Its guest stands still until `resume`.
    ///
    /// # Errors
    /// As [`start`](Self::start); a snapshot that the VMM does not take may show only as the end of the process.
    async fn restore(
        &self,
        _dir: &MachineDir,
        _spec: &MachineSpec,
        _snapshot: &Path,
    ) -> Result<Process, Error> {
        Err(Error::Unsupported {
            runtime: self.name(),
            what: "restore memory",
        })
    }

    /// Finds out what is the case with a machine that an earlier server started.
    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error>;

    /// Asks the guest to power off by the VMM's own means (a power button). Guests with an agent are asked there.
    async fn stop(&self, dir: &MachineDir) -> Result<(), Error>;

    /// Ends the VMM at once and waits until it is gone. A machine that does not run is no error; one whose identity
    /// cannot be proved is [`Error::Unproved`], and nothing is done to it.
    async fn kill(&self, dir: &MachineDir) -> Result<(), Error>;

    /// Stops execution; memory stays. One that is paused is no error.
    async fn pause(&self, dir: &MachineDir) -> Result<(), Error>;

    /// Goes on after `pause`; one that runs is no error. A [`Channel::Connection`] that was open then may be lost without a sign of it: open
    /// another.
    async fn resume(&self, dir: &MachineDir) -> Result<(), Error>;

    /// Writes device state and memory of a paused machine to files in the directory `into`, which is on the file system of
    /// the machine's. After an error there may be anything in it.
    async fn snapshot(&self, _dir: &MachineDir, _into: &Path) -> Result<(), Error> {
        Err(Error::Unsupported {
            runtime: self.name(),
            what: "snapshot memory",
        })
    }

    /// Opens the way to the agent. May succeed before the guest listens; may fail while the VMM is still starting.
    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error>;
}
