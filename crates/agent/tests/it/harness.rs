//! One agent per test, in a directory of its own, and short words for the calls.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hutch_guest::limits;
use hutch_guest::pb::agent_client::AgentClient;
use hutch_guest::pb::output_event::Event;
use hutch_guest::pb::{self, exit_status::How, output_chunk};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::{Code, Status, Streaming};

pub type Client = AgentClient<Wire>;

/// Far beyond what anything here takes; only a hang reaches it.
pub const BOUND: Duration = Duration::from_secs(60);

pub struct Agent {
    pub dir: TempDir,
    child: Child,
    cgroup: Option<PathBuf>,
}

impl Agent {
    /// An agent whose processes are found by walking, with a `TempDir` as root.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// An agent with control groups, where this host lets us have them.
    pub fn start_with_cgroup() -> Option<Self> {
        let cgroup = new_cgroup()?;
        Some(Self::start_with(Some(cgroup)))
    }

    fn start_with(cgroup: Option<PathBuf>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hutch-agent"));
        command
            .arg("serve")
            .arg("--unix")
            .arg(dir.path().join("sock"));
        command.arg("--root").arg(&root).stdin(Stdio::null());
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let child = command.spawn().unwrap();
        Self { dir, child, cgroup }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A new connection that has said nothing.
    pub async fn connect(&self) -> Client {
        client_on(connect(&self.dir.path().join("sock")).await).await
    }

    /// A connection after Hello.
    pub async fn greet(&self) -> Client {
        let mut client = self.connect().await;
        client
            .hello(pb::HelloRequest { generation: 1 })
            .await
            .unwrap();
        client
    }

    /// A connection after Hello and Configure.
    pub async fn client(&self) -> Client {
        let mut client = self.greet().await;
        client
            .configure(pb::ConfigureRequest::default())
            .await
            .unwrap();
        client
    }

    /// Waits for the agent's own end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SIGTERM, so that its processes end too.
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        if let Some(cgroup) = &self.cgroup {
            let _ = std::fs::remove_dir(cgroup.join("user"));
            let left = std::fs::remove_dir(cgroup);
            if !std::thread::panicking() {
                left.expect("no control group is left behind");
            }
        }
    }
}

/// One HTTP/2 connection; all clones are gone with it.
#[derive(Clone)]
pub struct Wire(pub http2::SendRequest<Body>);

impl tower::Service<http::Request<Body>> for Wire {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// A client on a connection that has said nothing.
pub async fn client_on(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Client {
    let handshake = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .handshake(TokioIo::new(stream));
    let (requests, driver) = handshake.await.unwrap();
    tokio::spawn(driver);
    AgentClient::with_origin(Wire(requests), http::Uri::from_static("http://agent"))
}

async fn connect(path: &Path) -> UnixStream {
    let connecting = async {
        loop {
            match UnixStream::connect(path).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(BOUND, connecting)
        .await
        .expect("the agent listens")
}

fn new_cgroup() -> Option<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    for base in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        let name = format!("hutch-agent-test-{}-{next}", std::process::id());
        let dir = Path::new(base).join(name);
        if Path::new(base).join("cgroup.procs").exists() && std::fs::create_dir(&dir).is_ok() {
            return Some(dir);
        }
    }
    eprintln!("skipped: no writable cgroup v2 tree");
    None
}

pub fn start(id: &str, argv: &[&str]) -> pb::StartRequest {
    pb::StartRequest {
        process_id: id.to_owned(),
        argv: argv.iter().map(|word| word.to_string()).collect(),
        ..Default::default()
    }
}

pub fn shell(id: &str, script: &str) -> pb::StartRequest {
    start(id, &["sh", "-c", script])
}

/// What an attached reader saw.
#[derive(Debug, Default)]
pub struct Seen {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub dropped: u64,
    /// Sequence number after the last byte.
    pub end: u64,
    pub exit: Option<pb::ExitStatus>,
}

impl Seen {
    pub fn code(&self) -> Option<i32> {
        match self.exit.as_ref()?.how? {
            How::Code(code) => Some(code),
            How::Signal(_) => None,
        }
    }

    pub fn signal(&self) -> Option<i32> {
        match self.exit.as_ref()?.how? {
            How::Signal(signal) => Some(signal),
            How::Code(_) => None,
        }
    }

    /// Takes one event and checks that the sequence has no gap.
    pub fn take(&mut self, event: pb::OutputEvent) {
        match event.event.unwrap() {
            Event::Chunk(chunk) => {
                assert_eq!(chunk.sequence, self.end, "a gap");
                assert!(!chunk.data.is_empty());
                self.end += chunk.data.len() as u64;
                match chunk.stream() {
                    output_chunk::Stream::Stdout => self.stdout.extend(&chunk.data),
                    output_chunk::Stream::Stderr => self.stderr.extend(&chunk.data),
                }
            }
            Event::Dropped(bytes) => {
                self.dropped += bytes;
                self.end += bytes;
            }
            Event::Exit(exit) => {
                assert_eq!(exit.output_end, self.end);
                self.exit = Some(exit);
            }
        }
    }
}

pub async fn attach(client: &mut Client, id: &str, from: u64) -> Streaming<pb::OutputEvent> {
    let request = pb::AttachRequest {
        process_id: id.to_owned(),
        from,
        no_follow: false,
    };
    client.attach(request).await.unwrap().into_inner()
}

/// Reads until the exit.
pub async fn follow(client: &mut Client, id: &str) -> Seen {
    let mut events = attach(client, id, 0).await;
    let mut seen = Seen::default();
    let reading = async {
        while let Some(event) = events.message().await.unwrap() {
            assert!(seen.exit.is_none(), "an event after the exit");
            seen.take(event);
        }
    };
    tokio::time::timeout(BOUND, reading)
        .await
        .expect("the process ends");
    seen
}

/// Start, attach, wait.
pub async fn exec(client: &mut Client, request: pb::StartRequest) -> Seen {
    let id = request.process_id.clone();
    client.start(request).await.unwrap();
    let seen = follow(client, &id).await;
    assert!(seen.exit.is_some());
    seen
}

pub async fn start_error(client: &mut Client, request: pb::StartRequest) -> Status {
    client.start(request).await.expect_err("cannot start")
}

pub fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.expect_err("refused").code()
}

/// Waits for something that another process does.
pub async fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let waiting = async {
        while !happened() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(BOUND, waiting).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}

pub fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.starts_with('Z'));
    state == Some(false)
}
