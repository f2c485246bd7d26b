//! A Caddy of our own: started, started again when it ends, and ended with us.
//!
//! Each run has a thread, which is the child's parent: when it ends, by a crash of this process, the kernel kills the
//! child. Should the kernel not do so (see [`sys::die_with_thread`]), the next one that is started here ends the old one
//! first: it is whoever holds the socket of the admin API.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{OwnCaddy, sys};

/// The wait before it is started again, which doubles each time, up to the second.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));
/// One that ran so long has not failed at its start.
const STEADY: Duration = Duration::from_secs(60);
/// How long its requests may go on once it is to end.
const GRACE: Duration = Duration::from_secs(5);
/// It is killed when it has not ended so long after it was told to.
const PATIENCE: Duration = Duration::from_secs(8);
/// How much of its last words is looked at.
const LAST_WORDS: u64 = 4096;
/// How often the holder of the socket may change while we look at it.
const LOOKS: usize = 10;

/// How it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Life {
    Starting,
    /// No such program.
    Absent,
    /// It runs; that does not mean that it answers.
    Running,
    /// It ended, and will be started again.
    Ended {
        reason: String,
        hint: String,
    },
}

impl OwnCaddy {
    /// The socket of its admin API.
    pub(super) fn admin_socket(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    /// What it says before it has a log, and when it panics.
    fn words(&self) -> PathBuf {
        self.dir.join("start.log")
    }

    /// What it starts with. The rest is put in as it is for any other Caddy.
    fn first_config(&self, https_port: u16) -> Value {
        json!({
            "admin": {
                "listen": format!("unix/{}", self.admin_socket().display()),
                "config": { "persist": false },
            },
            "logging": { "logs": { "default": {
                "writer": {
                    "output": "file",
                    "filename": self.dir.join("caddy.log"),
                    "roll_size_mb": 8,
                    "roll_keep": 2,
                },
                // It would tell each time that we look.
                "exclude": ["admin.api"],
            } } },
            "storage": { "module": "file_system", "root": self.dir.join("storage") },
            "apps": { "http": {
                "http_port": self.http_port,
                "https_port": https_port,
                "grace_period": format!("{}s", GRACE.as_secs()),
            } },
        })
    }

    fn command(&self, config: &Path) -> io::Result<Command> {
        let words = fs::File::create(self.words())?;
        let mut command = Command::new(&self.program);
        command
            .args(["run", "--config"])
            .arg(config)
            .env_clear()
            .envs(self.environment.iter().cloned())
            .env("HOME", &self.dir)
            .env("XDG_DATA_HOME", self.dir.join("data"))
            .env("XDG_CONFIG_HOME", self.dir.join("config"))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(words.try_clone()?)
            .stderr(words)
            // What a terminal sends to us is our affair.
            .process_group(0);
        sys::die_with_thread(&mut command);
        Ok(command)
    }
}

/// Keeps it alive until `closing`.
pub(super) async fn supervise(
    own: OwnCaddy,
    https_port: u16,
    publish: watch::Sender<Life>,
    closing: &CancellationToken,
) {
    let mut pause = AGAIN.0;
    loop {
        let began = Instant::now();
        let life = run(&own, https_port, &publish, closing).await;
        if closing.is_cancelled() {
            return;
        }
        if let Life::Ended { reason, .. } = &life {
            warn!(reason, "a Caddy of ours ended");
        }
        publish.send_replace(life);
        if began.elapsed() > STEADY {
            pause = AGAIN.0;
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = closing.cancelled() => return,
        }
        pause = (pause * 2).min(AGAIN.1);
    }
}

/// One life, and how it ended.
async fn run(
    own: &OwnCaddy,
    https_port: u16,
    publish: &watch::Sender<Life>,
    closing: &CancellationToken,
) -> Life {
    let (says_begun, begun) = oneshot::channel();
    let (says_ended, mut ended) = oneshot::channel();
    let child = own.clone();
    let parent = std::thread::Builder::new().name("caddy".into());
    let parent = parent.spawn(move || live(&child, https_port, says_begun, says_ended));
    let begun = match parent {
        Ok(_) => begun
            .await
            .unwrap_or_else(|_| Err(io::Error::other("its thread ended"))),
        Err(error) => Err(error),
    };
    let process = match begun {
        Ok(process) => Process(process),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Life::Absent,
        Err(error) => {
            return Life::Ended {
                reason: format!("{} cannot be started: {error}", own.program.display()),
                hint: "look at the program and its directory".into(),
            };
        }
    };
    info!(program = %own.program.display(), "a Caddy of ours runs");
    publish.send_replace(Life::Running);
    let status = tokio::select! {
        status = &mut ended => status,
        () = closing.cancelled() => {
            process.signal(Signal::TERM);
            match timeout(PATIENCE, &mut ended).await {
                Ok(status) => status,
                Err(_) => {
                    process.signal(Signal::KILL);
                    ended.await
                }
            }
        }
    };
    let how = match status {
        Ok(Ok(status)) => status.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "nobody saw how".into(),
    };
    debug!(how, "a Caddy of ours has ended");
    Life::Ended {
        reason: format!("Caddy ended ({how}): {}", last_words(&own.words())),
        hint: format!("look at what it wrote in {}", own.dir.display()),
    }
}

/// A child; killed when this is dropped.
struct Process(OwnedFd);

impl Process {
    fn signal(&self, signal: Signal) {
        // Only when it is gone.
        let _ = pidfd_send_signal(&self.0, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Begins and sees the end of a child: the whole life of a thread.
fn live(
    own: &OwnCaddy,
    https_port: u16,
    begun: oneshot::Sender<io::Result<OwnedFd>>,
    ended: oneshot::Sender<io::Result<ExitStatus>>,
) {
    let spawned = begin(own, https_port).and_then(|mut command| command.spawn());
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            // Nobody waits any more.
            let _ = begun.send(Err(error));
            return;
        }
    };
    // Until it is waited for, its number is nobody else's.
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let failed = process.is_err();
    // Who does not take it any more drops it, and the child must go.
    if begun.send(process.map_err(Into::into)).is_err() || failed {
        let _ = child.kill();
    }
    let _ = ended.send(child.wait());
}

fn begin(own: &OwnCaddy, https_port: u16) -> io::Result<Command> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&own.dir)
        .map_err(|error| at(&own.dir, error))?;
    let socket = own.admin_socket();
    end_predecessor(&socket).map_err(|error| at(&socket, error))?;
    let config = own.dir.join("first.json");
    let text = own.first_config(https_port).to_string();
    fs::write(&config, text).map_err(|error| at(&config, error))?;
    own.command(&config)
}

/// Of another kind than a program that is missing.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

/// Ends a Caddy that an earlier process left at this socket.
fn end_predecessor(socket: &Path) -> io::Result<()> {
    for _ in 0..LOOKS {
        let Some(pid) = holder(socket)? else {
            return match fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        };
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        // It held the socket after we had hold of it: it is no other process of the same number.
        if holder(socket)? != Some(pid) {
            continue;
        }
        warn!(
            pid = pid.as_raw_nonzero().get(),
            "ending a Caddy that an earlier run left"
        );
        for signal in [Signal::TERM, Signal::KILL] {
            // Only when it is gone.
            let _ = pidfd_send_signal(&process, signal);
            if has_ended(&process, PATIENCE)? {
                break;
            }
        }
    }
    Err(io::Error::other("another process holds it"))
}

/// The process that listens at a socket.
fn holder(socket: &Path) -> io::Result<Option<Pid>> {
    let stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(error),
            };
        }
    };
    let peer = rustix::net::sockopt::socket_peercred(&stream)?.pid;
    if peer == rustix::process::getpid() {
        return Err(io::Error::other("this process holds it"));
    }
    Ok(Some(peer))
}

fn has_ended(process: &OwnedFd, within: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let within = Timespec {
        tv_sec: within.as_secs() as i64,
        tv_nsec: 0,
    };
    Ok(rustix::event::poll(&mut fds, Some(&within))? > 0)
}

/// The last line that it wrote, in the words that Caddy uses for errors where it is such a line.
fn last_words(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
        let mut bytes = Vec::new();
        file.take(LAST_WORDS).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let line = text.lines().rfind(|line| !line.trim().is_empty());
    match line {
        Some(line) => line.chars().take(500).collect(),
        None => "it said nothing".into(),
    }
}
