//! The way to a Docker-compatible engine: its socket, its version, its errors in our words, and a deadline on each call.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::errors::Error as Answer;
use bollard::{API_DEFAULT_VERSION, ClientVersion};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

use crate::Error;
use crate::process::printable;

const USUAL_SOCKET: &str = "/var/run/docker.sock";
/// Time for an engine to say who it is.
const GREETING: Duration = Duration::from_secs(3);
/// Time for any other answer; making and starting a container takes about a second on a busy host.
const ANSWER: Duration = Duration::from_secs(10);
/// What bollard itself waits for the head of an answer, in seconds. Ours are shorter, but for the import of an image.
const LONGEST: u64 = 1800;
/// The most bytes of an engine's words in an error.
const WORDS: usize = 512;

/// The oldest API that has all we ask for: Docker 20.10.
const OLDEST: ClientVersion = ClientVersion {
    major_version: 1,
    minor_version: 41,
};

/// A connection that is made when first needed. Clones of the engine's client share it.
pub(super) struct Client {
    socket: PathBuf,
    engine: OnceCell<bollard::Docker>,
}

impl Client {
    pub(super) fn new(socket: Option<PathBuf>) -> Self {
        Self {
            socket: socket.unwrap_or_else(|| USUAL_SOCKET.into()),
            engine: OnceCell::new(),
        }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The engine, which has answered at least once.
    pub(super) async fn engine(&self) -> Result<&bollard::Docker, Error> {
        let greet = async {
            // Only for its plain error: bollard's says less.
            let tried = tokio::time::timeout(GREETING, UnixStream::connect(&self.socket)).await;
            let connected = tried
                .map_err(|_| unreachable("it takes no connection"))?
                .map_err(|error| refused(&error))?;
            same_user(&connected)?;
            let path = self.socket.to_str().ok_or_else(|| Error::Setting {
                runtime: super::NAME,
                setting: "socket",
                value: self.socket.to_string_lossy().into_owned(),
            })?;
            let engine = bollard::Docker::connect_with_unix(path, LONGEST, API_DEFAULT_VERSION)
                .map_err(|error| said("connect", error))?;
            let engine = tokio::time::timeout(GREETING, engine.negotiate_version()).await;
            let engine = engine.map_err(|_| unreachable("it does not answer"))?;
            let engine = engine.map_err(|error| said("version", error))?;
            let version = engine.client_version();
            let number = |version: &ClientVersion| (version.major_version, version.minor_version);
            if number(&version) < number(&OLDEST) {
                return Err(Error::TooOld {
                    program: "Docker's API",
                    version: version.to_string(),
                    oldest: OLDEST.to_string(),
                    hint: "Docker 20.10 or newer is needed",
                });
            }
            Ok(engine)
        };
        self.engine.get_or_try_init(|| greet).await
    }

    /// The engine's own version.
    pub(super) async fn version(&self) -> Result<String, Error> {
        let asked = self.engine().await?.version();
        let version = tokio::time::timeout(GREETING, asked)
            .await
            .map_err(|_| unreachable("it does not answer"))?
            .map_err(|error| said("version", error))?;
        Ok(printable(
            version.version.unwrap_or_default().as_bytes(),
            64,
        ))
    }
}

/// An answer within the usual time.
pub(super) async fn asked<T>(
    command: &'static str,
    call: impl Future<Output = Result<T, Answer>>,
) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => answer.map_err(|error| said(command, error)),
        Err(_) => Err(Error::Timeout {
            what: "answer of Docker",
            seconds: ANSWER.as_secs(),
        }),
    }
}

/// The same, with `None` for what is not there.
pub(super) async fn found<T>(
    command: &'static str,
    call: impl Future<Output = Result<T, Answer>>,
) -> Result<Option<T>, Error> {
    let absent = async {
        match call.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_status(&error, 404) => Ok(None),
            Err(error) => Err(error),
        }
    };
    asked(command, absent).await
}

pub(super) fn is_status(error: &Answer, status: u16) -> bool {
    matches!(error, Answer::DockerResponseServerError { status_code, .. } if *status_code == status)
}

/// An engine's refusal, or what became of the connection to it.
pub(super) fn said(command: &'static str, error: Answer) -> Error {
    let answer = match error {
        Answer::DockerResponseServerError { message, .. } => message,
        Answer::DockerStreamError { error } => error,
        Answer::RequestTimeoutError => return unreachable("it does not answer"),
        Answer::JsonDataError { message, .. } => format!("an answer that means nothing: {message}"),
        Answer::JsonSerdeError { err } => format!("an answer that means nothing: {err}"),
        other => return unreachable(&chain(&other)),
    };
    Error::Monitor {
        command,
        answer: printable(answer.as_bytes(), WORDS),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = error.source();
    }
    printable(text.as_bytes(), WORDS)
}

fn unreachable(reason: &str) -> Error {
    Error::Unreachable {
        service: "Docker",
        reason: reason.to_owned(),
        hint: "look whether `docker version` answers, and what the log of dockerd says",
    }
}

/// What root in a container writes belongs to the engine's user: a server that is neither root nor that user could
/// not open the agent's socket, nor erase a machine.
fn same_user(engine: &UnixStream) -> Result<(), Error> {
    let ours = rustix::process::geteuid();
    let theirs = engine.peer_cred().map_or(0, |peer| peer.uid());
    if ours.is_root() || ours.as_raw() == theirs {
        return Ok(());
    }
    Err(Error::Unreachable {
        service: "Docker",
        reason: "it runs as another user, whose files the server may not touch".to_owned(),
        hint: "run the server as root, or a rootless Docker as the server's user and name its socket in `runtime.docker_socket`",
    })
}

fn refused(error: &io::Error) -> Error {
    let (reason, hint) = match error.kind() {
        io::ErrorKind::NotFound => (
            "its socket is not there",
            "apt-get install docker.io and start it, or name another socket in `runtime.docker_socket`",
        ),
        io::ErrorKind::PermissionDenied => (
            "its socket may not be opened",
            "run the server as root, or a rootless Docker as the server's user",
        ),
        io::ErrorKind::ConnectionRefused => (
            "nothing listens on its socket",
            "start it: systemctl start docker",
        ),
        _ => return unreachable(&error.to_string()),
    };
    Error::Unreachable {
        service: "Docker",
        reason: reason.to_owned(),
        hint,
    }
}
