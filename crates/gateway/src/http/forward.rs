//! One request, from its head to the head of its answer.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::CONNECTION;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use super::access::{self, Asked, Verdict};
use super::body::{Answer, Download, Places, Progress, Upload};
use super::clients::{Busy, Clients, Conn};
use super::guard::REFUSED;
use super::headers::{self, From};
use super::pages::{self, Code};
use super::pool::{Lent, Pool, Target};
use super::route::{Route, route};
use super::upgrade;
use crate::Machines;
use crate::limits::{self, HttpLimits, client};
use crate::token::Tokens;

/// What all connections share.
pub(super) struct Shared {
    pub(super) machines: Arc<dyn Machines>,
    pub(super) base_domain: String,
    pub(super) tokens: Tokens,
    pub(super) limits: HttpLimits,
    pub(super) clients: Arc<Clients>,
    pub(super) pool: Arc<Pool>,
    pub(super) per_client: limits::Places<IpAddr>,
    pub(super) per_machine: limits::Places<String>,
    pub(super) upgrades: limits::Places<String>,
    /// Connections, and WebSockets after them.
    pub(super) tasks: TaskTracker,
    /// Ends all of them.
    pub(super) cutting: CancellationToken,
}

/// Whose word counts for where a request comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    /// The connection's own address.
    Direct(IpAddr),
    /// What a proxy of ours says.
    Proxy,
}

/// Answers a request, by a page of ours where the guest does not.
pub(super) async fn answer(
    shared: Arc<Shared>,
    conn: Arc<Conn>,
    origin: Origin,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    let watch = conn.watch();
    let html = pages::wants_html(request.headers());
    let (method, version) = (request.method().clone(), request.version());
    let began = Instant::now();
    let refusal = conn.refusal().filter(|_| method.as_str() == REFUSED);
    let passed = match refusal {
        Some(refusal) => {
            debug!(what = refusal.what, "a request was refused");
            Err(refusal.code)
        }
        None => shared.pass(origin, request, conn.begin()).await,
    };
    let mut response = passed.unwrap_or_else(|code| {
        let id = ulid::Ulid::generate().to_string().to_lowercase();
        info!(request_id = id, %method, code = code.word(), "answered for a machine");
        pages::page(code, html, &id).map(|page| Answer::Page(Some(page)))
    });
    let status = response.status();
    // After a head that asked for a WebSocket the bytes were not looked at.
    let raw = conn.raw.load(Ordering::Relaxed) && status != StatusCode::SWITCHING_PROTOCOLS;
    if version >= Version::HTTP_2 {
        response.headers_mut().remove(CONNECTION);
    } else if raw {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    debug!(%method, status = status.as_u16(), took_ms, "answered");
    watch.settle();
    Ok(response)
}

impl Shared {
    /// Passes a request on to the machine that it names.
    async fn pass(
        self: &Arc<Self>,
        origin: Origin,
        mut request: Request<Incoming>,
        busy: Busy,
    ) -> Result<Response<Answer>, Code> {
        if matches!(*request.method(), Method::CONNECT | Method::TRACE) {
            return Err(Code::MethodNotAllowed);
        }
        let authority =
            access::authority(request.uri(), request.headers()).map_err(|_| Code::BadRequest)?;
        let target = target(&request)?;
        let (label, port) = match route(&authority, &self.base_domain) {
            Route::Machine { label, port } => (label, port),
            Route::Nobody => return Err(Code::NoSuchMachine),
            Route::Foreign => return Err(Code::Misdirected),
        };
        let from = match origin {
            Origin::Proxy => From::of_proxy(request.headers()),
            Origin::Direct(address) => From {
                client: Some(address),
                https: false,
            },
        };
        let client_place = from.client.map(|address| {
            let place = self.per_client.take(&client(address));
            place.ok_or(Code::TooManyRequests)
        });
        let client_place = client_place.transpose()?;
        let found = self.machines.find(&label).await;
        let found = found.ok_or(Code::NoSuchMachine)?;
        let asked = Asked {
            method: request.method(),
            target: &target,
            headers: request.headers(),
            from: &from,
            authority: &authority,
        };
        let strip = match access::judge(&*self.machines, &self.tokens, &found, &asked).await {
            Verdict::Enter(strip) => strip,
            Verdict::Keep(headers) => {
                let mut redirect = Response::new(Answer::Page(None));
                *redirect.status_mut() = StatusCode::SEE_OTHER;
                *redirect.headers_mut() = headers;
                return Ok(redirect);
            }
            Verdict::Refuse => return Err(Code::NoSuchMachine),
        };
        let port = port.unwrap_or(found.http_port);
        if !found.exposes(port) {
            return Err(Code::PortNotExposed);
        }
        if headers::loops(request.headers()) {
            return Err(Code::Loop);
        }
        let websocket = upgrade::is_wanted(&request);
        let places = match websocket {
            true => &self.upgrades,
            false => &self.per_machine,
        };
        let places: Places = (client_place, places.take(&found.id).ok_or(Code::Busy)?);
        let host = HeaderValue::try_from(authority).map_err(|_| Code::BadRequest)?;
        headers::to_guest(request.headers_mut(), &host, &from, strip);
        let (_, path) = access::split_parameter(&target);
        *request.uri_mut() = Uri::from(path);
        let target = Target {
            port,
            incarnation: found.incarnation,
            id: found.id,
        };
        if websocket {
            return upgrade::pass(self, target, request, busy, places).await;
        }
        let (parts, incoming) = request.into_parts();
        let progress = Progress::new();
        let upload = Upload::new(incoming, self.limits.stall, progress.clone());
        let mut to_guest = Request::new(upload);
        *to_guest.method_mut() = parts.method;
        *to_guest.uri_mut() = parts.uri;
        *to_guest.headers_mut() = parts.headers;
        let dialled = self.limits.dial;
        let sending = self
            .pool
            .send(&*self.machines, target, to_guest, dialled, &progress);
        let sent = tokio::select! {
            sent = sending => sent,
            () = progress.quiet(dialled, self.limits.answer) => Err(Code::AnswerTimeout),
        };
        let (answer, lent) = match sent {
            Err(_) if progress.stalled() => return Err(Code::SlowRequest),
            sent => sent?,
        };
        self.passed_on(answer, busy, Some(lent), places)
    }

    /// A guest's answer as the client gets it.
    pub(super) fn passed_on(
        &self,
        answer: Response<Incoming>,
        busy: Busy,
        lent: Option<Lent>,
        places: Places,
    ) -> Result<Response<Answer>, Code> {
        // Only what was asked for may be another protocol.
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Code::Broken);
        }
        let (parts, incoming) = answer.into_parts();
        let download = Download::new(incoming, self.limits.idle, busy, lent, places);
        let mut response = Response::new(Answer::Guest(Box::new(download)));
        *response.status_mut() = parts.status;
        *response.headers_mut() = parts.headers;
        headers::to_client(response.headers_mut(), &self.base_domain);
        Ok(response)
    }
}

/// What the guest is asked for. `*` is for OPTIONS alone (RFC 9112, 3.2.4).
fn target<B>(request: &Request<B>) -> Result<PathAndQuery, Code> {
    let target = request.uri().path_and_query().ok_or(Code::BadRequest)?;
    let whole = target.as_str() == "*" && *request.method() == Method::OPTIONS;
    if target.as_str().starts_with('/') || whole {
        return Ok(target.clone());
    }
    Err(Code::BadRequest)
}
