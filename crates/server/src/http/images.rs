//! `/v1/images`.

use axum::extract::State;
use axum::http::StatusCode;
use hutch_contract::image::{Accepted, BootstrapImage, Image, ImportFormat};
use hutch_contract::name::Name;
use hutch_contract::page::{DEFAULT_LIMIT, Page};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path, Query, Raw};
use super::{App, Failure};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(import))
        .routes(routes!(bootstrap))
        .routes(routes!(get, delete))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `next` of the page before.
    cursor: Option<String>,
    /// Rows in the page.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// List images
#[utoipa::path(get, path = "/v1/images", tag = "images", params(ListQuery),
    responses((status = 200, description = "A page.", body = Page<Image>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Image>>, Failure> {
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    Ok(axum::Json(app.engine.images(
        &who,
        query.cursor.as_deref(),
        limit,
    )?))
}

/// Get an image
#[utoipa::path(get, path = "/v1/images/{id}", tag = "images",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The image.", body = Image)))]
async fn get(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Image>, Failure> {
    Ok(axum::Json(app.engine.image(&who, &id)?))
}

/// Delete an image
///
/// Machines made from it keep their disks.
#[utoipa::path(delete, path = "/v1/images/{id}", tag = "images",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "It is gone.")))]
async fn delete(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let engine = app.engine.clone();
    app.to_its_end(async move { engine.delete_image(&who, &id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ImportQuery {
    /// Name of the new image.
    #[param(value_type = String)]
    name: Name,
    /// What the body is.
    #[param(inline)]
    format: ImportFormat,
}

/// Import an image
///
/// Answers when the body has arrived; follow the operation for the rest.
#[utoipa::path(put, path = "/v1/images/import", tag = "images", params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 202, description = "It is being made.", body = Accepted)))]
async fn import(
    State(app): State<App>,
    Caller(who): Caller,
    Query(query): Query<ImportQuery>,
    body: Raw,
) -> Result<(StatusCode, axum::Json<Accepted>), Failure> {
    let engine = app.engine.clone();
    let ImportQuery { name, format } = query;
    // To its end also without the client: then the body ends with an error, and what came of it is removed.
    let accepted =
        app.to_its_end(async move { engine.import_image(&who, name, format, body.bytes).await });
    Ok((StatusCode::ACCEPTED, axum::Json(accepted.await?)))
}

/// Make an image from a distribution
#[utoipa::path(post, path = "/v1/images/bootstrap", tag = "images", request_body = BootstrapImage,
    responses((status = 202, description = "It is being made.", body = Accepted)))]
async fn bootstrap(
    State(app): State<App>,
    Caller(who): Caller,
    Json(request): Json<BootstrapImage>,
) -> Result<(StatusCode, axum::Json<Accepted>), Failure> {
    let engine = app.engine.clone();
    let accepted = app.to_its_end(async move { engine.bootstrap_image(&who, request).await });
    Ok((StatusCode::ACCEPTED, axum::Json(accepted.await?)))
}
