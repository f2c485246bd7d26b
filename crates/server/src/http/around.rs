//! Around every request: its id, its log line, and the body of an error answer.

use std::any::Any;
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hutch_contract::error::Kind;
use tracing::Instrument;

use super::error::{Failed, Failure};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 64;

/// Gives the request an id, runs it, and finishes the answer.
pub(super) async fn around(request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok());
    let id = match given {
        Some(id) if is_request_id(id) => id.to_owned(),
        _ => ulid::Ulid::generate().to_string().to_lowercase(),
    };
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let began = Instant::now();
    let span = tracing::info_span!("request", request_id = %id);
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    let failure =
        (status.is_client_error() || status.is_server_error()).then(|| failure(&response));
    let _in = span.enter();
    let route = route.as_deref().unwrap_or("(none)");
    let (status, took_ms) = (status.as_u16(), began.elapsed().as_millis() as u64);
    match &failure {
        None if route == "/health" => tracing::debug!(%method, route, status, took_ms, "answered"),
        None => tracing::info!(%method, route, status, took_ms, "answered"),
        Some(Failed(failure)) => {
            let code = failure.code.as_ref();
            let cause = failure.cause.as_deref().unwrap_or(&failure.message);
            if status == 500 {
                tracing::error!(%method, route, status, took_ms, code, cause, "answered");
            } else {
                tracing::info!(%method, route, status, took_ms, code, cause, "answered");
            }
        }
    }
    if let Some(Failed(failure)) = failure {
        response = with_body(response, &failure, id.clone());
    }
    let value = HeaderValue::from_str(&id).expect("an id has only letters, digits and dashes");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

/// An id from outside stands in our log and our headers.
fn is_request_id(id: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(good)
}

/// The failure of a response, also of one that the router made by itself.
fn failure(response: &Response) -> Failed {
    response
        .extensions()
        .get::<Failed>()
        .cloned()
        .unwrap_or_else(|| {
            let status = response.status();
            let (code, message) = match status {
                StatusCode::NOT_FOUND => ("no_such_route", "there is nothing at this path"),
                StatusCode::METHOD_NOT_ALLOWED => {
                    ("method_not_allowed", "this path does not know that method")
                }
                StatusCode::PAYLOAD_TOO_LARGE => ("too_large", "the body is larger than the limit"),
                _ => (
                    "http",
                    status.canonical_reason().unwrap_or("the request failed"),
                ),
            };
            let failure = Failure::with_status(status, code, message);
            Failed(std::sync::Arc::new(failure))
        })
}

fn with_body(response: Response, failure: &Failure, request_id: String) -> Response {
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    if failure.status == Kind::Unauthenticated.http_status() {
        parts
            .headers
            .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let body = serde_json::to_vec(&failure.body(request_id)).expect("texts are JSON");
    Response::from_parts(parts, body.into())
}

/// A handler panicked: a fault of ours, for this request alone.
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no text");
    Failure::bug(format!("a handler panicked: {text}")).into_response()
}
