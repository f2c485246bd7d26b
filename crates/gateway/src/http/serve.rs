//! Connections of clients: taken in, told apart (HTTP/1 or 2), served, and ended.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::clients::{Clients, Conn};
use super::forward::{self, Origin, Shared};
use super::guard::Guard;
use super::pool::Pool;
use super::wire::Wire;
use crate::Machines;
use crate::limits::{HttpLimits, Places};
use crate::token::Tokens;

/// What an HTTP/2 client says first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long to wait when the system gives no connection, for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at a client's connection.
const LOOK: Duration = Duration::from_secs(5);
/// Between two looks at the guests' connections that wait.
const SWEEP: Duration = Duration::from_secs(1);
/// An HTTP/2 connection without requests is ended after so long.
const H2_IDLE: Duration = Duration::from_secs(60);
/// How long requests may go on once the gateway ends.
const DRAIN: Duration = Duration::from_secs(10);
/// HTTP/2: a ping after so long without a frame, and how long its answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));
/// HTTP/2 windows in bytes: of a stream, and of a connection, so that a stalled stream leaves room for others.
const WINDOWS: (u32, u32) = (256 * 1024, 1024 * 1024);
/// Bytes of an HTTP/2 stream that may wait unsent.
const SEND_BUFFER: usize = 64 * 1024;
/// HTTP/2 streams that a client resets before we saw them, and that we reset for its mistakes, before it is cut off.
const RESETS: (usize, usize) = (20, 64);
/// Bytes of an HTTP/1 connection that may wait on either side.
const BUFFER: usize = 64 * 1024;

/// What is not the same for everybody.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Machines are one label below this.
    pub base_domain: String,
    /// Checks what opens private machines.
    pub tokens: Tokens,
    /// How much of everything.
    pub limits: HttpLimits,
}

/// Where clients come in.
#[derive(Debug)]
pub enum Listener {
    /// Anybody: their addresses are what the kernel says, and what they say of themselves is not believed.
    Tcp(TcpListener),
    /// A proxy of ours, which alone can connect there: it says by `X-Forwarded-For` and `-Proto` who its clients are.
    Proxy(UnixListener),
}

/// The HTTP gateway. Clones are the same one.
#[derive(Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
}

impl Gateway {
    /// One that does not listen yet.
    #[must_use]
    pub fn new(machines: Arc<dyn Machines>, config: HttpConfig) -> Self {
        let limits = config.limits;
        let base_domain = config.base_domain.trim_matches('.').to_ascii_lowercase();
        Self {
            shared: Arc::new(Shared {
                machines,
                base_domain,
                tokens: config.tokens,
                clients: Clients::new(limits.connections, limits.per_client),
                pool: Arc::<Pool>::default(),
                per_client: Places::new(limits.requests_per_client),
                per_machine: Places::new(limits.requests_per_machine),
                upgrades: Places::new(limits.upgrades_per_machine),
                tasks: TaskTracker::new(),
                cutting: CancellationToken::new(),
                limits,
            }),
        }
    }

    /// Serves a listener until `closing`; then lets requests end for 10 s, and cuts what is left, of all listeners.
    pub async fn serve(&self, listener: Listener, closing: CancellationToken) {
        let mut sweeping = interval(SWEEP);
        sweeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept(self, &closing) => accepted,
                _ = sweeping.tick() => {
                    self.shared.pool.sweep();
                    continue;
                }
                () = closing.cancelled() => break,
            };
            if let Err(error) = accepted {
                warn!(%error, "no connection was accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
        drop(listener);
        let tasks = &self.shared.tasks;
        tasks.close();
        if timeout(DRAIN, tasks.wait()).await.is_err() {
            debug!(
                connections = tasks.len(),
                "cutting what did not end by itself"
            );
            self.shared.cutting.cancel();
            tasks.wait().await;
        }
    }

    fn spawn<S>(&self, stream: S, address: Option<IpAddr>, closing: &CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(conn) = self.shared.clients.admit(address) else {
            debug!(?address, "no place for a connection");
            return;
        };
        let (shared, closing) = (self.shared.clone(), closing.clone());
        let origin = address.map_or(Origin::Proxy, Origin::Direct);
        self.shared.tasks.spawn(async move {
            let cut = conn.cut.clone();
            tokio::select! {
                served = serve(&shared, &conn, stream, origin, &closing) => if let Err(error) = served {
                    debug!(?address, %error, "a connection ended early");
                },
                () = cut.cancelled() => debug!(?address, "a connection was cut"),
                () = shared.cutting.cancelled() => {}
            }
        });
    }
}

impl Listener {
    async fn accept(&self, gateway: &Gateway, closing: &CancellationToken) -> io::Result<()> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Small answers must not wait for the acknowledgement of the one before.
                if let Err(error) = stream.set_nodelay(true) {
                    debug!(%error, "cannot set TCP_NODELAY");
                }
                gateway.spawn(stream, Some(address.ip()), closing);
            }
            Listener::Proxy(listener) => {
                let (stream, _) = listener.accept().await?;
                gateway.spawn(stream, None, closing);
            }
        }
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn serve<S>(
    shared: &Arc<Shared>,
    conn: &Arc<Conn>,
    mut stream: S,
    origin: Origin,
    closing: &CancellationToken,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let limits = &shared.limits;
    let mut first = BytesMut::new();
    let is_h2 = tokio::select! {
        sniffed = timeout(limits.head, sniff(&mut stream, &mut first)) => sniffed??,
        () = closing.cancelled() => return Ok(()),
    };
    let guard = match is_h2 {
        true => Guard::none(),
        false => Guard::new(limits.head_bytes, limits.headers),
    };
    let wire = Wire::new(stream, first, guard, conn.clone(), limits.stall);
    let (wire, service) = (TokioIo::new(wire), {
        let (shared, conn) = (shared.clone(), conn.clone());
        service_fn(move |request| forward::answer(shared.clone(), conn.clone(), origin, request))
    });
    if is_h2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .adaptive_window(false)
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(limits.head_bytes as u32)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(RESETS.0)
            .max_local_error_reset_streams(RESETS.1)
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .serve_connection(wire, service);
        let end = |connection: Pin<&mut http2::Connection<_, _, _>>| connection.graceful_shutdown();
        follow(connection, end, conn, limits, closing, Some(H2_IDLE)).await
    } else {
        let connection = http1::Builder::new()
            // Without a timer hyper ignores the deadline.
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(BUFFER)
            .serve_connection(wire, service)
            .with_upgrades();
        let end = |connection: Pin<&mut http1::UpgradeableConnection<_, _>>| {
            connection.graceful_shutdown()
        };
        follow(connection, end, conn, limits, closing, None).await
    }
}

/// Polls a connection to its end, which comes early when the client does not take what it asked for.
async fn follow<C: Future<Output = hyper::Result<()>>>(
    connection: C,
    mut end: impl FnMut(Pin<&mut C>),
    conn: &Conn,
    limits: &HttpLimits,
    closing: &CancellationToken,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let mut connection = pin!(connection);
    let mut looking = interval(LOOK.min(limits.stall));
    looking.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ending = false;
    loop {
        tokio::select! {
            served = connection.as_mut() => return served.map_err(Into::into),
            () = closing.cancelled(), if !ending => {
                ending = true;
                end(connection.as_mut());
            }
            _ = looking.tick() => {
                if conn.stalls(limits.stall) {
                    return Err("the client does not take its answer".into());
                }
                if !ending && idle.is_some_and(|idle| conn.idle() > idle) {
                    ending = true;
                    end(connection.as_mut());
                }
            }
        }
    }
}

/// Reads until it is clear whether this is HTTP/2. hyper-util's own way of doing it waits for the first bytes for ever
/// (hyperium/hyper#3756).
async fn sniff(stream: &mut (impl AsyncRead + Unpin), first: &mut BytesMut) -> io::Result<bool> {
    loop {
        let length = first.len().min(PREFACE.len());
        if first[..length] != PREFACE[..length] {
            return Ok(false);
        }
        if length == PREFACE.len() {
            return Ok(true);
        }
        if stream.read_buf(first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
