//! Requests a second through the gateway, beside Caddy's reverse proxy.

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hutch_contract::expose::Access;
use hutch_contract::machine::CreateMachine;
use hutch_tests::world::World;
use hutch_tests::{Lab, Runtime, lab};

use crate::client::{Done, Load, is_there};
use crate::numbers::{Times, median};
use crate::role::Role;
use crate::roles::DOMAIN;

const ROUNDS: usize = 5;
const LOAD: Load = Load {
    connections: 32,
    time: Duration::from_secs(3),
    pause: Duration::ZERO,
    renew: 0,
};
/// Before the first round, of each.
const WARM: Duration = Duration::from_secs(1);
/// At once to the guest's server. More do not fit into its queue (`listen(2)` of busybox: 9), and then what is measured
/// is how often the kernel of either side asks again after a second.
const IN_GUEST: usize = 8;
const LIMIT: Duration = Duration::from_secs(120);
/// Where the guest's server listens.
const GUEST_PORT: u16 = 8080;
/// A port on the host of the world, where nobody else is.
const CADDY_PORT: u16 = 8081;

/// To a server on the host, then to one in a guest.
pub async fn run() {
    if !is_there("caddy") {
        println!("http: SKIPPED: caddy is not installed, so there is nothing to compare with");
        return;
    }
    host();
    guest().await;
}

fn host() {
    let upstream = Role::start(None, &["upstream"]);
    let gateway = Role::start(None, &["gateway", &upstream.address()]);
    let port = free_port();
    let caddy = Caddy::start(None, port, &upstream.address());
    compare(
        "a server on the host",
        None,
        &gateway.address(),
        &caddy.address(),
        LOAD,
    );
}

async fn guest() {
    let Some(world) = World::new() else { return };
    let lab = lab!(Runtime::Qemu)
        .inside(&world)
        .env("HUTCH_LOG", "warn")
        .start()
        .await;
    lab.busybox().await;
    let request = CreateMachine {
        http_port: Some(GUEST_PORT),
        access: Access::Public,
        ..lab.request("web")
    };
    let machine = lab.client().create(&request, None, Some(LIMIT)).await;
    let address = machine.unwrap().network.unwrap().ipv4.unwrap();
    start_server(&lab).await;
    let caddy = Caddy::start(Some(&world), CADDY_PORT, &format!("{address}:{GUEST_PORT}"));
    let gateway = format!("127.0.0.1:{}", lab.gateway());
    compare(
        "busybox httpd in a guest, through `hutch serve`",
        Some(&world),
        &gateway,
        &caddy.address(),
        Load {
            connections: IN_GUEST,
            ..LOAD
        },
    );
    drop(caddy);
    lab.finish().await;
}

async fn start_server(lab: &Lab) {
    let script = format!(
        "mkdir -p /tmp/www && head -c 128 /dev/zero >/tmp/www/index.html && \
         cd / && \
         (busybox httpd -f -p {GUEST_PORT} -h /tmp/www </dev/null >/dev/null 2>&1 &) && sleep 1"
    );
    let started = lab.sh("web", &script).await;
    assert_eq!(started.exit.exit_code, 0, "{started:?}");
}

fn compare(what: &str, world: Option<&World>, gateway: &str, caddy: &str, load: Load) {
    let host = format!("web.{DOMAIN}");
    let run = |load: Load, to: &str| -> Done { load.run(world, to, &host) };
    for side in [gateway, caddy] {
        run(Load { time: WARM, ..load }, side);
    }
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    for _ in 0..ROUNDS {
        ours.add(run(load, gateway));
        theirs.add(run(load, caddy));
    }
    println!(
        "http: {what}: {ROUNDS} rounds of {} s in turn, {} connections",
        load.time.as_secs(),
        load.connections
    );
    let ratio = median(&ours.rates) / median(&theirs.rates);
    for (name, side) in [("gateway", &mut ours), ("Caddy", &mut theirs)] {
        println!(
            "http:   {name:<8} {:>8.0} requests/s, {}, {} errors",
            median(&side.rates),
            side.times.shown(),
            side.errors
        );
    }
    println!("http:   ratio of requests/s to Caddy {ratio:.2}");
}

#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    times: Times,
    errors: usize,
}

impl Side {
    fn add(&mut self, done: Done) {
        self.rates.push(done.per_second());
        self.errors += done.errors;
        self.times.merge(done.times);
    }
}

/// Caddy as a plain reverse proxy, without TLS and its administration; its files are in a directory of their own.
struct Caddy {
    child: Child,
    port: u16,
    _files: tempfile::TempDir,
}

impl Caddy {
    fn start(world: Option<&World>, port: u16, upstream: &str) -> Caddy {
        let files = tempfile::tempdir().unwrap();
        let path = files.path().join("Caddyfile");
        let text = format!(
            "{{\n\tadmin off\n\tauto_https off\n}}\n\
             http://:{port} {{\n\tbind 127.0.0.1\n\treverse_proxy {upstream}\n}}\n"
        );
        fs::write(&path, text).unwrap();
        let mut command = Command::new("caddy");
        command
            .args(["run", "--adapter", "caddyfile", "--config"])
            .arg(&path)
            .env("HOME", files.path())
            .env("XDG_CONFIG_HOME", files.path())
            .env("XDG_DATA_HOME", files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = on(world, || command.spawn().unwrap());
        let start = Instant::now();
        while on(world, || TcpStream::connect(("127.0.0.1", port)).is_err()) {
            assert!(start.elapsed() < LIMIT, "Caddy does not listen");
            assert!(child.try_wait().unwrap().is_none(), "Caddy ended");
            std::thread::sleep(Duration::from_millis(50));
        }
        Caddy {
            child,
            port,
            _files: files,
        }
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Caddy {
    fn drop(&mut self) {
        let _may_have_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn on<T: Send>(world: Option<&World>, what: impl FnOnce() -> T + Send) -> T {
    match world {
        None => what(),
        Some(world) => world.on_host(what),
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}
