//! TCP ports of the host that lead to ports of machines.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::limits::{Places, TcpLimits, client};
use crate::{BoxStream, DialError, Machines, copy};

/// How long to wait when the system gives no connection, for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that is gone without a word is noticed after about two minutes: idle time, then probes, in seconds.
const KEEPALIVE: (u64, u64, u32) = (60, 15, 4);

/// Forwards ports; its limits hold for all of them together.
#[derive(Clone)]
pub struct Forwarder {
    shared: Arc<Shared>,
}

struct Shared {
    machines: Arc<dyn Machines>,
    limits: TcpLimits,
    total: Arc<Semaphore>,
    per_machine: Places<String>,
    per_client: Places<std::net::IpAddr>,
    waiting: Places<()>,
    waiting_per_machine: Places<String>,
}

/// A port that is being forwarded, until this is dropped.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    connections: TaskTracker,
    closing: CancellationToken,
    _closes: DropGuard,
}

impl Forward {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        // One of the tasks listens.
        self.connections.len().saturating_sub(1)
    }

    /// Ends it: cuts its connections, frees its port. Returns when all is gone.
    pub async fn close(self) {
        self.closing.cancel();
        self.connections.wait().await;
    }
}

impl Forwarder {
    /// One that forwards nothing yet.
    #[must_use]
    pub fn new(machines: Arc<dyn Machines>, limits: TcpLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                machines,
                total: Arc::new(Semaphore::new(limits.total)),
                per_machine: Places::new(limits.per_machine),
                per_client: Places::new(limits.per_client),
                waiting: Places::new(limits.waiting),
                waiting_per_machine: Places::new(limits.waiting_per_machine),
                limits,
            }),
        }
    }

    /// Leads connections of `listener` to a port of the machine with this id.
    ///
    /// # Errors
    /// The listener has no address.
    pub fn forward(
        &self,
        listener: TcpListener,
        machine: &str,
        port: u16,
    ) -> std::io::Result<Forward> {
        let address = listener.local_addr()?;
        let connections = TaskTracker::new();
        let closing = CancellationToken::new();
        let way = Way {
            shared: self.shared.clone(),
            machine: machine.into(),
            port,
            listens: address.port(),
        };
        connections.spawn(listen(listener, way, connections.clone(), closing.clone()));
        connections.close();
        Ok(Forward {
            address,
            connections,
            _closes: closing.clone().drop_guard(),
            closing,
        })
    }
}

/// Where connections of one listener go.
#[derive(Clone)]
struct Way {
    shared: Arc<Shared>,
    machine: Arc<str>,
    port: u16,
    listens: u16,
}

async fn listen(
    listener: TcpListener,
    way: Way,
    connections: TaskTracker,
    closing: CancellationToken,
) {
    loop {
        // Beyond the total, connections wait in the kernel's queue.
        let place = way.shared.total.clone().acquire_owned();
        let accepted = tokio::select! {
            accepted = async { (place.await, listener.accept().await) } => accepted,
            () = closing.cancelled() => return,
        };
        let (Ok(place), accepted) = accepted else {
            return;
        };
        match accepted {
            Ok((stream, source)) => {
                let (way, closing) = (way.clone(), closing.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = way.serve(stream, source, place) => {}
                        () = closing.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                warn!(port = way.listens, %error, "no connection was accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Way {
    async fn serve(&self, stream: TcpStream, source: SocketAddr, _place: OwnedSemaphorePermit) {
        let (machine, port, listens) = (&*self.machine, self.port, self.listens);
        let limits = &self.shared.limits;
        let per_client = self.shared.per_client.take(&client(source.ip()));
        let per_machine = self.shared.per_machine.take(&machine.to_owned());
        let (Some(_client), Some(_machine)) = (per_client, per_machine) else {
            info!(%source, listens, machine, port, "refused: too many connections");
            return reset(&stream);
        };
        prepare(&stream);
        let inner = match self.dial().await {
            Ok(inner) => inner,
            Err(reason) => {
                info!(%source, listens, machine, port, %reason, "refused");
                return reset(&stream);
            }
        };
        info!(%source, listens, machine, port, "connected");
        let began = Instant::now();
        let copied = copy::both(stream, inner, limits.idle).await;
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (in_bytes, out_bytes) = (copied.forth, copied.back);
        let end = copied.end.err().map(|error| error.to_string());
        info!(%source, listens, machine, port, in_bytes, out_bytes, took_ms, end, "disconnected");
    }

    /// A connection to the machine's port, which may have to start first.
    async fn dial(&self) -> Result<BoxStream, DialError> {
        let shared = &self.shared;
        let all = shared.waiting.take(&());
        let of_machine = shared.waiting_per_machine.take(&self.machine.to_string());
        let (Some(_all), Some(_of_machine)) = (all, of_machine) else {
            return Err(DialError::Busy);
        };
        let dial = shared.machines.dial(&self.machine, self.port);
        match timeout(shared.limits.dial, dial).await {
            Ok(dialled) => dialled,
            Err(_) => Err(DialError::Timeout),
        }
    }
}

/// Sets what a socket that carries other people's bytes should have.
fn prepare(stream: &TcpStream) {
    let (idle, interval, count) = KEEPALIVE;
    let fd = stream.as_fd();
    let set = stream.set_nodelay(true).and_then(|()| {
        sockopt::set_socket_keepalive(fd, true)?;
        sockopt::set_tcp_keepidle(fd, Duration::from_secs(idle))?;
        sockopt::set_tcp_keepintvl(fd, Duration::from_secs(interval))?;
        Ok(sockopt::set_tcp_keepcnt(fd, count)?)
    });
    if let Err(error) = set {
        debug!(%error, "cannot set options of a socket");
    }
}

/// Lets the stream's end be a reset: it was no connection, and the client is to know.
fn reset(stream: &TcpStream) {
    if let Err(error) = sockopt::set_socket_linger(stream, Some(Duration::ZERO)) {
        debug!(%error, "cannot reset a connection");
    }
}
