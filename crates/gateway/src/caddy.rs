//! Caddy in front of the HTTP gateway: TLS for `*.DOMAIN`, with certificates on demand.
//!
//! ```text
//! clients ─TLS─► Caddy ─unix socket─► http::Gateway ─► machines
//!                  ▲ └─ may this name have a certificate? ─► ask_url
//!   keeper ─admin API─┘
//! ```
//!
//! The Caddy is one that runs anyhow, or a child of ours. In the first case our part of its configuration stays when this
//! process ends, so that its clients keep their connections and find us again after a restart; [`remove`] takes it out.
//! A child ends with us, and with it what goes through it.
//!
//! Machines never wait for any of this.

mod api;
mod config;
mod keeper;
mod own;
mod sys;

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use api::{Admin, ApiError, NoAddress};

/// Everything about Caddy that a server knows.
#[derive(Debug, Clone)]
pub struct CaddyConfig {
    /// Whose Caddy it is.
    pub mode: Mode,
    /// Letters and digits that tell this instance from others in the same Caddy.
    pub tag: String,
    /// Machines are one label below it.
    pub domain: String,
    /// Where clients come in.
    pub https_port: u16,
    /// The addresses for that port; none means all. Somebody else's server on the port keeps the addresses that it has.
    pub bind: Vec<IpAddr>,
    /// Whether requests to Caddy's HTTP port are sent to HTTPS. In somebody else's server that is as they have set it.
    pub redirect: bool,
    /// What Caddy asks with `?domain=NAME` before it gets a certificate: 2xx means yes.
    pub ask_url: String,
    /// The socket of a [`crate::http::Listener::Proxy`]. Caddy's user must be able to connect to it, and nobody else.
    pub upstream: PathBuf,
    /// Where certificates come from.
    pub issuer: Issuer,
    /// Between two looks at whether our part is still there. 15 s is good: Caddy logs each.
    pub check_every: Duration,
}

/// Whose Caddy it is.
#[derive(Debug, Clone)]
pub enum Mode {
    /// One that runs already.
    Existing(Admin),
    /// A child of this process.
    Own(OwnCaddy),
}

/// How to run a Caddy of our own.
#[derive(Clone)]
pub struct OwnCaddy {
    /// The program; found in `PATH` of `environment` unless it is a path.
    pub program: PathBuf,
    /// Its home, for nobody else: certificates, keys, logs, and the socket of its admin API.
    pub dir: PathBuf,
    /// All that it gets as environment, but for its home directories: proxies, credentials of DNS providers.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it answers ACME's HTTP challenge, and redirects; 80 but for tests.
    pub http_port: u16,
}

impl fmt::Debug for OwnCaddy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.environment.iter().map(|(name, _)| name).collect();
        f.debug_struct("OwnCaddy")
            .field("program", &self.program)
            .field("dir", &self.dir)
            .field("environment", &names)
            .field("http_port", &self.http_port)
            .finish()
    }
}

/// Where certificates come from.
#[derive(Clone)]
pub enum Issuer {
    /// A certificate authority of this instance in Caddy; clients must be told of its root, which is put nowhere.
    Internal,
    /// A public authority, for each name when it is first asked for.
    Acme(Acme),
    /// One certificate for all names, by a record in DNS.
    WildcardDns {
        /// The authority.
        acme: Acme,
        /// What Caddy's module for the DNS provider wants, with the provider's `name`. Debian's Caddy has no such module.
        provider: Value,
    },
}

impl Issuer {
    /// Whether Caddy gets a certificate for each name, and asks before.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        !matches!(self, Self::WildcardDns { .. })
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Internal => f.write_str("Internal"),
            Self::Acme(acme) => f.debug_tuple("Acme").field(acme).finish(),
            // The rest of it is credentials.
            Self::WildcardDns { acme, provider } => f
                .debug_struct("WildcardDns")
                .field("acme", acme)
                .field("provider", &provider["name"])
                .finish(),
        }
    }
}

/// An ACME authority (RFC 8555).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acme {
    /// Whom it may write to.
    pub email: Option<String>,
    /// The URL of its directory; Let's Encrypt's when not said.
    pub directory: Option<String>,
    /// PEM files with the roots that its own HTTPS is trusted by, where the system's are not enough.
    pub trusted_roots: Vec<PathBuf>,
}

/// Whether no public authority gives certificates for names below `domain` (RFC 2606, RFC 6761, RFC 6762; `.internal` by
/// ICANN's resolution 2024.07.29.06).
#[must_use]
pub fn is_local(domain: &str) -> bool {
    let top = domain.trim_end_matches('.').rsplit('.').next();
    let top = top.unwrap_or_default().to_ascii_lowercase();
    ["localhost", "internal", "test", "local"].contains(&top.as_str())
}

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Not looked yet, or our own is not there yet.
    Starting,
    /// There is no such program.
    Absent,
    /// Caddy does not run, does not answer or does not take our part.
    Down {
        /// What happened.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// Caddy runs, and what somebody else configured stands in our way: nothing was changed.
    Foreign(Foreign),
    /// Our names are served.
    Up {
        /// There.
        https_port: u16,
        /// Whether by a server of somebody else, which had the port.
        shared: bool,
    },
}

/// What stands in our way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// What it is.
    pub what: String,
    /// What to do.
    pub hint: String,
}

/// What is wrong with a [`CaddyConfig`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It becomes a part of ids.
    #[error("the tag {0:?} is not made of small letters and digits")]
    Tag(String),
    /// It becomes a part of host names.
    #[error("the domain {0:?} is not a domain")]
    Domain(String),
    /// The kernel takes no longer one (`sun_path`, unix(7)), and Caddy no other.
    #[error("the path of the socket {0} is longer than 107 bytes or not text")]
    Socket(PathBuf),
}

/// Keeps our part in a Caddy, and the Caddy alive when it is our own. Dropping it ends both at once.
#[derive(Debug)]
pub struct Caddy {
    status: watch::Receiver<Status>,
    admin: Admin,
    authority: String,
    closing: CancellationToken,
    _closes: DropGuard,
    keeping: JoinHandle<()>,
}

impl Caddy {
    /// Begins. Needs a tokio runtime.
    ///
    /// # Errors
    /// Only what is wrong with `config`; all else is a [`Status`].
    pub fn start(mut config: CaddyConfig) -> Result<Self, ConfigError> {
        config.domain = config.domain.trim_matches('.').to_ascii_lowercase();
        check(&config)?;
        let (publish, status) = watch::channel(Status::Starting);
        let closing = CancellationToken::new();
        let admin = config.mode.admin();
        let authority = config::name(&config.tag);
        let keeping = keeper::keep(config, admin.clone(), publish, closing.clone());
        Ok(Self {
            status,
            admin,
            authority,
            _closes: closing.clone().drop_guard(),
            closing,
            keeping: tokio::spawn(keeping),
        })
    }

    /// How it stands, now and whenever that changes.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// The root certificate in PEM that clients must trust, with [`Issuer::Internal`].
    ///
    /// # Errors
    /// Whatever keeps Caddy from telling it; that it is not configured yet, too.
    pub async fn root_certificate(&self) -> Result<String, ApiError> {
        self.admin.root_certificate(&self.authority).await
    }

    /// Ends, and ends a Caddy of our own; that takes up to 10 s, for requests that are still going on. Our part stays in
    /// one that is not ours.
    pub async fn close(self) {
        self.closing.cancel();
        // It does not panic; and if it did, there is nothing left to end.
        let _ = self.keeping.await;
    }
}

/// Takes everything of ours out of a Caddy, and says whether there was anything. What it has stored stays: certificates,
/// and the keys of our certificate authority.
///
/// # Errors
/// Nothing was changed then.
pub async fn remove(admin: &Admin, tag: &str) -> Result<bool, ApiError> {
    keeper::remove(admin, tag).await
}

impl Mode {
    fn admin(&self) -> Admin {
        match self {
            Self::Existing(admin) => admin.clone(),
            Self::Own(own) => Admin::Unix(own.admin_socket()),
        }
    }
}

fn check(config: &CaddyConfig) -> Result<(), ConfigError> {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let tag = &config.tag;
    if tag.is_empty() || !tag.bytes().all(alphanumeric) {
        return Err(ConfigError::Tag(tag.clone()));
    }
    let domain = &config.domain;
    let is_label = |label: &str| {
        !label.is_empty() && label.bytes().all(|byte| alphanumeric(byte) || byte == b'-')
    };
    if !domain.split('.').all(is_label) {
        return Err(ConfigError::Domain(domain.clone()));
    }
    let mut sockets = vec![config.upstream.clone()];
    if let Mode::Own(own) = &config.mode {
        sockets.push(own.admin_socket());
    }
    let too_long = |path: &PathBuf| path.to_str().is_none_or(|path| path.len() > 107);
    match sockets.into_iter().find(too_long) {
        Some(path) => Err(ConfigError::Socket(path)),
        None => Ok(()),
    }
}
