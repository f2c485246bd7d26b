//! `/v1/machines/{id}/exec`: a command, its whole result at once or its output as it comes.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::{Stream, StreamExt, stream};
use hutch_contract::exec::{Exec, ExecEvent, ExecResult};
use hutch_engine::{ExecOutput, Execution};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Json, Path};
use super::{App, Failure, error};

/// A silent command still shows that it lives, so that proxies keep the connection and a dead client is noticed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(exec))
}

/// Run a command
///
/// Waits for a machine that is starting. With `accept: text/event-stream` each event is one `data:` line of JSON, and
/// the last one is `exit` or `error`. A client that goes away does not end the command.
#[utoipa::path(post, path = "/v1/machines/{id}/exec", tag = "exec", request_body = Exec,
    params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "It has ended, or its events.", content(
        (ExecResult = "application/json"), (ExecEvent = "text/event-stream")))))]
async fn exec(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(command): Json<Exec>,
) -> Result<Response, Failure> {
    if !wants_events(&headers) {
        return Ok(axum::Json(app.engine.exec_blocking(&who, &id, command).await?).into_response());
    }
    Ok(sse(app.engine.exec(&who, &id, command).await?))
}

/// What a command writes, as server-sent events.
pub(super) fn sse(execution: Execution) -> Response {
    let events =
        events(execution).map(|event| Event::default().json_data(event).map_err(axum::Error::new));
    Sse::new(events)
        .keep_alive(KeepAlive::new().interval(SIGN_OF_LIFE))
        .into_response()
}

fn wants_events(headers: &HeaderMap) -> bool {
    let accepted = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|kind| {
        kind.split(';')
            .next()
            .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
    })
}

/// The events of a command that was started; the last one says how it ended.
fn events(execution: Execution) -> impl Stream<Item = ExecEvent> {
    let started = ExecEvent::Started {
        process: execution.process,
    };
    let following = stream::unfold(Some(execution.output), |output| async {
        let mut output = output?;
        let event = match output.next().await {
            Some(Ok(event)) => outgoing(event),
            Some(Err(error)) => broken(error.into()),
            None => broken(Failure::bug("a command's output ended without its exit")),
        };
        let last = matches!(event, ExecEvent::Exit(_) | ExecEvent::Error { .. });
        Some((event, (!last).then_some(output)))
    });
    stream::iter([started]).chain(following)
}

fn outgoing(output: ExecOutput) -> ExecEvent {
    match output {
        ExecOutput::Stdout { sequence, data } => ExecEvent::Stdout {
            sequence,
            data_base64: BASE64_STANDARD.encode(data),
        },
        ExecOutput::Stderr { sequence, data } => ExecEvent::Stderr {
            sequence,
            data_base64: BASE64_STANDARD.encode(data),
        },
        ExecOutput::Dropped(bytes) => ExecEvent::Dropped { bytes },
        ExecOutput::Exit(exit) => ExecEvent::Exit(exit),
    }
}

fn broken(failure: Failure) -> ExecEvent {
    if let Some(cause) = &failure.cause {
        tracing::warn!(cause, "a command's output broke off");
    }
    let hint = failure.hint.as_deref().map(error::plain);
    ExecEvent::Error {
        code: failure.code.into(),
        message: error::plain(&failure.message),
        hint,
    }
}
