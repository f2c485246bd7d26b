//! A server that answers as the API does, from a little memory, and remembers what it was asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures::{StreamExt, stream};
use hutch_contract::error::ErrorBody;
use hutch_contract::machine::{CreateMachine, Machine, Status};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener};

pub const MACHINE_ID: &str = "mch-01arz3ndektsv4rrffq69g5fav";
pub const IMAGE_ID: &str = "img-01arz3ndektsv4rrffq69g5fav";
const OPERATION_ID: &str = "op-01arz3ndektsv4rrffq69g5fav";
const PROCESS_ID: &str = "prc-01arz3ndektsv4rrffq69g5fav";
const HOUR_MS: u64 = 3_600_000;

type Query1 = Query<BTreeMap<String, String>>;

/// The server; it ends with the test's runtime.
#[derive(Clone)]
pub struct Fake {
    pub url: String,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Default)]
struct Memory {
    requests: Vec<String>,
    keys: Vec<String>,
    created: BTreeMap<String, Machine>,
    images: Vec<String>,
    files: BTreeMap<String, (u32, Vec<u8>)>,
    steps: u64,
}

impl Fake {
    /// Listens on a free port of the loopback.
    pub async fn start() -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Fake {
            url: format!("http://{}", listener.local_addr().unwrap()),
            memory: Arc::default(),
        };
        fake.memory().images.push("debian-base".to_owned());
        let router = fake.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    /// Listens on a unix socket besides.
    pub fn listen_at(&self, socket: &std::path::Path) {
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(socket).unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
    }

    /// Method, path and query of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.memory().requests.clone()
    }

    /// The key shown with the last request.
    pub fn last_key(&self) -> String {
        self.memory().keys.last().cloned().unwrap_or_default()
    }

    /// Waits until a machine has been created, whether or not that was answered.
    pub async fn has_a_machine(&self) {
        while self.memory().created.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until something has been asked for.
    pub async fn asked(&self, what: &str) {
        while !self.requests().iter().any(|request| request.contains(what)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Puts a file into the machine `web`.
    pub fn put_file(&self, path: &str, mode: u32, content: &[u8]) {
        self.memory()
            .files
            .insert(path.to_owned(), (mode, content.to_vec()));
    }

    /// A file of the machine `web`.
    pub fn file(&self, path: &str) -> Option<(u32, Vec<u8>)> {
        self.memory().files.get(path).cloned()
    }

    /// Forgets an image.
    pub fn without_images(self) -> Fake {
        self.memory().images.clear();
        self
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap()
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/v1/machines", get(machines).post(create))
            .route(
                "/v1/machines/{machine}",
                get(machine).delete(delete).patch(change),
            )
            .route(
                "/v1/machines/{machine}/ports",
                get(async || Json(a_shop()["ports"].clone())).post(publish),
            )
            .route(
                "/v1/machines/{machine}/ports/{port}",
                axum::routing::delete(async || StatusCode::NO_CONTENT),
            )
            .route("/v1/machines/{machine}/token", post(token))
            .route("/v1/machines/{machine}/{verb}", post(verb))
            .route("/v1/machines/{machine}/wait", post(wait))
            .route("/v1/machines/{machine}/exec", post(exec))
            .route("/v1/machines/{machine}/logs", get(async || "boot\x1b[0m\n"))
            .route(
                "/v1/machines/{machine}/files",
                get(read_file).put(write_file),
            )
            .route("/v1/machines/{machine}/files/stat", get(stat_file))
            .route(
                "/v1/images",
                get(async || page(vec![image("debian-base")], None)),
            )
            .route("/v1/images/{image}", get(get_image).delete(delete_image))
            .route("/v1/images/import", put(import))
            .route("/v1/images/bootstrap", post(bootstrap))
            .route("/v1/operations/{operation}", get(operation))
            .route("/v1/runtimes", get(async || Json(runtimes())))
            .layer(DefaultBodyLimit::disable())
            .layer(from_fn_with_state(self.clone(), remember))
            .with_state(self.clone())
    }
}

async fn remember(State(fake): State<Fake>, request: Request, next: Next) -> Response {
    let uri = request.uri().path_and_query().unwrap();
    let key = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|key| key.to_str().ok());
    let (line, key) = (
        format!("{} {uri}", request.method()),
        key.unwrap_or("none").to_owned(),
    );
    fake.memory().requests.push(line);
    fake.memory().keys.push(key);
    next.run(request).await
}

fn error(status: u16, code: &str, message: &str, hint: Option<&str>) -> Response {
    let body = ErrorBody {
        code: code.to_owned(),
        message: message.to_owned(),
        hint: hint.map(str::to_owned),
        request_id: "r1".to_owned(),
    };
    (StatusCode::from_u16(status).unwrap(), Json(body)).into_response()
}

fn not_found(machine: &str) -> Response {
    error(
        404,
        "machine_not_found",
        &format!("machine `{machine}` not found"),
        Some("`hutch list` shows all"),
    )
}

fn ago(hours: u64) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis();
    u64::try_from(now).unwrap() - hours * HOUR_MS - 60_000
}

fn a_machine(name: &str, status: Status) -> Machine {
    serde_json::from_value(json!({
        "id": MACHINE_ID, "name": name, "status": status, "image": IMAGE_ID, "image_name": "debian-base",
        "runtime": "qemu", "isolation": "emulation", "vcpu": 1, "memory_mib": 512, "disk_gib": 8, "starts": 1,
        "created_at_ms": ago(3), "version": 1,
        "reason": (status == Status::Failed).then_some("the guest said \x1b[31mno"),
        "timings": [{"phase": "clone", "start_us": 0, "took_us": 1_234}, {"phase": "boot", "start_us": 1_234, "took_us": 2_000_000}],
    }))
    .unwrap()
}

/// A machine that is reached from outside.
fn a_shop() -> Value {
    let mut shop = serde_json::to_value(a_machine("shop", Status::Running)).unwrap();
    let ways = json!({
        "url": "http://shop.vms.localhost:8081", "http_port": 8080, "access": "private", "expose": [3000],
        "urls": { "3000": "http://3000-shop.vms.localhost:8081" },
        "ports": [
            { "host_port": 22_001, "guest_port": 22, "kind": "ssh", "bind": "127.0.0.1", "state": "listening" },
            { "host_port": 8000, "guest_port": 80, "kind": "tcp", "bind": "::", "state": "waiting", "reason": "in use" },
        ],
    });
    let ways = ways.as_object().unwrap().clone();
    shop.as_object_mut().unwrap().extend(ways);
    shop
}

async fn change(Json(change): Json<Value>) -> Response {
    let mut shop = a_shop();
    let change = change.as_object().unwrap().clone();
    shop.as_object_mut().unwrap().extend(change);
    Json(shop).into_response()
}

async fn publish(Json(asked): Json<Value>) -> Response {
    let port = json!({
        "host_port": asked["host_port"].as_u64().unwrap_or(22_002), "guest_port": asked["guest_port"], "kind": "tcp",
        "bind": asked["bind"].as_str().unwrap_or("127.0.0.1"), "state": "listening",
    });
    (StatusCode::CREATED, Json(port)).into_response()
}

async fn token(Json(asked): Json<Value>) -> Response {
    if asked["port"] == 5 {
        return error(
            409,
            "not_exposed",
            "port 5 of machine `shop` is not exposed",
            None,
        );
    }
    let port = asked["port"]
        .as_u64()
        .map_or(String::new(), |port| format!("{port}-"));
    let lifetime = asked["lifetime_s"].as_u64().unwrap_or(86_400);
    let url = format!("http://{port}shop.vms.localhost:8081/?hutch_token={lifetime}.mac");
    let token = json!({ "token": "t", "url": url, "expires_at_ms": 1 });
    (StatusCode::CREATED, Json(token)).into_response()
}

fn page<T: Serialize>(items: Vec<T>, next: Option<&str>) -> Response {
    Json(json!({ "items": items, "next": next })).into_response()
}

async fn machines(Query(query): Query1) -> Response {
    match (
        query.get("status").map(String::as_str),
        query.get("cursor").map(String::as_str),
    ) {
        (Some("stopped"), _) => page(Vec::<Machine>::new(), None),
        (_, None) => page(vec![a_machine("web", Status::Running)], Some("rest")),
        (_, Some("rest")) => page(vec![a_machine("very-silly-penguin", Status::Failed)], None),
        _ => error(400, "invalid", "no such cursor", None),
    }
}

async fn create(
    State(fake): State<Fake>,
    headers: HeaderMap,
    Json(wanted): Json<CreateMachine>,
) -> Response {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    if wanted.image == "sluggish" && !fake.memory().created.contains_key(&key) {
        fake.memory().images.push(wanted.image.clone());
        fake.memory()
            .created
            .insert(key, a_machine("web", Status::Starting));
        return std::future::pending().await;
    }
    let mut memory = fake.memory();
    if !memory.images.contains(&wanted.image) {
        return error(
            404,
            "image_not_found",
            &format!("image `{}` not found", wanted.image),
            None,
        );
    }
    let name = wanted
        .name
        .map_or("very-silly-penguin".to_owned(), |name| name.to_string());
    let machine = memory
        .created
        .entry(key)
        .or_insert_with(|| a_machine(&name, Status::Starting));
    (StatusCode::CREATED, Json(machine.clone())).into_response()
}

async fn machine(Path(machine): Path<String>) -> Response {
    match machine.as_str() {
        "web" => Json(a_machine("web", Status::Running)).into_response(),
        "shop" => Json(a_shop()).into_response(),
        "broken" => Json(a_machine("broken", Status::Failed)).into_response(),
        "hostile" => error(
            409,
            "conflict",
            "it says \x1b[2J\x07",
            Some("look\x1b]0;x\x07"),
        ),
        "denied" => error(401, "unauthenticated", "no valid key was shown", None),
        "web-site" => (StatusCode::NOT_FOUND, "<h1>404</h1>").into_response(),
        other => not_found(other),
    }
}

async fn delete(Path(machine): Path<String>) -> Response {
    match machine.as_str() {
        "absent" => not_found("absent"),
        _ => (
            StatusCode::ACCEPTED,
            Json(a_machine("web", Status::Deleting)),
        )
            .into_response(),
    }
}

async fn verb(Path((machine, _verb)): Path<(String, String)>) -> Response {
    match machine.as_str() {
        "absent" => not_found("absent"),
        name => (
            StatusCode::ACCEPTED,
            Json(a_machine(name, Status::Starting)),
        )
            .into_response(),
    }
}

async fn wait(
    State(fake): State<Fake>,
    Path(machine): Path<String>,
    Query(query): Query1,
) -> Response {
    let doomed = fake
        .memory()
        .created
        .values()
        .any(|created| created.name.as_str() == "doomed");
    match query["status"].as_str() {
        "deleted" => {
            // Long enough for something to come in between.
            tokio::time::sleep(Duration::from_millis(50)).await;
            StatusCode::NO_CONTENT.into_response()
        }
        _ if doomed => error(
            409,
            "machine_failed",
            "machine `doomed` failed: no boot",
            Some("`hutch logs doomed`"),
        ),
        "running" => Json(a_machine(
            &machine.replace(MACHINE_ID, "web"),
            Status::Running,
        ))
        .into_response(),
        _ => Json(a_machine(&machine, Status::Stopped)).into_response(),
    }
}

async fn exec(Path(machine): Path<String>, Json(exec): Json<Value>) -> Response {
    if machine == "absent" {
        return not_found("absent");
    }
    let data =
        |stream: &str, base64: &str| json!({"event": stream, "sequence": 0, "data_base64": base64});
    let exit = |code: i32| json!({"event": "exit", "exit_code": code});
    let started = json!({"event": "started", "process": PROCESS_ID});
    let (events, goes_on) = match exec["command"][0].as_str().unwrap() {
        "both" => (
            vec![
                started,
                data("stdout", "b3V0Cg=="),
                data("stderr", "ZXJyCg=="),
                exit(3),
            ],
            false,
        ),
        "echo-stdin" => (
            vec![
                data("stdout", exec["stdin_base64"].as_str().unwrap()),
                exit(0),
            ],
            false,
        ),
        "show" => (
            vec![json!({"event": "error", "code": "x", "message": exec.to_string()})],
            false,
        ),
        "slow" => (
            vec![json!({"event": "exit", "exit_code": 137, "signal": 9, "timed_out": true})],
            false,
        ),
        "gone" => (vec![started], false),
        "lossy" => (
            vec![json!({"event": "dropped", "bytes": 7}), exit(0)],
            false,
        ),
        "hang" => (vec![started, data("stdout", "b3V0Cg==")], true),
        other => panic!("no such command here: {other}"),
    };
    let events = events
        .into_iter()
        .map(|event| format!("data: {event}\n\n"))
        .collect::<Vec<_>>();
    let rest = stream::iter(goes_on.then_some(())).then(|()| std::future::pending());
    let body = stream::iter(events)
        .chain(rest)
        .map(Ok::<_, std::io::Error>);
    (
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from_stream(body),
    )
        .into_response()
}

async fn read_file(State(fake): State<Fake>, Query(query): Query1) -> Response {
    match fake.file(&query["path"]) {
        Some((mode, content)) => {
            ([("x-hutch-mode", format!("{mode:04o}"))], content).into_response()
        }
        None => error(404, "file_not_found", "no such file", None),
    }
}

async fn write_file(State(fake): State<Fake>, Query(query): Query1, body: Bytes) -> Response {
    let mode = query
        .get("mode")
        .map_or(0, |mode| u32::from_str_radix(mode, 8).unwrap());
    fake.put_file(&query["path"], mode, &body);
    Json(json!({ "size_bytes": body.len() })).into_response()
}

async fn stat_file(
    State(fake): State<Fake>,
    Path(machine): Path<String>,
    Query(query): Query1,
) -> Response {
    if machine == "absent" {
        return not_found("absent");
    }
    let info = |kind: &str, size: usize| {
        let info = json!({"name": "../../evil", "kind": kind, "size_bytes": size, "mode": 420, "uid": 0, "gid": 0, "modified_at_ms": 0});
        Json(info).into_response()
    };
    match (query["path"].as_str(), fake.file(&query["path"])) {
        ("/root" | "/root/", _) => info("directory", 0),
        (_, Some((_, content))) => info("file", content.len()),
        _ => error(404, "file_not_found", "no such file", None),
    }
}

fn image(name: &str) -> Value {
    json!({
        "id": IMAGE_ID, "name": name, "source": {"from": "bootstrap", "distribution": "debian", "suite": "bookworm"},
        "sha256": "00".repeat(32), "size_bytes": 8u64 << 30, "used_bytes": 165 << 20, "created_at_ms": ago(50),
    })
}

async fn get_image(Path(name): Path<String>) -> Response {
    Json(image(&name.replace(IMAGE_ID, "debian-base"))).into_response()
}

async fn delete_image(Path(name): Path<String>) -> Response {
    match name.as_str() {
        "absent" => error(404, "image_not_found", "image `absent` not found", None),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

async fn import(State(fake): State<Fake>, Query(query): Query1, body: Bytes) -> Response {
    fake.memory().files.insert(
        format!("image {} {}", query["name"], query["format"]),
        (0, body.to_vec()),
    );
    accepted()
}

async fn bootstrap(State(fake): State<Fake>, Json(wanted): Json<Value>) -> Response {
    let name = wanted["name"].as_str().unwrap_or("debian-base").to_owned();
    match wanted["distribution"].as_str() {
        Some("debian" | "busybox") => fake.memory().images.push(name),
        _ => return error(400, "invalid", "there is no such distribution", None),
    }
    accepted()
}

fn accepted() -> Response {
    (
        StatusCode::ACCEPTED,
        Json(json!({ "operation": OPERATION_ID })),
    )
        .into_response()
}

async fn operation(State(fake): State<Fake>) -> Response {
    let mut memory = fake.memory();
    memory.steps += 1;
    let fails = memory
        .files
        .keys()
        .any(|file| file.starts_with("image bad"));
    let mut operation = json!({
        "id": OPERATION_ID, "kind": "image-bootstrap", "target": IMAGE_ID, "created_at_ms": 0, "version": memory.steps,
    });
    operation["state"] = match memory.steps {
        1 | 2 => {
            json!({"state": "running", "progress": {"phase": "fetch packages", "done": memory.steps, "unit": "packages"}})
        }
        3 => {
            json!({"state": "running", "progress": {"phase": "write the disk", "done": 1, "total": 2, "unit": "bytes"}})
        }
        _ if fails => {
            json!({"state": "failed", "code": "refused", "message": "entry `../x` leaves the tree", "hint": "make it anew"})
        }
        _ => json!({"state": "succeeded"}),
    };
    Json(operation).into_response()
}

fn runtimes() -> Value {
    let can = |isolation: &str| json!({"isolation": isolation, "pause": true, "memory_snapshot": true, "live_resize": false, "network": true});
    json!([
        {"name": "qemu", "usable": true, "version": "7.2", "acceleration": "tcg", "capabilities": can("emulation")},
        {"name": "firecracker", "usable": false, "reason": "not installed", "capabilities": can("hardware")},
    ])
}
