//! `/v1/machines`: create, look, start, stop, delete, wait.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use hutch_contract::expose::ChangeMachine;
use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::network::NetworkPolicy;
use hutch_contract::page::{DEFAULT_LIMIT, Page};
use hutch_engine::{Admitted, ListMachines, Target};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path, Query};
use super::{App, Failure, wait_time};

const MAX_IDEMPOTENCY_KEY: usize = 255;
/// Told of an answer to a request that had been answered before.
pub(super) const REPLAYED: &str = "idempotency-replayed";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get, delete, change))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(restart))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(set_network))
        .routes(routes!(wait))
        .routes(routes!(logs))
}

/// What a create may wait for.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Created {
    /// Its agent answers.
    Running,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct CreateQuery {
    /// Answer only when the machine is in this state.
    #[param(inline)]
    wait: Option<Created>,
    /// How long to wait at most, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Create a machine
///
/// Answers once it is certain that the machine will be made, also if the server crashes; with `wait` when it runs. A
/// wait that ends in an error leaves the machine as it is; `location` names it.
#[utoipa::path(post, path = "/v1/machines", tag = "machines", request_body = CreateMachine,
    params(CreateQuery, ("idempotency-key" = Option<String>, Header, description = "The same key never makes a second machine.")),
    responses((status = 201, description = "It will run, or runs.", body = Machine, headers(
        ("location" = String, description = "Path of the machine."),
        ("idempotency-replayed" = Option<bool>, description = "It was made by an earlier request with this key."),
    ))))]
async fn create(
    State(app): State<App>,
    Caller(who): Caller,
    Query(query): Query<CreateQuery>,
    headers: HeaderMap,
    Json(request): Json<CreateMachine>,
) -> Result<Response, Failure> {
    let timeout = wait_time(query.timeout_ms)?;
    let key = idempotency_key(&headers)?;
    let (engine, caller) = (app.engine.clone(), who.clone());
    let created =
        app.to_its_end(async move { engine.create(&caller, request, key.as_deref()).await });
    let Admitted { machine, replayed } = created.await?;
    let location = format!("/v1/machines/{}", machine.id);
    let answer = match query.wait {
        None => Ok(Some(machine)),
        Some(Created::Running) => {
            let running = Target::Status(Status::Running);
            app.unless_closing(app.engine.wait(&who, machine.id.as_str(), running, timeout))
                .await
        }
    };
    let mut response = match answer {
        Ok(Some(machine)) => (StatusCode::CREATED, axum::Json(machine)).into_response(),
        Ok(None) => gone().into_response(),
        Err(failure) => failure.into_response(),
    };
    let location = HeaderValue::try_from(location).expect("an id can stand in a header");
    response.headers_mut().insert(header::LOCATION, location);
    if replayed {
        response
            .headers_mut()
            .insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// It was deleted by somebody else while this request waited for something else.
fn gone() -> Failure {
    Failure::with_status(
        StatusCode::CONFLICT,
        "machine_deleted",
        "the machine was deleted meanwhile",
    )
}

/// The key that makes a request safe to send again.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut keys = headers.get_all("idempotency-key").iter();
    let Some(key) = keys.next() else {
        return Ok(None);
    };
    match key.to_str() {
        Ok(key) if (1..=MAX_IDEMPOTENCY_KEY).contains(&key.len()) && keys.next().is_none() => {
            Ok(Some(key.to_owned()))
        }
        _ => Err(Failure::invalid(
            "`idempotency-key` is one text of 1 to 255 visible characters",
        )),
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only machines in this state.
    #[param(inline)]
    status: Option<Status>,
    /// `next` of the page before.
    cursor: Option<String>,
    /// Rows in the page.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// List machines
#[utoipa::path(get, path = "/v1/machines", tag = "machines", params(ListQuery),
    responses((status = 200, description = "A page.", body = Page<Machine>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Machine>>, Failure> {
    let ListQuery {
        status,
        cursor,
        limit,
    } = query;
    let list = ListMachines {
        status,
        cursor,
        limit: limit.unwrap_or(DEFAULT_LIMIT),
    };
    Ok(axum::Json(app.engine.machines(&who, &list)?))
}

/// Get a machine
#[utoipa::path(get, path = "/v1/machines/{id}", tag = "machines",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The machine.", body = Machine)))]
async fn get(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Machine>, Failure> {
    Ok(axum::Json(app.engine.machine(&who, &id)?))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ChangeQuery {
    /// Answer only when it has happened.
    wait: Option<bool>,
    /// How long to wait at most, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Delete a machine
///
/// With all that belongs to it.
#[utoipa::path(delete, path = "/v1/machines/{id}", tag = "machines",
    params(("id" = String, Path, description = "Id or name."), ChangeQuery),
    responses((status = 202, description = "It will be gone.", body = Machine), (status = 204, description = "It is gone.")))]
async fn delete(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ChangeQuery>,
) -> Result<Response, Failure> {
    let timeout = wait_time(query.timeout_ms)?;
    let (engine, caller) = (app.engine.clone(), who.clone());
    let machine = app
        .to_its_end(async move { engine.delete(&caller, &id).await })
        .await?;
    if query.wait != Some(true) {
        return Ok((StatusCode::ACCEPTED, axum::Json(machine)).into_response());
    }
    app.unless_closing(
        app.engine
            .wait(&who, machine.id.as_str(), Target::Gone, timeout),
    )
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Change a machine
///
/// At once, whatever it does; what is left out stays.
#[utoipa::path(patch, path = "/v1/machines/{id}", tag = "machines", request_body = ChangeMachine,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "It is so.", body = Machine)))]
async fn change(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Json(asked): Json<ChangeMachine>,
) -> Result<axum::Json<Machine>, Failure> {
    let engine = app.engine.clone();
    let changed = app.to_its_end(async move { engine.change(&who, &id, &asked).await });
    Ok(axum::Json(changed.await?))
}

/// Changes the level of a machine, and waits for it when asked to.
macro_rules! level {
    ($verb:ident, $path:literal, $status:ident, $title:literal, $meaning:literal) => {
        #[doc = $title]
        #[utoipa::path(post, path = $path, tag = "machines",
            params(("id" = String, Path, description = "Id or name."), ChangeQuery),
            responses((status = 200, description = $meaning, body = Machine), (status = 202, description = "It will.", body = Machine)))]
        async fn $verb(
            State(app): State<App>,
            Caller(who): Caller,
            Path(id): Path<String>,
            Query(query): Query<ChangeQuery>,
        ) -> Result<Response, Failure> {
            let timeout = wait_time(query.timeout_ms)?;
            let (engine, caller) = (app.engine.clone(), who.clone());
            let machine = app.to_its_end(async move { engine.$verb(&caller, &id).await }).await?;
            if query.wait != Some(true) {
                return Ok((StatusCode::ACCEPTED, axum::Json(machine)).into_response());
            }
            let target = Target::Status(Status::$status);
            let waited = app.engine.wait(&who, machine.id.as_str(), target, timeout);
            let machine = app.unless_closing(waited).await?.ok_or_else(gone)?;
            Ok(axum::Json(machine).into_response())
        }
    };
}

level!(
    start,
    "/v1/machines/{id}/start",
    Running,
    "Start a machine",
    "It runs."
);
level!(
    stop,
    "/v1/machines/{id}/stop",
    Stopped,
    "Stop a machine",
    "It has stopped."
);
level!(
    restart,
    "/v1/machines/{id}/restart",
    Running,
    "Restart a machine",
    "It runs again."
);

level!(
    pause,
    "/v1/machines/{id}/pause",
    Paused,
    "Pause a machine",
    "It is paused."
);
level!(
    resume,
    "/v1/machines/{id}/resume",
    Running,
    "Let a paused machine go on",
    "It runs."
);

/// Give a machine another network policy
///
/// It holds for the next packet. Connections that it denies are ended, others go on. What is left out gets its default.
#[utoipa::path(put, path = "/v1/machines/{id}/network", tag = "machines", request_body = NetworkPolicy,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The policy holds.", body = Machine)))]
async fn set_network(
    State(app): State<App>,
    Caller(who): Caller,
    Path(reference): Path<String>,
    Json(policy): Json<NetworkPolicy>,
) -> Result<axum::Json<Machine>, Failure> {
    let engine = app.engine.clone();
    let changed = app.to_its_end(async move { engine.set_network(&who, &reference, policy).await });
    Ok(axum::Json(changed.await?))
}

/// What can be waited for.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Awaited {
    Starting,
    Running,
    Pausing,
    Paused,
    Stopping,
    Stopped,
    Failed,
    Unknown,
    Deleting,
    Deleted,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// The state to wait for.
    #[param(inline)]
    status: Awaited,
    /// How long at most, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Wait for a machine
///
/// Answers when it has come to the state, or as soon as it cannot any more.
#[utoipa::path(post, path = "/v1/machines/{id}/wait", tag = "machines",
    params(("id" = String, Path, description = "Id or name."), WaitQuery),
    responses((status = 200, description = "It is in that state.", body = Machine), (status = 204, description = "It is gone, as awaited.")))]
async fn wait(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Result<Response, Failure> {
    let target = match query.status {
        Awaited::Starting => Target::Status(Status::Starting),
        Awaited::Running => Target::Status(Status::Running),
        Awaited::Pausing => Target::Status(Status::Pausing),
        Awaited::Paused => Target::Status(Status::Paused),
        Awaited::Stopping => Target::Status(Status::Stopping),
        Awaited::Stopped => Target::Status(Status::Stopped),
        Awaited::Failed => Target::Status(Status::Failed),
        Awaited::Unknown => Target::Status(Status::Unknown),
        Awaited::Deleting => Target::Status(Status::Deleting),
        Awaited::Deleted => Target::Gone,
    };
    let timeout = wait_time(query.timeout_ms)?;
    match app
        .unless_closing(app.engine.wait(&who, &id, target, timeout))
        .await?
    {
        Some(machine) => Ok(axum::Json(machine).into_response()),
        None if matches!(query.status, Awaited::Deleted) => {
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        None => Err(gone()),
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LogsQuery {
    /// Leave out so many bytes of what was printed since the machine was created.
    from: Option<u64>,
    /// Go on with what comes, until the machine is gone.
    follow: Option<bool>,
}

/// Read the serial console
#[utoipa::path(get, path = "/v1/machines/{id}/logs", tag = "machines",
    params(("id" = String, Path, description = "Id or name."), LogsQuery),
    responses((status = 200, description = "The console's bytes, as the guest wrote them.", body = Vec<u8>, content_type = "text/plain")))]
async fn logs(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, Failure> {
    let follow = query.follow.unwrap_or(false);
    let bytes = app
        .engine
        .logs(&who, &id, query.from.unwrap_or(0), follow)
        .await?;
    let bytes = bytes.take_until(app.closing.clone().cancelled_owned());
    let kind = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        ),
        // What a guest prints is not to be taken for a page of ours.
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
    ];
    Ok((kind, axum::body::Body::from_stream(bytes)).into_response())
}
