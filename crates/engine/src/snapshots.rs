//! Snapshots: machines as they were at a moment. Asked for, found and deleted here; taken and restored by the machine's
//! own task (`drive/snapshot.rs`).
//!
//! A snapshot's row is there from the moment it is asked for. It becomes `ready` in one commit, once its directory has
//! been published whole. One that is interrupted before is dropped by the next server, with what it left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hutch_contract::id::{ImageId, MachineId, SnapshotId};
use hutch_contract::image::{Accepted, ImageSource};
use hutch_contract::machine::{Machine, Status};
use hutch_contract::name::Name;
use hutch_contract::page::Page;
use hutch_contract::record::{
    FORMAT, Fit, ImageInput, MachineRecord, Observed, SnapshotRecord, Wanted, Work,
};
use hutch_contract::snapshot::{CreateSnapshot, RestoreMachine, Snapshot, SnapshotState};
use hutch_runtime::{Root, Runtime};
use hutch_store::{Check, Write};
use tracing::warn;

use crate::access::{self, Access};
use crate::engine::Shared;
use crate::images::Spooled;
use crate::rows;
use crate::{Engine, Error, Principal, Target, choose, engine, machines, plan};

pub(crate) mod files;
mod keep;

/// Keeps a snapshot from being deleted. One that was made to pass goes with the last that needed it.
pub(crate) struct InUse {
    shared: Arc<Shared>,
    id: SnapshotId,
}

impl Drop for InUse {
    fn drop(&mut self) {
        {
            let mut fleet = self.shared.fleet();
            if let Some(count) = fleet.snapshots_in_use.get_mut(&self.id) {
                *count -= 1;
                if *count == 0 {
                    fleet.snapshots_in_use.remove(&self.id);
                }
            }
        }
        let (shared, id) = (self.shared.clone(), self.id.clone());
        let tasks = shared.tasks.clone();
        tasks.spawn(async move { shared.release_snapshot(&id).await });
    }
}

/// Which snapshots to list.
#[derive(Debug, Clone, Default)]
pub struct ListSnapshots {
    /// Only those of this machine.
    pub machine: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Rows at most.
    pub limit: u32,
}

impl Engine {
    /// Snapshots in pages, oldest first.
    ///
    /// # Errors
    /// [`Error::NotFound`] for the machine; [`Error::Invalid`] for a cursor that no page gave.
    pub fn snapshots(
        &self,
        who: &Principal,
        list: &ListSnapshots,
    ) -> Result<Page<Snapshot>, Error> {
        access::check(who, Access::Read)?;
        let limit = machines::page_limit(list.limit)?;
        let machine = match &list.machine {
            Some(reference) => Some(self.find_machine(who, reference)?.cell.id.clone()),
            None => None,
        };
        let after: Option<SnapshotId> = match &list.cursor {
            None => None,
            Some(cursor) => Some(
                cursor
                    .parse()
                    .map_err(|_| Error::invalid("cursor", "is not of a list"))?,
            ),
        };
        let fleet = self.shared.fleet();
        let mut found = fleet
            .snapshots
            .values()
            .filter(|record| after.as_ref().is_none_or(|after| record.id > *after))
            .filter(|record| access::sees(who, &record.owner) && !record.passing)
            .filter(|record| {
                machine
                    .as_ref()
                    .is_none_or(|machine| record.machine == *machine)
            })
            .cloned()
            .map(Snapshot::from);
        let items: Vec<_> = found.by_ref().take(limit).collect();
        let more = found.next().is_some();
        let next = more
            .then(|| items.last().map(|snapshot| snapshot.id.to_string()))
            .flatten();
        Ok(Page { items, next })
    }

    /// One snapshot, by id or `MACHINE:NAME`.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn snapshot(&self, who: &Principal, reference: &str) -> Result<Snapshot, Error> {
        access::check(who, Access::Read)?;
        self.find_snapshot(who, None, reference).map(Snapshot::from)
    }

    /// Begins to take a snapshot: returns once that is durable. A machine that is starting is waited for by its task, one
    /// that is paused goes on for a moment. Goes on when the future is dropped.
    ///
    /// # Errors
    /// [`Error::MachineBusy`], [`Error::NameTaken`], [`Error::TooMany`], [`Error::Unable`], a full disk.
    pub async fn take_snapshot(
        &self,
        who: &Principal,
        reference: &str,
        request: CreateSnapshot,
    ) -> Result<Snapshot, Error> {
        let (engine, who, reference) = (self.clone(), who.clone(), reference.to_owned());
        self.unbroken("begin a snapshot", async move {
            access::check(&who, Access::Write)?;
            let machine = engine.find_machine(&who, &reference)?;
            let begun = engine
                .begin_snapshot(&who, &machine, request, false)
                .await?;
            Ok(Snapshot::from(begun))
        })
        .await
    }

    /// As [`Engine::take_snapshot`]; `passing`: see [`SnapshotRecord::passing`].
    pub(crate) async fn begin_snapshot(
        &self,
        who: &Principal,
        machine: &Arc<engine::Machine>,
        request: CreateSnapshot,
        passing: bool,
    ) -> Result<SnapshotRecord, Error> {
        let shared = &self.shared;
        let gone = || Error::not_found("machine", machine.cell.id.as_str());
        let seen = machine.cell.get().ok_or_else(gone)?.record;
        self.can_snapshot(&seen.runtime, request.memory).await?;
        shared.room_for_disk(&shared.machine_disk(&seen.id))?;
        let id = SnapshotId::new();
        let name = shared.snapshot_name(&seen, request.name, &id, passing)?;
        let (operation, operation_write) =
            shared.new_operation(who, "snapshot", id.to_string(), None)?;
        let record = SnapshotRecord {
            passing,
            memory: request.memory,
            operation: Some(operation.id.clone()),
            ..of(&seen, id.clone(), name.clone(), shared.now_ms())
        };
        let name_key = rows::snapshot_name(&seen.owner, &seen.id, &name);
        let rows = (
            vec![Check::Absent(name_key.clone())],
            vec![
                Write::json(rows::snapshot(&id), &record)?,
                Write::json(name_key.clone(), &id)?,
                operation_write,
            ],
        );
        let work = Work::Snapshot {
            snapshot: id.clone(),
            memory: request.memory,
            operation: operation.id.clone(),
        };
        // Seen before it is durable: the machine's task may begin with it at once.
        let operation = shared.show_operation(operation);
        shared.fleet().snapshots.insert(id.clone(), record.clone());
        let begun = machine.cell.update_with(rows, |now| {
            can_begin(now, "be snapshotted")?;
            if request.memory && !plan::is_up(now.wanted) {
                return Err(Error::wrong_status(
                    &now.name,
                    plan::status(now),
                    "be snapshotted with its memory",
                ));
            }
            if now.snapshots != seen.snapshots {
                return Err(busy(now, "snapshotted"));
            }
            now.snapshots += 1;
            now.work = Some(work);
            Ok(())
        });
        if let Err(error) = begun.await {
            let mut fleet = shared.fleet();
            fleet.snapshots.remove(&id);
            fleet.operations.remove(&operation.record.id);
            return Err(match error {
                Error::Store(hutch_store::Error::Conflict { key, .. }) if key == name_key => {
                    name_taken(&name)
                }
                error => error,
            });
        }
        Ok(record)
    }

    /// Begins to put a machine back to a snapshot: returns once that is durable. Everything is checked before anything
    /// is replaced; then the machine is at its level again. Goes on when the future is dropped, and after a crash.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::MachineBusy`], [`Error::SnapshotMisfit`], what is short on the host.
    pub async fn restore(
        &self,
        who: &Principal,
        reference: &str,
        request: RestoreMachine,
    ) -> Result<Machine, Error> {
        let (engine, who, reference) = (self.clone(), who.clone(), reference.to_owned());
        self.unbroken("begin to restore", async move {
            engine.restore_now(&who, &reference, request).await
        })
        .await
    }

    async fn restore_now(
        &self,
        who: &Principal,
        reference: &str,
        request: RestoreMachine,
    ) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let shared = &self.shared;
        let machine = self.find_machine(who, reference)?;
        let found = self.find_snapshot(who, Some(&machine.cell.id), &request.snapshot)?;
        let _in_use = self.shared.use_snapshot(&found.id)?;
        let its_own = |record: &MachineRecord| {
            found.machine == record.id || record.origin.as_ref() == Some(&found.id)
        };
        let with_memory = found.memory && !request.disk_only;
        if with_memory {
            self.must_fit(&found).await?;
        }
        shared.room_for_disk(&shared.snapshot_disk(&found.id))?;
        let _memory = match with_memory {
            true => self.take_memory(&self.machine(who, reference)?)?,
            false => None,
        };
        let (operation, write) =
            shared.new_operation(who, "restore", machine.cell.id.to_string(), None)?;
        let work = Work::Restore {
            snapshot: found.id.clone(),
            disk_only: request.disk_only,
            operation: operation.id.clone(),
        };
        let operation = shared.show_operation(operation);
        let begun = machine.cell.update_with((Vec::new(), vec![write]), |now| {
            can_begin(now, "be restored")?;
            if !its_own(now) {
                return Err(Error::invalid(
                    "snapshot",
                    format!(
                        "is of machine `{}`; a fork of it makes a machine that begins there",
                        found.machine_name
                    ),
                ));
            }
            if now.observed == Observed::Absent {
                let status = plan::status(now);
                return Err(Error::wrong_status(&now.name, status, "be restored"));
            }
            if with_memory {
                now.wanted = Wanted::Running;
                now.restart = false;
                now.generation += 1;
            }
            now.work = Some(work);
            Ok(())
        });
        match begun.await {
            Ok(current) => Ok(shared.view(&current)),
            Err(error) => {
                shared.fleet().operations.remove(&operation.record.id);
                Err(error)
            }
        }
    }

    /// Waits until a machine, as [`Engine::restore`] answered it, is restored and at its level again.
    ///
    /// # Errors
    /// Why it is not restored, or does not come to run, or [`Error::Timeout`].
    pub async fn restored(
        &self,
        who: &Principal,
        machine: &Machine,
        limit: Duration,
    ) -> Result<Machine, Error> {
        let (began, id) = (Instant::now(), machine.id.as_str());
        if let Some(operation) = &machine.operation {
            self.finish(who, operation, limit).await?;
        }
        let target = match self.machine(who, id)?.status {
            Status::Starting => Status::Running,
            Status::Pausing => Status::Paused,
            status => status,
        };
        let left = limit.saturating_sub(began.elapsed());
        let arrived = self.wait(who, id, Target::Status(target), left).await?;
        arrived.ok_or_else(|| Error::not_found("machine", id))
    }

    /// Deletes a snapshot. What was made from it has disks of its own and goes on.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::SnapshotBusy`] while it is being made, or something is being made of it.
    pub async fn delete_snapshot(&self, who: &Principal, reference: &str) -> Result<(), Error> {
        let (engine, who, reference) = (self.clone(), who.clone(), reference.to_owned());
        self.unbroken("delete a snapshot", async move {
            access::check(&who, Access::Write)?;
            let found = engine.find_snapshot(&who, None, &reference)?;
            let dropped = engine.shared.drop_snapshot(&found.id, |record, needed| {
                if needed || record.state == SnapshotState::Creating {
                    return Err(Error::SnapshotBusy {
                        name: record.name.to_string(),
                    });
                }
                Ok(())
            });
            match dropped.await? {
                true => Ok(()),
                false => Err(Error::not_found("snapshot", &reference)),
            }
        })
        .await
    }

    /// Finds a snapshot by id, by `MACHINE:NAME`, or by its name among those of `machine`.
    pub(crate) fn find_snapshot(
        &self,
        who: &Principal,
        machine: Option<&MachineId>,
        reference: &str,
    ) -> Result<SnapshotRecord, Error> {
        let missing = || Error::not_found("snapshot", reference);
        let named = |machine: &MachineId, name: &str| {
            let name: Name = name.parse().ok()?;
            let fleet = self.shared.fleet();
            let mut all = fleet.snapshots.values();
            all.find(|record| record.machine == *machine && record.name == name)
                .cloned()
        };
        let found = if let Ok(id) = reference.parse::<SnapshotId>() {
            self.shared.fleet().snapshots.get(&id).cloned()
        } else if let Some((machine, name)) = reference.split_once(':') {
            let machine = self.find_machine(who, machine)?;
            named(&machine.cell.id, name)
        } else {
            machine.and_then(|machine| named(machine, reference))
        };
        found
            .filter(|record| access::sees(who, &record.owner) && !record.passing)
            .ok_or_else(missing)
    }

    /// Makes an image of a snapshot's disk. Returns once the operation is durable.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::NameTaken`], [`Error::SnapshotBroken`], a full disk.
    pub async fn snapshot_image(
        &self,
        who: &Principal,
        reference: &str,
        name: Name,
    ) -> Result<Accepted, Error> {
        access::check(who, Access::Write)?;
        let found = self.find_snapshot(who, None, reference)?;
        let _in_use = self.shared.use_snapshot(&found.id)?;
        self.shared.verify_snapshot(&found).await?;
        let id = ImageId::new();
        let source = ImageSource::Snapshot {
            machine: found.machine_name,
            snapshot: found.name,
        };
        let input = ImageInput::Snapshot { snapshot: found.id };
        let nothing = Spooled::new(self.shared.upload(&id));
        self.make(who, id, name, source, input, nothing).await
    }

    /// Refuses a runtime whose machines cannot be snapshotted.
    pub(crate) async fn can_snapshot(&self, runtime: &str, memory: bool) -> Result<(), Error> {
        let disks =
            |runtime: &dyn Runtime| runtime.root() == Root::Disk && runtime.capabilities().pause;
        let memories =
            |runtime: &dyn Runtime| disks(runtime) && runtime.capabilities().memory_snapshot;
        let its = self.shared.runtime(runtime)?;
        if !disks(its.as_ref()) {
            let able = self.able(disks).await;
            return Err(choose::unable(runtime, "snapshot machines", &able));
        }
        if memory && !memories(its.as_ref()) {
            let able = self.able(memories).await;
            return Err(choose::unable(runtime, "snapshot memory", &able));
        }
        Ok(())
    }

    /// Refuses memory that the runtime, as it is now, does not take.
    pub(crate) async fn must_fit(&self, record: &SnapshotRecord) -> Result<(), Error> {
        self.can_snapshot(&record.runtime, true).await?;
        let runtime = self.shared.runtime(&record.runtime)?;
        must_fit(runtime.as_ref(), record).await
    }

    /// Takes up what the last server left: snapshots that are whole. Others are dropped with the wish for them; their
    /// directories, if any, are of nobody then.
    pub(crate) async fn load_snapshots(&self) -> Result<(), Error> {
        let shared = &self.shared;
        for row in rows::all::<SnapshotRecord>(shared.store.as_ref(), "snapshot/").await? {
            let record = row.value;
            rows::known_format(&row.key, record.format)?;
            if record.state == SnapshotState::Ready {
                shared.fleet().snapshots.insert(record.id.clone(), record);
                continue;
            }
            warn!(snapshot = %record.id, machine = %record.machine, "the last server ended while it was taken: dropped");
            let name = rows::snapshot_name(&record.owner, &record.machine, &record.name);
            let writes = vec![Write::Delete(row.key), Write::Delete(name)];
            let machine = shared.fleet().machines.get(&record.machine).cloned();
            let clear = |machine: &mut MachineRecord| {
                if machine
                    .work
                    .as_ref()
                    .is_some_and(|work| *work.snapshot() == record.id)
                {
                    machine.work = None;
                }
                Ok(())
            };
            if let Some(machine) = machine {
                machine.cell.update(clear).await?;
            }
            shared.store.commit(Vec::new(), writes).await?;
        }
        let passing: Vec<_> = {
            let fleet = shared.fleet();
            let passing = fleet.snapshots.values().filter(|record| record.passing);
            passing.map(|record| record.id.clone()).collect()
        };
        for id in passing {
            shared.release_snapshot(&id).await;
        }
        Ok(())
    }
}

/// What the runtime's memory snapshots depend on now; agent and kernel are the guest's to tell.
pub(crate) async fn fit_of(runtime: &dyn Runtime) -> Fit {
    let info = runtime.probe().await;
    Fit {
        vmm: info.version.unwrap_or_default(),
        acceleration: info.acceleration.unwrap_or_default(),
        cpu: files::cpu(),
        agent: String::new(),
        kernel: String::new(),
    }
}

/// Refuses memory that the runtime, as it is now, does not take.
pub(crate) async fn must_fit(runtime: &dyn Runtime, record: &SnapshotRecord) -> Result<(), Error> {
    let now = fit_of(runtime).await;
    let unknown = || Some("what it needs was not written down".to_owned());
    let reason = record
        .fit
        .as_ref()
        .map_or_else(unknown, |then| files::misfit(then, &now));
    reason.map_or(Ok(()), |reason| {
        Err(Error::SnapshotMisfit {
            name: record.name.to_string(),
            reason,
        })
    })
}

/// A snapshot of a machine's disk that is about to be taken.
pub(crate) fn of(
    machine: &MachineRecord,
    id: SnapshotId,
    name: Name,
    now_ms: u64,
) -> SnapshotRecord {
    SnapshotRecord {
        format: FORMAT,
        id,
        owner: machine.owner.clone(),
        name,
        state: SnapshotState::Creating,
        machine: machine.id.clone(),
        machine_name: machine.name.clone(),
        image: machine.image.clone(),
        image_name: machine.image_name.clone(),
        parent: machine.head.clone(),
        sequence: machine.snapshots + 1,
        passing: false,
        memory: false,
        frozen: false,
        runtime: machine.runtime.clone(),
        kernel: machine.kernel.clone(),
        vcpu: machine.vcpu,
        memory_mib: machine.memory_mib,
        disk_gib: machine.disk_gib,
        fit: None,
        files: Vec::new(),
        manifest_sha256: String::new(),
        pause_us: None,
        created_at_ms: now_ms,
        timings: Vec::new(),
        operation: None,
    }
}

fn can_begin(record: &MachineRecord, verb: &'static str) -> Result<(), Error> {
    if record.wanted == Wanted::Deleted {
        let status = plan::status(record);
        return Err(Error::wrong_status(&record.name, status, verb));
    }
    match &record.work {
        None => Ok(()),
        Some(Work::Snapshot { .. }) => Err(busy(record, "snapshotted")),
        Some(Work::Restore { .. }) => Err(busy(record, "restored")),
    }
}

fn busy(record: &MachineRecord, doing: &'static str) -> Error {
    Error::MachineBusy {
        name: record.name.to_string(),
        doing,
    }
}

fn name_taken(name: &Name) -> Error {
    Error::NameTaken {
        what: "snapshot",
        name: name.to_string(),
    }
}
