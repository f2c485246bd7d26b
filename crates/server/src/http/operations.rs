//! `/v1/operations`.

use axum::extract::State;
use hutch_contract::error::Kind;
use hutch_contract::id::OperationId;
use hutch_contract::operation::Operation;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Path, Query};
use super::{App, Failure, wait_time};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(get))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct GetQuery {
    /// Answer only when `version` is above this, or the operation has ended.
    after_version: Option<u64>,
    /// How long to wait for that, in milliseconds; then the answer is the operation as it is.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Get an operation
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path, description = "Id."), GetQuery),
    responses((status = 200, description = "How far it is.", body = Operation)))]
async fn get(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<GetQuery>,
) -> Result<axum::Json<Operation>, Failure> {
    let id: OperationId = id.parse().map_err(|_| {
        Failure::new(
            Kind::NotFound,
            "operation_not_found",
            format!("operation `{id:.64}` not found"),
        )
    })?;
    let operation = match query.after_version {
        None => app.engine.operation(&who, &id)?,
        Some(version) => {
            let timeout = wait_time(query.timeout_ms)?;
            app.unless_closing(app.engine.wait_operation(&who, &id, version, timeout))
                .await?
        }
    };
    Ok(axum::Json(operation))
}
