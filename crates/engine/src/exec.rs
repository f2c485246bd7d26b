//! Commands in machines: started in the guest, followed from there. A client that goes away ends only its stream.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use hutch_contract::exec::{Exec, ExecResult, MAX_BLOCKING_OUTPUT_BYTES};
use hutch_contract::id::ProcessId;
use hutch_contract::machine::Status;
use hutch_contract::process::StartProcess;
use hutch_contract::record::Observed;
use hutch_guest::session::Session;
use tokio::time::timeout;

use crate::access::{self, Access};
use crate::engine::Machine;
use crate::levels::wake;
use crate::lifetime::Used;
use crate::processes::{self, ExecOutput, Following};
use crate::{Engine, Error, Principal, deadline, plan};

/// The most standard input that comes with the request.
const MAX_STDIN_BYTES: usize = 1024 * 1024;

/// A command that was started.
pub struct Execution {
    /// The process, for attaching again.
    pub process: ProcessId,
    /// What it writes, then how it ended.
    pub output: BoxStream<'static, Result<ExecOutput, Error>>,
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
        let stdin = stdin(exec.stdin_base64.as_deref())?;
        let start = StartProcess {
            command: exec.command,
            env: exec.env,
            cwd: exec.cwd,
            user: exec.user,
            stdin: stdin.is_some(),
            pty: None,
            timeout_ms: exec.timeout_ms,
        };
        processes::validate(&start)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "run commands").await?;
        let process = processes::start(&session, start).await?.id;
        let following = Following::new(machine, session, process.clone(), 0).await?;
        if let Some(bytes) = stdin {
            let (session, id) = (following.session(), process.clone());
            // Feeds beside the output: a command that writes before it has read everything must not wait for us.
            self.spawn(async move {
                let chunks = stream::iter([Bytes::from(bytes)]).boxed();
                if let Err(error) = session.input(id.as_str(), chunks, true).await {
                    tracing::debug!(process = %id, %error, "standard input was not taken");
                }
            });
        }
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

/// The standard input that came with a request.
fn stdin(base64: Option<&str>) -> Result<Option<Vec<u8>>, Error> {
    let Some(text) = base64 else {
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
