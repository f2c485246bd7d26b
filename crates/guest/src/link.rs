//! Connections over byte streams that outlive them: a virtio-serial port, a UART. It owns the framing and the
//! handshake; it knows nothing of HTTP/2 or of the calls above.
//!
//! Such a stream tells neither side that the other has gone: after a restore the guest goes on in the old
//! connection, and the new host finds half of a frame in the pipe. So the bytes travel in frames ([`frame`]) that
//! carry a session, and the host alone begins one:
//!
//! ```text
//! host                                    guest
//!   │ filler, SYN(session, nonce) ────────▶ │  ends the older session, whatever it was doing
//!   │   again after a while, if unanswered  │  (a repeated SYN of the session in force is only answered again)
//!   │ ◀──────── filler, ACK(session, nonce) │  accept() yields a stream
//!   │ ◀──── DATA(session, 0, 1, 2, …) ────▶ │
//!   │ ◀──── FIN(session, n) ──────────────▶ │  the writer has closed; each direction for itself
//! ```
//!
//! - **Filler**: zeros, as many as the largest frame has bytes. A frame that was cut off is completed by them, fails its
//!   checksum, and cannot swallow the SYN or ACK behind it. Zeros between frames mean nothing.
//! - Frames of another session are dropped. Inside the session in force, a checksum error, foreign bytes or a gap in
//!   the sequence end it, since HTTP/2 cannot go on after lost bytes; the side that noticed sends FIN.
//! - **A reader that stalls** must not keep a SYN from being seen, so the guest never stops reading its port: it queues
//!   up to [`GUEST_QUEUE`] for the stream and ends the session beyond that. HTTP/2 always reads its connection and its
//!   windows bound what can be under way, so an honest host never comes near. The host needs no SYN from anybody, and
//!   does not trust the guest: it queues little ([`HOST_QUEUE`]) and then stops reading.

pub mod frame;
mod guest;
#[cfg(feature = "host")]
mod host;
mod pipe;

pub use guest::{Listener, listen};
#[cfg(feature = "host")]
pub use host::connect;
pub use pipe::LinkStream;

use std::io;

use crate::limits;

/// Bytes that the guest queues for a stream that is not being read: every window full, and the messages about them.
pub const GUEST_QUEUE: usize = limits::CONNECTION_WINDOW as usize + 2 * limits::MESSAGE;
/// Bytes that the host queues for a stream before it stops reading from the port.
pub const HOST_QUEUE: usize = 256 * 1024;

/// Why a link connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum End {
    /// The other side has closed its direction.
    #[error("closed by the other side")]
    Closed,
    /// The host began a newer session.
    #[error("replaced by a newer connection")]
    Replaced,
    /// Foreign bytes or a wrong checksum.
    #[error("damaged bytes on the line")]
    Damaged,
    /// A frame is missing.
    #[error("frame {expected} expected, {found} came")]
    Gap {
        /// The sequence number that should have come.
        expected: u32,
        /// The one that came.
        found: u32,
    },
    /// More came than the reader's queue may hold.
    #[error("reader too slow for what the other side sends")]
    Overflow,
    /// The byte stream below ended or broke.
    #[error("line lost: {0}")]
    Lost(io::ErrorKind),
}

impl From<End> for io::Error {
    fn from(end: End) -> Self {
        let kind = match end {
            End::Closed => io::ErrorKind::BrokenPipe,
            End::Replaced | End::Overflow => io::ErrorKind::ConnectionReset,
            End::Damaged | End::Gap { .. } => io::ErrorKind::InvalidData,
            End::Lost(kind) => kind,
        };
        io::Error::new(kind, end)
    }
}
