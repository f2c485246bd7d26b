//! The steps that take a snapshot of a machine and put one back.
//!
//! ```text
//! taken of one that runs:  freeze ─► pause ─► (memory) ─► clone the disk ─► go on ─► thaw; the machine is itself again
//!                          └─ then, beside it: digest, publish by rename, one commit
//! put back:                look at every byte ─► clone beside ─► end the VMM ─► rename ─► one commit; the plan boots it
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use hutch_contract::error::Kind;
use hutch_contract::id::SnapshotId;
use hutch_contract::machine::Status;
use hutch_contract::record::{MachineRecord, Observed, SnapshotRecord, Wanted, Work};
use hutch_contract::snapshot::SnapshotState;
use hutch_guest::session::{Hello, Session};
use hutch_runtime::MachineDir;
use hutch_store::Write;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{Body, Driver, blocking, retry_delay};
use crate::engine::{Machine, Shared};
use crate::images::CancelOnDrop;
use crate::operations::Running;
use crate::phases::Phases;
use crate::prepare::{erase_dir, io_error};
use crate::snapshots::{self, files};
use crate::{Error, deadline, plan, rows};

/// What a machine starts from.
pub(super) enum Beginning {
    /// Its disk.
    Cold,
    /// The memory of a snapshot, in this directory of the machine's.
    Memory(&'static str),
}

/// In a machine's directory: links to the files of the snapshot that its memory came from.
pub(super) const FROM: &str = "from";
/// The same of the one that it is being put back to.
const FROM_NEXT: &str = "from.new";

impl Driver {
    /// Takes the snapshot that is wanted. What becomes of that is told by its operation; the machine goes on either way.
    pub(super) async fn snapshot(&mut self, record: &MachineRecord) -> Result<(), Error> {
        let Some(Work::Snapshot { snapshot, .. }) = &record.work else {
            return Ok(());
        };
        let Some(begun) = self.shared.fleet().snapshots.get(snapshot).cloned() else {
            let nothing = Error::not_found("snapshot", snapshot.as_str());
            return self.give_up(record, &nothing).await;
        };
        let mut clock = Phases::default();
        clock.begin();
        let taken = self.take(record, &begun, &mut clock).await;
        if let Body::Alive(_) = self.body {
            let thawing = Instant::now();
            // What goes wrong here the plan sees, and tries again.
            if let Err(error) = self.greet(record).await {
                warn!(machine = %record.id, error = %error.chain(), "it does not go on at once after a snapshot");
            }
            clock.phase("thaw", thawing);
        }
        let (taken, frozen_at) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                warn!(machine = %record.id, error = %error.chain(), "no snapshot");
                return self.give_up(record, &error).await;
            }
        };
        let taken = SnapshotRecord {
            pause_us: frozen_at.map(|at| at.elapsed().as_micros() as u64),
            timings: clock.list(),
            ..taken
        };
        // In a task of its own: a step that is dropped here must not lose what it has taken.
        let (shared, machine) = (self.shared.clone(), self.machine.clone());
        let (tell, told) = oneshot::channel();
        self.shared.tasks.spawn(async move {
            let done = machine.cell.update(|record| {
                // One that is about to go is nobody's parent.
                if !taken.passing {
                    record.head = Some(taken.id.clone());
                }
                record.work = None;
                Ok(())
            });
            let done = done.await;
            let go_on = done.is_ok();
            drop(tell.send(done));
            if go_on {
                finish(shared, machine, taken, clock).await;
            }
        });
        match told.await {
            Ok(done) => done.map(drop),
            // The end of the server.
            Err(_) => std::future::pending().await,
        }
    }

    /// Everything that the machine stands still for. Answers since when what runs in it did.
    pub(super) async fn take(
        &mut self,
        record: &MachineRecord,
        begun: &SnapshotRecord,
        clock: &mut Phases,
    ) -> Result<(SnapshotRecord, Option<Instant>), Error> {
        let mut taken = begun.clone();
        let stage = self.shared.snapshot_stage(&begun.id);
        let (at, dir, with_memory) = (stage.clone(), self.dir.clone(), begun.memory);
        self.file_work("begin a snapshot", move || {
            erase_dir(&at)?;
            DirBuilder::new()
                .mode(0o700)
                .create(&at)
                .map_err(|source| io_error("create", &at, source))?;
            match with_memory {
                true => files::keep_modules(&dir, &at),
                false => Ok(()),
            }
        })
        .await?;
        let mut frozen_at = None;
        if let Body::Alive(_) = self.body {
            // Whoever calls from here on waits for the next session.
            let session = self.machine.session.send_replace(None);
            let session = match session.filter(|session| !session.is_closed()) {
                Some(session) => session,
                None => self.connect(deadline::RECONNECT).await?,
            };
            if begun.memory {
                taken.fit = Some(self.fit(session.hello()).await);
            }
            let began = Instant::now();
            frozen_at = Some(began);
            taken.frozen = freeze(&session, begun.memory).await?;
            clock.phase("freeze", began);
            let frozen = Instant::now();
            self.may_be_paused = true;
            timeout(deadline::PAUSE, self.runtime.pause(&self.dir))
                .await
                .map_err(|_| Error::timeout("pausing the machine", deadline::PAUSE))??;
            if taken.frozen && frozen.elapsed() > deadline::FROZEN {
                // It may have thawed by itself before it was paused.
                return Err(Error::timeout(
                    "pausing the frozen machine",
                    deadline::FROZEN,
                ));
            }
            clock.phase("pause", frozen);
            if begun.memory {
                let started = Instant::now();
                let saving = self.runtime.snapshot(&self.dir, &stage);
                timeout(deadline::MEMORY, saving)
                    .await
                    .map_err(|_| Error::timeout("saving the memory", deadline::MEMORY))??;
                clock.phase("memory", started);
            }
        } else if begun.memory {
            let what = "be snapshotted with its memory";
            return Err(Error::wrong_status(&record.name, Status::Stopped, what));
        }
        let started = Instant::now();
        let disk = self.dir.file(MachineDir::DISK);
        self.file_work("clone the disk", move || {
            hutch_disk::clone_file(&disk, &stage.join(MachineDir::DISK))?;
            Ok(())
        })
        .await?;
        clock.phase("disk", started);
        if let Body::Alive(_) = self.body {
            let started = Instant::now();
            self.go_on().await?;
            clock.phase("resume", started);
        }
        Ok((taken, frozen_at))
    }

    async fn fit(&self, hello: &Hello) -> hutch_contract::record::Fit {
        hutch_contract::record::Fit {
            agent: hello.agent_version.clone(),
            kernel: hello.kernel_release.clone(),
            ..snapshots::fit_of(self.runtime.as_ref()).await
        }
    }

    /// Puts the machine back to the snapshot that is wanted. What becomes of that is told by its operation; a machine
    /// whose snapshot cannot be used goes on as it is.
    pub(super) async fn restore(&mut self, record: &MachineRecord) -> Result<(), Error> {
        let Some(Work::Restore {
            snapshot,
            disk_only,
            operation,
        }) = &record.work
        else {
            return Ok(());
        };
        let (found, from) = match self.look_at_snapshot(snapshot, *disk_only).await {
            Ok(found) => found,
            Err(error) => return self.give_up(record, &error).await,
        };
        let with_memory = found.memory && !disk_only;
        let dir = self.dir.clone();
        let staged = self.file_work("clone the snapshot's disk", move || {
            if with_memory {
                files::link(&from, &dir.file(FROM_NEXT))?;
            }
            files::stage_disk(&from.join(MachineDir::DISK), &dir)
        });
        if let Err(error) = staged.await {
            files::unstage(&self.dir);
            drop(erase_dir(&self.dir.file(FROM_NEXT)));
            return self.give_up(record, &error).await;
        }
        self.machine.session.send_replace(None);
        self.kill().await?;
        let dir = self.dir.clone();
        self.file_work("replace the disk", move || {
            // What it began with was its VMM's until now.
            erase_dir(&dir.file(FROM))?;
            if with_memory {
                let (next, from) = (dir.file(FROM_NEXT), dir.file(FROM));
                std::fs::rename(&next, &from)
                    .map_err(|source| io_error("replace", &from, source))?;
            }
            files::take_over(&dir)
        })
        .await?;
        self.fresh_disk = true;
        let running = self.shared.running(operation);
        let ending = match &running {
            Some(running) => Some(self.shared.operation_end(running, Ok(()))?),
            None => None,
        };
        let writes = ending
            .iter()
            .flat_map(|ending| ending.writes.clone())
            .collect();
        let done = self
            .machine
            .cell
            .update_with((Vec::new(), writes), |record| {
                record.work = None;
                record.observed = Observed::Stopped;
                record.head = Some(found.id.clone());
                record.disk_gib = found.disk_gib;
                record.resume_from = with_memory.then(|| found.id.clone());
                if record.wanted == Wanted::Stopped {
                    record.served = record.generation;
                }
                Ok(())
            });
        done.await?;
        self.body = Body::None(None);
        self.clock.end();
        if let (Some(running), Some(ending)) = (&running, ending) {
            self.shared.show_end(running, ending);
        }
        info!(machine = %record.id, snapshot = %found.id, "restored");
        Ok(())
    }

    async fn look_at_snapshot(
        &self,
        id: &SnapshotId,
        disk_only: bool,
    ) -> Result<(SnapshotRecord, std::path::PathBuf), Error> {
        let found = self.shared.fleet().snapshots.get(id).cloned();
        let found = found.ok_or_else(|| Error::not_found("snapshot", id.as_str()))?;
        if found.memory && !disk_only {
            snapshots::must_fit(self.runtime.as_ref(), &found).await?;
        }
        self.shared.verify_snapshot(&found).await?;
        let dir = self.shared.snapshot_dir(id);
        Ok((found, dir))
    }

    /// Ends the work that is wanted of the machine with an error.
    pub(super) async fn give_up(
        &mut self,
        record: &MachineRecord,
        error: &Error,
    ) -> Result<(), Error> {
        let Some(work) = &record.work else {
            return Ok(());
        };
        let running = self.shared.running(work.operation());
        if let Work::Snapshot { snapshot, .. } = work {
            let stage = self.shared.snapshot_stage(snapshot);
            self.file_work("erase a broken snapshot", move || erase_dir(&stage))
                .await?;
            return self
                .shared
                .snapshot_failed(&self.machine, snapshot, running.as_ref(), error)
                .await;
        }
        let ending = match &running {
            Some(running) => Some(self.shared.operation_end(running, Err(error))?),
            None => None,
        };
        let writes = ending
            .iter()
            .flat_map(|ending| ending.writes.clone())
            .collect();
        let done = self
            .machine
            .cell
            .update_with((Vec::new(), writes), |record| {
                record.work = None;
                Ok(())
            });
        done.await?;
        if let (Some(running), Some(ending)) = (&running, ending) {
            self.shared.show_end(running, ending);
        }
        Ok(())
    }

    /// What the machine starts from now. The disk is made fresh where it goes on from memory: that knows what was on it.
    pub(super) async fn beginning(&mut self, record: &MachineRecord) -> Result<Beginning, Error> {
        let fresh = std::mem::take(&mut self.fresh_disk);
        let dir = self.dir.clone();
        // A template is what it was prepared from a moment ago, or nothing.
        self.warm = self.warm.take().filter(|_| fresh);
        if record.resume_from.is_none() && self.warm.is_none() {
            self.file_work("drop old memory", move || erase_dir(&dir.file(FROM)))
                .await?;
            return Ok(Beginning::Cold);
        }
        self.file_work("clone the snapshot's disk", move || {
            let from = dir.file(FROM);
            files::use_modules(&from, &dir)?;
            if !fresh {
                files::stage_disk(&from.join(MachineDir::DISK), &dir)?;
                files::take_over(&dir)?;
            }
            Ok(())
        })
        .await?;
        Ok(Beginning::Memory(FROM))
    }

    /// Prepares a machine that begins as a copy of `origin`.
    pub(super) async fn prepare_from(
        &mut self,
        record: &MachineRecord,
        origin: &SnapshotId,
    ) -> Result<(), Error> {
        let snapshot = self.shared.snapshot_dir(origin);
        if !self.shared.fleet().snapshots.contains_key(origin) {
            return Err(Error::not_found("snapshot", origin.as_str()));
        }
        let (dir, made_for) = (self.dir.clone(), record.clone());
        let with_memory = record.resume_from.is_some();
        self.file_work("prepare", move || {
            crate::prepare::prepare(&dir, Some(&snapshot.join(MachineDir::DISK)), &made_for)?;
            match with_memory {
                true => files::link(&snapshot, &dir.file(FROM)),
                false => Ok(()),
            }
        })
        .await?;
        self.fresh_disk = true;
        Ok(())
    }
}

/// Lets the guest stand still by itself. Answers whether it does: one that cannot is no reason not to keep its disk.
async fn freeze(session: &Session, must: bool) -> Result<bool, Error> {
    match session.quiesce().await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == hutch_guest::Kind::Conflict && !must => {
            info!(%error, "the guest does not freeze: its disk is taken as after a power cut");
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// What needs no machine any more: digests, the manifest, the rename, the commit.
async fn finish(
    shared: Arc<Shared>,
    machine: Arc<Machine>,
    taken: SnapshotRecord,
    mut clock: Phases,
) {
    let (stage, target) = (
        shared.snapshot_stage(&taken.id),
        shared.snapshot_dir(&taken.id),
    );
    let cancel = Arc::new(AtomicBool::new(false));
    let _cancel = CancelOnDrop(cancel.clone());
    let publish = {
        let (stage, target, record) = (stage.clone(), target.clone(), taken.clone());
        let record = SnapshotRecord {
            state: SnapshotState::Ready,
            operation: None,
            ..record
        };
        // The end of the engine waits for it: nothing may write here once another server has the directory.
        let counted = shared.tasks.token();
        blocking("publish the snapshot", move || {
            let _counted = counted;
            files::publish(&stage, &target, record, &cancel)
        })
    };
    let started = Instant::now();
    let published = tokio::select! {
        published = publish => published,
        // The next server drops it.
        () = shared.stop.cancelled() => return,
    };
    clock.phase("publish", started);
    let running = taken.operation.as_ref().and_then(|id| shared.running(id));
    let mut attempt = 0;
    loop {
        let recorded = match &published {
            Ok(record) => ready(&shared, record, &clock, running.as_ref()).await,
            Err(error) => Err(Error::Told {
                kind: error.kind(),
                code: error.code(),
                message: error.chain(),
                hint: error.hint(),
            }),
        };
        let Err(error) = recorded else { return };
        // A store that is full has room again some day; until then it is being taken for all to see.
        let again = published.is_ok() && error.kind() == Kind::Exhausted;
        let failed = match again {
            true => Err(error),
            false => {
                warn!(snapshot = %taken.id, error = %error.chain(), "no snapshot");
                erase_both(&stage, &target).await;
                shared
                    .snapshot_failed(&machine, &taken.id, running.as_ref(), &error)
                    .await
            }
        };
        let Err(error) = failed else { return };
        warn!(snapshot = %taken.id, error = %error.chain(), "what became of it cannot be recorded yet");
        attempt += 1;
        tokio::select! {
            () = sleep(retry_delay(attempt)) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

pub(super) async fn erase_both(stage: &std::path::Path, target: &std::path::Path) {
    let both = [stage.to_owned(), target.to_owned()];
    let erased = blocking("erase a broken snapshot", move || {
        both.iter().try_for_each(|dir| erase_dir(dir))
    });
    if let Err(error) = erased.await {
        warn!(error = %error.chain(), "what a failed snapshot left cannot be erased; the next start does it");
    }
}

/// Records that a snapshot is whole, and the end of its operation. One that was dropped meanwhile stays so.
async fn ready(
    shared: &Shared,
    record: &SnapshotRecord,
    clock: &Phases,
    running: Option<&Arc<Running>>,
) -> Result<(), Error> {
    let key = rows::snapshot(&record.id);
    let gone = || Error::not_found("snapshot", record.id.as_str());
    let row = shared.store.get_json::<SnapshotRecord>(&key).await?;
    let row = row.ok_or_else(gone)?;
    let record = SnapshotRecord {
        passing: row.value.passing,
        timings: clock.list(),
        ..record.clone()
    };
    let mut writes = vec![Write::json(key, &record)?];
    let ending = match running {
        Some(running) => Some(shared.operation_end(running, Ok(()))?),
        None => None,
    };
    writes.extend(ending.iter().flat_map(|ending| ending.writes.clone()));
    match shared.store.commit(vec![row.unchanged()], writes).await {
        Err(hutch_store::Error::Conflict { .. }) => return Err(gone()),
        committed => committed?,
    };
    info!(snapshot = %record.id, name = %record.name, machine = %record.machine, "taken");
    // One that is just being dropped is not brought back.
    if let Some(seen) = shared.fleet().snapshots.get_mut(&record.id) {
        *seen = record;
    }
    if let (Some(running), Some(ending)) = (running, ending) {
        shared.show_end(running, ending);
    }
    Ok(())
}

/// Why nothing comes of the work on a machine that is on its way out.
pub(super) fn why_not(record: &MachineRecord) -> Error {
    let verb = match &record.work {
        Some(Work::Restore { .. }) => "be restored",
        _ => "be snapshotted",
    };
    Error::wrong_status(&record.name, plan::status(record), verb)
}
