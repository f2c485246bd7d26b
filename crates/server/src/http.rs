//! The HTTP API: one file per resource, each with its handlers and their rows in `routes`; this file puts them
//! together. A handler parses, calls the engine and forms the answer; it decides nothing.

mod around;
mod attach;
mod caddy;
mod document;
mod error;
mod exec;
mod extract;
mod files;
mod images;
mod machines;
mod meta;
mod operations;
mod ports;
mod processes;
mod runtimes;
mod snapshots;
mod tokens;

use std::future::Future;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use hutch_engine::Engine;
use hutch_gateway::token::Tokens;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::auth::{Token, authenticated};
pub(crate) use caddy::Names;
pub(crate) use error::Failure;

/// The longest that a request may ask to wait, in milliseconds: an hour.
const MAX_WAIT_MS: u64 = 3_600_000;
/// How long it waits when it does not say.
const DEFAULT_WAIT_MS: u64 = 60_000;

/// What every handler has.
#[derive(Clone)]
pub(crate) struct App {
    pub engine: Engine,
    /// The key of the configuration.
    pub token: Option<Token>,
    /// Makes tokens for the URLs of machines.
    pub tokens: Tokens,
    /// What Caddy asks about.
    pub names: Names,
    /// Cancelled when the server begins to end: waits answer, followed logs end.
    pub closing: CancellationToken,
}

impl App {
    /// Runs a change to its end, also when the client goes away meanwhile: it drops the handler, not this.
    async fn to_its_end<T, F>(&self, change: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, hutch_engine::Error>> + Send + 'static,
    {
        match tokio::spawn(change.in_current_span()).await {
            Ok(result) => Ok(result?),
            Err(ended) => Err(Failure::bug(format!(
                "a change did not come to its end: {ended}"
            ))),
        }
    }

    /// Waits for something that may take long, but not beyond the server's own end.
    async fn unless_closing<T>(
        &self,
        waiting: impl Future<Output = Result<T, hutch_engine::Error>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            result = waiting => Ok(result?),
            () = self.closing.cancelled() => Err(Failure::stopping()),
        }
    }
}

/// How long a request waits.
fn wait_time(timeout_ms: Option<u64>) -> Result<Duration, Failure> {
    match timeout_ms.unwrap_or(DEFAULT_WAIT_MS) {
        ms if ms <= MAX_WAIT_MS => Ok(Duration::from_millis(ms)),
        _ => Err(Failure::invalid(format!(
            "`timeout_ms` is at most {MAX_WAIT_MS}"
        ))),
    }
}

/// The routes that need a key.
fn keyed() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .merge(machines::routes())
        .merge(snapshots::routes())
        .merge(ports::routes())
        .merge(tokens::routes())
        .merge(exec::routes())
        .merge(processes::routes())
        .merge(files::routes())
        .merge(images::routes())
        .merge(operations::routes())
        .merge(runtimes::routes())
}

/// The routes that need none.
fn open() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .merge(meta::routes())
        .merge(caddy::routes())
}

/// The document of the API, as the handlers describe it.
pub(crate) fn document() -> OpenApi {
    let (_, described) = OpenApiRouter::new()
        .merge(keyed())
        .merge(open())
        .split_for_parts();
    document::finish(described)
}

/// The whole API.
pub(crate) fn router(app: App) -> Router {
    let auth = from_fn_with_state(app.clone(), authenticated);
    let (keyed, _) = keyed().route_layer(auth).split_for_parts();
    let (open, _) = open().split_for_parts();
    around_all(keyed.merge(open).merge(meta::documents(&document()))).with_state(app)
}

/// What stands around every route, and in the place of those that are none.
fn around_all(routes: Router<App>) -> Router<App> {
    routes
        .fallback(|| async { axum::http::StatusCode::NOT_FOUND })
        .layer(CatchPanicLayer::custom(around::panicked))
        .layer(from_fn(around::around))
}

#[cfg(test)]
mod tests;
