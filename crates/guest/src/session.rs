//! The host's side of one connection to one agent. Nothing that a guest says leaves it unchecked, and no call waits
//! without a deadline. It does not reconnect: when the connection is lost the session is over, so that no call can land
//! in another incarnation of the machine.

mod call;
mod dial;
mod file;
mod identity;
mod process;
mod tree;
mod upload;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

pub use crate::error::{Error, Kind, Result};
pub use dial::DialStream;
pub use file::{DirPage, FileInfo, FileKind, FileStream, WriteFile};
pub use identity::{Address, Configure, Hello, ShutdownMode, Unapplied};
pub use process::{
    Chunk, Exit, ExitStatus, Output, OutputStream, Process, PtySize, StartProcess, Stream,
};
pub use tree::{Change, Found, Walk, WalkPage};

use crate::limits;
use wire::Wire;

/// A connection to the agent of one machine. Clones are the same connection; it closes with the last of them and of the
/// streams that they gave.
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

struct Inner {
    wire: Wire,
    hello: Hello,
    slots: Arc<Semaphore>,
    dials: Arc<Semaphore>,
    connection: Connection,
}

/// The task that moves the connection's bytes. Ends with it.
struct Connection {
    task: AbortHandle,
    open: watch::Receiver<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    /// Says Hello over an established stream: a vsock or unix connection, or a [`crate::link::LinkStream`].
    ///
    /// # Errors
    /// [`Error::Timeout`] when the guest has not answered within `deadline`, [`Error::Protocol`] when it is no agent
    /// that we understand, [`Error::Disconnected`] when the stream ended.
    pub async fn open(
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        deadline: Duration,
    ) -> Result<Self> {
        let opened = async {
            let (wire, driver) = wire::connect(io).await.map_err(Error::disconnected)?;
            let (ended, open) = watch::channel(());
            let task = tokio::spawn(async move {
                if let Err(error) = driver.await {
                    tracing::debug!(%error, "guest connection ended");
                }
                drop(ended);
            });
            let connection = Connection {
                task: task.abort_handle(),
                open,
            };
            let hello = identity::hello(&wire).await?;
            Ok(Self {
                inner: Arc::new(Inner {
                    wire,
                    hello,
                    slots: Arc::new(Semaphore::new(limits::STREAMS as usize)),
                    dials: Arc::new(Semaphore::new(limits::DIALS as usize)),
                    connection,
                }),
            })
        };
        tokio::time::timeout(deadline, opened)
            .await
            .map_err(|_| Error::Timeout { call: "Hello" })?
    }

    /// What the agent said of itself when the session began.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.inner.hello
    }

    /// Resolves when the connection is gone. Does not keep it open.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut open = self.inner.connection.open.clone();
        async move { while open.changed().await.is_ok() {} }
    }

    /// Whether the connection is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.connection.open.has_changed().is_err()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Session")
            .field("hello", &self.inner.hello)
            .finish_non_exhaustive()
    }
}
