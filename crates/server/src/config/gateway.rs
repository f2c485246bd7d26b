//! The table `[gateway]`: how machines are reached from outside.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use hutch_contract::name::Name;
use hutch_engine::{Reach, Urls};
use serde::{Deserialize, Serialize};

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
    pub url_scheme: String,
    /// The port in the URLs of machines.
    pub url_port: Option<u16>,
    /// The address that ports of machines listen on.
    pub ports_bind: IpAddr,
    /// The lowest port that is given out.
    pub port_min: u16,
    /// The highest one.
    pub port_max: u16,
    /// Somebody has set `http_listen`. Not configurable.
    #[serde(skip)]
    pub chosen: bool,
}

impl Gateway {
    /// What the engine is told; `port` is where HTTP really comes in, if it does.
    #[must_use]
    pub fn reach(&self, port: Option<u16>) -> Reach {
        let (own, inner) = match self.url_scheme.as_str() {
            "https" => (443, Some(443)),
            _ => (80, port),
        };
        let urls = self.url_port.or(inner).map(|port| Urls {
            scheme: self.url_scheme.clone(),
            domain: self.domain.to_string(),
            port: (port != own).then_some(port),
        });
        Reach {
            ports: self.port_min..=self.port_max,
            ports_bind: self.ports_bind,
            urls,
        }
    }
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
