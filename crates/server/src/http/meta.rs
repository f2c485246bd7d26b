//! `/health` and the documentation: what needs no key and tells nothing about anybody.

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use hutch_contract::node::Health;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;

/// A page that shows the document, without anything from elsewhere.
const PAGE: &str = include_str!("docs.html");

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(health))
}

/// Whether the server answers
#[utoipa::path(get, path = "/health", tag = "server", security(()),
    responses((status = 200, description = "It does.", body = Health)))]
async fn health() -> axum::Json<Health> {
    axum::Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// `/openapi.json`, `/docs/json` and `/docs`.
pub(super) fn documents(document: &OpenApi) -> Router<App> {
    let json = Bytes::from(document.to_json().expect("a document is JSON"));
    let json = get(move || async move {
        (
            [(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/json"),
            )],
            json,
        )
    });
    Router::new()
        .route("/openapi.json", json.clone())
        .route("/docs/json", json)
        .route("/docs", get(page))
}

async fn page() -> impl IntoResponse {
    // Nothing but the page's own script may run, and it may fetch from here only.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
        connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(policy),
        ),
    ];
    (headers, PAGE)
}
