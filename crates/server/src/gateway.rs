//! The gateway over the engine: what it asks of machines, where HTTP for them comes in, and the ports of the host.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use hutch_contract::error::Kind;
use hutch_contract::expose::{Access, Expose};
use hutch_contract::id::KeyId;
use hutch_contract::node::{Finding, Level};
use hutch_engine::{Engine, READY, Reached};
use hutch_gateway::http::{Gateway, HttpConfig, Listener};
use hutch_gateway::limits::{HttpLimits, TcpLimits};
use hutch_gateway::tcp::Forwarder;
use hutch_gateway::token::Tokens;
use hutch_gateway::{BoxStream, DialError, Found, KeySays, Machines, Ports};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::auth::Token;
use crate::config::HttpListen;
use crate::{Config, Error, forward};

/// Listens for HTTP for machines. A port that nobody chose is no reason not to start: a second server on one host
/// finds the default one taken.
pub(crate) async fn listen(config: &Config) -> Result<Option<TcpListener>, Error> {
    let HttpListen(Some(address)) = config.gateway.http_listen else {
        return Ok(None);
    };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
            if config.gateway.chosen {
                return Err(Error::GatewayInUse { address });
            }
            warn!(
                %address,
                "is in use: machines have no URLs; choose another with --http-listen or HUTCH_HTTP_LISTEN"
            );
            Ok(None)
        }
        Err(source) => Err(Error::Listen { address, source }),
    }
}

/// The gateway of a server.
pub(crate) struct Ways {
    machines: Arc<EngineMachines>,
    domain: String,
    http: Option<TcpListener>,
    proxy: UnixListener,
    socket: PathBuf,
}

impl Ways {
    pub(crate) fn new(
        engine: Engine,
        config: &Config,
        token: Option<Token>,
        http: Option<TcpListener>,
        proxy: UnixListener,
    ) -> Ways {
        Ways {
            machines: Arc::new(EngineMachines { engine, token }),
            domain: config.gateway.domain.to_string(),
            http,
            proxy,
            socket: config.gateway_socket(),
        }
    }

    /// Serves until `closing`, and lets what is going on end.
    pub(crate) async fn run(self, closing: CancellationToken) {
        let engine = self.machines.engine.clone();
        let config = HttpConfig {
            base_domain: self.domain,
            tokens: Tokens::new(engine.gateway_secret()),
            limits: HttpLimits {
                dial: READY,
                ..HttpLimits::default()
            },
        };
        let gateway = Gateway::new(self.machines.clone(), config);
        let forwarder = Forwarder::new(
            self.machines,
            TcpLimits {
                dial: READY,
                ..TcpLimits::default()
            },
        );
        if let Some(address) = self.http.as_ref().and_then(|http| http.local_addr().ok()) {
            info!(%address, "HTTP for machines comes in");
        }
        let tcp = async {
            if let Some(http) = self.http {
                gateway.serve(Listener::Tcp(http), closing.clone()).await;
            }
        };
        let proxy = gateway.serve(Listener::Proxy(self.proxy), closing.clone());
        let ports = forward::keep(engine, forwarder, closing.clone());
        tokio::join!(tcp, proxy, ports);
        // While we still hold the data directory: afterwards it could be the next server's.
        if let Err(error) = fs::remove_file(&self.socket) {
            debug!(%error, "the gateway's socket was gone already");
        }
    }
}

/// Whether machines have URLs, seen without a running server.
pub(crate) fn finding(config: &Config) -> Finding {
    let (level, found, hint) = match config.gateway.http_listen {
        HttpListen(None) => (
            Level::Limited,
            "off: machines have no URLs of their own".to_owned(),
            Some("--http-listen ADDRESS:PORT switches it on"),
        ),
        HttpListen(Some(address)) => match std::net::TcpListener::bind(address) {
            Err(error) if !runs(config) => (
                Level::Limited,
                format!("{address}: {error}; machines would have no URLs"),
                Some("choose another with --http-listen or HUTCH_HTTP_LISTEN"),
            ),
            _ => (
                Level::Good,
                format!("NAME.{} by {address}", config.gateway.domain),
                None,
            ),
        },
    };
    Finding {
        area: "gateway".to_owned(),
        level,
        found,
        hint: hint.map(str::to_owned),
    }
}

/// Whether the server of this data directory runs: then it is what has its port, most likely.
pub(crate) fn runs(config: &Config) -> bool {
    std::os::unix::net::UnixStream::connect(config.gateway_socket()).is_ok()
}

/// The engine's machines, as the gateway sees them.
struct EngineMachines {
    engine: Engine,
    /// The key of the configuration.
    token: Option<Token>,
}

#[async_trait]
impl Machines for EngineMachines {
    async fn find(&self, label: &str) -> Option<Found> {
        self.engine.reached(label).map(found)
    }

    async fn key(&self, machine: &Found, key: &str) -> KeySays {
        if self.token.as_ref().is_some_and(|token| token.is(key)) {
            return KeySays::Yes;
        }
        // Nothing else is looked up, and a key of ours goes to no guest, also when it is not valid any more.
        let ours = key.split_once('.').map(|(id, _)| id.parse::<KeyId>());
        if !matches!(ours, Some(Ok(_))) {
            return KeySays::NotOurs;
        }
        match self.engine.authenticate(key).await {
            Ok(who) if self.engine.machine(&who, &machine.id).is_ok() => KeySays::Yes,
            _ => KeySays::No,
        }
    }

    async fn dial(&self, id: &str, port: u16) -> Result<BoxStream, DialError> {
        let who = self.engine.local_admin();
        let dialled = self.engine.dial(&who, id, port).await;
        dialled
            .map(|stream| Box::new(stream) as BoxStream)
            .map_err(|error| refusal(&error))
    }
}

fn found(reached: Reached) -> Found {
    Found {
        id: reached.id.to_string(),
        incarnation: u64::from(reached.starts),
        http_port: reached.http_port,
        ports: match reached.expose {
            Expose::All(_) => Ports::All,
            Expose::Ports(ports) => Ports::Only(ports),
        },
        access: match reached.access {
            Access::Public => hutch_gateway::Access::Public,
            Access::Private => hutch_gateway::Access::Private {
                generation: reached.generation,
            },
        },
    }
}

fn refusal(error: &hutch_engine::Error) -> DialError {
    use hutch_engine::Error;
    match error {
        Error::NothingListens { .. } => DialError::NothingListens,
        Error::NotFound { .. } => DialError::NoSuchMachine,
        Error::WrongStatus { .. } | Error::MachineFailed { .. } => DialError::Stopped,
        Error::AgentSilent { .. } => DialError::Timeout,
        other => match other.kind() {
            Kind::Timeout => DialError::Timeout,
            Kind::Exhausted => DialError::Busy,
            _ => DialError::Failed(other.chain()),
        },
    }
}
