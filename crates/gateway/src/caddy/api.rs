//! The admin API of a Caddy: one small request at a time, each on a connection of its own.
//!
//! Facts: Caddy's `admin.go` (2.6.2 and later). Its answers to `GET /config/` carry their `Etag` as a trailer.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HOST, IF_MATCH};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::BoxStream;

/// For an answer that only tells something.
const READ: Duration = Duration::from_secs(10);
/// For a change: Caddy starts everything anew before it answers.
const CHANGE: Duration = Duration::from_secs(60);
/// Bytes of an answer.
const MOST: usize = 16 * 1024 * 1024;

/// Where the admin API of a Caddy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admin {
    /// `host:port`; what Caddy has when nobody says otherwise is `localhost:2019`.
    Tcp(String),
    /// A socket.
    Unix(PathBuf),
}

/// Not an address of an admin API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither host:port nor unix/ with the path of a socket")]
pub struct NoAddress(String);

impl FromStr for Admin {
    type Err = NoAddress;

    /// As Caddy writes them: `localhost:2019`, `tcp/localhost:2019`, `unix//run/caddy/admin.sock`.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        if let Some(path) = text.strip_prefix("unix/").filter(|path| path.len() > 1) {
            return Ok(Self::Unix(path.into()));
        }
        let tcp = text.strip_prefix("tcp/").unwrap_or(text);
        match tcp.rsplit_once(':') {
            Some((host, port)) if !host.contains('/') && port.parse::<u16>().is_ok() => {
                let host = if host.is_empty() { "localhost" } else { host };
                Ok(Self::Tcp(format!("{host}:{port}")))
            }
            _ => Err(NoAddress(text.to_owned())),
        }
    }
}

impl fmt::Display for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix/{}", path.display()),
        }
    }
}

/// What came of a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// Nobody takes connections there, or not ours.
    #[error("cannot connect to the admin API at {admin}: {source}")]
    Unreachable {
        /// Where.
        admin: Admin,
        /// Why.
        source: io::Error,
    },
    /// No answer in time.
    #[error("the admin API at {0} does not answer")]
    Timeout(Admin),
    /// The connection broke, or what came is not what a Caddy says.
    #[error("the admin API at {admin} gives no proper answer: {why}")]
    Broken {
        /// Where.
        admin: Admin,
        /// What is wrong with it.
        why: String,
    },
    /// Caddy says no.
    #[error("Caddy refuses with status {status}: {message}")]
    Refused {
        /// The status of its answer.
        status: u16,
        /// In its words.
        message: String,
    },
    /// Somebody else changed the configuration meanwhile.
    #[error("the configuration was changed meanwhile")]
    Changed,
}

/// A whole configuration, and what proves later that it still is that.
#[derive(Debug)]
pub(super) struct Config {
    /// `null`: there is none.
    pub(super) value: Value,
    etag: Option<HeaderValue>,
}

impl Admin {
    /// The configuration as it is.
    pub(super) async fn config(&self) -> Result<Config, ApiError> {
        let request = self.request(Method::GET, "/config/");
        let (headers, body) = self.call(request, Bytes::new(), READ).await?;
        Ok(Config {
            value: self.json(&body)?,
            etag: headers.get(ETAG).cloned(),
        })
    }

    /// Makes `value` the configuration, unless it is another one now than `instead_of`. With `force` Caddy also takes
    /// it when it looks the same.
    pub(super) async fn replace(
        &self,
        instead_of: &Config,
        value: &Value,
        force: bool,
    ) -> Result<(), ApiError> {
        let mut request = self.request(Method::POST, "/config/");
        let json = HeaderValue::from_static("application/json");
        request.insert(CONTENT_TYPE, json);
        if let Some(etag) = &instead_of.etag {
            request.insert(IF_MATCH, etag.clone());
        }
        if force {
            request.insert(CACHE_CONTROL, HeaderValue::from_static("must-revalidate"));
        }
        self.call(request, value.to_string().into(), CHANGE).await?;
        Ok(())
    }

    /// The certificate of a certificate authority's root, in PEM.
    pub(super) async fn root_certificate(&self, authority: &str) -> Result<String, ApiError> {
        let request = self.request(Method::GET, &format!("/pki/ca/{authority}"));
        let (_, body) = self.call(request, Bytes::new(), READ).await?;
        match self.json(&body)?["root_certificate"].as_str() {
            Some(pem) => Ok(pem.to_owned()),
            None => Err(self.broken("no root certificate")),
        }
    }

    fn request(&self, method: Method, path: &str) -> Head {
        // It compares this with where it listens, against pages in browsers; at a socket, with nothing.
        let host = match self {
            Self::Tcp(address) => address.as_str(),
            Self::Unix(_) => "",
        };
        Head {
            method,
            path: path.to_owned(),
            host: host.to_owned(),
            headers: HeaderMap::new(),
        }
    }

    async fn call(
        &self,
        head: Head,
        body: Bytes,
        within: Duration,
    ) -> Result<(HeaderMap, Bytes), ApiError> {
        let called = timeout(within, self.call_unbounded(head, body)).await;
        let (status, headers, body) = called.map_err(|_| ApiError::Timeout(self.clone()))??;
        match status {
            StatusCode::PRECONDITION_FAILED => Err(ApiError::Changed),
            status if !status.is_success() => Err(ApiError::Refused {
                status: status.as_u16(),
                message: message(&body),
            }),
            _ => Ok((headers, body)),
        }
    }

    async fn call_unbounded(
        &self,
        head: Head,
        body: Bytes,
    ) -> Result<(StatusCode, HeaderMap, Bytes), ApiError> {
        let broken = |error: hyper::Error| self.broken(error);
        let stream: BoxStream = match self {
            Self::Tcp(address) => Box::new(self.reached(TcpStream::connect(address).await)?),
            Self::Unix(path) => Box::new(self.reached(UnixStream::connect(path).await)?),
        };
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(broken)?;
        let exchange = async {
            let request = head.with(body).map_err(|error| self.broken(error))?;
            let answer = sender.send_request(request).await.map_err(broken)?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, MOST).collect().await;
            let body = body.map_err(|error| self.broken(error))?;
            let mut headers = parts.headers;
            headers.extend(body.trailers().cloned().unwrap_or_default());
            Ok((parts.status, headers, body.to_bytes()))
        };
        // The connection ends with the exchange, and the other way round the exchange fails by itself.
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            done = exchange.as_mut() => done,
            _ = connection => exchange.await,
        }
    }

    fn reached<S>(&self, connected: io::Result<S>) -> Result<S, ApiError> {
        connected.map_err(|source| ApiError::Unreachable {
            admin: self.clone(),
            source,
        })
    }

    fn json(&self, body: &[u8]) -> Result<Value, ApiError> {
        serde_json::from_slice(body).map_err(|error| self.broken(error))
    }

    fn broken(&self, why: impl ToString) -> ApiError {
        ApiError::Broken {
            admin: self.clone(),
            why: why.to_string(),
        }
    }
}

/// A request before it has a body.
struct Head {
    method: Method,
    path: String,
    host: String,
    headers: HeaderMap,
}

impl Head {
    fn insert(&mut self, name: http::HeaderName, value: HeaderValue) {
        self.headers.insert(name, value);
    }

    fn with(self, body: Bytes) -> Result<Request<Full<Bytes>>, http::Error> {
        let request = Request::builder().method(self.method).uri(self.path);
        let mut request = request.header(HOST, self.host).body(Full::new(body))?;
        request.headers_mut().extend(self.headers);
        Ok(request)
    }
}

/// What Caddy says of an error: `{"error": "…"}`.
fn message(body: &[u8]) -> String {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let said = json.as_ref().and_then(|json| json["error"].as_str());
    let text = match said {
        Some(text) => text.into(),
        None => String::from_utf8_lossy(body),
    };
    text.trim().chars().take(1000).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_caddy_writes_them() {
        let tcp = |text: &str| Ok(Admin::Tcp(text.into()));
        assert_eq!("localhost:2019".parse(), tcp("localhost:2019"));
        assert_eq!("tcp/127.0.0.1:1".parse(), tcp("127.0.0.1:1"));
        assert_eq!(":2019".parse(), tcp("localhost:2019"));
        assert_eq!("[::1]:2019".parse(), tcp("[::1]:2019"));
        let socket = Admin::Unix("/run/caddy/admin.sock".into());
        assert_eq!("unix//run/caddy/admin.sock".parse(), Ok(socket.clone()));
        assert_eq!(socket.to_string(), "unix//run/caddy/admin.sock");
        for wrong in ["", "localhost", "unix/", "http://localhost:2019", "a:b"] {
            assert!(wrong.parse::<Admin>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn errors_are_told_in_caddys_words() {
        assert_eq!(message(br#"{"error":"loading: no"}"#), "loading: no");
        assert_eq!(message(b"host not allowed\n"), "host not allowed");
    }
}
