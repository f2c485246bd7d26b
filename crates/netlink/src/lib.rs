//! Netlink by hand: the few messages of rtnetlink, nf_tables and conntrack that Hutch needs, on blocking sockets.
//!
//! Nothing here knows what is allowed or wanted. Encoding never fails at once: what cannot be encoded is refused when
//! it is sent. Decoding takes any bytes: what is malformed ends early.
//! Facts: `linux/netlink.h`, and the header that each module names.

use rustix::io::Errno;

pub mod attribute;
pub mod bridge;
pub mod conntrack;
mod message;
pub mod nft;
pub mod route;
mod socket;
mod sys;

pub use message::Message;
pub use socket::{Protocol, Reply, Socket};

/// What became of a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel did not do what a message says.
    #[error("cannot {what}: {}{}{said}", std::io::Error::from(*.errno), if .said.is_empty() { "" } else { ": " })]
    Refused {
        /// What the message was to do.
        what: &'static str,
        /// Why not.
        errno: Errno,
        /// The kernel's own words (`NLMSGERR_ATTR_MSG`), often none.
        said: String,
    },
    /// An attribute exceeds 64 KiB, or a name its longest length.
    #[error("cannot {0}: a value is too long for a netlink message")]
    TooLong(&'static str),
    /// The kernel sent what is no answer.
    #[error("cannot {0}: the kernel's answer is malformed")]
    Malformed(&'static str),
    /// Answers were lost: what has been done must be looked at.
    #[error("cannot tell what became of netlink messages, since answers were lost")]
    Lost,
    /// No answer within the socket's patience.
    #[error("cannot {0}: the kernel does not answer")]
    Silent(&'static str),
    /// The socket itself failed.
    #[error("netlink socket")]
    Socket(#[source] Errno),
}

impl Error {
    /// The reason for which the kernel refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused { errno, .. } | Error::Socket(errno) => errno.into(),
            Error::Silent(_) => std::io::ErrorKind::TimedOut.into(),
            other => Self::other(other),
        }
    }
}

/// What every call of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
