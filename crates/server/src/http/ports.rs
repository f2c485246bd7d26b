//! `/v1/machines/{id}/ports`: ports of the host that lead to ports of a machine.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hutch_contract::expose::{Port, PublishPort};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path};
use super::{App, Failure};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, publish))
        .routes(routes!(unpublish))
}

/// List the ports of a machine
#[utoipa::path(get, path = "/v1/machines/{id}/ports", tag = "ports",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "Those of the host that lead to it.", body = Vec<Port>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Vec<Port>>, Failure> {
    Ok(axum::Json(app.engine.ports(&who, &id)?))
}

/// Publish a port
///
/// A port of the host leads to the machine's by TCP from now on, also after restarts of machine and server, until it is
/// taken back or the machine is deleted. Asking again for one that the machine has already, just so, changes nothing.
#[utoipa::path(post, path = "/v1/machines/{id}/ports", tag = "ports", request_body = PublishPort,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 201, description = "The port is the machine's.", body = Port)))]
async fn publish(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Json(asked): Json<PublishPort>,
) -> Result<Response, Failure> {
    let engine = app.engine.clone();
    let port = app
        .to_its_end(async move { engine.publish(&who, &id, &asked).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(port)).into_response())
}

/// Take a port back
///
/// Connections through it are cut.
#[utoipa::path(delete, path = "/v1/machines/{id}/ports/{host_port}", tag = "ports",
    params(("id" = String, Path, description = "Id or name."), ("host_port" = u16, Path, description = "Port of the host.")),
    responses((status = 204, description = "It is nobody's.")))]
async fn unpublish(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, host_port)): Path<(String, u16)>,
) -> Result<StatusCode, Failure> {
    let engine = app.engine.clone();
    app.to_its_end(async move { engine.unpublish(&who, &id, host_port).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
