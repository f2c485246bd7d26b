//! The table `[gateway]`: how machines are reached from outside.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use hutch_contract::name::Name;
use hutch_engine::{Reach, Urls};
use hutch_gateway::caddy::is_local;
use serde::{Deserialize, Serialize};

use super::Secret;

/// Longest domain in bytes: with a label and a dot before it, it is as long as DNS allows (RFC 1035, 2.3.4).
const MAX_DOMAIN: usize = 253 - Name::MAX_LEN - 1;

/// How machines are reached from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// Where HTTP comes in.
    pub http_listen: HttpListen,
    /// Machines are one label below it.
    pub domain: Domain,
    /// `http` or `https`, in the URLs of machines.
    pub url_scheme: Option<String>,
    /// The port in the URLs of machines.
    pub url_port: Option<u16>,
    /// The address that ports of machines listen on.
    pub ports_bind: IpAddr,
    /// The lowest port that is given out.
    pub port_min: u16,
    /// The highest one.
    pub port_max: u16,
    /// Whose Caddy brings HTTPS.
    pub caddy: CaddyMode,
    /// Where HTTPS comes in.
    pub https_port: u16,
    /// On which address.
    pub https_bind: Option<IpAddr>,
    /// The admin API of a Caddy that runs.
    pub caddy_admin: String,
    /// The program of a Caddy of ours.
    pub caddy_program: PathBuf,
    /// The HTTP port of a Caddy of ours.
    pub caddy_http_port: u16,
    /// Whom the certificate authority may write to.
    pub acme_email: Option<String>,
    /// The certificate authority.
    pub acme_directory: Option<String>,
    /// Files with the roots that it is trusted by, with commas between.
    pub acme_roots: Option<String>,
    /// Caddy's module for the DNS provider, for one certificate for all names.
    pub caddy_dns_provider: Option<Secret>,
    /// What a Caddy of ours gets as environment. Not configurable.
    #[serde(skip)]
    pub caddy_environment: BTreeMap<String, Secret>,
    /// Somebody has set `http_listen`. Not configurable.
    #[serde(skip)]
    pub chosen: bool,
}

impl Gateway {
    /// What the engine is told; `port` is where HTTP really comes in, if it does.
    #[must_use]
    pub fn reach(&self, port: Option<u16>) -> Reach {
        let with_caddy = self.caddy != CaddyMode::Off;
        let scheme = match self.url_scheme.as_deref() {
            Some(scheme) => scheme,
            None if with_caddy => "https",
            None => "http",
        };
        let (own, inner) = match scheme {
            "https" if with_caddy => (443, Some(self.https_port)),
            "https" => (443, Some(443)),
            _ => (80, port),
        };
        let urls = self.url_port.or(inner).map(|port| Urls {
            scheme: scheme.to_owned(),
            domain: self.domain.to_string(),
            port: (port != own).then_some(port),
        });
        Reach {
            ports: self.port_min..=self.port_max,
            ports_bind: self.ports_bind,
            urls,
        }
    }

    /// Whether certificates are of an authority of our own, as no public one gives any for such a domain.
    #[must_use]
    pub fn is_own_authority(&self) -> bool {
        self.acme_directory.is_none() && is_local(&self.domain.0)
    }

    /// The addresses for HTTPS; none means all.
    #[must_use]
    pub fn https_addresses(&self) -> Vec<IpAddr> {
        let below_localhost = self.domain.0.rsplit('.').next() == Some("localhost");
        match self.https_bind {
            Some(address) if address.is_unspecified() => Vec::new(),
            Some(address) => vec![address],
            None if below_localhost => vec![IpAddr::from([127, 0, 0, 1])],
            None => Vec::new(),
        }
    }
}

/// Whose Caddy brings HTTPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaddyMode {
    /// Nobody's.
    Off,
    /// One that runs, else one of ours, else nobody's.
    Auto,
    /// One that runs anyhow.
    Running,
    /// A child of the server.
    Own,
}

/// Reads paths with commas between.
pub(crate) fn paths(text: &str) -> Vec<PathBuf> {
    let paths = text.split(',').map(str::trim);
    paths
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .collect()
}

/// Reads what Caddy's module for a DNS provider wants.
pub(crate) fn provider(text: &str) -> Option<serde_json::Value> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    value["name"].is_string().then_some(value)
}

/// Where HTTP for machines comes in: an address, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HttpListen(pub Option<SocketAddr>);

impl TryFrom<String> for HttpListen {
    type Error = String;

    fn try_from(text: String) -> Result<HttpListen, String> {
        match text.as_str() {
            "off" => Ok(HttpListen(None)),
            address => match address.parse() {
                Ok(address) => Ok(HttpListen(Some(address))),
                Err(_) => Err("is neither ADDRESS:PORT nor off".to_owned()),
            },
        }
    }
}

impl From<HttpListen> for String {
    fn from(listen: HttpListen) -> String {
        listen
            .0
            .map_or("off".to_owned(), |address| address.to_string())
    }
}

/// A DNS name in lower case, without a dot at its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain(String);

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Domain {
    type Error = String;

    fn try_from(text: String) -> Result<Domain, String> {
        let text = text.strip_suffix('.').unwrap_or(&text).to_ascii_lowercase();
        match text.len() <= MAX_DOMAIN && text.split('.').all(|label| label.parse::<Name>().is_ok())
        {
            true => Ok(Domain(text)),
            false => Err("is no domain name".to_owned()),
        }
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> String {
        domain.0
    }
}
