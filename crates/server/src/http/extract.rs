//! What handlers read from a request: each refuses with an error that names the field.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequest, FromRequestParts, Request, WebSocketUpgrade};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use hutch_contract::error::Kind;
use hutch_engine::Principal;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::App;
use super::error::Failure;
use crate::serve::Place;

/// The largest JSON body.
const MAX_JSON_BYTES: usize = 1024 * 1024;
/// How long a JSON body may take to arrive.
const JSON_DEADLINE: Duration = Duration::from_secs(30);
/// How long a raw body may pause.
const RAW_PAUSE: Duration = Duration::from_secs(60);

/// Who asks; put there by `auth`, so a handler cannot run without.
pub(super) struct Caller(pub Principal);

impl FromRequestParts<App> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let principal = parts.extensions.get::<Principal>().cloned();
        principal
            .map(Caller)
            .ok_or_else(|| Failure::bug("a route without authentication asks who calls"))
    }
}

/// Fields of the path.
pub(super) struct Path<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, app).await;
        path.map(|path| Path(path.0))
            .map_err(|refusal| Failure::invalid(refusal.body_text()))
    }
}

/// Fields of the query; an unknown one is refused.
pub(super) struct Query<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Failure> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query.map(|query| Query(query.0)).map_err(|refusal| {
            let why = refusal
                .source()
                .map_or_else(|| refusal.body_text(), ToString::to_string);
            Failure::invalid(format!("the query is wrong: {why}"))
        })
    }
}

/// A request to become a WebSocket, and the place that its connection has.
pub(super) struct Upgrade(pub WebSocketUpgrade, pub Option<Place>);

impl FromRequestParts<App> for Upgrade {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let place = parts.extensions.get::<Place>().cloned();
        match WebSocketUpgrade::from_request_parts(parts, app).await {
            Ok(upgrade) => Ok(Upgrade(upgrade, place)),
            Err(_) => {
                let message = "this route is a WebSocket: ask for the upgrade to one, version 13";
                let status = StatusCode::UPGRADE_REQUIRED;
                Err(Failure::with_status(status, "no_websocket", message))
            }
        }
    }
}

/// A JSON body of bounded size.
pub(super) struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &App) -> Result<Self, Failure> {
        refuse_encoding(request.headers())?;
        if !is_json(request.headers()) {
            return Err(unsupported("the body must be application/json"));
        }
        let too_large =
            || Failure::new(Kind::TooLarge, "too_large", "a JSON body has at most 1 MiB");
        if length(request.headers()).is_some_and(|length| length > MAX_JSON_BYTES as u64) {
            return Err(too_large());
        }
        let mut chunks = request.into_body().into_data_stream();
        let reading = async {
            let mut body = Vec::new();
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk.map_err(|_| Failure::invalid("the body broke off"))?;
                if body.len() + chunk.len() > MAX_JSON_BYTES {
                    return Err(too_large());
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body)
        };
        let body = timeout(JSON_DEADLINE, reading).await.map_err(|_| {
            let message = "the body took longer than 30 s to arrive";
            Failure::with_status(StatusCode::REQUEST_TIMEOUT, "slow_body", message)
        })??;
        // serde would also take a list, with the fields in the order of their declaration.
        if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return Err(Failure::invalid(
                "the body is wrong: it must be a JSON object",
            ));
        }
        axum::Json::<T>::from_bytes(&body)
            .map(|json| Json(json.0))
            .map_err(|refusal| {
                let why = refusal
                    .source()
                    .map_or_else(|| refusal.body_text(), ToString::to_string);
                Failure::invalid(format!("the body is wrong: {why}"))
            })
    }
}

/// A raw body of any size, read as fast as it is taken.
pub(super) struct Raw {
    /// What the client says it sends; hyper holds it to that.
    pub size_bytes: Option<u64>,
    /// The bytes. One that breaks off or stands still ends with an error.
    pub bytes: BoxStream<'static, io::Result<Bytes>>,
}

impl FromRequest<App> for Raw {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &App) -> Result<Self, Failure> {
        refuse_encoding(request.headers())?;
        let size_bytes = length(request.headers());
        Ok(Raw {
            size_bytes,
            bytes: unpaused(request.into_body()),
        })
    }
}

fn unpaused(body: Body) -> BoxStream<'static, io::Result<Bytes>> {
    let next = |chunks: Option<BodyDataStream>| async {
        let mut chunks = chunks?;
        match timeout(RAW_PAUSE, chunks.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(chunks))),
            Ok(Some(Err(error))) => Some((Err(io::Error::other(error)), None)),
            Ok(None) => None,
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
        }
    };
    stream::unfold(Some(body.into_data_stream()), next).boxed()
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind
        .and_then(|kind| kind.split(';').next())
        .unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("application/json")
}

/// What is compressed is not taken: a few bytes could become very many.
fn refuse_encoding(headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(unsupported("send the body without content-encoding"))
        }
        _ => Ok(()),
    }
}

fn unsupported(message: &str) -> Failure {
    Failure::with_status(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        message,
    )
}
