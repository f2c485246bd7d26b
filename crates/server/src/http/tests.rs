//! The API in process, without a socket: every route against every kind of caller, and bad requests.

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
                let mut uri = path.replace("{id}", "no-such-thing");
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
                        "path" => "/tmp/x",
                        "status" => "running",
                        "name" => "x",
                        "format" => "tar",
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
                            Some("#/components/schemas/Exec") => r#"{"command":["true"]}"#,
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

#[tokio::test]
async fn no_route_answers_without_a_valid_key() {
    let bench = Bench::new().await;
    let admin = bench.admin_key();
    let (id, secret) = admin.split_once('.').unwrap();
    let last = if secret.ends_with('0') { '1' } else { '0' };
    let nearly = format!("{id}.{}{last}", &secret[..secret.len() - 1]);
    let long = "k".repeat(100_000);
    let bearer = |key: &str| vec![("authorization", format!("Bearer {key}"))];
    let callers = [
        vec![],
        bearer(""),
        bearer(&nearly),
        bearer(id),
        bearer(secret),
        bearer(&format!("{TOKEN}x")),
        bearer(&long),
        vec![("authorization", format!("Basic {TOKEN}"))],
        vec![("authorization", TOKEN.to_owned())],
        vec![("x-api-key", nearly.clone())],
        vec![
            ("x-forwarded-for", "127.0.0.1".to_owned()),
            ("forwarded", "for=127.0.0.1".to_owned()),
        ],
        vec![
            ("host", "localhost".to_owned()),
            ("x-real-ip", "127.0.0.1".to_owned()),
        ],
        vec![("cookie", format!("key={TOKEN}"))],
    ];
    for route in bench.routes() {
        for caller in &callers {
            let mut request = Bench::request(&route);
            for (name, value) in caller {
                request = request.header(*name, value);
            }
            let body = route.3.unwrap_or_default();
            let (response, answer) = bench.send(request.body(body.into()).unwrap()).await;
            if route.1 == "/health" {
                assert_eq!(response.status(), 200);
                continue;
            }
            let caller: Vec<_> = caller.iter().map(|(name, _)| name).collect();
            assert_eq!(
                response.status(),
                401,
                "{} {} let in {caller:?}",
                route.0,
                route.1
            );
            assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
            let answer = String::from_utf8(answer).unwrap();
            assert!(
                !answer.contains(TOKEN) && !answer.contains(secret),
                "{answer}"
            );
        }
    }
}

#[tokio::test]
async fn every_route_answers_a_valid_key_as_the_document_says() {
    let bench = Bench::new().await;
    let admin = bench.admin_key();
    let callers = [
        ("authorization", format!("Bearer {admin}")),
        ("authorization", format!("bearer  {admin} ")),
        ("x-api-key", admin),
        ("x-api-key", TOKEN.to_owned()),
    ];
    for route in bench.routes() {
        for (name, value) in &callers {
            let request = Bench::request(&route).header(*name, value);
            let request = request.body(route.3.unwrap_or_default().into()).unwrap();
            let (response, body) = bench.send(request).await;
            let (method, path, status) = (&route.0, &route.1, response.status());
            let text = String::from_utf8_lossy(&body);
            assert!(
                status != 401 && status != 403 && status != 500,
                "{method} {path}: {status} {text}"
            );
            assert!(
                bench.documented(method, path, status),
                "{method} {path}: {status} is not documented"
            );
            if path.contains("{id}") {
                assert_eq!(status, 404, "{method} {path}: {text}");
            }
        }
    }
}

#[tokio::test]
async fn the_socket_s_owner_needs_no_key_but_a_wrong_one_counts() {
    let bench = Bench::new().await;
    let uid = rustix::process::geteuid().as_raw();
    let ask = |uid: u32, key: Option<&'static str>| {
        let mut request = Request::builder().uri("/v1/machines");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        request
            .extension(Peer::Local { uid })
            .body(Body::empty())
            .unwrap()
    };
    assert_eq!(bench.send(ask(uid, None)).await.0.status(), 200);
    assert_eq!(bench.send(ask(uid, Some("wrong"))).await.0.status(), 401);
    assert_eq!(bench.send(ask(uid + 1, None)).await.0.status(), 401);
    assert_eq!(bench.send(ask(uid + 1, Some(TOKEN))).await.0.status(), 200);
}

#[tokio::test]
async fn a_key_that_may_read_changes_nothing_anywhere() {
    let bench = Bench::new().await;
    let reader = Principal {
        scope: Scope::Read,
        ..bench.app.engine.local_admin()
    };
    // The same routes with another caller put in where `auth` would put one.
    let (routes, _) = keyed().split_for_parts();
    let routes = routes
        .layer(axum::Extension(reader))
        .layer(from_fn(around::around));
    let routes = routes.with_state(bench.app.clone());
    for route in bench
        .routes()
        .into_iter()
        .filter(|route| route.1 != "/health")
    {
        let (method, path) = (&route.0, &route.1);
        let request = Bench::request(&route)
            .body(route.3.unwrap_or_default().into())
            .unwrap();
        let (response, body) = bench.send_to(routes.clone(), request).await;
        let only_looks = method == Method::GET || path.ends_with("/wait");
        let text = String::from_utf8_lossy(&body);
        let status = response.status();
        assert_eq!(
            status == 403,
            !only_looks,
            "{method} {path}: {status} {text}"
        );
    }
}

#[tokio::test]
async fn what_is_no_route_says_so_in_json() {
    let bench = Bench::new().await;
    for path in [
        "/",
        "/v1",
        "/v1/machine",
        "/v1/machines/",
        "/v1/machines/a/b/c",
        "/v2/machines",
        "//v1/machines",
        "/docs/x",
    ] {
        let (status, error) = bench.ask(Request::get(path), "").await;
        assert_eq!(
            (status.as_u16(), error.code.as_str()),
            (404, "no_such_route"),
            "{path}"
        );
    }
    for (method, path, allowed) in [
        ("PATCH", "/v1/machines", "POST,GET,HEAD"),
        ("POST", "/v1/machines/a", "GET,HEAD,DELETE"),
        ("GET", "/v1/machines/a/start", "POST"),
        ("TRACE", "/v1/images", "GET,HEAD"),
        ("DELETE", "/health", "GET,HEAD"),
        ("QWERTY", "/openapi.json", "GET,HEAD"),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-api-key", TOKEN);
        let (response, body) = bench.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow = response.headers()[header::ALLOW].to_str().unwrap();
        let sorted = |text: &str| {
            let mut words: Vec<_> = text.split(',').map(|word| word.trim().to_owned()).collect();
            words.sort();
            words
        };
        assert_eq!(sorted(allow), sorted(allowed), "{method} {path}");
        assert!(
            String::from_utf8(body)
                .unwrap()
                .contains("method_not_allowed")
        );
    }
}

#[tokio::test]
async fn a_bad_body_is_refused_with_the_field_named() {
    let bench = Bench::new().await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_field = format!(r#"{{"image":{deep}}}"#);
    let cases: [(&[u8], &str); 20] = [
        (b"", "must be a JSON object"),
        (b"{", "EOF"),
        (b"null", "must be a JSON object"),
        (
            br#"["x",null,null,null,null,null,{},{},false]"#,
            "must be a JSON object",
        ),
        (b"{}", "image"),
        (br#"{"image":"x"} {}"#, "trailing"),
        (br#"{"image":"x","image":"y"}"#, "duplicate field `image`"),
        (
            br#"{"image":"x","vcpu":1,"vcpu":64}"#,
            "duplicate field `vcpu`",
        ),
        (br#"{"image":"x","owner":"own-1"}"#, "unknown field `owner`"),
        (
            br#"{"image":"x","__proto__":{}}"#,
            "unknown field `__proto__`",
        ),
        (br#"{"image":7}"#, "image: invalid type"),
        (br#"{"image":"x","vcpu":-1}"#, "vcpu: invalid value"),
        (br#"{"image":"x","vcpu":1.5}"#, "vcpu: invalid type"),
        (
            br#"{"image":"x","memory_mib":"4"}"#,
            "memory_mib: invalid type",
        ),
        (
            br#"{"image":"x","memory_mib":18446744073709551616}"#,
            "memory_mib: invalid",
        ),
        (br#"{"image":"x","disk_gib":1e400}"#, "number out of range"),
        (br#"{"image":"x","disk_gib":NaN}"#, "expected value"),
        (br#"{"image":"x","name":"../x"}"#, "name: "),
        (b"{\"image\":\"\xff\"}", "unicode"),
        (b"\xef\xbb\xbf{\"image\":\"x\"}", "must be a JSON object"),
    ];
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    for (body, part) in cases {
        let (status, error) = bench.ask(post(), body.to_vec()).await;
        let sent = String::from_utf8_lossy(body);
        assert_eq!(status, 400, "{sent}: {}", error.message);
        assert!(
            error.message.contains(part),
            "{sent}: `{}` lacks `{part}`",
            error.message
        );
    }
    for body in [deep, deep_field] {
        let (status, error) = bench.ask(post(), body).await;
        assert_eq!(status, 400, "{}", error.message);
        assert!(error.message.len() < 1000);
    }
    let lone_surrogate = r#"{"image":"\ud800"}"#;
    assert_eq!(bench.ask(post(), lone_surrogate).await.0, 400);
    // A message quotes what it refuses: it must not carry a terminal's commands.
    let (_, error) = bench
        .ask(post(), "{\"image\":\"x\",\"\\u001b[2J\\u202e\":1}")
        .await;
    assert!(
        !error.message.contains(['\u{1b}', '\u{202e}']),
        "{:?}",
        error.message
    );
}

#[tokio::test]
async fn a_body_of_another_type_or_compressed_is_refused() {
    let bench = Bench::new().await;
    let body = r#"{"image":"x"}"#;
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "",
        "multipart/form-data",
    ] {
        let request = Request::post("/v1/machines").header(header::CONTENT_TYPE, kind);
        assert_eq!(bench.ask(request, body).await.0, 415, "{kind}");
    }
    assert_eq!(bench.ask(Request::post("/v1/machines"), body).await.0, 415);
    let json = || {
        Request::post("/v1/machines")
            .header(header::CONTENT_TYPE, "application/json; charset=utf-8")
    };
    assert_eq!(
        bench
            .ask(json().header(header::CONTENT_ENCODING, "gzip"), body)
            .await
            .0,
        415
    );
    assert_eq!(
        bench.ask(json(), body).await.0,
        404,
        "the right type goes on to the image that is not there"
    );
    let upload =
        Request::put("/v1/machines/x/files?path=/x").header(header::CONTENT_ENCODING, "zstd");
    assert_eq!(bench.ask(upload, body).await.0, 415);
}

#[tokio::test]
async fn a_json_body_has_a_largest_size_whether_it_says_so_or_not() {
    let bench = Bench::new().await;
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let announced = post().header(header::CONTENT_LENGTH, u64::MAX);
    assert_eq!(bench.ask(announced, "{").await.0, 413);
    let endless = futures::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[b' '; 4096]))
    });
    let (status, error) = bench.ask(post(), Body::from_stream(endless)).await;
    assert_eq!((status.as_u16(), error.code.as_str()), (413, "too_large"));
    let padded = format!("{}{}", " ".repeat(1024 * 1024 - 13), r#"{"image":"x"}"#);
    assert_eq!(
        bench.ask(post(), padded.clone()).await.0,
        404,
        "1 MiB is not yet too large"
    );
    assert_eq!(bench.ask(post(), format!(" {padded}")).await.0, 413);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let bench = Bench::new().await;
    let never = || Body::from_stream(futures::stream::pending::<std::io::Result<bytes::Bytes>>());
    let json = Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let (status, error) = bench.ask(json, never()).await;
    assert_eq!((status.as_u16(), error.code.as_str()), (408, "slow_body"));
}

#[tokio::test]
async fn a_bad_query_is_refused_with_the_parameter_named() {
    let bench = Bench::new().await;
    for (path, part) in [
        ("/v1/machines?limit=0", "limit"),
        ("/v1/machines?limit=1001", "limit"),
        ("/v1/machines?limit=-1", "limit"),
        ("/v1/machines?limit=many", "limit"),
        ("/v1/machines?status=dancing", "status"),
        ("/v1/machines?stauts=running", "stauts"),
        ("/v1/machines?key=secret", "unknown field `key`"),
        ("/v1/machines?limit=1&limit=2", "limit"),
        ("/v1/images?limit=0", "limit"),
        ("/v1/machines/a/files", "path"),
        ("/v1/machines/a/files?path=/x&offset=-1", "offset"),
        (
            "/v1/machines/a/files/list?path=/x&limit=4294967296",
            "limit",
        ),
        ("/v1/machines/a/logs?follow=maybe", "follow"),
        (
            "/v1/operations/op-01arz3ndektsv4rrffq69g5fav?after_version=1&timeout_ms=3600001",
            "timeout_ms",
        ),
    ] {
        let (status, error) = bench.ask(Request::get(path), "").await;
        assert_eq!(status, 400, "{path}: {}", error.message);
        assert!(
            error.message.contains(part),
            "{path}: `{}` lacks `{part}`",
            error.message
        );
    }
    for (method, path) in [
        ("POST", "/v1/machines/a/wait"),
        ("POST", "/v1/machines/a/wait?status=sleeping"),
        ("POST", "/v1/machines/a/start?wait=1"),
        (
            "POST",
            "/v1/machines/a/stop?timeout_ms=99999999999999999999",
        ),
        ("DELETE", "/v1/machines/a?timeout_ms=3600001"),
        ("PUT", "/v1/images/import?name=../x&format=tar"),
        ("PUT", "/v1/images/import?name=x&format=rpm"),
        ("PUT", "/v1/machines/a/files?path=/x&mode=0o644"),
        ("PUT", "/v1/machines/a/files?path=/x&mode=99999"),
    ] {
        let request = Request::builder().method(method).uri(path);
        assert_eq!(bench.ask(request, "").await.0, 400, "{method} {path}");
    }
}

#[tokio::test]
async fn hostile_references_name_nothing() {
    let bench = Bench::new().await;
    let long = "a".repeat(10_000);
    for reference in [
        "%2e%2e",
        "..%2f..%2fetc",
        "-rf",
        "%00",
        "%0d%0ax",
        "'%20OR%201=1",
        "mch-",
        &long,
        "MCH-x",
        "%E2%80%AE",
    ] {
        let (status, error) = bench
            .ask(Request::get(format!("/v1/machines/{reference}")), "")
            .await;
        assert_eq!(status, 404, "{reference:.40}");
        assert!(
            !error.message.contains(['\r', '\n', '\0', '\u{202e}']) && error.message.len() < 1000
        );
    }
    assert_eq!(bench.ask(Request::get("/v1/machines/%ff"), "").await.0, 400);
    assert_eq!(
        bench
            .ask(
                Request::get("/v1/operations/mch-01arz3ndektsv4rrffq69g5fav"),
                ""
            )
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn two_keys_are_no_key() {
    let bench = Bench::new().await;
    let bearer = format!("Bearer {TOKEN}");
    for second in [
        ("authorization", bearer.as_str()),
        ("x-api-key", TOKEN),
        ("x-api-key", "other"),
    ] {
        let request = Request::get("/v1/machines")
            .header("authorization", &bearer)
            .header(second.0, second.1);
        assert_eq!(
            bench
                .send(request.body(Body::empty()).unwrap())
                .await
                .0
                .status(),
            400
        );
    }
}

#[tokio::test]
async fn an_idempotency_key_has_bounds() {
    let bench = Bench::new().await;
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let body = r#"{"image":"x"}"#;
    for key in ["", &"k".repeat(256), "caf\u{e9}"] {
        assert_eq!(
            bench
                .ask(post().header("idempotency-key", key), body)
                .await
                .0,
            400,
            "{key:.20}"
        );
    }
    let twice = post()
        .header("idempotency-key", "a")
        .header("idempotency-key", "b");
    assert_eq!(bench.ask(twice, body).await.0, 400);
    assert_eq!(
        bench
            .ask(post().header("idempotency-key", "k".repeat(255)), body)
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn a_request_keeps_a_good_id_and_loses_a_bad_one() {
    let bench = Bench::new().await;
    for (given, kept) in [
        ("abc-DEF_1.2", true),
        (&"x".repeat(64)[..], true),
        (&"x".repeat(65)[..], false),
        ("a b", false),
        ("a\"b", false),
        ("", false),
    ] {
        let request = Request::get("/health")
            .header("x-request-id", given)
            .body(Body::empty())
            .unwrap();
        let (response, _) = bench.send(request).await;
        let answered = response.headers()["x-request-id"].to_str().unwrap();
        assert_eq!(answered == given, kept, "{given}: {answered}");
        assert!(!answered.is_empty());
    }
}

#[tokio::test]
async fn a_panic_is_one_request_s_fault() {
    let bench = Bench::new().await;
    let routes = Router::new().route(
        "/boom",
        axum::routing::get(|| async { panic!("a secret reason") as () }),
    );
    let routes = around_all(routes).with_state(bench.app.clone());
    let (response, body) = bench
        .send_to(routes, Request::get("/boom").body(Body::empty()).unwrap())
        .await;
    assert_eq!(response.status(), 500);
    assert!(!String::from_utf8(body).unwrap().contains("secret reason"));
    let failed = bench
        .app
        .to_its_end(async { panic!("another") as Result<(), hutch_engine::Error> })
        .await;
    assert_eq!(failed.unwrap_err().status, 500);
}

#[tokio::test]
async fn a_change_goes_on_when_its_client_has_gone() {
    let bench = Bench::new().await;
    let (tell, told) = tokio::sync::oneshot::channel();
    let mut change = Box::pin(bench.app.to_its_end(async move {
        tokio::task::yield_now().await;
        tell.send(())
            .map_err(|()| hutch_engine::Error::Unauthenticated)
    }));
    assert!(futures::poll!(change.as_mut()).is_pending());
    drop(change);
    told.await.expect("it came to its end");
}

#[tokio::test]
async fn waiting_ends_with_the_server() {
    let bench = Bench::new().await;
    bench.app.closing.cancel();
    let waited = bench
        .app
        .unless_closing(std::future::pending::<Result<(), hutch_engine::Error>>())
        .await;
    assert_eq!(waited.unwrap_err().status, 503);
}

#[tokio::test]
async fn the_document_and_its_page_are_there_without_a_key_and_need_nothing_from_elsewhere() {
    let bench = Bench::new().await;
    let get = |path: &str| Request::get(path.to_owned()).body(Body::empty()).unwrap();
    let (_, json) = bench.send(get("/openapi.json")).await;
    assert_eq!(
        serde_json::from_slice::<Value>(&json).unwrap(),
        bench.document
    );
    assert_eq!(bench.send(get("/docs/json")).await.1, json);
    let (response, page) = bench.send(get("/docs")).await;
    assert_eq!(response.status(), 200);
    let page = String::from_utf8(page).unwrap();
    assert!(
        response.headers()["content-security-policy"]
            .to_str()
            .unwrap()
            .starts_with("default-src 'none'")
    );
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("innerHTML"));
}

#[test]
fn every_operation_has_a_name_of_its_own() {
    let document: Value = serde_json::from_str(&crate::openapi()).unwrap();
    let items = document["paths"].as_object().unwrap().values();
    let operations = items.flat_map(|item| item.as_object().unwrap().values());
    let names: Vec<_> = operations
        .map(|operation| operation["operationId"].as_str().unwrap())
        .collect();
    let different: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(different.len(), names.len(), "{names:?}");
}

#[test]
fn the_document_is_the_one_that_was_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let now = crate::openapi() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let reviewed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        now == reviewed,
        "the API has changed: run with UPDATE_GOLDEN=1 and review the diff of {path}"
    );
}
