//! Why a server does not start. What a request is answered with is in `http/error.rs`.

use std::net::SocketAddr;
use std::path::PathBuf;

use hutch_contract::error::Kind;

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the configuration cannot be meant so.
    #[error("setting `{key}` ({origin}) {problem}{}", allowed.as_ref().map(|a| format!("; allowed: {a}")).unwrap_or_default())]
    Setting {
        /// The key, with dots.
        key: String,
        /// Where the value came from.
        origin: String,
        /// What is wrong with it.
        problem: String,
        /// What would be right.
        allowed: Option<String>,
    },
    /// There is no home directory to put something in.
    #[error("setting `{key}` has no default without a home directory")]
    NoHome {
        /// The key.
        key: &'static str,
    },
    /// The configuration file cannot be read.
    #[error("read the configuration {}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else listens there.
    #[error("{address} is in use")]
    PortInUse {
        /// Where we wanted to listen.
        address: SocketAddr,
    },
    /// Somebody else listens where HTTP for machines was told to come in.
    #[error("{address} is in use: HTTP for machines cannot come in there")]
    GatewayInUse {
        /// Where we wanted to listen.
        address: SocketAddr,
    },
    /// We cannot listen there.
    #[error("listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// We cannot listen on the unix socket.
    #[error("listen on {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Something that is no socket stands in the way; it is left alone.
    #[error("{} is no socket", path.display())]
    NotASocket {
        /// What.
        path: PathBuf,
    },
    /// The engine does not start.
    #[error(transparent)]
    Engine(#[from] hutch_engine::Error),
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Setting { .. } | Error::NoHome { .. } | Error::Config { .. } => Kind::Invalid,
            Error::PortInUse { .. } | Error::GatewayInUse { .. } | Error::NotASocket { .. } => {
                Kind::Conflict
            }
            Error::Listen { .. } | Error::Socket { .. } => Kind::Unavailable,
            Error::Engine(error) => error.kind(),
        }
    }

    /// What to do next, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NoHome { key } => Some(format!("set HOME, or HUTCH_{}", key.to_uppercase())),
            Error::PortInUse { address } => Some(format!(
                "is a server running already? Choose another port with --listen {}:PORT or API_PORT",
                match address {
                    SocketAddr::V4(v4) => v4.ip().to_string(),
                    SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
                }
            )),
            Error::GatewayInUse { .. } => Some(
                "choose another port with --http-listen ADDRESS:PORT or HUTCH_HTTP_LISTEN, or `off`"
                    .to_owned(),
            ),
            Error::NotASocket { .. } => Some("move it out of the way".to_owned()),
            Error::Engine(error) => error.hint(),
            _ => None,
        }
    }
}
