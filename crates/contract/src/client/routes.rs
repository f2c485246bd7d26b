//! One method per route, in the order of the API document.

use std::time::Duration;

use futures::stream::BoxStream;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, RequestBuilder, StatusCode};

use super::{Body, Client, Download, Error, decode, sse, stream};
use crate::exec::{Exec, ExecEvent, ExecResult};
use crate::expose::{ChangeMachine, MintToken, Port, PublishPort, UrlToken};
use crate::id::OperationId;
use crate::image::{Accepted, BootstrapImage, Image, ImportFormat};
use crate::machine::{CreateMachine, Machine, Status};
use crate::name::Name;
use crate::network::NetworkPolicy;
use crate::node::{Health, RuntimeInfo};
use crate::operation::Operation;
use crate::page::{MAX_LIMIT, Page};

pub(super) const NO_WAIT: Duration = Duration::ZERO;

/// What [`Client::wait`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// It is in this state.
    Status(Status),
    /// It is deleted, with all that belonged to it.
    Gone,
}

impl Until {
    fn as_str(self) -> &'static str {
        match self {
            Until::Status(status) => status.as_str(),
            Until::Gone => "deleted",
        }
    }
}

/// Adds `name=value` where there is a value.
pub(super) fn optional<T: ToString>(
    request: RequestBuilder,
    name: &str,
    value: Option<T>,
) -> RequestBuilder {
    match value {
        Some(value) => request.query(&[(name, value.to_string())]),
        None => request,
    }
}

/// Adds what asks the server to answer only when it has happened, or after so long.
pub(super) fn waiting(
    request: RequestBuilder,
    until: &str,
    wait: Option<Duration>,
) -> RequestBuilder {
    match wait {
        Some(timeout) => request.query(&[
            ("wait", until.to_owned()),
            ("timeout_ms", timeout.as_millis().to_string()),
        ]),
        None => request,
    }
}

/// Sends raw bytes.
pub(super) fn raw(request: RequestBuilder, size_bytes: Option<u64>, body: Body) -> RequestBuilder {
    let request = request
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(reqwest::Body::wrap_stream(body));
    match size_bytes {
        Some(size) => request.header(CONTENT_LENGTH, size),
        None => request,
    }
}

/// Server.
impl Client {
    /// `GET /health`: whether a server answers; needs no key.
    pub async fn health(&self) -> Result<Health, Error> {
        self.json(self.request(Method::GET, &["health"])?, NO_WAIT)
            .await
    }

    /// `GET /v1/runtimes`: what can run machines here.
    pub async fn runtimes(&self) -> Result<Vec<RuntimeInfo>, Error> {
        self.json(self.request(Method::GET, &["v1", "runtimes"])?, NO_WAIT)
            .await
    }
}

/// Machines.
impl Client {
    /// `POST /v1/machines`. With `wait` it answers when the machine runs, or with an error of kind `Timeout` after
    /// so long; the machine goes on starting then. The same `idempotency_key` never makes a second machine.
    pub async fn create(
        &self,
        machine: &CreateMachine,
        idempotency_key: Option<&str>,
        wait: Option<Duration>,
    ) -> Result<Machine, Error> {
        let mut request = waiting(
            self.request(Method::POST, &["v1", "machines"])?,
            "running",
            wait,
        )
        .json(machine);
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        self.json(request, wait.unwrap_or(NO_WAIT)).await
    }

    /// `GET /v1/machines`: one page.
    pub async fn machines(
        &self,
        status: Option<Status>,
        cursor: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Page<Machine>, Error> {
        let request = optional(
            self.request(Method::GET, &["v1", "machines"])?,
            "status",
            status.map(Status::as_str),
        );
        self.json(
            optional(optional(request, "cursor", cursor), "limit", limit),
            NO_WAIT,
        )
        .await
    }

    /// All pages of [`Client::machines`].
    pub async fn all_machines(&self, status: Option<Status>) -> Result<Vec<Machine>, Error> {
        let mut all = Vec::new();
        let mut cursor = None;
        loop {
            let page = self
                .machines(status, cursor.as_deref(), Some(MAX_LIMIT))
                .await?;
            all.extend(page.items);
            cursor = page.next;
            if cursor.is_none() {
                return Ok(all);
            }
        }
    }

    /// `GET /v1/machines/{id}`.
    pub async fn machine(&self, reference: &str) -> Result<Machine, Error> {
        self.json(self.of(Method::GET, reference, &[])?, NO_WAIT)
            .await
    }

    /// `PATCH /v1/machines/{id}`.
    pub async fn change(&self, reference: &str, change: &ChangeMachine) -> Result<Machine, Error> {
        let request = self.of(Method::PATCH, reference, &[])?;
        self.json(request.json(change), NO_WAIT).await
    }

    /// `DELETE /v1/machines/{id}`. With `wait` it answers `None` when nothing of it is left.
    pub async fn delete(
        &self,
        reference: &str,
        wait: Option<Duration>,
    ) -> Result<Option<Machine>, Error> {
        let request = waiting(self.of(Method::DELETE, reference, &[])?, "true", wait);
        self.machine_or_gone(request, wait.unwrap_or(NO_WAIT)).await
    }

    /// `POST /v1/machines/{id}/start`. With `wait` it answers when it runs.
    pub async fn start(&self, reference: &str, wait: Option<Duration>) -> Result<Machine, Error> {
        self.verb(reference, "start", wait).await
    }

    /// `POST /v1/machines/{id}/stop`. With `wait` it answers when it has stopped.
    pub async fn stop(&self, reference: &str, wait: Option<Duration>) -> Result<Machine, Error> {
        self.verb(reference, "stop", wait).await
    }

    /// `POST /v1/machines/{id}/restart`. With `wait` it answers when it runs again.
    pub async fn restart(&self, reference: &str, wait: Option<Duration>) -> Result<Machine, Error> {
        self.verb(reference, "restart", wait).await
    }

    /// `POST /v1/machines/{id}/pause`. With `wait` it answers when it is paused.
    pub async fn pause(&self, reference: &str, wait: Option<Duration>) -> Result<Machine, Error> {
        self.verb(reference, "pause", wait).await
    }

    /// `POST /v1/machines/{id}/resume`. With `wait` it answers when it runs.
    pub async fn resume(&self, reference: &str, wait: Option<Duration>) -> Result<Machine, Error> {
        self.verb(reference, "resume", wait).await
    }

    /// `PUT /v1/machines/{id}/network`.
    pub async fn set_network(
        &self,
        reference: &str,
        policy: &NetworkPolicy,
    ) -> Result<Machine, Error> {
        let request = self.of(Method::PUT, reference, &["network"])?.json(policy);
        self.json(request, NO_WAIT).await
    }

    async fn verb(
        &self,
        reference: &str,
        verb: &str,
        wait: Option<Duration>,
    ) -> Result<Machine, Error> {
        let request = waiting(self.of(Method::POST, reference, &[verb])?, "true", wait);
        self.json(request, wait.unwrap_or(NO_WAIT)).await
    }

    /// `POST /v1/machines/{id}/wait`: answers when it has come to that state; `None` when it is gone.
    pub async fn wait(
        &self,
        reference: &str,
        until: Until,
        timeout: Duration,
    ) -> Result<Option<Machine>, Error> {
        let request = self.of(Method::POST, reference, &["wait"])?;
        let request = request.query(&[("status", until.as_str())]);
        self.machine_or_gone(
            optional(request, "timeout_ms", Some(timeout.as_millis())),
            timeout,
        )
        .await
    }

    /// `GET /v1/machines/{id}/logs`: the serial console from byte `from` on; with `follow` it does not end by itself.
    pub async fn logs(&self, reference: &str, from: u64, follow: bool) -> Result<Download, Error> {
        let request = self
            .of(Method::GET, reference, &["logs"])?
            .query(&[("from", from)])
            .query(&[("follow", follow)]);
        self.download(request).await
    }

    /// A request for a machine, or for something of it.
    pub(super) fn of(
        &self,
        method: Method,
        reference: &str,
        rest: &[&str],
    ) -> Result<RequestBuilder, Error> {
        let mut segments = vec!["v1", "machines", reference];
        segments.extend(rest);
        self.request(method, &segments)
    }

    async fn machine_or_gone(
        &self,
        request: RequestBuilder,
        waits: Duration,
    ) -> Result<Option<Machine>, Error> {
        let response = self
            .send(request.timeout(super::ANSWER_TIMEOUT + waits))
            .await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(None),
            _ => decode(response).await.map(Some),
        }
    }
}

/// Ways to a machine.
impl Client {
    /// `GET /v1/machines/{id}/ports`.
    pub async fn ports(&self, reference: &str) -> Result<Vec<Port>, Error> {
        let request = self.of(Method::GET, reference, &["ports"])?;
        self.json(request, NO_WAIT).await
    }

    /// `POST /v1/machines/{id}/ports`: one more port of the host leads to it.
    pub async fn publish(&self, reference: &str, port: &PublishPort) -> Result<Port, Error> {
        let request = self.of(Method::POST, reference, &["ports"])?;
        self.json(request.json(port), NO_WAIT).await
    }

    /// `DELETE /v1/machines/{id}/ports/{host_port}`.
    pub async fn unpublish(&self, reference: &str, host_port: u16) -> Result<(), Error> {
        let port = host_port.to_string();
        self.nothing(self.of(Method::DELETE, reference, &["ports", &port])?)
            .await
    }

    /// `POST /v1/machines/{id}/token`: a token for its URLs.
    pub async fn token(&self, reference: &str, token: &MintToken) -> Result<UrlToken, Error> {
        let request = self.of(Method::POST, reference, &["token"])?;
        self.json(request.json(token), NO_WAIT).await
    }

    /// `DELETE /v1/machines/{id}/token`: all that were made so far open nothing any more.
    pub async fn revoke_tokens(&self, reference: &str) -> Result<(), Error> {
        self.nothing(self.of(Method::DELETE, reference, &["token"])?)
            .await
    }
}

/// Commands.
impl Client {
    /// `POST /v1/machines/{id}/exec`: runs a command to its end, however long that takes.
    pub async fn exec(&self, reference: &str, exec: &Exec) -> Result<ExecResult, Error> {
        decode(
            self.send(self.of(Method::POST, reference, &["exec"])?.json(exec))
                .await?,
        )
        .await
    }

    /// The same with its output as it comes. The last event is `exit` or `error`; an end without one is an error.
    pub async fn exec_stream(
        &self,
        reference: &str,
        exec: &Exec,
    ) -> Result<BoxStream<'static, Result<ExecEvent, Error>>, Error> {
        let mut request = self
            .of(Method::POST, reference, &["exec"])?
            .json(exec)
            .build()
            .map_err(Error::reading)?;
        request
            .headers_mut()
            .insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let request = RequestBuilder::from_parts(self.http.clone(), request);
        Ok(sse::events(stream(self.send(request).await?)))
    }
}

/// Images and operations.
impl Client {
    /// `GET /v1/images`: one page.
    pub async fn images(
        &self,
        cursor: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Page<Image>, Error> {
        let request = self.request(Method::GET, &["v1", "images"])?;
        self.json(
            optional(optional(request, "cursor", cursor), "limit", limit),
            NO_WAIT,
        )
        .await
    }

    /// All pages of [`Client::images`].
    pub async fn all_images(&self) -> Result<Vec<Image>, Error> {
        let mut all = Vec::new();
        let mut cursor = None;
        loop {
            let page = self.images(cursor.as_deref(), Some(MAX_LIMIT)).await?;
            all.extend(page.items);
            cursor = page.next;
            if cursor.is_none() {
                return Ok(all);
            }
        }
    }

    /// `GET /v1/images/{id}`.
    pub async fn image(&self, reference: &str) -> Result<Image, Error> {
        self.json(
            self.request(Method::GET, &["v1", "images", reference])?,
            NO_WAIT,
        )
        .await
    }

    /// `DELETE /v1/images/{id}`.
    pub async fn delete_image(&self, reference: &str) -> Result<(), Error> {
        self.nothing(self.request(Method::DELETE, &["v1", "images", reference])?)
            .await
    }

    /// `PUT /v1/images/import`: answers when the body is there; follow the operation for the rest.
    pub async fn import_image(
        &self,
        name: &Name,
        format: ImportFormat,
        size_bytes: Option<u64>,
        body: Body,
    ) -> Result<Accepted, Error> {
        let format = match format {
            ImportFormat::Tar => "tar",
            ImportFormat::Ext4 => "ext4",
        };
        let request = self.request(Method::PUT, &["v1", "images", "import"])?;
        let request = request.query(&[("name", name.as_str()), ("format", format)]);
        decode(self.send(raw(request, size_bytes, body)).await?).await
    }

    /// `POST /v1/images/bootstrap`: follow the operation.
    pub async fn bootstrap_image(&self, image: &BootstrapImage) -> Result<Accepted, Error> {
        self.json(
            self.request(Method::POST, &["v1", "images", "bootstrap"])?
                .json(image),
            NO_WAIT,
        )
        .await
    }

    /// `GET /v1/operations/{id}`.
    pub async fn operation(&self, id: &OperationId) -> Result<Operation, Error> {
        self.json(
            self.request(Method::GET, &["v1", "operations", id.as_str()])?,
            NO_WAIT,
        )
        .await
    }

    /// The same; answers when its version has passed `after_version`, when it has ended, or unchanged after `timeout`.
    pub async fn wait_operation(
        &self,
        id: &OperationId,
        after_version: u64,
        timeout: Duration,
    ) -> Result<Operation, Error> {
        let request = self.request(Method::GET, &["v1", "operations", id.as_str()])?;
        let request = request.query(&[("after_version", after_version)]);
        self.json(
            optional(request, "timeout_ms", Some(timeout.as_millis())),
            timeout,
        )
        .await
    }
}
