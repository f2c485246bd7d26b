//! User processes: one row each in a bounded table, alive until forgotten, whatever happens to connections.
//! Everything here runs on the agent's single runtime thread; only preparing a launch goes to the blocking pool.

pub mod group;
pub mod launch;
pub mod output;
mod pump;
pub mod ring;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hutch_guest::pb;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tonic::Status;

use self::group::{Group, Groups};
use self::launch::{Defaults, Ends, Launch, Surroundings};
use self::output::{Budget, How, Output};
use self::pump::Source;
use self::ring::Stream;
use crate::status;
use crate::sys::exec::{self, REPORT};
use crate::sys::poll;

const SIGKILL: i32 = 9;
/// Rows of the table.
const ROWS: usize = 1024;
/// Ring of a process that does not ask for another size, in bytes.
const RING: u32 = 1024 * 1024;
/// Largest ring that can be asked for.
const RING_MAX: u32 = 16 * 1024 * 1024;
/// Longest process id. It names a row and is never used as a path.
const ID: usize = 128;
/// Bytes of the command line that a row keeps for listings.
const SHOWN_ARGV: usize = 384;

/// One user process.
pub struct Process {
    /// The host's name for it.
    pub id: String,
    /// Of the leader.
    pub pid: Pid,
    /// What it writes, and how it ended.
    pub output: Arc<Output>,
    /// What it was started with, shortened.
    argv: Vec<String>,
    started_unix_ms: i64,
    group: Group,
    /// Standard input, until it is closed.
    pub input: tokio::sync::Mutex<Option<AsyncFd<OwnedFd>>>,
    /// Master of the terminal.
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    live: Mutex<Live>,
    /// Set when exec has succeeded or failed.
    launched: watch::Sender<Option<Result<(), Status>>>,
}

/// What the end of the leader needs.
struct Live {
    sources: Option<[Option<Arc<Source>>; 2]>,
    slave: Option<OwnedFd>,
    timed_out: bool,
}

/// All user processes.
pub struct Table {
    inner: Mutex<Inner>,
    groups: Groups,
    budget: Arc<Budget>,
    surroundings: Surroundings,
}

#[derive(Default)]
struct Inner {
    rows: BTreeMap<String, Arc<Process>>,
    by_pid: HashMap<i32, Arc<Process>>,
    /// Ids in the order of their start.
    order: Vec<String>,
    /// No more starts: frozen, or on the way down.
    closed: Option<&'static str>,
}

impl Table {
    /// An empty table; all rings together use about `ring_bytes`.
    pub fn new(groups: Groups, ring_bytes: usize, surroundings: Surroundings) -> Self {
        Self {
            inner: Mutex::default(),
            groups,
            budget: Budget::new(ring_bytes),
            surroundings,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the processes are.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Refuses starts with this reason from now on, or allows them again.
    pub fn close(&self, reason: Option<&'static str>) {
        self.lock().closed = reason;
    }

    /// The row of that name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<Process>, Status> {
        let row = self.lock().rows.get(id).cloned();
        row.ok_or_else(|| Status::not_found(format!("process {id:?} not found")))
    }

    /// All rows, oldest first.
    pub fn list(&self) -> Vec<pb::ProcessInfo> {
        let inner = self.lock();
        let rows = inner.order.iter().filter_map(|id| inner.rows.get(id));
        rows.map(|row| row.info()).collect()
    }

    /// Starts a process, or answers with the row that has its id already.
    ///
    /// # Errors
    /// What prevents it, as precisely as the kernel says.
    pub async fn start(
        self: &Arc<Self>,
        request: pb::StartRequest,
        defaults: Defaults,
    ) -> Result<Arc<Process>, Status> {
        if request.process_id.is_empty() || request.process_id.len() > ID {
            return Err(Status::invalid_argument(
                "process_id must have 1 to 128 bytes",
            ));
        }
        launch::check_environment(&request.environment)?;
        if let Some(process) = self.admit(&request.process_id)? {
            return process.launched().await;
        }
        let group = self.groups.create();
        let group = group.map_err(|error| status::of_io("make a control group", &error))?;
        let surroundings = self.surroundings;
        let prepared = tokio::task::spawn_blocking(move || {
            let dir = match &group {
                Group::Cgroup(dir) => Some(dir.clone()),
                Group::Walk => None,
            };
            let launch = launch::prepare(&request, &defaults, group, surroundings);
            if let (Err(_), Some(dir)) = (&launch, dir) {
                Group::Cgroup(dir).remove_if_empty();
            }
            (request, defaults, launch)
        });
        let prepared = prepared
            .await
            .map_err(|_| Status::cancelled("the agent ends"))?;
        let (request, defaults, launch) = prepared;
        let launch = launch?;
        match self.fork(request, defaults, launch)? {
            Forked::New(process) | Forked::Known(process) => process.launched().await,
        }
    }

    /// Looks for a row of that id; without one, makes sure that there is room for it.
    fn admit(&self, id: &str) -> Result<Option<Arc<Process>>, Status> {
        let mut inner = self.lock();
        if let Some(process) = inner.rows.get(id) {
            return Ok(Some(process.clone()));
        }
        if let Some(reason) = inner.closed {
            return Err(Status::failed_precondition(reason));
        }
        if inner.rows.len() < ROWS {
            return Ok(None);
        }
        let idle = |id: &&String| {
            let row = inner.rows.get(id.as_str());
            row.is_some_and(|row| row.output.exit().is_some() && !row.output.has_readers())
        };
        let Some(oldest) = inner.order.iter().find(idle).cloned() else {
            return Err(Status::resource_exhausted("1024 processes are running"));
        };
        inner.remove(&oldest);
        Ok(None)
    }

    /// Forks and enters the row, without anything else of this thread in between.
    fn fork(
        self: &Arc<Self>,
        request: pb::StartRequest,
        defaults: Defaults,
        launch: Launch,
    ) -> Result<Forked, Status> {
        if let Some(known) = self.admit(&request.process_id)? {
            launch.group.remove_if_empty();
            return Ok(Forked::Known(known));
        }
        let Launch {
            exec,
            ends,
            report,
            group,
        } = launch;
        let failed = |error: std::io::Error| status::of_io("start a process", &error);
        let watched = Watched::new(ends).map_err(failed)?;
        let report = tokio::net::unix::pipe::Receiver::from_owned_fd(report).map_err(failed)?;
        let pid = exec::spawn(&exec).map_err(failed)?;
        // The child's ends must not stay open here.
        drop(exec);
        let ring = match request.ring_bytes {
            0 => RING,
            bytes => bytes.min(RING_MAX),
        };
        let process = Arc::new(Process {
            id: request.process_id.clone(),
            pid,
            output: Arc::new(Output::new(ring as usize, self.budget.clone())),
            argv: shorten(&request.argv),
            started_unix_ms: unix_ms(),
            group,
            input: tokio::sync::Mutex::new(watched.input),
            terminal: watched.slave.is_some().then(|| watched.output.fd()),
            live: Mutex::new(Live {
                sources: Some([Some(watched.output.clone()), watched.error.clone()]),
                slave: watched.slave,
                timed_out: false,
            }),
            launched: watch::Sender::new(None),
        });
        {
            let mut inner = self.lock();
            inner.rows.insert(process.id.clone(), process.clone());
            inner.order.push(process.id.clone());
            inner
                .by_pid
                .insert(pid.as_raw_nonzero().get(), process.clone());
        }
        let sources = [
            (Stream::Stdout, Some(watched.output)),
            (Stream::Stderr, watched.error),
        ];
        for (stream, source) in sources {
            if let Some(source) = source {
                tokio::spawn(pump::run(source, stream, process.output.clone()));
            }
        }
        let watcher = Watcher {
            table: self.clone(),
            process: process.clone(),
            defaults,
            request,
        };
        tokio::spawn(watcher.run(report));
        Ok(Forked::New(process))
    }

    /// Takes the ends of all children that have ended. To be called after each SIGCHLD.
    pub fn reap(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let process = self.lock().by_pid.remove(&pid.as_raw_nonzero().get());
            if let Some(process) = process {
                process.ended(status);
            }
        }
        if self.budget.is_exceeded() {
            self.shrink();
        }
    }

    /// Frees rings of exited processes that nobody reads, oldest first.
    fn shrink(&self) {
        let inner = self.lock();
        for id in &inner.order {
            let Some(row) = inner.rows.get(id) else {
                continue;
            };
            if row.output.exit().is_some() && !row.output.has_readers() {
                row.output.clear();
                if !self.budget.is_exceeded() {
                    return;
                }
            }
        }
    }

    /// Kills what is left of a process and drops its row.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn forget(&self, id: &str) -> Result<(), Status> {
        let process = self.get(id)?;
        process.signal_all(SIGKILL);
        process.output.wait().await;
        process.group.remove().await;
        let mut inner = self.lock();
        // Another row may have taken the name meanwhile.
        if inner
            .rows
            .get(id)
            .is_some_and(|row| Arc::ptr_eq(row, &process))
        {
            inner.remove(id);
        }
        Ok(())
    }

    /// Ends all user processes: SIGTERM, `grace`, SIGKILL.
    pub async fn end_all(&self, grace: Duration) {
        self.close(Some("the machine is shutting down"));
        let leaders = || -> Vec<_> { self.lock().by_pid.values().cloned().collect() };
        let gone = async {
            for process in leaders() {
                process.output.wait().await;
            }
            if let Groups::Cgroup { .. } = self.groups {
                self.groups.empty().await;
            }
        };
        self.groups.signal_all(15);
        // A stopped process sees no SIGTERM.
        self.groups.signal_all(18);
        let _ = tokio::time::timeout(grace, gone).await;
        self.groups.signal_all(SIGKILL);
        let rows: Vec<_> = self.lock().rows.values().cloned().collect();
        let killed = async {
            for process in rows {
                process.output.wait().await;
                process.group.remove().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), killed).await;
        self.groups.remove_if_empty();
    }
}

/// The agent's ends of a process' streams, watched by the runtime.
struct Watched {
    input: Option<AsyncFd<OwnedFd>>,
    output: Arc<Source>,
    error: Option<Arc<Source>>,
    slave: Option<OwnedFd>,
}

impl Watched {
    fn new(ends: Ends) -> std::io::Result<Self> {
        let input = ends.input.map(|fd| poll::watch(fd, Interest::WRITABLE));
        let error = ends.error.map(|fd| Source::new(fd, false).map(Arc::new));
        Ok(Self {
            input: input.transpose()?,
            output: Arc::new(Source::new(ends.output, ends.slave.is_some())?),
            error: error.transpose()?,
            slave: ends.slave,
        })
    }
}

enum Forked {
    New(Arc<Process>),
    Known(Arc<Process>),
}

impl Inner {
    fn remove(&mut self, id: &str) {
        if let Some(row) = self.rows.remove(id) {
            row.group.remove_if_empty();
        }
        self.order.retain(|other| other != id);
    }
}

/// Looks after one process from fork to exit.
struct Watcher {
    table: Arc<Table>,
    process: Arc<Process>,
    request: pb::StartRequest,
    defaults: Defaults,
}

impl Watcher {
    async fn run(self, mut report: tokio::net::unix::pipe::Receiver) {
        use tokio::io::AsyncReadExt;
        let mut bytes = [0; REPORT];
        if report.read_exact(&mut bytes).await.is_ok() {
            let (step, error) = exec::parse_report(bytes);
            let failure = launch::explain(&self.request, &self.defaults, step, &error);
            self.table.lock().remove(&self.process.id);
            self.process.launched.send_replace(Some(Err(failure)));
            return;
        }
        self.process.launched.send_replace(Some(Ok(())));
        let timeout = match self.request.timeout_ms {
            0 => return,
            ms => Duration::from_millis(ms),
        };
        let process = self.process;
        if tokio::time::timeout(timeout, process.output.wait())
            .await
            .is_err()
        {
            process.live().timed_out = true;
            process.signal_all(SIGKILL);
        }
    }
}

impl Process {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn launched(self: Arc<Self>) -> Result<Arc<Self>, Status> {
        let mut launched = self.launched.subscribe();
        let result = launched.wait_for(Option::is_some).await;
        match result.as_deref() {
            Ok(Some(Err(status))) => return Err(status.clone()),
            Ok(_) => {}
            Err(_) => return Err(Status::cancelled("the agent ends")),
        }
        drop(result);
        Ok(self)
    }

    /// The leader has been reaped.
    fn ended(&self, status: WaitStatus) {
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => How::Code(code),
            (None, signal) => How::Signal(signal.unwrap_or(0)),
        };
        let mut live = self.live();
        live.slave = None;
        let mut owed = [0; 2];
        for (index, source) in live.sources.take().into_iter().flatten().enumerate() {
            if let Some(source) = source {
                owed[index] = source.left_at_exit(&self.output);
            }
        }
        self.output.exited(how, live.timed_out, owed);
        self.group.remove_if_empty();
    }

    /// Sends a signal to the leader's process group.
    ///
    /// # Errors
    /// The leader has ended, or the kernel refuses.
    pub fn signal(&self, signal: i32) -> Result<(), Status> {
        if self.output.exit().is_some() {
            return Err(Status::failed_precondition("the process has ended"));
        }
        let group = -self.pid.as_raw_nonzero().get();
        let sent = crate::sys::signal::kill(group, signal);
        sent.map_err(|error| status::of_io("send the signal", &error))
    }

    /// Sends a signal to all that the process has started.
    pub fn signal_all(&self, signal: i32) {
        let leader = self.output.exit().is_none().then_some(self.pid);
        self.group.signal(leader, signal);
    }

    /// Tells the terminal its new size.
    ///
    /// # Errors
    /// The process has no terminal.
    pub fn resize(&self, size: pb::PtySize) -> Result<(), Status> {
        let Some(terminal) = &self.terminal else {
            return Err(Status::failed_precondition("the process has no terminal"));
        };
        let set = rustix::termios::tcsetwinsize(terminal.get_ref(), launch::winsize(size));
        set.map_err(|errno| status::of_io("resize the terminal", &errno.into()))
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    fn info(&self) -> pb::ProcessInfo {
        pb::ProcessInfo {
            process_id: self.id.clone(),
            pid: self.pid.as_raw_nonzero().get().unsigned_abs(),
            argv: self.argv.clone(),
            started_unix_ms: self.started_unix_ms,
            exit: self.output.exit().map(exit_status),
            pty: self.has_terminal(),
        }
    }
}

/// In the protocol's words.
pub fn exit_status(exit: output::Exit) -> pb::ExitStatus {
    pb::ExitStatus {
        how: Some(match exit.how {
            How::Code(code) => pb::exit_status::How::Code(code),
            How::Signal(signal) => pb::exit_status::How::Signal(signal),
        }),
        timed_out: exit.timed_out,
        output_end: exit.output_end,
    }
}

fn shorten(argv: &[String]) -> Vec<String> {
    let mut left = SHOWN_ARGV;
    let mut shown = Vec::new();
    for word in argv {
        let mut end = word.len().min(left);
        while !word.is_char_boundary(end) {
            end -= 1;
        }
        shown.push(word[..end].to_owned());
        left = left.saturating_sub(end + 8);
        if end < word.len() || left == 0 {
            shown.push("…".to_owned());
            break;
        }
    }
    shown
}

fn unix_ms() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
