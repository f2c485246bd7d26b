//! The API client: one method per route of [`routes`] and its neighbours, typed errors, byte streams of any size.
//!
//! It keeps no state but its connections, retries nothing and reads no environment: whoever makes it says where the
//! server is and with which key.

mod error;
mod files;
mod processes;
mod routes;
mod snapshots;
mod sse;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::de::DeserializeOwned;

use crate::error::ErrorBody;

pub use error::Error;
pub use files::Upload;
pub use processes::{AttachEvent, AttachInput, AttachOutput};
pub use routes::Until;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an ordinary answer may take; added to the time that a request asks the server to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an unused connection is kept: less than the server's 10 s, so that none is used just as it closes.
const POOL_IDLE: Duration = Duration::from_secs(5);
/// The most bytes of an answer that is read as a whole: a blocking exec's two streams with every byte escaped, or a
/// page of a thousand rows, fit well.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `http://host:port` or `https://host`, with a path before the API's own when it stands behind a proxy.
    Url(String),
    /// The unix socket of a server on this host; its owner needs no key.
    Unix(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Url(url) => f.write_str(url),
            Target::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Bytes as they come in.
pub type ByteStream = BoxStream<'static, Result<Bytes, Error>>;

/// A body that is sent: the caller's bytes, or why there are no more.
pub type Body = BoxStream<'static, std::io::Result<Bytes>>;

/// Bytes of a file, or of a log.
pub struct Download {
    /// How many bytes come, when the server knows.
    pub size_bytes: Option<u64>,
    /// Permission bits of the file; none for a log.
    pub mode: Option<u32>,
    /// The bytes. An end before `size_bytes` is an error, never a short file.
    pub bytes: ByteStream,
}

/// Chooses the cryptography of TLS for this process; every HTTP client here needs that before it is made.
pub fn ready_for_tls() {
    // An error only says that it was chosen before.
    let _chosen = rustls::crypto::ring::default_provider().install_default();
}

/// A client of one server. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    target: Target,
    token: Option<HeaderValue>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client for a server; connects at the first request.
    ///
    /// # Errors
    /// [`Error::Target`] when the URL is none, or neither `http` nor `https`.
    pub fn new(target: Target) -> Result<Client, Error> {
        let refused = |reason: &str| Error::Target {
            target: target.to_string(),
            reason: reason.to_owned(),
        };
        // A server does not redirect, and a key must not follow somebody else's redirect.
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_idle_timeout(POOL_IDLE)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        let (builder, base) = match &target {
            Target::Url(text) => {
                let url = Url::parse(text).map_err(|error| refused(&error.to_string()))?;
                if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
                    return Err(refused("only http://HOST:PORT and https://HOST are known"));
                }
                (builder, url)
            }
            Target::Unix(path) => {
                let base = Url::parse("http://localhost").expect("a constant");
                (builder.unix_socket(path.as_path()), base)
            }
        };
        ready_for_tls();
        let builder = match base.scheme() {
            "https" => builder,
            // Reading the system's certificates takes longer than most requests.
            _ => builder.tls_certs_only([]),
        };
        let http = builder.build().map_err(|source| Error::Protocol {
            what: "prepare the client",
            source: source.into(),
        })?;
        Ok(Client {
            http,
            base,
            target,
            token: None,
        })
    }

    /// The same client with a key.
    ///
    /// # Errors
    /// [`Error::Token`] when the key cannot stand in a header.
    pub fn with_token(mut self, token: &str) -> Result<Client, Error> {
        let mut value =
            HeaderValue::try_from(format!("Bearer {}", token.trim())).map_err(|_| Error::Token)?;
        value.set_sensitive(true);
        self.token = Some(value);
        Ok(self)
    }

    /// Where it sends requests to.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A request for the path made of these segments, each encoded.
    fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, Error> {
        // These two would be taken for steps in the path, and the request for another one.
        if let Some(bad) = segments
            .iter()
            .find(|segment| matches!(**segment, "" | "." | ".."))
        {
            return Err(Error::Reference {
                reference: (*bad).to_owned(),
            });
        }
        let mut url = self.base.clone();
        url.path_segments_mut()
            .expect("an http URL has a path")
            .pop_if_empty()
            .extend(segments);
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(token) = &self.token {
            headers.insert(reqwest::header::AUTHORIZATION, token.clone());
        }
        Ok(self.http.request(method, url).headers(headers))
    }

    /// Sends a request; an answer that is no success becomes [`Error::Api`].
    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let response = request
            .send()
            .await
            .map_err(|source| Error::sending(&self.target, source))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let body = read(response).await?;
        let body = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
            code: "not_hutch".to_owned(),
            message: format!(
                "{} answered {status}, not as a Hutch server does",
                self.target
            ),
            hint: Some("is it the right address, and is a proxy in between?".to_owned()),
            request_id: String::new(),
        });
        Err(Error::Api {
            status: status.as_u16(),
            body,
        })
    }

    /// Sends a request and reads its JSON answer; `waits` is what the request itself asks the server to wait.
    async fn json<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        waits: Duration,
    ) -> Result<T, Error> {
        decode(self.send(request.timeout(ANSWER_TIMEOUT + waits)).await?).await
    }

    /// Sends a request whose answer has no body worth reading.
    async fn nothing(&self, request: RequestBuilder) -> Result<(), Error> {
        self.send(request.timeout(ANSWER_TIMEOUT)).await.map(drop)
    }
}

/// The JSON of an answer.
async fn decode<T: DeserializeOwned>(response: Response) -> Result<T, Error> {
    let body = read(response).await?;
    serde_json::from_slice(&body).map_err(|source| Error::Protocol {
        what: "read the answer",
        source: source.into(),
    })
}

/// The whole of an answer, within the limit.
async fn read(response: Response) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    let mut bytes = stream(response);
    while let Some(chunk) = bytes.try_next().await? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(Error::Protocol {
                what: "read the answer",
                source: "it is larger than 64 MiB".into(),
            });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The body of an answer as it comes in.
fn stream(response: Response) -> ByteStream {
    response.bytes_stream().map_err(Error::reading).boxed()
}
