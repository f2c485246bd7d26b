//! Commands in machines: started in the guest, followed from there. A client that goes away ends only its stream.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use hutch_contract::exec::{Exec, ExecExit, ExecResult, MAX_BLOCKING_OUTPUT_BYTES};
use hutch_contract::id::ProcessId;
use hutch_contract::machine::Status;
use hutch_contract::record::Observed;
use hutch_guest::session::{Chunk, Exit, ExitStatus, Output, Session, StartProcess, Stream};
use tokio::time::timeout;

use crate::access::{self, Access};
use crate::engine::Machine;
use crate::levels::wake;
use crate::lifetime::Used;
use crate::rows::Current;
use crate::{Engine, Error, Principal, admission, deadline, plan};

/// The most arguments of a command, and the most bytes of all of them.
const MAX_ARGUMENTS: usize = 4096;
const MAX_ARGUMENT_BYTES: usize = 512 * 1024;
/// The most standard input that comes with the request.
const MAX_STDIN_BYTES: usize = 1024 * 1024;

/// A command that was started.
pub struct Execution {
    /// The process, for attaching again.
    pub process: ProcessId,
    /// What it writes, then how it ended.
    pub output: BoxStream<'static, Result<ExecOutput, Error>>,
}

/// What comes from a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of standard output, after so many bytes of both streams.
    Stdout {
        /// Bytes of output before these.
        sequence: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Bytes of standard error, after so many bytes of both streams.
    Stderr {
        /// Bytes of output before these.
        sequence: u64,
        /// The bytes.
        data: Bytes,
    },
    /// So many bytes are gone.
    Dropped(u64),
    /// It has ended; nothing follows.
    Exit(ExecExit),
}

impl Engine {
    /// Runs a command; waits for a machine that is starting.
    ///
    /// # Errors
    /// Why it cannot be started: by the request, the machine's status, or the guest.
    pub async fn exec(
        &self,
        who: &Principal,
        reference: &str,
        exec: Exec,
    ) -> Result<Execution, Error> {
        access::check(who, Access::Write)?;
        let stdin = validate(&exec)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "run commands").await?;
        let process = ProcessId::new();
        let start = StartProcess {
            process_id: process.to_string(),
            argv: exec.command,
            environment: exec.env,
            cwd: exec.cwd.unwrap_or_default(),
            user: exec.user.unwrap_or_default(),
            stdin: stdin.is_some(),
            timeout: exec.timeout_ms.map(Duration::from_millis),
            ..StartProcess::default()
        };
        session.start(&start).await?;
        let output = session.attach(process.as_str(), 0, true).await?;
        if let Some(bytes) = stdin {
            let (session, id) = (session.clone(), process.clone());
            // Feeds beside the output: a command that writes before it has read everything must not wait for us.
            self.spawn(async move {
                let chunks = stream::iter([Bytes::from(bytes)]).boxed();
                if let Err(error) = session.input(id.as_str(), chunks, true).await {
                    tracing::debug!(process = %id, %error, "standard input was not taken");
                }
            });
        }
        let following = Following {
            machine,
            session,
            process: process.clone(),
            output: output.boxed(),
            next: 0,
        };
        Ok(Execution {
            output: following.stream(),
            process,
        })
    }

    /// Runs a command to its end and returns what it wrote, up to [`MAX_BLOCKING_OUTPUT_BYTES`] of each stream.
    ///
    /// # Errors
    /// As [`Engine::exec`], and when the machine is lost meanwhile.
    pub async fn exec_blocking(
        &self,
        who: &Principal,
        reference: &str,
        exec: Exec,
    ) -> Result<ExecResult, Error> {
        let mut execution = self.exec(who, reference, exec).await?;
        let (mut stdout, mut stderr, mut dropped_bytes) = (Vec::new(), Vec::new(), 0);
        while let Some(output) = execution.output.next().await {
            match output? {
                ExecOutput::Stdout { data, .. } => dropped_bytes += keep(&mut stdout, &data),
                ExecOutput::Stderr { data, .. } => dropped_bytes += keep(&mut stderr, &data),
                ExecOutput::Dropped(bytes) => dropped_bytes += bytes,
                ExecOutput::Exit(exit) => {
                    return Ok(ExecResult {
                        exit,
                        stdout: String::from_utf8_lossy(&stdout).into_owned(),
                        stderr: String::from_utf8_lossy(&stderr).into_owned(),
                        dropped_bytes,
                    });
                }
            }
        }
        let name = self
            .machine(who, reference)
            .map_or_else(|_| reference.to_owned(), |machine| machine.name.to_string());
        Err(Error::AgentSilent { name })
    }
}

/// Adds what fits; returns how many bytes did not.
fn keep(kept: &mut Vec<u8>, data: &[u8]) -> u64 {
    let room = MAX_BLOCKING_OUTPUT_BYTES - kept.len();
    let fits = room.min(data.len());
    kept.extend_from_slice(&data[..fits]);
    (data.len() - fits) as u64
}

/// A command's output. The process stays in the guest's table, which drops the oldest ended ones by itself: a command may
/// leave others running behind it, and those live on.
struct Following {
    machine: Arc<Machine>,
    session: Used<Session>,
    process: ProcessId,
    output: BoxStream<'static, hutch_guest::session::Result<Output>>,
    /// The first byte that has not been seen.
    next: u64,
}

impl Following {
    /// Translates the guest's words, and goes on with them after a snapshot, which ends every session with the guest.
    fn stream(self) -> BoxStream<'static, Result<ExecOutput, Error>> {
        stream::unfold(Some(self), |following| async {
            let mut following = following?;
            loop {
                let lost = match following.output.next().await {
                    Some(Ok(output)) => {
                        let output = following.translate(output);
                        let over = matches!(output, ExecOutput::Exit(_));
                        return Some((Ok(output), (!over).then_some(following)));
                    }
                    Some(Err(error)) => Some(error),
                    None => None,
                };
                if !following.attach_again().await {
                    return lost.map(|error| (Err(error.into()), None));
                }
            }
        })
        .boxed()
    }

    fn translate(&mut self, output: Output) -> ExecOutput {
        match output {
            Output::Chunk(Chunk {
                stream,
                sequence,
                data,
            }) => {
                self.next = sequence + data.len() as u64;
                match stream {
                    Stream::Stdout => ExecOutput::Stdout { sequence, data },
                    Stream::Stderr => ExecOutput::Stderr { sequence, data },
                }
            }
            Output::Dropped(bytes) => {
                self.next += bytes;
                ExecOutput::Dropped(bytes)
            }
            Output::Exit(exit) => ExecOutput::Exit(exec_exit(&exit)),
        }
    }

    /// Whether the same process' output comes from a new session now. One that was paused by wish is not woken for it.
    async fn attach_again(&mut self) -> bool {
        let closed = timeout(deadline::CLOSED, self.session.closed()).await;
        let runs = |current: &Current| plan::status(&current.record) == Status::Running;
        if closed.is_err() || !self.machine.cell.get().as_ref().is_some_and(runs) {
            return false;
        }
        let Ok(session) = ready(&self.machine, "run commands").await else {
            return false;
        };
        let attached = session.attach(self.process.as_str(), self.next, true).await;
        let Ok(output) = attached else {
            return false;
        };
        self.session = session;
        self.output = output.boxed();
        true
    }
}

fn exec_exit(exit: &Exit) -> ExecExit {
    let (exit_code, signal) = match exit.status {
        ExitStatus::Code(code) => (i32::from(code), None),
        ExitStatus::Signal(number) => (128 + i32::from(number), Some(i32::from(number))),
    };
    ExecExit {
        exit_code,
        signal,
        timed_out: exit.timed_out,
    }
}

fn validate(exec: &Exec) -> Result<Option<Vec<u8>>, Error> {
    if exec.command.is_empty() || exec.command[0].is_empty() {
        return Err(Error::invalid("command", "is empty"));
    }
    let bytes: usize = exec.command.iter().map(String::len).sum();
    if exec.command.len() > MAX_ARGUMENTS || bytes > MAX_ARGUMENT_BYTES {
        return Err(Error::invalid(
            "command",
            format!("has more than {MAX_ARGUMENTS} arguments or {MAX_ARGUMENT_BYTES} bytes"),
        ));
    }
    let texts = exec.command.iter().chain(&exec.cwd).chain(&exec.user);
    if texts.into_iter().any(|text| text.contains('\0')) {
        return Err(Error::invalid("command", "has a NUL"));
    }
    if exec.timeout_ms == Some(0) {
        return Err(Error::invalid(
            "timeout_ms",
            "is 0; leave it out for no timeout",
        ));
    }
    admission::pairs("env", &exec.env)?;
    let Some(text) = &exec.stdin_base64 else {
        return Ok(None);
    };
    let stdin = BASE64_STANDARD
        .decode(text)
        .map_err(|_| Error::invalid("stdin_base64", "is not base64"))?;
    if stdin.len() > MAX_STDIN_BYTES {
        return Err(Error::invalid(
            "stdin_base64",
            format!("has more than {MAX_STDIN_BYTES} bytes"),
        ));
    }
    Ok(Some(stdin))
}

/// The session with a machine's agent; waits for a machine that is starting, and lets one that is paused go on.
pub(crate) async fn ready(machine: &Machine, verb: &'static str) -> Result<Used<Session>, Error> {
    let held = machine.uses.hold();
    let mut sessions = machine.session.subscribe();
    let mut records = machine.cell.watch();
    let wait = async {
        loop {
            if let Some(session) = sessions
                .borrow_and_update()
                .as_ref()
                .filter(|session| !session.is_closed())
            {
                return Ok(session.clone());
            }
            let Some(current) = records.borrow_and_update().clone() else {
                return Err(Error::not_found("machine", machine.cell.id.as_str()));
            };
            let record = &current.record;
            match (plan::status(record), &record.observed) {
                (Status::Starting | Status::Running | Status::Pausing, _) => {}
                (Status::Paused, _) => {
                    wake(machine).await?;
                    continue;
                }
                (Status::Failed, Observed::Failed { reason, .. }) => {
                    return Err(Error::MachineFailed {
                        name: record.name.to_string(),
                        reason: reason.clone(),
                    });
                }
                (status, _) => return Err(Error::wrong_status(&record.name, status, verb)),
            }
            tokio::select! {
                _ = sessions.changed() => {}
                _ = records.changed() => {}
            }
        }
    };
    match timeout(deadline::READY, wait).await {
        Ok(outcome) => outcome.map(|session| Used::new(session, held)),
        Err(_) => Err(Error::AgentSilent {
            name: machine.name(),
        }),
    }
}
