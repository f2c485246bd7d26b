//! How connections of the host reach the agent, per kind of channel. What is said on them is in `calls`.

mod device;
mod socket;

use std::convert::Infallible;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use hutch_guest::link;
use rustix::process::geteuid;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::agent::Agent;
use crate::calls::Connection;
use crate::error::{Context, Result, chain, say};
use crate::params::Channel;
use crate::sys;

/// The context id of the host, `VMADDR_CID_HOST`.
const CID_HOST: u32 = 2;
/// Connections at once; all but one are about to be replaced or have not said Hello.
const CONNECTIONS: usize = 16;

/// Serves the host until something below breaks for good.
///
/// # Errors
/// The channel cannot be opened.
pub async fn serve(channel: Channel, agent: Arc<Agent>) -> Result<Infallible> {
    let door = Door {
        agent,
        places: Arc::new(Semaphore::new(CONNECTIONS)),
    };
    match channel {
        Channel::VirtioSerial(name) => loop {
            let port = device::virtio_port(&name).await?;
            door.link(port).await;
        },
        Channel::Uart(path) => loop {
            let line = device::uart(&path).await?;
            door.link(line).await;
        },
        Channel::Unix(path) => {
            let listener = bind(&path)?;
            door.unix(listener).await
        }
        Channel::Inherited(fd) => {
            let listener = sys::vsock::inherit(fd).what("take over the descriptor of --fd")?;
            let listener = std::os::unix::net::UnixListener::from(listener);
            listener
                .set_nonblocking(true)
                .what("use the descriptor of --fd")?;
            door.unix(UnixListener::from_std(listener).what("use the descriptor of --fd")?)
                .await
        }
        Channel::Vsock(port) => door.vsock(port).await,
    }
}

/// Only its owner may connect. A socket left behind by an earlier agent is replaced, anything else is not.
fn bind(path: &Path) -> Result<UnixListener> {
    let is_socket = |meta: std::fs::Metadata| meta.file_type().is_socket();
    if path.symlink_metadata().is_ok_and(is_socket) {
        std::fs::remove_file(path).path("replace", path)?;
    }
    let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path).path("listen on", path);
    rustix::process::umask(old);
    let listener = listener?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).path("listen on", path)?;
    Ok(listener)
}

struct Door {
    agent: Arc<Agent>,
    places: Arc<Semaphore>,
}

impl Door {
    /// Serves one connection in a task of its own.
    fn admit(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            return;
        };
        let connection = Connection::new(self.agent.clone());
        tokio::spawn(async move {
            connection.serve(io).await;
            drop(place);
        });
    }

    /// Serves the sessions of a link until the line is lost.
    async fn link(&self, line: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let mut listener = link::listen(line);
        loop {
            match listener.accept().await {
                Ok(stream) => self.admit(stream),
                Err(error) => return say(&format!("channel lost: {}", chain(&error))),
            }
        }
    }

    async fn unix(&self, listener: UnixListener) -> Result<Infallible> {
        loop {
            let (stream, _) = listener.accept().await.what("accept a connection")?;
            let uid = stream.peer_cred().map(|peer| peer.uid());
            if uid.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw()) {
                self.admit(stream);
            }
        }
    }

    async fn vsock(&self, port: u32) -> Result<Infallible> {
        let listener = sys::vsock::listen(port).what("listen on vsock")?;
        let listener = sys::poll::watch(listener, Interest::READABLE).what("listen on vsock")?;
        loop {
            let mut ready = listener.readable().await.what("accept a connection")?;
            let accepted =
                ready.try_io(|fd| sys::vsock::accept(std::os::fd::AsFd::as_fd(fd.get_ref())));
            // Others are processes of this guest, or went away before they were accepted.
            if let Ok(Ok((stream, CID_HOST))) = accepted
                && let Ok(stream) = socket::Socket::new(stream)
            {
                self.admit(stream);
            }
        }
    }
}
