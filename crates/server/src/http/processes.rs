//! `/v1/machines/{id}/processes`: commands that go on by themselves, and what is done with them.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use futures::TryStreamExt;
use hutch_contract::exec::{ExecEvent, ExecExit};
use hutch_contract::process::{
    InputTaken, Process, Processes, PtySize, SendSignal, StartProcess, StartedProcess,
};
use hutch_engine::{Execution, ProcessInput};
use serde::Deserialize;
use tokio::time::timeout;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::attach::Attachment;
use super::extract::{Caller, Json, Path, Query, Raw, Upgrade};
use super::{App, Failure, exec, wait_time};

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(start, list))
        .routes(routes!(get, delete))
        .routes(routes!(wait))
        .routes(routes!(signal))
        .routes(routes!(resize))
        .routes(routes!(stdin))
        .routes(routes!(output))
        .routes(routes!(attach))
}

/// Start a process
///
/// Answers when it runs; waits for a machine that is starting. Whoever is interested in its output attaches to it.
#[utoipa::path(post, path = "/v1/machines/{id}/processes", tag = "processes", request_body = StartProcess,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 201, description = "It runs.", body = StartedProcess)))]
async fn start(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Json(process): Json<StartProcess>,
) -> Result<(StatusCode, axum::Json<StartedProcess>), Failure> {
    let engine = app.engine.clone();
    let started = app.to_its_end(async move { engine.start_process(&who, &id, process).await });
    Ok((StatusCode::CREATED, axum::Json(started.await?)))
}

/// List processes
///
/// Those that were started through the API, also by `exec`. Ended ones stay until they are deleted, or the machine needs
/// their place.
#[utoipa::path(get, path = "/v1/machines/{id}/processes", tag = "processes",
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "Oldest first.", body = Processes)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
) -> Result<axum::Json<Processes>, Failure> {
    let items = app.engine.processes(&who, &id).await?;
    Ok(axum::Json(Processes { items }))
}

/// Get a process
#[utoipa::path(get, path = "/v1/machines/{id}/processes/{process}", tag = "processes",
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id.")),
    responses((status = 200, description = "How it is.", body = Process)))]
async fn get(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
) -> Result<axum::Json<Process>, Failure> {
    Ok(axum::Json(app.engine.process(&who, &id, &process).await?))
}

/// Delete a process
///
/// Kills it and all it started, and drops its output.
#[utoipa::path(delete, path = "/v1/machines/{id}/processes/{process}", tag = "processes",
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id.")),
    responses((status = 204, description = "It is gone.")))]
async fn delete(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
) -> Result<StatusCode, Failure> {
    let engine = app.engine.clone();
    app.to_its_end(async move { engine.delete_process(&who, &id, &process).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// How long at most, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Wait for the end of a process
#[utoipa::path(post, path = "/v1/machines/{id}/processes/{process}/wait", tag = "processes",
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id."), WaitQuery),
    responses((status = 200, description = "It has ended.", body = ExecExit)))]
async fn wait(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Query(query): Query<WaitQuery>,
) -> Result<axum::Json<ExecExit>, Failure> {
    let limit = wait_time(query.timeout_ms)?;
    let waited = app.engine.wait_process(&who, &id, &process, limit);
    Ok(axum::Json(app.unless_closing(waited).await?))
}

/// Send a signal
#[utoipa::path(post, path = "/v1/machines/{id}/processes/{process}/signal", tag = "processes", request_body = SendSignal,
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id.")),
    responses((status = 204, description = "It is sent.")))]
async fn signal(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Json(signal): Json<SendSignal>,
) -> Result<StatusCode, Failure> {
    app.engine
        .signal_process(&who, &id, &process, &signal)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Resize the terminal of a process
#[utoipa::path(post, path = "/v1/machines/{id}/processes/{process}/resize", tag = "processes", request_body = PtySize,
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id.")),
    responses((status = 204, description = "It has that size.")))]
async fn resize(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Json(size): Json<PtySize>,
) -> Result<StatusCode, Failure> {
    app.engine.resize_process(&who, &id, &process, size).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct StdinQuery {
    /// The process reads an end of file after these bytes.
    eof: Option<bool>,
    /// How long it may take none of them, in milliseconds.
    #[param(maximum = 3600000)]
    timeout_ms: Option<u64>,
}

/// Write to the standard input of a process
///
/// Answers when it has taken everything, or has closed its end. A body that breaks off is no end of file.
#[utoipa::path(post, path = "/v1/machines/{id}/processes/{process}/stdin", tag = "processes",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id."), StdinQuery),
    responses((status = 200, description = "What it took.", body = InputTaken)))]
async fn stdin(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Query(query): Query<StdinQuery>,
    mut body: Raw,
) -> Result<axum::Json<InputTaken>, Failure> {
    let pause = wait_time(query.timeout_ms)?;
    let stalled = |accepted: u64| {
        let message = format!(
            "the process takes no more input, {accepted} bytes or a few more after it began"
        );
        Failure::new(hutch_contract::error::Kind::Timeout, "timeout", message)
    };
    let mut input = app.engine.process_input(&who, &id, &process).await?;
    let mut accepted_bytes = 0;
    while let Some(chunk) = body.bytes.try_next().await.map_err(broken_off)? {
        let sent = chunk.len() as u64;
        let written = app.unless_closing(input.write(chunk));
        let taken = timeout(pause, written)
            .await
            .map_err(|_| stalled(accepted_bytes))??;
        accepted_bytes += taken;
        if taken < sent {
            return Ok(axum::Json(InputTaken { accepted_bytes }));
        }
    }
    if query.eof == Some(true) {
        let ended = app.unless_closing(input.end());
        timeout(pause, ended)
            .await
            .map_err(|_| stalled(accepted_bytes))??;
    }
    Ok(axum::Json(InputTaken { accepted_bytes }))
}

fn broken_off(error: std::io::Error) -> Failure {
    Failure::invalid(format!("the body broke off: {error}"))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OutputQuery {
    /// Leave out so many bytes of what it wrote.
    from: Option<u64>,
}

/// Follow the output of a process
///
/// Each event is one `data:` line of JSON; the last one is `exit` or `error`. Bytes that are no longer kept are counted
/// in `dropped`.
#[utoipa::path(get, path = "/v1/machines/{id}/processes/{process}/output", tag = "processes",
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id."), OutputQuery),
    responses((status = 200, description = "Its events.", body = ExecEvent, content_type = "text/event-stream")))]
async fn output(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Query(query): Query<OutputQuery>,
) -> Result<Response, Failure> {
    let from = query.from.unwrap_or(0);
    let output = app.engine.process_output(&who, &id, &process, from).await?;
    let process = process
        .parse()
        .map_err(|_| Failure::bug("output of a process that has no id"))?;
    Ok(exec::sse(Execution { process, output }))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AttachQuery {
    /// Leave out so many bytes of what it wrote.
    from: Option<u64>,
    /// Write to its standard input too.
    stdin: Option<bool>,
}

/// Attach to a process
///
/// A WebSocket. Binary frames of the server are output: a byte for the channel (1 stdout, 2 stderr), eight for the
/// sequence of the first byte, the highest first, then the bytes. Those of the client are a byte 0 and standard input, of
/// at most 64 KiB. Text frames are JSON. The client's: `{"resize":{"rows":24,"cols":80}}`, `{"signal":"INT"}`,
/// `{"eof":true}`. The server's: `{"exit":{…}}`, `{"dropped":BYTES}`, `{"refused":{"code":…,"message":…}}` for something
/// that was not done, `{"error":{"code":…,"message":…}}` as the last word. A client that goes away changes nothing for the
/// process. One that sends nothing for 60 s, not even the answer to a ping, is taken to be gone.
#[utoipa::path(get, path = "/v1/machines/{id}/processes/{process}/attach", tag = "processes",
    params(("id" = String, Path, description = "Id or name."), ("process" = String, Path, description = "Id."), AttachQuery),
    responses((status = 101, description = "It is a WebSocket now."), (status = 426, description = "The request asks for none.")))]
async fn attach(
    State(app): State<App>,
    Caller(who): Caller,
    Path((id, process)): Path<(String, String)>,
    Query(query): Query<AttachQuery>,
    upgrade: Result<Upgrade, Failure>,
) -> Result<Response, Failure> {
    let from = query.from.unwrap_or(0);
    let output = app.engine.process_output(&who, &id, &process, from).await?;
    // What is not there is that for a plain request, too.
    let Upgrade(upgrade, place) = upgrade?;
    let input: Option<ProcessInput> = match query.stdin {
        Some(true) => Some(app.engine.process_input(&who, &id, &process).await?),
        _ => None,
    };
    let attachment = Attachment {
        app,
        who,
        machine: id,
        process,
    };
    Ok(attachment.upgrade(upgrade, place, output, input))
}
