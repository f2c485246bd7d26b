//! Starts and ends a server: the port, the engine, the unix socket, in this order; connections.
//!
//! The port comes first: when it is taken, nothing has been touched. The engine comes second: it locks the data
//! directory, so a second server on it ends here, before it could take the first one's socket away.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hutch_engine::{Engine, EngineConfig};
use hutch_gateway::token::Tokens;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tower::ServiceExt;
use tracing::{debug, error, info, warn};

use crate::auth::{Peer, Token};
use crate::gateway::Ways;
use crate::http::{App, Names, router};
use crate::{Config, Error, caddy, gateway};

/// How long a request's head may take, and how long a connection may be idle between two.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// The longest head.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// How long requests may go on once the server ends.
const DRAIN: Duration = Duration::from_secs(10);
/// How long, and for how many bytes, a client may go on sending after its connection's last answer.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 64 * 1024 * 1024;
/// How long to wait when the system gives no connection, for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Descriptors that we want to be able to have: two for each connection through us.
const DESCRIPTORS: u64 = 65_536;

/// A server to be.
pub struct Server;

/// A server that runs. Dropping this does not end it.
#[derive(Debug)]
pub struct Running {
    addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    socket: PathBuf,
    closing: CancellationToken,
    closed: CancellationToken,
}

impl Running {
    /// Where it listens: with the port that the system chose, when the configuration says port 0.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where HTTP for machines comes in, if it does.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// The unix socket that it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until it has ended.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Ends it: no more connections, 10 s for requests that are being answered, machines go on. Returns when it has
    /// ended and another server may take the data directory.
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.closed().await;
    }
}

impl Server {
    /// Starts a server.
    ///
    /// # Errors
    /// [`Error::PortInUse`], [`Error::Engine`] when the data directory has another server already; nothing is left
    /// behind then.
    pub async fn start(mut config: Config) -> Result<Running, Error> {
        let address = config.listen;
        let tcp = TcpListener::bind(address)
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => Error::PortInUse { address },
                _ => Error::Listen { address, source },
            })?;
        let addr = tcp
            .local_addr()
            .map_err(|source| Error::Listen { address, source })?;
        let http = gateway::listen(&config).await?;
        let http_addr = http.as_ref().and_then(|http| http.local_addr().ok());
        raise_descriptor_limit();
        config.gateway.caddy = caddy::chosen(&config).await;
        let engine = Engine::open(EngineConfig {
            reach: config
                .gateway
                .reach(http_addr.map(|address| address.port())),
            ..config.engine()
        })
        .await?;
        let socket = config.socket();
        let sockets = listen_on_socket(&socket)
            .and_then(|unix| Ok((unix, listen_on_socket(&config.gateway_socket())?)));
        let (unix, proxy) = match sockets {
            Ok(sockets) => sockets,
            Err(error) => {
                engine.close().await;
                return Err(error);
            }
        };
        let closing = CancellationToken::new();
        let closed = CancellationToken::new();
        let token = config
            .api
            .token
            .as_ref()
            .map(|token| Token::new(token.expose()));
        let ways = Ways::new(engine.clone(), &config, token.clone(), http, proxy);
        let app = App {
            engine: engine.clone(),
            token,
            tokens: Tokens::new(engine.gateway_secret()),
            names: Names::below(&config.gateway.domain.to_string()),
            closing: closing.clone(),
        };
        let serving = Serving {
            router: router(app),
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            connections: TaskTracker::new(),
            closing: closing.clone(),
            cut: CancellationToken::new(),
        };
        info!(%addr, socket = %socket.display(), "the API listens");
        let running = Running {
            addr,
            http_addr,
            socket: socket.clone(),
            closing,
            closed: closed.clone(),
        };
        tokio::spawn(end_with(engine.clone(), serving.closing.clone()));
        tokio::spawn(async move {
            // Whatever ends this task, also a panic, whoever waits for the end is told.
            let _told = closed.drop_guard();
            let closing = serving.closing.clone();
            let https = caddy::keep(&config, addr, closing.clone());
            tokio::join!(serving.run(tcp, unix), ways.run(closing), https);
            caddy::end(&config, engine.has_machines()).await;
            // While we still hold the data directory: afterwards it could be the next server's.
            if let Err(error) = fs::remove_file(&socket) {
                debug!(%error, "the socket was gone already");
            }
            engine.close().await;
            // With the last engine goes the lock on the data directory; only then is the end told.
            drop(engine);
            info!("ended; machines go on");
        });
        Ok(running)
    }
}

/// Lets us have as many descriptors as the gateway's limits can come to; the usual soft limit of 1024 is one for programs
/// that use select(2). Not all that the hard limit allows: some children, such as fakeroot, go over every number up to it.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit
        .maximum
        .map_or(DESCRIPTORS, |hard| hard.min(DESCRIPTORS));
    if limit.current.is_none_or(|soft| soft >= wanted) {
        return;
    }
    limit.current = Some(wanted);
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "the limit of open files stays as it is");
    }
}

/// Ends the server when its engine cannot go on: a server that can make nothing durable must not answer 2xx, and the
/// next start finds out what was.
async fn end_with(engine: Engine, closing: CancellationToken) {
    tokio::select! {
        () = closing.cancelled() => {}
        reason = engine.failed() => {
            error!(reason = %reason.chain(), hint = reason.hint(), "the server ends");
            closing.cancel();
        }
    }
}

/// Listens on the unix socket. One that is there is of a server that is gone: the data directory is ours.
fn listen_on_socket(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path).map_err(failed)?,
        Ok(_) => {
            return Err(Error::NotASocket {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Who comes in before this is stopped by the check of the peer's user.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// The place of a connection, kept by whoever goes on with it: it counts, and the server's end waits for it.
#[derive(Clone)]
pub(crate) struct Place(
    #[expect(dead_code, reason = "it is held")] Arc<(OwnedSemaphorePermit, TaskTrackerToken)>,
);

/// What all connections share.
struct Serving {
    router: Router,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    closing: CancellationToken,
    /// Ends connections that are still there after [`DRAIN`].
    cut: CancellationToken,
}

impl Serving {
    /// Serves until `closing`, then drains.
    async fn run(self, tcp: TcpListener, unix: UnixListener) {
        loop {
            let place = tokio::select! {
                place = self.places.clone().acquire_owned() => place.expect("it is never closed"),
                () = self.closing.cancelled() => break,
            };
            let accepted = tokio::select! {
                accepted = tcp.accept() => accepted.map(|(stream, _)| {
                    // Small answers must not wait for the acknowledgement of the one before.
                    if let Err(error) = stream.set_nodelay(true) {
                        debug!(%error, "cannot set TCP_NODELAY");
                    }
                    self.spawn(stream, Peer::Remote, place);
                }),
                accepted = unix.accept() => accepted.map(|(stream, _)| {
                    let peer = match stream.peer_cred() {
                        Ok(peer) => Peer::Local { uid: peer.uid() },
                        Err(_) => Peer::Remote,
                    };
                    self.spawn(stream, peer, place);
                }),
                () = self.closing.cancelled() => break,
            };
            if let Err(error) = accepted {
                warn!(%error, "no connection was accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        drop((tcp, unix));
        self.connections.close();
        if timeout(DRAIN, self.connections.wait()).await.is_err() {
            info!(
                connections = self.connections.len(),
                "cutting what did not end by itself"
            );
            self.cut.cancel();
            self.connections.wait().await;
        }
    }

    /// Serves one connection in a task of its own, for as long as it holds its place.
    fn spawn<S>(&self, stream: S, peer: Peer, place: OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let router = self.router.clone();
        let place = Place(Arc::new((place, self.connections.token())));
        let shared = place.clone();
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            request.extensions_mut().insert(shared.clone());
            Box::pin(router.clone().oneshot(request))
        });
        let mut connection = http1::Builder::new()
            // Without a timer hyper ignores the deadline.
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let (closing, cut) = (self.closing.clone(), self.cut.clone());
        self.connections.spawn(async move {
            let _place = place;
            let served = tokio::select! {
                served = &mut connection => served,
                () = closing.cancelled() => {
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                    tokio::select! {
                        served = &mut connection => served,
                        () = cut.cancelled() => return,
                    }
                }
            };
            if let Err(error) = served {
                debug!(%error, "a connection ended early");
            }
            // One that became a WebSocket is no longer ours.
            let Some(parts) = connection.into_parts() else {
                return;
            };
            let stream = parts.io.into_inner();
            tokio::select! {
                _ = timeout(LINGER, linger(stream)) => {}
                () = closing.cancelled() => {}
            }
        });
    }
}

/// Ends our side, and swallows what the client still sends until it ends its own. A socket that is closed with unread
/// bytes is reset, and the client would lose the answer that says why its upload was refused.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> io::Result<u64> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await
}
