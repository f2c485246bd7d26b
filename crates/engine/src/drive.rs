//! Performs the plan's steps: one task per machine, which alone touches the machine's process and files.
//!
//! A step may be dropped at any await (a newer wish, the end of the server). What is the case on the host is then
//! looked at again, exactly as after a crash, so there is one way back and not two.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hutch_contract::machine::Exit;
use hutch_contract::record::{MachineRecord, Observed, Wanted};
use hutch_guest::session::ShutdownMode;
use hutch_runtime::{Adopted, MachineDir, MachineSpec, Nic, Process, Root, Runtime, User};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::engine::{Machine, Shared};
use crate::lifetime::{self, Due};
use crate::phases::Phases;
use crate::plan::{self, Facts, Life, Step};
use crate::rows::Current;
use crate::warm::Shape;
use crate::{Error, deadline, network, prepare};

mod greet;
mod initial;
mod note;
mod snapshot;
mod warm;

use snapshot::Beginning;

/// A guest that ran shorter than this before it ended by itself is started again with a growing delay.
const SHORT_RUN: Duration = Duration::from_secs(30);
/// Between two looks at a process that could not be proved.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// What the task has in its hands.
enum Body {
    None(Option<Exit>),
    Alive(Process),
    Unproved(String),
}

/// The task of one machine.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    machine: Arc<Machine>,
    runtime: Arc<dyn Runtime>,
    dir: MachineDir,
    body: Body,
    files: bool,
    /// Held by work on the machine's files, also when the step that wanted it was dropped.
    files_busy: Arc<Mutex<()>>,
    /// A start whose result is not in hand yet; likewise.
    launching: Option<JoinHandle<Result<Process, hutch_runtime::Error>>>,
    /// It was booted by this task, and has not answered since.
    booted: bool,
    /// It may not be executing: it was paused, or found by a server that cannot know what an earlier one did last.
    may_be_paused: bool,
    /// Its disk was just made, and nothing has run on it since.
    fresh_disk: bool,
    /// The template that its present start goes on from.
    warm: Option<String>,
    /// What it could be kept as a template of, once it has booted.
    shape: Option<Shape>,
    /// It could not go on from its template.
    boots: bool,
    /// Failures of steps in a row.
    failures: u32,
    /// It has ended by itself and is to run again.
    comes_back: bool,
    /// Starts in a row that nobody asked for, each soon after it came to run.
    returns: u32,
    running_since: Option<Instant>,
    clock: Phases,
}

impl Driver {
    pub fn new(shared: Arc<Shared>, machine: Arc<Machine>, runtime: Arc<dyn Runtime>) -> Driver {
        let dir = MachineDir::new(shared.machine_dir(&machine.cell.id));
        Driver {
            shared,
            machine,
            runtime,
            dir,
            body: Body::None(None),
            files: false,
            files_busy: Arc::default(),
            launching: None,
            booted: false,
            may_be_paused: false,
            fresh_disk: false,
            warm: None,
            shape: None,
            boots: false,
            failures: 0,
            comes_back: false,
            returns: 0,
            running_since: None,
            clock: Phases::default(),
        }
    }

    /// Drives the machine until it is gone or the server ends. `fresh`: it was just created, nothing can be there.
    pub async fn run(mut self, fresh: bool) {
        let stop = self.shared.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.live(fresh) => {}
        }
    }

    async fn live(&mut self, fresh: bool) {
        if !fresh {
            self.look().await;
        }
        let mut records = self.machine.cell.watch();
        loop {
            let Some(current) = records.borrow_and_update().clone() else {
                return;
            };
            let step = plan::next(&current.record, &self.facts());
            if step == Step::Rest {
                self.clock.end();
                self.rest(&current.record, &mut records).await;
                continue;
            }
            let superseded = superseded(&step, records.clone());
            let outcome = tokio::select! {
                outcome = self.perform(&step, &current) => Some(outcome),
                () = superseded => None,
            };
            match outcome {
                Some(Ok(())) => self.failures = 0,
                Some(Err(error)) => self.step_failed(&step, &current, error, &mut records).await,
                None => {
                    info!(machine = %self.machine.cell.id, ?step, "overtaken by a newer wish");
                    self.look().await;
                }
            }
        }
    }

    fn facts(&self) -> Facts {
        let life = match &self.body {
            Body::None(exit) => Life::None(exit.clone()),
            Body::Alive(_) => Life::Alive,
            Body::Unproved(_) => Life::Unproved,
        };
        Facts {
            life,
            files: self.files,
            greeted: self.machine.session.borrow().is_some(),
        }
    }

    /// Finds out what is the case on the host, once what a dropped step began there has ended.
    async fn look(&mut self) {
        if let Some(launching) = self.launching.take() {
            // Adopting tells how it went.
            drop(timeout(deadline::LAUNCH, launching).await);
        }
        drop(self.files_busy.lock().await);
        self.files = prepare::is_complete(&self.dir);
        self.machine.session.send_replace(None);
        self.body = match timeout(deadline::ADOPT, self.runtime.adopt(&self.dir)).await {
            Ok(Ok(Adopted::Absent)) => Body::None(None),
            Ok(Ok(Adopted::Exited(report))) => Body::None(Some(report.exit)),
            Ok(Ok(Adopted::Running(process))) => {
                self.may_be_paused = true;
                Body::Alive(process)
            }
            Ok(Ok(Adopted::Unknown { reason })) => Body::Unproved(reason),
            Ok(Err(error)) => Body::Unproved(Error::from(error).chain()),
            Err(_) => Body::Unproved("it could not be looked at in time".into()),
        };
    }

    /// Waits until something happens that the plan must know.
    async fn rest(
        &mut self,
        record: &MachineRecord,
        records: &mut watch::Receiver<Option<Current>>,
    ) {
        let session = self.machine.session.borrow().clone();
        let lost = async {
            match &session {
                Some(session) => session.closed().await,
                None => std::future::pending().await,
            }
        };
        let exited = async {
            match &self.body {
                Body::Alive(process) => process.wait().await,
                _ => std::future::pending().await,
            }
        };
        let look_again = async {
            match &self.body {
                Body::Unproved(_) => sleep(LOOK_AGAIN).await,
                _ => std::future::pending().await,
            }
        };
        let due = lifetime::due(record, &self.machine.uses, self.shared.now_ms());
        tokio::select! {
            _ = records.changed() => {}
            due = due => self.do_by_itself(due).await,
            report = exited => {
                if !report.stderr_tail.is_empty() {
                    info!(machine = %self.machine.cell.id, said = report.stderr_tail, "last words of the VMM");
                }
                self.ended(report.exit);
            }
            () = lost => {
                info!(machine = %self.machine.cell.id, "lost the connection to the agent");
                self.machine.session.send_replace(None);
            }
            () = look_again => self.look().await,
        }
    }

    /// What a machine does without being asked.
    async fn do_by_itself(&mut self, due: Due) {
        let machine = &self.machine;
        if let Due::Idle(idle) = due {
            // Whoever begins to use it now waits for the next session, and for that wakes it.
            let hide = || drop(machine.session.send_replace(None));
            if !machine.uses.unless_used(idle, hide) {
                return;
            }
        }
        let now_ms = self.shared.now_ms();
        let changed = machine.cell.update(|record| {
            match due {
                Due::Idle(_) => lifetime::pause_idle(record),
                Due::Ttl => lifetime::expire(record, now_ms),
            }
            Ok(())
        });
        match changed.await {
            Ok(_) => info!(machine = %machine.cell.id, ?due, "rests or ends by itself"),
            Err(error) => {
                warn!(machine = %machine.cell.id, error = %error.chain(), "it cannot be noted; later again");
                sleep(LOOK_AGAIN).await;
            }
        }
    }

    fn ended(&mut self, exit: Exit) {
        info!(machine = %self.machine.cell.id, ?exit, "ended");
        self.machine.session.send_replace(None);
        self.body = Body::None(Some(exit));
    }

    async fn perform(&mut self, step: &Step, current: &Current) -> Result<(), Error> {
        match step {
            Step::Rest => Ok(()),
            Step::Prepare => self.prepare(&current.record).await,
            Step::KeepInitial => self.keep_initial(&current.record).await,
            Step::Boot | Step::Greet => self.start(step, &current.record).await,
            Step::Pause => self.pause().await,
            Step::Snapshot => self.snapshot(&current.record).await,
            Step::Restore => self.restore(&current.record).await,
            Step::ShutDown => self.shut_down(&current.record).await,
            Step::Kill => self.kill().await,
            Step::NoteStopped(exit) => {
                self.note_stopped(exit.clone(), current.record.generation)
                    .await
            }
            Step::NoteRestarting => self.note_restarting().await,
            Step::NoteUnknown => self.note_unknown().await,
            Step::Remove => self.remove(&current.record).await,
        }
    }

    async fn prepare(&mut self, record: &MachineRecord) -> Result<(), Error> {
        self.clock.begin();
        let started = Instant::now();
        if let Some(origin) = &record.origin {
            self.prepare_from(record, origin).await?;
        } else if !self.prepare_warm(record).await {
            let disk = match self.runtime.root() {
                Root::Disk => Some(self.shared.image_disk(&record.image)),
                Root::Layer | Root::Elsewhere => None,
            };
            let (dir, made_for) = (self.dir.clone(), record.clone());
            let shared = self.shared.clone();
            self.file_work("prepare", move || {
                shared.with_room(|| prepare::prepare(&dir, disk.as_deref(), &made_for))
            })
            .await?;
        }
        let (spec, layer) = (self.spec(record), self.shared.image_layer(&record.image));
        // What was begun goes on when this future is dropped, and is waited for before it is looked at or removed.
        let held = self.files_busy.clone().lock_owned().await;
        let (runtime, its_dir) = (self.runtime.clone(), self.dir.clone());
        let made = tokio::spawn(async move {
            let _held = held;
            let made = runtime.prepare(&its_dir, &spec, &layer);
            timeout(deadline::OUTSIDE_MADE, made).await
        });
        let what = "preparing the machine";
        joined(what, made)
            .await?
            .map_err(|_| Error::timeout(what, deadline::OUTSIDE_MADE))??;
        let (dir, made_for) = (self.dir.clone(), record.clone());
        self.file_work("prepare", move || prepare::complete(&dir, &made_for))
            .await?;
        self.clock.phase("prepare", started);
        self.files = true;
        Ok(())
    }

    /// Works on the machine's files. What was begun goes on when the future is dropped; the next such work and the end
    /// of the engine wait for it.
    async fn file_work<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let held = (
            self.files_busy.clone().lock_owned().await,
            self.shared.tasks.token(),
        );
        blocking(what, move || {
            let _held = held;
            work()
        })
        .await
    }

    async fn boot(&mut self, record: &MachineRecord) -> Result<(), Error> {
        self.clock.begin();
        let rebooted = matches!(self.body, Body::None(Some(Exit::Reboot)));
        if std::mem::take(&mut self.comes_back) || rebooted {
            self.pause_before_return().await;
        }
        let started = Instant::now();
        let mut spec = self.spec(record);
        if self.runtime.boots_kernel() {
            let (boot_set, args) = self.shared.kernel.get(record.kernel.as_deref()).await?;
            spec.kernel_args = args;
            let (dir, elf) = (self.dir.clone(), self.runtime.boots_elf_only());
            self.file_work("link the kernel", move || {
                prepare::link_boot_set(&dir, &boot_set, elf)
            })
            .await?;
            self.clock.phase("kernel", started);
        }
        let started = Instant::now();
        let network = self.shared.network();
        let plug = network.up(&self.machine, record.slot, self.runtime.as_ref());
        spec.nic = plug.await?.nic;
        self.clock.phase("network", started);
        let started = Instant::now();
        let beginning = self.beginning(record).await?;
        let from_memory = matches!(beginning, Beginning::Memory(_));
        // From here until the result is in hand something may be alive that we do not hold.
        self.body = Body::Unproved("it is being started".into());
        let (runtime, dir) = (self.runtime.clone(), self.dir.clone());
        let start = async move {
            match beginning {
                Beginning::Cold => runtime.start(&dir, &spec).await,
                Beginning::Memory(from) => runtime.restore(&dir, &spec, Path::new(from)).await,
            }
        };
        let launching = self.launching.insert(self.shared.tasks.spawn(start));
        let error = match timeout(deadline::LAUNCH, &mut *launching).await {
            Ok(launched) => {
                self.launching = None;
                match launched {
                    Ok(Ok(process)) => {
                        info!(machine = %record.id, pid = process.pid(), "started");
                        self.body = Body::Alive(process);
                        self.booted = true;
                        self.may_be_paused = from_memory;
                        self.clock.phase("vmm", started);
                        return Ok(());
                    }
                    Ok(Err(error)) => error.into(),
                    // As in `joined`.
                    Err(error) if error.is_cancelled() => std::future::pending().await,
                    Err(_) => Error::Panicked {
                        what: "starting the VMM",
                    },
                }
            }
            Err(_) => Error::timeout("starting the VMM", deadline::LAUNCH),
        };
        self.look().await;
        Err(error)
    }

    async fn pause_before_return(&mut self) {
        let short = self
            .running_since
            .take()
            .is_none_or(|since| since.elapsed() < SHORT_RUN);
        self.returns = if short { self.returns + 1 } else { 0 };
        if self.returns > 1 {
            sleep(retry_delay(self.returns)).await;
        }
    }

    fn spec(&self, record: &MachineRecord) -> MachineSpec {
        let label = self.shared.label(record.slot);
        let user = rustix::process::geteuid().is_root().then(|| {
            let id = network::uid(record.slot);
            User { uid: id, gid: id }
        });
        MachineSpec {
            id: record.id.to_string(),
            label,
            vcpu: record.vcpu,
            memory_mib: record.memory_mib,
            kernel_args: Vec::new(),
            nic: Nic::Restricted,
            user,
        }
    }

    async fn pause(&mut self) -> Result<(), Error> {
        // Whoever calls from here on waits for the next session, which there is once it executes again.
        self.machine.session.send_replace(None);
        self.may_be_paused = true;
        timeout(deadline::PAUSE, self.runtime.pause(&self.dir))
            .await
            .map_err(|_| Error::timeout("pausing the machine", deadline::PAUSE))??;
        let noted = self.machine.cell.update(|record| {
            record.observed = Observed::Paused;
            if record.wanted == Wanted::Paused {
                record.served = record.generation;
            }
            Ok(())
        });
        noted.await?;
        info!(machine = %self.machine.cell.id, "paused");
        Ok(())
    }

    /// Lets it execute, where it may not be.
    async fn go_on(&self) -> Result<(), Error> {
        if !self.may_be_paused || !self.runtime.capabilities().pause {
            return Ok(());
        }
        timeout(deadline::PAUSE, self.runtime.resume(&self.dir))
            .await
            .map_err(|_| Error::timeout("resuming the machine", deadline::PAUSE))??;
        Ok(())
    }

    async fn shut_down(&mut self, record: &MachineRecord) -> Result<(), Error> {
        if !matches!(self.body, Body::Alive(_)) {
            return Ok(());
        }
        // Only what executes can be asked; one that cannot be let go on is killed below.
        if let Err(error) = self.go_on().await {
            warn!(machine = %record.id, error = %error.chain(), "it cannot be let go on to be asked to stop");
        }
        let session = self.machine.session.borrow().clone();
        let asked = match session {
            Some(session) => Some(session),
            // The server was restarted a moment ago, or the connection was lost: the guest still wants to be asked.
            None if plan::came_to_run(record) => self.connect(deadline::STOP_GRACE).await.ok(),
            None => None,
        };
        let Body::Alive(process) = &self.body else {
            return Ok(());
        };
        if let Some(session) = asked {
            // A guest that cannot be asked is killed below.
            if let Err(error) = session
                .shutdown(ShutdownMode::PowerOff, deadline::STOP_GRACE)
                .await
            {
                warn!(machine = %record.id, %error, "the guest cannot be asked to stop");
            } else if let Ok(report) = timeout(deadline::STOP, process.wait()).await {
                self.ended(report.exit);
                return Ok(());
            }
        }
        self.kill().await
    }

    async fn kill(&mut self) -> Result<(), Error> {
        let Body::Alive(process) = &self.body else {
            return Ok(());
        };
        let report = timeout(deadline::KILL, async {
            self.runtime.kill(&self.dir).await?;
            Ok::<_, Error>(process.wait().await)
        })
        .await
        .map_err(|_| Error::timeout("ending the VMM", deadline::KILL))??;
        self.ended(report.exit);
        Ok(())
    }

    async fn remove(&mut self, record: &MachineRecord) -> Result<(), Error> {
        self.give_up(record, &snapshot::why_not(record)).await?;
        self.shared.drop_snapshots_of(&record.id).await?;
        // Before its directory: that says what it had.
        timeout(deadline::OUTSIDE, self.runtime.remove(&self.spec(record)))
            .await
            .map_err(|_| Error::timeout("removing the machine", deadline::OUTSIDE))??;
        let network = self.shared.network();
        network.down(record.slot, &self.shared.instance.tag).await?;
        let (dir, label) = (self.dir.clone(), self.shared.label(record.slot));
        self.file_work("erase the machine's files", move || {
            // Its shim does this, unless it crashed.
            hutch_runtime::cgroup::destroy(&label).map_err(|source| {
                prepare::io_error("end what runs in the cgroup of", dir.path(), source)
            })?;
            prepare::erase(&dir)
        })
        .await?;
        let free = || self.shared.forget(&self.machine);
        self.machine.cell.forget(self.shared.now_ms(), free).await?;
        info!(machine = %self.machine.cell.id, "gone");
        self.shared.remove_outside_of_gone(&record.image).await;
        self.release_origin(record).await;
        Ok(())
    }

    /// Lets go of the snapshot that the machine began as a copy of.
    async fn release_origin(&self, record: &MachineRecord) {
        if let Some(origin) = record.origin.clone() {
            let shared = self.shared.clone();
            // In a task of its own: a step that is dropped between its row and its files would leave these.
            let released = async move { shared.release_snapshot(&origin).await };
            drop(self.shared.tasks.spawn(released).await);
        }
    }

    /// A start that fails is given up until somebody asks again; everything else is tried again.
    async fn step_failed(
        &mut self,
        step: &Step,
        current: &Current,
        error: Error,
        records: &mut watch::Receiver<Option<Current>>,
    ) {
        let id = &self.machine.cell.id;
        let starting = matches!(step, Step::Prepare | Step::KeepInitial | Step::Boot)
            || (*step == Step::Greet && !plan::came_to_run(&current.record));
        if starting {
            warn!(machine = %id, ?step, error = %error.chain(), "the start failed");
            let generation = current.record.generation;
            let failed = Observed::Failed {
                code: error.code().to_owned(),
                reason: error.chain(),
            };
            let noted = self
                .machine
                .cell
                .update(|record| {
                    // A wish that came meanwhile has not failed.
                    if record.generation == generation {
                        record.observed = failed;
                        record.failed_starts = record.failed_starts.saturating_add(1);
                        record.served = generation;
                        record.restart = false;
                    }
                    Ok(())
                })
                .await;
            match noted {
                Ok(_) => return self.release_origin(&current.record).await,
                Err(error) => {
                    warn!(machine = %id, error = %error.chain(), "the failure cannot be recorded")
                }
            }
        } else {
            warn!(machine = %id, ?step, error = %error.chain(), "trying again");
        }
        self.failures += 1;
        let pause = retry_delay(self.failures);
        let exited = async {
            match &self.body {
                Body::Alive(process) => process.wait().await,
                _ => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            () = sleep(pause) => None,
            _ = records.changed() => None,
            report = exited => Some(report),
        };
        if let Some(report) = ended {
            self.ended(report.exit);
        }
        if matches!(self.body, Body::Unproved(_)) || *step == Step::Kill || *step == Step::ShutDown
        {
            self.look().await;
        }
    }
}

/// Resolves when a newer wish makes `step` pointless.
async fn superseded(step: &Step, mut records: watch::Receiver<Option<Current>>) {
    let newer = |current: &Option<Current>| {
        current
            .as_ref()
            .is_some_and(|current| plan::superseded(step, &current.record))
    };
    if records.wait_for(newer).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn in_words(exit: &Exit) -> String {
    match exit {
        Exit::PowerOff => "it powered off".into(),
        Exit::Reboot => "it rebooted".into(),
        Exit::Panic => "its kernel panicked".into(),
        Exit::Killed => "its VMM was killed".into(),
        Exit::Code { code } => format!("its VMM ended with code {code}"),
        Exit::Signal { signal } => format!("its VMM was ended by signal {signal}"),
        Exit::Lost => "nobody saw how".into(),
    }
}

/// Grows from the first to the second of [`deadline::RETRY`].
pub(crate) fn retry_delay(attempt: u32) -> Duration {
    let (first, last) = deadline::RETRY;
    first
        .saturating_mul(1 << attempt.saturating_sub(1).min(16))
        .min(last)
}

/// Runs file work where it does not hold up the others.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    joined(what, tokio::task::spawn_blocking(work)).await?
}

/// The end of a task of ours. One that was cancelled never ends: nobody cancels one but the runtime when that ends, and
/// with it the caller at this line. What was being done has not failed then, and the next server goes on with it.
pub(crate) async fn joined<T>(what: &'static str, task: JoinHandle<T>) -> Result<T, Error> {
    match task.await {
        Ok(done) => Ok(done),
        Err(error) if error.is_cancelled() => std::future::pending().await,
        Err(_) => Err(Error::Panicked { what }),
    }
}
