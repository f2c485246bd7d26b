//! What keeps a snapshot, and how it goes: its names, its place, who needs it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hutch_contract::id::{MachineId, OperationId, SnapshotId};
use hutch_contract::name::Name;
use hutch_contract::record::{MachineRecord, Observed, SnapshotRecord, Wanted, Work};
use hutch_contract::snapshot::{MAX_SNAPSHOTS, SnapshotState};
use hutch_disk::pool::Room;
use hutch_store::Write;
use tracing::{info, warn};

use super::{InUse, files};
use crate::drive::blocking;
use crate::engine::{Fleet, Shared, snapshots_dir, spool_dir};
use crate::images::CancelOnDrop;
use crate::operations::Running;
use crate::prepare::erase_dir;
use crate::rows::{self, Current};
use crate::{Error, admission, engine};

/// Whether a machine cannot do without the snapshot yet.
fn needs(record: &MachineRecord, id: &SnapshotId) -> bool {
    let restored = matches!(&record.work, Some(Work::Restore { snapshot, .. }) if snapshot == id);
    // Until it has come to run once, or has failed to.
    let made = record.origin.as_ref() == Some(id)
        && record.observed == Observed::Absent
        && record.wanted != Wanted::Deleted;
    restored || made
}

impl Fleet {
    fn needs_snapshot(&self, id: &SnapshotId) -> bool {
        let mut machines = self
            .machines
            .values()
            .filter_map(|machine| machine.cell.get());
        self.snapshots_in_use.contains_key(id) || machines.any(|now| needs(&now.record, id))
    }
}

impl Shared {
    pub(crate) fn snapshot_dir(&self, id: &SnapshotId) -> std::path::PathBuf {
        snapshots_dir(&self.config.data_dir).join(id.as_str())
    }

    pub(crate) fn snapshot_disk(&self, id: &SnapshotId) -> std::path::PathBuf {
        self.snapshot_dir(id).join(hutch_runtime::MachineDir::DISK)
    }

    pub(super) fn machine_disk(&self, id: &MachineId) -> std::path::PathBuf {
        self.machine_dir(id).join(hutch_runtime::MachineDir::DISK)
    }

    /// Keeps a snapshot that is ready from being deleted until the returned value is dropped.
    pub(crate) fn use_snapshot(self: &Arc<Self>, id: &SnapshotId) -> Result<InUse, Error> {
        let mut fleet = self.fleet();
        match fleet.snapshots.get(id) {
            Some(record) if record.state == SnapshotState::Ready => {}
            Some(record) => {
                return Err(Error::SnapshotBusy {
                    name: record.name.to_string(),
                });
            }
            None => return Err(Error::not_found("snapshot", id.as_str())),
        }
        *fleet.snapshots_in_use.entry(id.clone()).or_default() += 1;
        Ok(InUse {
            shared: self.clone(),
            id: id.clone(),
        })
    }

    /// Where a snapshot grows: dropped at every start.
    pub(crate) fn snapshot_stage(&self, id: &SnapshotId) -> std::path::PathBuf {
        spool_dir(&self.config.data_dir).join(id.as_str())
    }

    /// Looks whether a copy of the disk fits beside the reserve. Where the file system shares blocks it takes nothing.
    pub(crate) fn room_for_disk(&self, disk: &std::path::Path) -> Result<(), Error> {
        let data_dir = &self.config.data_dir;
        let takes = match hutch_disk::reflink_supported(&spool_dir(data_dir)) {
            true => 0,
            // One that is not there yet, or not any more, is told of by who wants to read it.
            false => files::used_bytes(disk).unwrap_or(0),
        };
        let room = hutch_disk::pool::room(data_dir)?;
        let left = Room {
            free: room.free.saturating_sub(takes),
            ..room
        };
        admission::disk_room(&self.config, left)
    }

    /// The name of a new snapshot, looked at before the commit that reserves it.
    pub(super) fn snapshot_name(
        &self,
        machine: &MachineRecord,
        asked: Option<Name>,
        id: &SnapshotId,
        passing: bool,
    ) -> Result<Name, Error> {
        let fleet = self.fleet();
        let its = || {
            fleet
                .snapshots
                .values()
                .filter(|record| record.machine == machine.id)
        };
        let kept = its().filter(|record| !record.passing).count();
        if !passing && kept >= MAX_SNAPSHOTS {
            return Err(Error::TooMany {
                what: "snapshots",
                limit: MAX_SNAPSHOTS,
            });
        }
        let taken = |name: &Name| its().any(|record| record.name == *name);
        if let Some(name) = asked {
            return if taken(&name) {
                Err(super::name_taken(&name))
            } else {
                Ok(name)
            };
        }
        let named = |text: String| text.parse::<Name>().expect("letters and digits are a name");
        let counted = named(format!("s{}", machine.snapshots + 1));
        Ok(match taken(&counted) {
            false => counted,
            // Somebody chose that name; the end of an id is nobody's choice.
            true => named(format!(
                "{counted}-{}",
                &id.as_str()[id.as_str().len() - 6..]
            )),
        })
    }

    /// Looks at every byte of a snapshot.
    ///
    /// # Errors
    /// [`Error::SnapshotBroken`].
    pub(crate) async fn verify_snapshot(&self, record: &SnapshotRecord) -> Result<(), Error> {
        let cancel = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(cancel.clone());
        let (dir, record) = (self.snapshot_dir(&record.id), record.clone());
        blocking("look at the snapshot", move || {
            files::verify(&dir, &record, &cancel)
        })
        .await
    }

    /// Drops a snapshot, unless `refused` says why not; it is told whether something needs it. Whether there was one.
    pub(super) async fn drop_snapshot(
        &self,
        id: &SnapshotId,
        refused: impl FnOnce(&SnapshotRecord, bool) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let record = {
            let mut fleet = self.fleet();
            let needed = fleet.needs_snapshot(id);
            let Some(record) = fleet.snapshots.get(id) else {
                return Ok(false);
            };
            refused(record, needed)?;
            // From here on nobody finds it; a failed commit puts it back.
            fleet.snapshots.remove(id)
        };
        let Some(record) = record else {
            return Ok(false);
        };
        let name = rows::snapshot_name(&record.owner, &record.machine, &record.name);
        let writes = vec![Write::Delete(rows::snapshot(id)), Write::Delete(name)];
        if let Err(error) = self.store.commit(Vec::new(), writes).await {
            self.fleet().snapshots.insert(id.clone(), record);
            return Err(error.into());
        }
        let dir = self.snapshot_dir(id);
        blocking("erase the snapshot", move || erase_dir(&dir)).await?;
        info!(snapshot = %id, "gone");
        Ok(true)
    }

    /// Drops a snapshot that was made to pass, once nothing needs it.
    pub(crate) async fn release_snapshot(&self, id: &SnapshotId) {
        let kept = |record: &SnapshotRecord, needed: bool| match needed
            || !record.passing
            || record.state == SnapshotState::Creating
        {
            true => Err(Error::SnapshotBusy {
                name: record.name.to_string(),
            }),
            false => Ok(()),
        };
        match self.drop_snapshot(id, kept).await {
            Ok(_) | Err(Error::SnapshotBusy { .. }) => {}
            Err(error) => {
                warn!(snapshot = %id, error = %error.chain(), "cannot be dropped; the next start does it")
            }
        }
    }

    /// Drops the snapshots of a machine that is on its way out. Those that something still needs go with that.
    pub(crate) async fn drop_snapshots_of(&self, machine: &MachineId) -> Result<(), Error> {
        let all: Vec<_> = {
            let fleet = self.fleet();
            let its = fleet
                .snapshots
                .values()
                .filter(|record| record.machine == *machine);
            its.map(|record| record.id.clone()).collect()
        };
        for id in all {
            let unneeded = |record: &SnapshotRecord, needed: bool| match needed {
                true => Err(Error::SnapshotBusy {
                    name: record.name.to_string(),
                }),
                false => Ok(()),
            };
            match self.drop_snapshot(&id, unneeded).await {
                Err(Error::SnapshotBusy { .. }) => self.let_pass(&id).await?,
                dropped => drop(dropped?),
            }
            self.release_snapshot(&id).await;
        }
        Ok(())
    }

    async fn let_pass(&self, id: &SnapshotId) -> Result<(), Error> {
        let Some(mut record) = self.fleet().snapshots.get(id).cloned() else {
            return Ok(());
        };
        record.passing = true;
        let write = Write::json(rows::snapshot(id), &record)?;
        self.store.commit(Vec::new(), vec![write]).await?;
        self.fleet().snapshots.insert(id.clone(), record);
        Ok(())
    }

    /// Drops the row of a snapshot that did not come to pass, and tells how its operation ended.
    pub(crate) async fn snapshot_failed(
        &self,
        machine: &engine::Machine,
        id: &SnapshotId,
        operation: Option<&Arc<Running>>,
        error: &Error,
    ) -> Result<(), Error> {
        let record = self.fleet().snapshots.get(id).cloned();
        let mut writes = vec![Write::Delete(rows::snapshot(id))];
        writes.extend(record.map(|record| {
            Write::Delete(rows::snapshot_name(
                &record.owner,
                &record.machine,
                &record.name,
            ))
        }));
        let ending = match operation {
            Some(running) => Some(self.operation_end(running, Err(error))?),
            None => None,
        };
        writes.extend(ending.iter().flat_map(|ending| ending.writes.clone()));
        let is_its = |work: &Work| work.snapshot() == id;
        let pending = |current: Current| current.record.work.as_ref().is_some_and(is_its);
        if machine.cell.get().is_some_and(pending) {
            let clear = |record: &mut MachineRecord| {
                record.work = None;
                Ok(())
            };
            machine
                .cell
                .update_with((Vec::new(), writes), clear)
                .await?;
        } else {
            self.store.commit(Vec::new(), writes).await?;
        }
        self.fleet().snapshots.remove(id);
        if let (Some(running), Some(ending)) = (operation, ending) {
            self.show_end(running, ending);
        }
        Ok(())
    }

    pub(crate) fn running(&self, id: &OperationId) -> Option<Arc<Running>> {
        self.fleet().operations.get(id).cloned()
    }
}
