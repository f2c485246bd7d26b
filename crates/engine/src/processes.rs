//! Processes in machines: started, listed, fed, signalled and forgotten. The guest's table is the only record of them: they
//! live as long as their machine runs, whatever happens to servers and clients.

mod following;

use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use hutch_contract::exec::ExecExit;
use hutch_contract::id::ProcessId;
use hutch_contract::machine::Status;
use hutch_contract::process::{Process, PtySize, SendSignal, StartProcess, StartedProcess};
use hutch_guest::Kind;
use hutch_guest::session::{self, Session};
use tokio::time::{Instant, timeout};

use crate::access::{self, Access};
use crate::engine::Machine;
use crate::exec::ready;
use crate::lifetime::Used;
use crate::rows::Current;
use crate::{Engine, Error, Principal, admission, deadline, plan};

pub use following::ExecOutput;
pub(crate) use following::Following;
use following::exec_exit;

/// The most arguments of a command, and the most bytes of all of them.
const MAX_ARGUMENTS: usize = 4096;
const MAX_ARGUMENT_BYTES: usize = 512 * 1024;

impl Engine {
    /// Starts a process and returns at once; waits for a machine that is starting.
    ///
    /// # Errors
    /// Why it cannot be started: by the request, the machine's status, or the guest.
    pub async fn start_process(
        &self,
        who: &Principal,
        reference: &str,
        process: StartProcess,
    ) -> Result<StartedProcess, Error> {
        access::check(who, Access::Write)?;
        validate(&process)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "run commands").await?;
        start(&session, process).await
    }

    /// All processes of a machine that were started through the API and not forgotten, oldest first.
    ///
    /// # Errors
    /// [`Error::NotFound`]; that the machine does not run; what its guest says.
    pub async fn processes(&self, who: &Principal, reference: &str) -> Result<Vec<Process>, Error> {
        access::check(who, Access::Read)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "list processes").await?;
        session.processes().await?.into_iter().map(row).collect()
    }

    /// One process.
    ///
    /// # Errors
    /// [`Error::NotFound`], also of the process.
    pub async fn process(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
    ) -> Result<Process, Error> {
        let id = named(process)?;
        let processes = self.processes(who, reference).await?;
        let found = processes.into_iter().find(|process| process.id == id);
        found.ok_or_else(|| Error::not_found("process", process))
    }

    /// Waits until a process has ended.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Timeout`], and that the machine does not run any more.
    pub async fn wait_process(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
        limit: Duration,
    ) -> Result<ExecExit, Error> {
        access::check(who, Access::Read)?;
        let id = named(process)?;
        let machine = self.find_machine(who, reference)?;
        let until = Instant::now() + limit;
        loop {
            let session = ready(&machine, "run commands").await?;
            let left = until.saturating_duration_since(Instant::now());
            match session.wait(id.as_str(), left).await {
                Ok(exit) => return Ok(exec_exit(&exit)),
                Err(error) if error.kind() == Kind::Timeout => {
                    return Err(Error::timeout(format!("process `{id}` to end"), limit));
                }
                // A snapshot ends every session; the process knows nothing of it.
                Err(_) if goes_on(&machine, &session).await => {}
                Err(error) => return Err(of_process(&id, error)),
            }
        }
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`]; that it has ended.
    pub async fn signal_process(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
        signal: &SendSignal,
    ) -> Result<(), Error> {
        let Some(number) = signal.signal.number() else {
            let problem = "is none: names such as `TERM` and numbers of 1 to 64 are";
            return Err(Error::invalid("signal", problem));
        };
        let (session, id) = self.session_of(who, reference, process).await?;
        let sent = session.signal(id.as_str(), number, signal.all).await;
        sent.map_err(|error| of_process(&id, error))
    }

    /// Gives a process' terminal another size.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`]; that it has no terminal.
    pub async fn resize_process(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
        size: PtySize,
    ) -> Result<(), Error> {
        check_size(size)?;
        let (session, id) = self.session_of(who, reference, process).await?;
        let resized = session.resize(id.as_str(), pty_size(size)).await;
        resized.map_err(|error| of_process(&id, error))
    }

    /// Kills what is left of a process, and drops its row and its output.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete_process(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
    ) -> Result<(), Error> {
        let (session, id) = self.session_of(who, reference, process).await?;
        let forgotten = session.forget(id.as_str()).await;
        forgotten.map_err(|error| of_process(&id, error))
    }

    /// The standard input of a process, to be written to.
    ///
    /// # Errors
    /// [`Error::NotFound`] of the machine; of the process only once something is written.
    pub async fn process_input(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
    ) -> Result<ProcessInput, Error> {
        access::check(who, Access::Write)?;
        let process = named(process)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "run commands").await?;
        Ok(ProcessInput {
            machine,
            session,
            process,
        })
    }

    /// What a process writes from byte `from` on, and how it ends. It goes on after snapshots of the machine.
    ///
    /// # Errors
    /// [`Error::NotFound`]; that `from` is beyond what was written.
    pub async fn process_output(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
        from: u64,
    ) -> Result<BoxStream<'static, Result<ExecOutput, Error>>, Error> {
        access::check(who, Access::Read)?;
        let id = named(process)?;
        let machine = self.find_machine(who, reference)?;
        let session = ready(&machine, "run commands").await?;
        let following = Following::new(machine, session, id.clone(), from).await;
        match following {
            Ok(following) => Ok(following.stream()),
            Err(Error::Guest(error)) => Err(of_process(&id, error)),
            Err(error) => Err(error),
        }
    }

    async fn session_of(
        &self,
        who: &Principal,
        reference: &str,
        process: &str,
    ) -> Result<(Used<Session>, ProcessId), Error> {
        access::check(who, Access::Write)?;
        let id = named(process)?;
        let machine = self.find_machine(who, reference)?;
        Ok((ready(&machine, "run commands").await?, id))
    }
}

/// Standard input of one process. What is written has been taken by the process when the write ends, so that it is known
/// how far one came when a connection is lost between two.
pub struct ProcessInput {
    machine: std::sync::Arc<Machine>,
    session: Used<Session>,
    process: ProcessId,
}

impl ProcessInput {
    /// Writes all of this; waits as long as the process takes. Returns how many bytes it took: fewer when it has closed
    /// its end.
    ///
    /// # Errors
    /// [`Error::NotFound`]; that its standard input is closed; that the connection to the guest was lost meanwhile.
    pub async fn write(&mut self, data: Bytes) -> Result<u64, Error> {
        self.send(data, false).await
    }

    /// Ends it: the process reads an end of file, once. Its terminal stays open for more.
    ///
    /// # Errors
    /// As [`ProcessInput::write`].
    pub async fn end(&mut self) -> Result<(), Error> {
        self.send(Bytes::new(), true).await.map(drop)
    }

    async fn send(&mut self, data: Bytes, eof: bool) -> Result<u64, Error> {
        if self.session.is_closed() && goes_on(&self.machine, &self.session).await {
            self.session = ready(&self.machine, "run commands").await?;
        }
        let chunks = stream::iter((!data.is_empty()).then_some(data)).boxed();
        let taken = self.session.input(self.process.as_str(), chunks, eof).await;
        taken.map_err(|error| of_process(&self.process, error))
    }
}

/// Whether a session has ended although its machine runs, so that there will be another one.
async fn goes_on(machine: &Machine, session: &Session) -> bool {
    let closed = timeout(deadline::CLOSED, session.closed()).await;
    let runs = |current: &Current| plan::status(&current.record) == Status::Running;
    closed.is_ok() && machine.cell.get().as_ref().is_some_and(runs)
}

/// Refuses what no guest could start.
pub(crate) fn validate(process: &StartProcess) -> Result<(), Error> {
    let command = &process.command;
    if command.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("command", "is empty"));
    }
    let bytes: usize = command.iter().map(String::len).sum();
    if command.len() > MAX_ARGUMENTS || bytes > MAX_ARGUMENT_BYTES {
        return Err(Error::invalid(
            "command",
            format!("has more than {MAX_ARGUMENTS} arguments or {MAX_ARGUMENT_BYTES} bytes"),
        ));
    }
    let mut texts = command.iter().chain(&process.cwd).chain(&process.user);
    if texts.any(|text| text.contains('\0')) {
        return Err(Error::invalid("command", "has a NUL"));
    }
    if process.timeout_ms == Some(0) {
        return Err(Error::invalid(
            "timeout_ms",
            "is 0; leave it out for no timeout",
        ));
    }
    process.pty.map_or(Ok(()), check_size)?;
    admission::pairs("env", &process.env)
}

fn check_size(size: PtySize) -> Result<(), Error> {
    match size.is_possible() {
        true => Ok(()),
        false => Err(Error::invalid("pty", "has 1 to 4096 rows and columns")),
    }
}

/// Starts a process that [`validate`] let pass, under a name of our own.
pub(crate) async fn start(
    session: &Session,
    process: StartProcess,
) -> Result<StartedProcess, Error> {
    let id = ProcessId::new();
    let start = session::StartProcess {
        process_id: id.to_string(),
        argv: process.command,
        environment: process.env,
        cwd: process.cwd.unwrap_or_default(),
        user: process.user.unwrap_or_default(),
        stdin: process.stdin,
        pty: process.pty.map(pty_size),
        timeout: process.timeout_ms.map(Duration::from_millis),
        ring_bytes: 0,
    };
    let pid = session.start(&start).await?;
    Ok(StartedProcess { id, pid })
}

fn pty_size(size: PtySize) -> session::PtySize {
    session::PtySize {
        rows: size.rows.into(),
        cols: size.cols.into(),
    }
}

/// The process of that name. What is no name of ours names nothing.
fn named(process: &str) -> Result<ProcessId, Error> {
    let named = process.parse();
    named.map_err(|_| Error::not_found("process", process))
}

/// What the guest says of a process that it does not know is said of the process by us.
fn of_process(process: &ProcessId, error: session::Error) -> Error {
    match error.kind() {
        Kind::NotFound => Error::not_found("process", process.as_str()),
        _ => error.into(),
    }
}

fn row(process: session::Process) -> Result<Process, Error> {
    let id = process.process_id.parse();
    Ok(Process {
        id: id.map_err(|_| session::Error::Protocol {
            call: "ListProcesses",
            what: "an id that we never gave",
        })?,
        pid: process.pid,
        command: process.argv,
        started_at_ms: process.started_unix_ms,
        pty: process.pty,
        exit: process.exit.as_ref().map(exec_exit),
    })
}
