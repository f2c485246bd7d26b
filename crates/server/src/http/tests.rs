//! The API in process, without a socket: what its tests stand on.

mod document;
mod input;
mod keys;
mod requests;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use axum::middleware::from_fn;
use axum::response::Response;
use http_body_util::BodyExt;
use hutch_contract::error::ErrorBody;
use hutch_contract::key::Scope;
use hutch_engine::Principal;
use serde_json::Value;
use tower::ServiceExt;

use super::*;
use crate::auth::Peer;
use crate::config::{Flags, Host, load};

/// An engine in a directory of its own, and the API in front of it.
struct Bench {
    dir: tempfile::TempDir,
    app: App,
    document: Value,
}

const TOKEN: &str = "the-configured-token";

impl Bench {
    async fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let flags = Flags {
            data_dir: Some(dir.path().join("data")),
            ..Flags::default()
        };
        let home = dir.path().to_str().unwrap().to_owned();
        let environment = [
            ("HOME", home.as_str()),
            ("HUTCH_KERNEL", "/nowhere/kernel.deb"),
            // The host's own network is left alone.
            ("HUTCH_NETWORK_MODE", "none"),
            // Nor is anything mounted on it.
            ("HUTCH_DISK_POOL", "off"),
        ];
        let environment = environment
            .map(|(name, value)| (name.into(), value.into()))
            .to_vec();
        let host = Host {
            root: false,
            executable: "/nowhere/hutch".into(),
            environment,
        };
        let config = load(&flags, &host).unwrap().config;
        let engine = Engine::open(config.engine()).await.unwrap();
        let closing = CancellationToken::new();
        let app = App {
            tokens: Tokens::new(engine.gateway_secret()),
            names: Names::below("vms.localhost"),
            engine,
            token: Some(Token::new(TOKEN)),
            closing,
        };
        Bench {
            dir,
            app,
            document: serde_json::from_str(&crate::openapi()).unwrap(),
        }
    }

    fn admin_key(&self) -> String {
        let key = std::fs::read_to_string(self.dir.path().join("data/admin.key")).unwrap();
        key.trim().to_owned()
    }

    /// Sends a request; whatever comes back is as the document says, and an error has the one shape.
    async fn send(&self, request: Request<Body>) -> (Response<()>, Vec<u8>) {
        self.send_to(router(self.app.clone()), request).await
    }

    async fn send_to(&self, router: Router, request: Request<Body>) -> (Response<()>, Vec<u8>) {
        let (method, path) = (request.method().clone(), request.uri().to_string());
        let (parts, body) = router.oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        let id = parts
            .headers
            .get("x-request-id")
            .expect("an answer names its request")
            .to_str()
            .unwrap();
        if parts.status.is_client_error() || parts.status.is_server_error() {
            assert_eq!(
                parts.headers[header::CONTENT_TYPE],
                "application/json",
                "{method} {path}"
            );
            let error: ErrorBody =
                serde_json::from_slice(&body).expect("an error has the one shape");
            assert_eq!(error.request_id, id);
            assert!(!error.message.is_empty() && !error.code.is_empty());
        }
        (Response::from_parts(parts, ()), body)
    }

    /// As `send`, with a key that may do everything.
    async fn ask(
        &self,
        request: axum::http::request::Builder,
        body: impl Into<Body>,
    ) -> (StatusCode, ErrorBody) {
        let request = request
            .header("x-api-key", TOKEN)
            .body(body.into())
            .unwrap();
        let (response, body) = self.send(request).await;
        let error = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
            code: String::new(),
            message: String::from_utf8_lossy(&body).into_owned(),
            hint: None,
            request_id: String::new(),
        });
        (response.status(), error)
    }

    /// Every route of the document: method, path as documented, and a request for it that is right in form.
    fn routes(&self) -> Vec<(Method, String, String, Option<&'static str>)> {
        let mut routes = Vec::new();
        for (path, item) in self.document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let mut uri = path
                    .replace("{id}", "no-such-thing")
                    .replace("{host_port}", "22001");
                if path.starts_with("/v1/operations") {
                    uri = path.replace("{id}", "op-01arz3ndektsv4rrffq69g5fav");
                }
                let parameters = operation["parameters"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                for parameter in parameters
                    .iter()
                    .filter(|it| it["in"] == "query" && it["required"] == true)
                {
                    let name = parameter["name"].as_str().unwrap();
                    let value = match name {
                        "path" | "to" => "/tmp/x",
                        "mode" => "0644",
                        "owner" => "root",
                        "pattern" => "*",
                        "status" => "running",
                        "name" => "x",
                        "format" => "tar",
                        "domain" => "no-such-thing.vms.localhost",
                        other => panic!("no example for {other} of {method} {path}"),
                    };
                    let join = if uri.contains('?') { '&' } else { '?' };
                    uri = format!("{uri}{join}{name}={value}");
                }
                let body = operation["requestBody"]["content"]
                    .as_object()
                    .map(|content| {
                        match content.values().next().unwrap()["schema"]["$ref"].as_str() {
                            Some("#/components/schemas/CreateMachine") => {
                                r#"{"image":"no-such-thing"}"#
                            }
                            Some("#/components/schemas/PublishPort") => r#"{"guest_port":80}"#,
                            Some(
                                "#/components/schemas/ChangeMachine"
                                | "#/components/schemas/MintToken"
                                | "#/components/schemas/CreateSnapshot"
                                | "#/components/schemas/ForkMachine"
                                | "#/components/schemas/NetworkPolicy",
                            ) => "{}",
                            Some("#/components/schemas/RestoreMachine") => {
                                r#"{"snapshot":"no-such-thing"}"#
                            }
                            Some("#/components/schemas/SnapshotImage") => {
                                r#"{"name":"no-such-thing"}"#
                            }
                            Some(
                                "#/components/schemas/Exec" | "#/components/schemas/StartProcess",
                            ) => r#"{"command":["true"]}"#,
                            Some("#/components/schemas/SendSignal") => r#"{"signal":"TERM"}"#,
                            Some("#/components/schemas/PtySize") => r#"{"rows":24,"cols":80}"#,
                            Some("#/components/schemas/BootstrapImage") => {
                                r#"{"distribution":"no-such-thing"}"#
                            }
                            Some(other) => panic!("no example for {other}"),
                            None => "raw bytes",
                        }
                    });
                routes.push((
                    method.to_uppercase().parse().unwrap(),
                    path.clone(),
                    uri,
                    body,
                ));
            }
        }
        assert!(routes.len() > 20, "the document has lost its routes");
        routes
    }

    fn request(route: &(Method, String, String, Option<&str>)) -> axum::http::request::Builder {
        let (method, _, uri, body) = route;
        let request = Request::builder().method(method).uri(uri);
        match body {
            Some("raw bytes") => request.header(header::CONTENT_TYPE, "application/octet-stream"),
            Some(_) => request.header(header::CONTENT_TYPE, "application/json"),
            None => request,
        }
    }

    fn documented(&self, method: &Method, path: &str, status: StatusCode) -> bool {
        let method = method.as_str().to_lowercase();
        self.document["paths"][path][method]["responses"]
            .get(status.as_str())
            .is_some()
    }
}
