//! Caddies, what they ask, and clients that believe only a given root.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hutch_gateway::caddy::{Admin, Caddy, CaddyConfig, Issuer, Mode, OwnCaddy, Status};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::Join;
use tokio::net::TcpListener;
use tokio::process::{ChildStdin, ChildStdout};

use crate::town::{BOUND, Client, Lab, Recorder, header};

/// Whether these programs are here; says so when not.
pub fn have(programs: &[&str]) -> bool {
    for program in programs {
        let found = std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
        });
        if !found {
            println!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

/// A port that was free a moment ago, and not one of those that the kernel gives to clients.
pub fn free_port() -> u16 {
    loop {
        let random = RandomState::new().hash_one(0);
        let port = 10_000 + (random % 20_000) as u16;
        let is_free = std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
            && std::net::UdpSocket::bind(("127.0.0.1", port)).is_ok();
        if is_free {
            return port;
        }
    }
}

/// Asks again and again until it is so.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let waited = tokio::time::timeout(BOUND, waiting).await;
    waited.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// A program of the test, killed with it.
pub struct Running(pub Child);

impl Running {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers whether a name may have a certificate: those with these first labels.
pub struct Ask {
    pub url: String,
    pub names: Arc<Mutex<BTreeSet<String>>>,
    /// What was asked for.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Ask {
    pub async fn start(names: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/caddy/check", listener.local_addr().unwrap());
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let ask = Self {
            url,
            names: Arc::new(Mutex::new(names)),
            asked: Arc::default(),
        };
        let (names, asked) = (ask.names.clone(), ask.asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (names, asked) = (names.clone(), asked.clone());
                tokio::spawn(async move {
                    let mut peer = Client::new(stream);
                    while let Some(head) = peer.head().await {
                        let path = head.split(' ').nth(1).unwrap();
                        let name = path.strip_prefix("/caddy/check?domain=").unwrap();
                        asked.lock().unwrap().push(name.to_owned());
                        let label = name.split('.').next().unwrap();
                        let known = names.lock().unwrap().contains(label);
                        let status = if known { "200 OK" } else { "404 Not Found" };
                        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                        peer.send(answer).await;
                    }
                });
            }
        });
        ask
    }
}

/// Everything around a Caddy.
pub struct Stage {
    pub dir: TempDir,
    pub lab: Lab,
    pub ask: Ask,
    pub recorder: Recorder,
    pub domain: String,
    pub http_port: u16,
    pub https_port: u16,
}

impl Stage {
    /// A machine `web`, whose name may have a certificate.
    pub async fn new(domain: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let lab = Lab::below(domain).await;
        lab.proxy(&dir.path().join("gateway.sock"));
        let recorder = Recorder::start().await;
        lab.town.build("web", recorder.behind());
        Self {
            dir,
            lab,
            ask: Ask::start(&["web", "3000-web"]).await,
            recorder,
            domain: domain.into(),
            http_port: free_port(),
            https_port: free_port(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self, mode: Mode) -> CaddyConfig {
        CaddyConfig {
            mode,
            tag: "ab12".into(),
            domain: self.domain.clone(),
            https_port: self.https_port,
            bind: vec!["127.0.0.1".parse().unwrap()],
            redirect: false,
            ask_url: self.ask.url.clone(),
            upstream: self.path("gateway.sock"),
            issuer: Issuer::Internal,
            check_every: Duration::from_millis(200),
        }
    }

    pub fn own(&self) -> OwnCaddy {
        OwnCaddy {
            program: "caddy".into(),
            dir: self.path("own"),
            environment: vec![("PATH".into(), std::env::var_os("PATH").unwrap())],
            http_port: self.http_port,
        }
    }

    /// Whether the machine is reached through Caddy.
    pub async fn works(&self, root: &Path) -> bool {
        let path = "/works";
        let output = self.curl("web", path, root, &[]).await;
        output.status.success() && output.stdout == path.as_bytes()
    }

    /// Asks for a path of a name below the domain, over TLS.
    pub async fn curl(&self, label: &str, path: &str, root: &Path, args: &[&str]) -> Output {
        let host = format!("{label}.{}", self.domain);
        curl_at(&host, self.https_port, path, root, args).await
    }

    /// A client with a TLS connection to the machine `web`, for HTTP/1.1.
    pub fn tls_client(&self, root: &Path) -> (Client<Tunnel>, tokio::process::Child) {
        let host = format!("web.{}", self.domain);
        let mut child = tokio::process::Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-verify_return_error",
                "-alpn",
                "http/1.1",
            ])
            .args(["-verify_hostname", &host, "-servername", &host])
            .args(["-connect", &format!("127.0.0.1:{}", self.https_port)])
            .arg("-CAfile")
            .arg(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (from, to) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        (Client::new(tokio::io::join(from, to)), child)
    }

    /// Writes our root certificate into a file.
    pub async fn root(&self, caddy: &Caddy) -> PathBuf {
        let pem = caddy.root_certificate().await.unwrap();
        assert!(pem.starts_with("-----BEGIN CERTIFICATE-----"), "{pem}");
        let path = self.path("root.pem");
        std::fs::write(&path, pem).unwrap();
        path
    }
}

/// Through another program.
pub type Tunnel = Join<ChildStdout, ChildStdin>;

pub async fn curl_at(host: &str, port: u16, path: &str, root: &Path, args: &[&str]) -> Output {
    let url = format!("https://{host}:{port}{path}");
    let resolve = format!("{host}:{port}:127.0.0.1");
    let root = root.to_str().unwrap();
    curl(&[&["--resolve", &resolve, "--cacert", root, &url], args].concat()).await
}

pub async fn curl(args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new("curl");
    command.args(["-q", "-sS", "--noproxy", "*", "--max-time", "50"]);
    command.args(args).kill_on_drop(true);
    command.output().await.unwrap()
}

pub fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A Caddy that is not ours, with somebody's configuration.
pub struct Theirs {
    pub socket: PathBuf,
    dir: PathBuf,
    first: PathBuf,
    pub running: Running,
}

impl Theirs {
    /// What every Caddy of a test has: ports that are not the real ones, and nothing in the system's trust store.
    pub fn base(stage: &Stage) -> Value {
        json!({
            "admin": {
                "listen": format!("unix/{}", stage.path("theirs.sock").display()),
                "config": { "persist": false },
            },
            "storage": { "module": "file_system", "root": stage.path("storage") },
            "apps": {
                "http": { "http_port": stage.http_port, "https_port": stage.https_port },
                "pki": { "certificate_authorities": { "local": { "install_trust": false } } },
            },
        })
    }

    pub async fn start(stage: &Stage, config: &Value) -> Self {
        let first = stage.path("theirs.json");
        std::fs::write(&first, config.to_string()).unwrap();
        let dir = stage.dir.path().to_owned();
        let theirs = Self {
            socket: stage.path("theirs.sock"),
            running: Self::spawn(&dir, Some(&first)),
            dir,
            first,
        };
        theirs.is_there().await;
        theirs
    }

    pub fn spawn(dir: &Path, first: Option<&Path>) -> Running {
        let log = std::fs::File::create(dir.join("theirs.log")).unwrap();
        let mut command = Command::new("caddy");
        command.arg("run").current_dir(dir);
        if let Some(first) = first {
            command.arg("--config").arg(first);
        }
        command
            .env("HOME", dir)
            .env("XDG_DATA_HOME", dir.join("data"))
            .env("XDG_CONFIG_HOME", dir.join("config"))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Running(command.spawn().unwrap())
    }

    async fn is_there(&self) {
        // It answers that only when everything is loaded.
        until("Caddy answers", async || {
            self.api("/config/", &[]).await.status.success()
        })
        .await;
    }

    pub fn kill(&mut self) {
        self.running.kill();
        // It would say that the address is in use.
        let _ = std::fs::remove_file(&self.socket);
    }

    pub async fn again(&mut self) {
        self.running = Self::spawn(&self.dir, Some(&self.first));
        self.is_there().await;
    }

    pub fn mode(&self) -> Mode {
        Mode::Existing(self.admin())
    }

    pub fn admin(&self) -> Admin {
        Admin::Unix(self.socket.clone())
    }

    /// A part of the configuration as Caddy says it, in bytes.
    pub async fn says(&self, path: &str) -> String {
        text(&self.api(path, &[]).await)
    }

    /// Somebody else's request to its API.
    pub async fn api(&self, path: &str, args: &[&str]) -> Output {
        let socket = self.socket.to_str().unwrap();
        let url = format!("http://caddy{path}");
        let ours: &[&str] = &[
            "--unix-socket",
            socket,
            "-H",
            "Host;",
            "--fail-with-body",
            &url,
        ];
        curl(&[ours, args].concat()).await
    }

    /// What `caddy reload` does.
    pub async fn load(&self, config: &Value) {
        let config = config.to_string();
        let args = [
            "-H",
            "Content-Type: application/json",
            "--data-binary",
            &config,
        ];
        text(&self.api("/load", &args).await);
    }
}

/// Waits for a status, and says it.
pub async fn status(caddy: &Caddy, is_it: impl FnMut(&Status) -> bool) -> Status {
    let mut status = caddy.status();
    let waited = tokio::time::timeout(BOUND, status.wait_for(is_it)).await;
    match waited {
        Ok(status) => status.unwrap().clone(),
        Err(_) => panic!("not in time: {:?}", *caddy.status().borrow()),
    }
}

pub async fn up(caddy: &Caddy) -> Status {
    status(caddy, |status| matches!(status, Status::Up { .. })).await
}

pub async fn down(caddy: &Caddy) -> (String, String) {
    match status(caddy, |status| matches!(status, Status::Down { .. })).await {
        Status::Down { reason, hint } => (reason, hint),
        _ => unreachable!(),
    }
}

pub fn forwarded<'a>(head: &'a str, what: &str) -> Option<&'a str> {
    header(head, &format!("x-forwarded-{what}"))
}
