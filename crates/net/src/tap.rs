//! Taps: the host's ends of machines' network cards, each owned by the user of its machine's VMM, which needs no
//! privilege then. They stay when the VMM ends, and belong to the network namespace of the thread that made them.
//!
//! The kernel makes them by ioctl only ("tun/tap creation via rtnetlink is not supported"); what one is can be asked by
//! rtnetlink only (`tap/look.rs`).

mod look;

use std::io;
use std::os::fd::OwnedFd;

use hutch_contract::error::Kind;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::{MAX_INTERFACE_NAME, sys};
use look::Looks;

/// Where all taps come from.
const DEVICE: &str = "/dev/net/tun";

/// Why a tap is not to be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It would be taken for a pattern, or for no name at all.
    #[error("{name:?} is no name for a tap")]
    Name {
        /// What was given.
        name: String,
    },
    /// Something else has the name. Nothing was done to it.
    #[error("the interface {name} is no tap of ours: {because}")]
    Foreign {
        /// Its name.
        name: String,
        /// In which way.
        because: String,
    },
    /// There is none.
    #[error("there is no tap {name}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A VMM, or another program, has it open.
    #[error("the tap {name} is in use")]
    InUse {
        /// Its name.
        name: String,
    },
    /// The operating system refused something.
    #[error("cannot {what} the tap {name}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The tap's name.
        name: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Name { .. } => Kind::Bug,
            Error::Foreign { .. } | Error::Missing { .. } | Error::InUse { .. } => Kind::Conflict,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Kind::Denied,
                // No such device on this host.
                io::ErrorKind::NotFound => Kind::Unavailable,
                _ => Kind::Bug,
            },
        }
    }
}

/// A tap, which may be there or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    name: String,
    owner: u32,
}

impl Tap {
    /// The tap of that name whose owner is the user `owner`. Does not look for it.
    ///
    /// # Errors
    /// [`Error::Name`]
    pub fn new(name: impl Into<String>, owner: u32) -> Result<Self, Error> {
        let name = name.into();
        // The kernel takes more, `%d` for a number among it.
        let good = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        match (1..=MAX_INTERFACE_NAME).contains(&name.len()) && name.bytes().all(good) {
            true => Ok(Self { name, owner }),
            false => Err(Error::Name { name }),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// [`Error::Foreign`]
    pub fn is_there(&self) -> Result<bool, Error> {
        let looks = look::look(&self.name).map_err(self.io("look at"))?;
        match looks {
            None => Ok(false),
            Some(looks) => self.is_ours(&looks).map(|()| true),
        }
    }

    /// Makes it, down and without addresses; `false` when it is there already.
    ///
    /// # Errors
    /// [`Error::Foreign`]. After an error there is nothing of it that was not there before.
    pub fn make(&self) -> Result<bool, Error> {
        if self.is_there()? {
            return Ok(false);
        }
        let tun = self.device()?;
        sys::attach(&tun, &self.name, sys::TAP | sys::NEW).map_err(self.io("make"))?;
        // Until the last of these it is gone with its descriptor.
        sys::set_owner(&tun, self.owner).map_err(self.io("give away"))?;
        sys::set_persistent(&tun, true).map_err(self.io("keep"))?;
        Ok(true)
    }

    /// Opens one that is there. What is written to the descriptor comes from the machine, what is read goes to it; each
    /// packet has a `virtio_net_hdr` before it.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Foreign`], [`Error::InUse`]
    pub fn open(&self) -> Result<OwnedFd, Error> {
        let missing = || Error::Missing {
            name: self.name.clone(),
        };
        if !self.is_there()? {
            return Err(missing());
        }
        let tun = self.device()?;
        sys::attach(&tun, &self.name, sys::TAP).map_err(self.io("open"))?;
        // One that is removed after the look is made again by that, and goes with this descriptor.
        match sys::flags(&tun).map_err(self.io("look at"))? & sys::PERSISTENT {
            0 => Err(missing()),
            _ => Ok(tun),
        }
    }

    /// Removes it. One that is not there is removed already.
    ///
    /// It takes some 20 ms, nearly all of them in `rcu_barrier`, by which the kernel waits, without holding any lock, for
    /// callbacks of all processors (`netdev_run_todo` in its `net/core/dev.c`). Who removes several does it at the same
    /// time: they wait together.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::InUse`]
    pub fn remove(&self) -> Result<(), Error> {
        match self.open() {
            Ok(tun) => sys::set_persistent(tun, false).map_err(self.io("remove")),
            Err(Error::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn device(&self) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::open(DEVICE, flags, Mode::empty())
            .map_err(|error| self.io("open /dev/net/tun for")(error.into()))
    }

    fn is_ours(&self, looks: &Looks) -> Result<(), Error> {
        let because = match looks {
            Looks::Other { kind } => format!("it is of the kind {kind:?}"),
            Looks::Tun { is_tap: false, .. } => "it is a tun".to_owned(),
            Looks::Tun {
                is_persistent: false,
                ..
            } => "it is gone with who made it".to_owned(),
            Looks::Tun { owner: None, .. } => "it has no owner".to_owned(),
            Looks::Tun {
                owner: Some(owner), ..
            } if *owner != self.owner => {
                format!("it belongs to the user {owner}, not {}", self.owner)
            }
            Looks::Tun { .. } => return Ok(()),
        };
        Err(Error::Foreign {
            name: self.name.clone(),
            because,
        })
    }

    fn io(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        let name = self.name.clone();
        move |source| match Errno::from_io_error(&source) {
            Some(Errno::BUSY) => Error::InUse { name },
            _ => Error::Io { what, name, source },
        }
    }
}

#[cfg(test)]
mod tests;
