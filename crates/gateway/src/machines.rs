//! What the gateway needs to know of machines.

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection to a port of a machine. `shutdown` ends one direction; a dropped one is broken off.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Any [`Stream`].
pub type BoxStream = Box<dyn Stream>;

/// A machine as the gateway sees it, at the moment of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What [`Machines::dial`] wants; never shown to clients.
    pub id: String,
    /// Changes whenever connections to the machine cannot go on: another start, a restore.
    pub incarnation: u64,
    /// The port behind the bare name.
    pub http_port: u16,
    /// Ports that may be reached by number.
    pub ports: Ports,
    /// Who may come in.
    pub access: Access,
}

/// Which ports may be named in a host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// These, and the HTTP port.
    Only(Vec<u16>),
    /// Every port.
    All,
}

impl Found {
    /// Whether `port` is one of those that are to be reached.
    #[must_use]
    pub fn exposes(&self, port: u16) -> bool {
        port == self.http_port
            || match &self.ports {
                Ports::All => true,
                Ports::Only(ports) => ports.contains(&port),
            }
    }
}

/// Who may come in by HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Public,
    /// Who has a key that may see the machine, or a [`crate::token`] of this generation.
    Private {
        /// Counted up to make all tokens that were given out worthless.
        generation: u64,
    },
}

/// What a secret turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySays {
    /// No key of ours: perhaps the guest's affair.
    NotOurs,
    /// One of ours, for other machines.
    No,
    /// One of ours, for this machine.
    Yes,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No such machine any more.
    #[error("no such machine")]
    NoSuchMachine,
    /// It does not run, and is not to be woken by connections.
    #[error("the machine does not run")]
    Stopped,
    /// No program in it takes connections at that port.
    #[error("nothing listens there")]
    NothingListens,
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// As many connections as may be are open.
    #[error("too many connections")]
    Busy,
    /// All else: words for the log, not for clients.
    #[error("{0}")]
    Failed(String),
}

/// The machines that there are. Calls may come at any rate from anybody: `find` and `key` must be cheap, also for what
/// does not exist.
#[async_trait]
pub trait Machines: Send + Sync + 'static {
    /// The machine whose host label this is: one DNS label in lower case, without a port.
    async fn find(&self, label: &str) -> Option<Found>;

    /// Whether `key`, which a client sent as `Authorization: Bearer` or `x-api-key`, is a key of ours for this machine.
    async fn key(&self, machine: &Found, key: &str) -> KeySays;

    /// Connects to a port of the machine with this id. A machine that sleeps is woken first, and that may take as long
    /// as it takes: the caller has a deadline of its own and may drop this future at any time.
    async fn dial(&self, id: &str, port: u16) -> Result<BoxStream, DialError>;
}
