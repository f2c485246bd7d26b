//! `/v1/runtimes`.

use axum::extract::State;
use hutch_contract::node::RuntimeInfo;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::Caller;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

/// List runtimes
///
/// What can run machines on this host, and what would be needed for the rest.
#[utoipa::path(get, path = "/v1/runtimes", tag = "server",
    responses((status = 200, description = "All that are known, the best first.", body = Vec<RuntimeInfo>)))]
async fn list(State(app): State<App>, Caller(_): Caller) -> axum::Json<Vec<RuntimeInfo>> {
    axum::Json(app.engine.runtimes().await)
}
