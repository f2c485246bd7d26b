//! A container that runs: what the engine says about it, its end, and its output, copied into the console's ring.
//!
//! The engine keeps the output while no server is there, in files of bounded size; each message has a time. The ring's
//! one writer is who holds `run/console.lock`; `run/console.at` is the time of the last message that is in the ring. A
//! server that dies between the two writes repeats one message.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::{LogsOptions, WaitContainerOptions};
use futures::StreamExt;
use hutch_contract::machine::Exit;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use super::client::{self, Client};
use crate::process::{Life, printable};
use crate::ring::RingWriter;
use crate::{Error, ExitReport, MachineDir};

/// Between two attempts to speak to an engine that has gone away: it is being restarted.
const ENGINE_AGAIN: Duration = Duration::from_secs(1);
/// Between two looks whether another copier of the same output has ended.
const WRITER_AGAIN: Duration = Duration::from_millis(200);
/// Time for the rest of the output once the container has ended.
const REST_OF_OUTPUT: Duration = Duration::from_secs(5);
/// The most bytes of an engine's words in a report.
const LAST_WORDS: usize = 2048;
/// The agent's exit code that asks for a restart.
const REBOOT: i64 = 64;
/// Exit codes above this are signals, as in a shell.
const SIGNALS: i64 = 128;

/// The present or last run of a machine's container: `run/container.json`, written before the start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Run {
    /// The engine's id of the container.
    pub(super) container: String,
    /// The machine's id, which stands on the container too.
    pub(super) machine: String,
    /// When the run before this one began: as long as the engine says the same, this one has not.
    pub(super) before: String,
    /// Where this run begins in the ring of the console.
    pub(super) console_from: u64,
}

/// What the engine says about a container.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) id: String,
    pub(super) machine: Option<String>,
    pub(super) running: bool,
    pub(super) paused: bool,
    pub(super) pid: u32,
    pub(super) started_at: String,
    pub(super) memory: i64,
    pub(super) nano_cpus: i64,
    exit_code: i64,
    out_of_memory: bool,
    words: String,
}

impl From<ContainerInspectResponse> for Seen {
    fn from(answer: ContainerInspectResponse) -> Self {
        let state = answer.state.unwrap_or_default();
        let limits = answer.host_config.unwrap_or_default();
        let labels = answer.config.and_then(|config| config.labels);
        Self {
            id: answer.id.unwrap_or_default(),
            machine: labels.and_then(|mut labels| labels.remove(super::MACHINE_LABEL)),
            // Also when it is paused.
            running: state.running.unwrap_or_default(),
            paused: state.paused.unwrap_or_default(),
            pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or(0),
            started_at: state.started_at.unwrap_or_default(),
            memory: limits.memory.unwrap_or_default(),
            nano_cpus: limits.nano_cpus.unwrap_or_default(),
            exit_code: state.exit_code.unwrap_or_default(),
            out_of_memory: state.oom_killed.unwrap_or_default(),
            words: state.error.unwrap_or_default(),
        }
    }
}

impl Seen {
    /// How the container ended. `ours`: we wanted it to.
    pub(super) fn report(&self, ours: bool) -> ExitReport {
        let exit = match self.exit_code {
            code if ours && code == SIGNALS + i64::from(libc::SIGKILL) => Exit::Killed,
            0 => Exit::PowerOff,
            REBOOT => Exit::Reboot,
            code if (SIGNALS + 1..SIGNALS + 65).contains(&code) => Exit::Signal {
                signal: (code - SIGNALS) as i32,
            },
            code => Exit::Code {
                code: code.try_into().unwrap_or(-1),
            },
        };
        let words = match self.out_of_memory && exit != Exit::Killed {
            true => "its memory was not enough",
            false => &self.words,
        };
        ExitReport {
            exit,
            stderr_tail: printable(words.as_bytes(), LAST_WORDS),
        }
    }
}

/// Of a container that is not there any more.
pub(super) fn lost(dir: &MachineDir) -> ExitReport {
    ExitReport {
        exit: match killed_by_us(dir) {
            true => Exit::Killed,
            false => Exit::Lost,
        },
        stderr_tail: "its container is gone".to_owned(),
    }
}

/// Whether we wanted the end of the present or last run.
pub(super) fn killed_by_us(dir: &MachineDir) -> bool {
    dir.file(MachineDir::KILLED).symlink_metadata().is_ok()
}

/// Looks at a container, by id or name.
pub(super) async fn inspect(client: &Client, container: &str) -> Result<Option<Seen>, Error> {
    let engine = client.engine().await?;
    let seen = client::found("inspect", engine.inspect_container(container, None)).await?;
    Ok(seen.map(Seen::from))
}

/// A running container. Its parent is the engine's.
pub(super) struct Container {
    pub(super) client: Arc<Client>,
    pub(super) dir: MachineDir,
    pub(super) run: Run,
    pub(super) pid: u32,
    pub(super) console_bytes: u64,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.run.fmt(f)
    }
}

#[async_trait]
impl Life for Container {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn console_from(&self) -> u64 {
        self.run.console_from
    }

    async fn ended(&self) -> ExitReport {
        let report = tokio::select! {
            report = self.end() => report,
            never = self.copy_output() => match never {},
        };
        // What the dropped copier had not read yet, or what another one is at.
        let rest = async {
            let writer = self.writer().await;
            self.copy(writer, false).await
        };
        if !matches!(timeout(REST_OF_OUTPUT, rest).await, Ok(Ok(()))) {
            tracing::warn!(dir = %self.dir.path().display(), "the end of the output is missing from the console");
        }
        // Nobody listens there any more. One that is gone already is as good.
        let socket = self.dir.file(MachineDir::VMM).join(super::SOCKET);
        drop(tokio::fs::remove_file(socket).await);
        tracing::debug!(dir = %self.dir.path().display(), runtime = super::NAME, exit = ?report.exit, "container ended");
        report
    }

    async fn kill(&self, _again: bool) -> Result<(), Error> {
        crate::process::mark_killed(&self.dir).await;
        let engine = self.client.engine().await?;
        let killed = async {
            match engine.kill_container(&self.run.container, None).await {
                // It does not run.
                Err(error) if client::is_status(&error, 409) => Ok(()),
                other => other,
            }
        };
        client::found("kill", killed).await.map(drop)
    }
}

impl Container {
    /// Waits for the end. An engine that goes away is waited for: it knows when it is back.
    async fn end(&self) -> ExitReport {
        loop {
            match inspect(&self.client, &self.run.container).await {
                Ok(None) => return lost(&self.dir),
                Ok(Some(seen)) if !seen.running || seen.started_at == self.run.before => {
                    return seen.report(killed_by_us(&self.dir));
                }
                Ok(Some(_)) => {
                    if let Ok(engine) = self.client.engine().await {
                        let waited = engine
                            .wait_container(&self.run.container, None::<WaitContainerOptions>);
                        // Whatever it says: the state is looked at again. An end that is no end is a connection lost.
                        if let Some(
                            Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. }),
                        ) = std::pin::pin!(waited).next().await
                        {
                            continue;
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(dir = %self.dir.path().display(), %error, "no word from the engine");
                }
            }
            sleep(ENGINE_AGAIN).await;
        }
    }

    /// Copies output for as long as it comes.
    async fn copy_output(&self) -> std::convert::Infallible {
        loop {
            let writer = self.writer().await;
            if let Err(error) = self.copy(writer, true).await {
                tracing::debug!(dir = %self.dir.path().display(), %error, "the output breaks off");
            }
            // The container has ended, which ends this too, or the engine has gone.
            sleep(ENGINE_AGAIN).await;
        }
    }

    /// The right to write to the ring, once nobody else has it.
    async fn writer(&self) -> File {
        loop {
            match self.try_writer() {
                Ok(Some(lock)) => return lock,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(dir = %self.dir.path().display(), %error, "the console is not recorded");
                }
            }
            sleep(WRITER_AGAIN).await;
        }
    }

    fn try_writer(&self) -> io::Result<Option<File>> {
        let lock = open_private(&self.dir, MachineDir::CONSOLE_LOCK)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies what is not in the ring yet, to its end or as it comes.
    async fn copy(&self, _writer: File, follow: bool) -> Result<(), Error> {
        let path = self.dir.file(MachineDir::CONSOLE);
        let mut ring =
            RingWriter::open(&path, self.console_bytes).map_err(Error::io("open", &path))?;
        let path = self.dir.file(MachineDir::CONSOLE_AT);
        let position = open_private(&self.dir, MachineDir::CONSOLE_AT);
        let position = position.map_err(Error::io("open", &path))?;
        let mut at = read_all(&position).map_err(Error::io("read", &path))?;
        let options = LogsOptions {
            follow,
            stdout: true,
            stderr: true,
            timestamps: true,
            tail: "all".to_owned(),
            ..LogsOptions::default()
        };
        let engine = self.client.engine().await?;
        let mut output = std::pin::pin!(engine.logs(&self.run.container, Some(options)));
        while let Some(message) = output.next().await {
            let message = message.map_err(|error| client::said("logs", error))?;
            let message = message.into_bytes();
            let Some(space) = message.iter().position(|byte| *byte == b' ') else {
                continue;
            };
            let (time, text) = (&message[..space], &message[space + 1..]);
            if time <= at.as_slice() {
                continue;
            }
            // A few bytes into the page cache: no reason to leave the thread. A full disk costs the words only.
            let _ = ring.append(text);
            at = time.to_vec();
            let _ = position.write_all_at(&at, 0);
        }
        Ok(())
    }
}

fn open_private(dir: &MachineDir, name: &str) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dir.file(name))
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    file.take(64).read_to_end(&mut bytes)?;
    Ok(bytes)
}
