//! `/v1/snapshots`, and what of a machine is about them: taking, restoring, forking.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hutch_contract::image::Accepted;
use hutch_contract::machine::{Machine, Status};
use hutch_contract::page::{DEFAULT_LIMIT, Page};
use hutch_contract::snapshot::{
    Copied, CreateSnapshot, ForkMachine, Forked, RestoreMachine, Snapshot, SnapshotImage,
};
use hutch_engine::{ListSnapshots, Target};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path, Query};
use super::machines::{REPLAYED, idempotency_key};
use super::{App, Failure, wait_time};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create, list_of))
        .routes(routes!(list))
        .routes(routes!(get, delete))
        .routes(routes!(image))
        .routes(routes!(restore))
        .routes(routes!(fork))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Answer only when it has happened.
    wait: Option<bool>,
    /// How long to wait at most, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
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

impl ListQuery {
    fn of(self, machine: Option<String>) -> ListSnapshots {
        ListSnapshots {
            machine,
            cursor: self.cursor,
            limit: self.limit.unwrap_or(DEFAULT_LIMIT),
        }
    }
}

/// Take a snapshot of a machine
///
/// Of its disk, and of its memory when asked to. What runs in the machine stands still for a moment; a paused machine goes
/// on for that and is paused again. One that is interrupted by the end of the server is gone, and the machine goes on.
#[utoipa::path(post, path = "/v1/machines/{id}/snapshots", tag = "snapshots", request_body = CreateSnapshot,
    params(("id" = String, Path, description = "Id or name."), WaitQuery),
    responses((status = 201, description = "It is ready.", body = Snapshot, headers(("location" = String, description = "Path of the snapshot."))),
        (status = 202, description = "It is being taken.", body = Snapshot, headers(("location" = String, description = "Path of the snapshot.")))))]
async fn create(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
    Json(request): Json<CreateSnapshot>,
) -> Result<Response, Failure> {
    let timeout = wait_time(query.timeout_ms)?;
    let (engine, caller) = (app.engine.clone(), who.clone());
    let mut snapshot = app
        .to_its_end(async move { engine.take_snapshot(&caller, &id, request).await })
        .await?;
    let mut status = StatusCode::ACCEPTED;
    if query.wait == Some(true)
        && let Some(operation) = &snapshot.operation
    {
        app.unless_closing(app.engine.finish(&who, operation, timeout))
            .await?;
        snapshot = app.engine.snapshot(&who, snapshot.id.as_str())?;
        status = StatusCode::CREATED;
    }
    let location = format!("/v1/snapshots/{}", snapshot.id);
    let location = HeaderValue::try_from(location).expect("an id can stand in a header");
    let location = [(header::LOCATION, location)];
    Ok((status, location, axum::Json(snapshot)).into_response())
}

/// List the snapshots of a machine
#[utoipa::path(get, path = "/v1/machines/{id}/snapshots", tag = "snapshots",
    params(("id" = String, Path, description = "Id or name."), ListQuery),
    responses((status = 200, description = "A page, oldest first.", body = Page<Snapshot>)))]
async fn list_of(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Snapshot>>, Failure> {
    Ok(axum::Json(app.engine.snapshots(&who, &query.of(Some(id)))?))
}

/// List snapshots
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", params(ListQuery),
    responses((status = 200, description = "A page, oldest first.", body = Page<Snapshot>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Snapshot>>, Failure> {
    Ok(axum::Json(app.engine.snapshots(&who, &query.of(None))?))
}

/// Get a snapshot
#[utoipa::path(get, path = "/v1/snapshots/{id}", tag = "snapshots",
    params(("id" = String, Path, description = "Id, or `MACHINE:NAME`.")),
    responses((status = 200, description = "The snapshot.", body = Snapshot)))]
async fn get(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Snapshot>, Failure> {
    Ok(axum::Json(app.engine.snapshot(&who, &id)?))
}

/// Make an image of a snapshot
///
/// Of its disk as it is: what the machine's owner left on it, such as host keys, is in the image.
#[utoipa::path(post, path = "/v1/snapshots/{id}/image", tag = "snapshots", request_body = SnapshotImage,
    params(("id" = String, Path, description = "Id, or `MACHINE:NAME`.")),
    responses((status = 202, description = "It is being made.", body = Accepted)))]
async fn image(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Json(request): Json<SnapshotImage>,
) -> Result<(StatusCode, axum::Json<Accepted>), Failure> {
    let engine = app.engine.clone();
    let making = async move { engine.snapshot_image(&who, &id, request.name).await };
    let accepted = app.to_its_end(making).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(accepted)))
}

/// Delete a snapshot
///
/// Machines that were made from it, or restored to it, keep their disks.
#[utoipa::path(delete, path = "/v1/snapshots/{id}", tag = "snapshots",
    params(("id" = String, Path, description = "Id, or `MACHINE:NAME`.")),
    responses((status = 204, description = "It is gone.")))]
async fn delete(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let engine = app.engine.clone();
    app.to_its_end(async move { engine.delete_snapshot(&who, &id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Restore a machine to a snapshot
///
/// Every byte of the snapshot is looked at before anything of the machine is replaced; one that is damaged changes
/// nothing. What was written to the machine's disk since is lost. With memory the machine then runs; else it boots when
/// it was to run, and stays stopped when not.
#[utoipa::path(post, path = "/v1/machines/{id}/restore", tag = "snapshots", request_body = RestoreMachine,
    params(("id" = String, Path, description = "Id or name."), WaitQuery),
    responses((status = 200, description = "It is restored, and at its level again.", body = Machine),
        (status = 202, description = "It will be. `operation` tells what became of that.", body = Machine)))]
async fn restore(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
    Json(request): Json<RestoreMachine>,
) -> Result<Response, Failure> {
    let timeout = wait_time(query.timeout_ms)?;
    let (engine, caller) = (app.engine.clone(), who.clone());
    let machine = app
        .to_its_end(async move { engine.restore(&caller, &id, request).await })
        .await?;
    if query.wait != Some(true) {
        return Ok((StatusCode::ACCEPTED, axum::Json(machine)).into_response());
    }
    let restored = app.engine.restored(&who, &machine, timeout);
    let machine = app.unless_closing(restored).await?;
    Ok(axum::Json(machine).into_response())
}

/// Fork a machine
///
/// Makes copies of it, as it is now or was at one of its snapshots. Each has a name, an address and an identity of its own
/// before anything of yours runs in it, its own disk, and no ports of the host. Answers once it is certain which copies
/// will be made; with `wait` when each runs, or does not.
#[utoipa::path(post, path = "/v1/machines/{id}/fork", tag = "snapshots", request_body = ForkMachine,
    params(("id" = String, Path, description = "Id or name."), WaitQuery,
        ("idempotency-key" = Option<String>, Header, description = "With the same key no copy is made twice.")),
    responses((status = 200, description = "What became of each copy.", body = Forked, headers(
        ("idempotency-replayed" = Option<bool>, description = "All were made by an earlier request with this key."),
    ))))]
async fn fork(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
    headers: HeaderMap,
    Json(request): Json<ForkMachine>,
) -> Result<Response, Failure> {
    let timeout = wait_time(query.timeout_ms)?;
    let (engine, caller) = (app.engine.clone(), who.clone());
    let key = idempotency_key(&headers)?;
    let forking =
        app.to_its_end(async move { engine.fork(&caller, &id, request, key.as_deref()).await });
    let forked = forking.await?;
    let copies = forked.copies.into_iter().map(async |copy| {
        let machine = match copy {
            Ok(machine) if query.wait == Some(true) => {
                let running = Target::Status(Status::Running);
                let waited = app.engine.wait(&who, machine.id.as_str(), running, timeout);
                app.unless_closing(waited)
                    .await
                    .map(|now| now.unwrap_or(machine))
            }
            copy => copy.map_err(Failure::from),
        };
        match machine {
            Ok(machine) => Copied::Machine(Box::new(machine)),
            Err(failure) => Copied::Error {
                code: failure.code.into_owned(),
                message: failure.message,
                hint: failure.hint,
            },
        }
    });
    let answer = Forked {
        pause_us: forked.pause_us,
        copies: futures::future::join_all(copies).await,
    };
    let mut response = axum::Json(answer).into_response();
    if forked.replayed {
        response
            .headers_mut()
            .insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}
