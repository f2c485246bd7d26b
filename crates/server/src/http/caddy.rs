//! `/caddy/check`: what Caddy asks before it gets a certificate for a name (`on_demand_tls.ask`).

use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use hutch_contract::expose::Expose;
use hutch_gateway::http::named;
use hutch_gateway::limits::Bucket;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::Query;
use super::{App, Failure};

/// Questions at once, then in a second. Anybody can make Caddy ask, and each answer tells whether a name is there.
const QUESTIONS: (u32, u32) = (100, 20);

/// What the answer depends on besides the machines.
#[derive(Clone)]
pub(crate) struct Names {
    domain: Arc<str>,
    left: Arc<Mutex<Bucket>>,
}

impl Names {
    pub(crate) fn below(domain: &str) -> Names {
        let (burst, per_second) = QUESTIONS;
        Names {
            domain: domain.into(),
            left: Arc::new(Mutex::new(Bucket::new(burst, per_second))),
        }
    }
}

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(check))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct CheckQuery {
    /// The name that a client asks for.
    domain: String,
}

/// Whether a domain name leads to a machine
///
/// For Caddy, before it gets a certificate: 200 for the names of machines and of their exposed ports. Needs no key.
#[utoipa::path(get, path = "/caddy/check", tag = "server", security(()), params(CheckQuery),
    responses((status = 200, description = "It does."), (status = 404, description = "It does not."),
        (status = 429, description = "Too many questions.")))]
async fn check(
    State(app): State<App>,
    Query(query): Query<CheckQuery>,
) -> Result<StatusCode, Failure> {
    let mut left = app
        .names
        .left
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if !left.take() {
        let status = StatusCode::TOO_MANY_REQUESTS;
        return Err(Failure::with_status(status, "too_many", "ask again later"));
    }
    drop(left);
    let leads = named(&query.domain, &app.names.domain).is_some_and(|(label, port)| {
        app.engine.reached(&label).is_some_and(|machine| {
            port.is_none_or(|port| {
                port == machine.http_port
                    || match &machine.expose {
                        Expose::All(_) => true,
                        Expose::Ports(ports) => ports.contains(&port),
                    }
            })
        })
    });
    match leads {
        true => Ok(StatusCode::OK),
        false => Err(Failure::with_status(
            StatusCode::NOT_FOUND,
            "no_such_name",
            "no machine has this name",
        )),
    }
}
