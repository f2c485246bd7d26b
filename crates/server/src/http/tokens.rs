//! `/v1/machines/{id}/token`: what opens a private machine's URLs to somebody without a key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hutch_contract::expose::{DEFAULT_TOKEN_LIFETIME_S, MAX_TOKEN_LIFETIME_S, MintToken, UrlToken};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path};
use super::{App, Failure};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(mint, revoke))
}

/// Make a token
///
/// It opens all URLs of one machine, in the header `x-hutch-token`, or by the link in the answer: a browser keeps it in a
/// cookie then. It holds until it ends, until tokens are revoked, or until the machine's access changes; also over restarts.
#[utoipa::path(post, path = "/v1/machines/{id}/token", tag = "ports", request_body = MintToken,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 201, description = "The token.", body = UrlToken)))]
async fn mint(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Json(asked): Json<MintToken>,
) -> Result<Response, Failure> {
    let lifetime_s = asked.lifetime_s.unwrap_or(DEFAULT_TOKEN_LIFETIME_S);
    let wanted = app.engine.token_for(&who, &id, asked.port)?;
    if !(1..=MAX_TOKEN_LIFETIME_S).contains(&lifetime_s) {
        return Err(Failure::invalid(format!(
            "`lifetime_s` must be from 1 to {MAX_TOKEN_LIFETIME_S}"
        )));
    }
    let lifetime = Duration::from_secs(lifetime_s);
    let machine = wanted.machine.as_str();
    let token = app.tokens.mint(machine, wanted.generation, lifetime);
    let ends = SystemTime::now() + lifetime;
    let ends = ends.duration_since(UNIX_EPOCH).unwrap_or_default();
    let answer = UrlToken {
        url: wanted.url.map(|url| format!("{url}/?hutch_token={token}")),
        token,
        expires_at_ms: u64::try_from(ends.as_millis()).unwrap_or(u64::MAX),
    };
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

/// Revoke all tokens of a machine
#[utoipa::path(delete, path = "/v1/machines/{id}/token", tag = "ports",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Those that were made so far open nothing.")))]
async fn revoke(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let engine = app.engine.clone();
    app.to_its_end(async move { engine.revoke_tokens(&who, &id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
