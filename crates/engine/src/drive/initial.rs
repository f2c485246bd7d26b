//! The step that keeps a machine's disk as it is before anything has run on it, as a snapshot that needs no machine to stand
//! still. It is one commit: what a crash before that leaves is a directory without a row, which the next start erases.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use hutch_contract::id::SnapshotId;
use hutch_contract::name::Name;
use hutch_contract::record::{MachineRecord, SnapshotRecord};
use hutch_contract::snapshot::SnapshotState;
use hutch_runtime::MachineDir;
use hutch_store::{Check, Write};
use tracing::info;

use super::Driver;
use super::snapshot::erase_both;
use crate::images::CancelOnDrop;
use crate::prepare::{erase_dir, io_error};
use crate::snapshots::{self, files};
use crate::{Error, rows};

/// What it is called.
const NAME: &str = "initial";

impl Driver {
    pub(super) async fn keep_initial(&mut self, record: &MachineRecord) -> Result<(), Error> {
        let started = Instant::now();
        let shared = self.shared.clone();
        let disk = self.dir.file(MachineDir::DISK);
        shared.room_for_disk(&disk)?;
        let id = SnapshotId::new();
        let name: Name = NAME.parse().expect("letters are a name");
        let begun = SnapshotRecord {
            state: SnapshotState::Ready,
            frozen: true,
            ..snapshots::of(record, id.clone(), name, shared.now_ms())
        };
        let (stage, target) = (shared.snapshot_stage(&id), shared.snapshot_dir(&id));
        let (at, to, room) = (stage.clone(), target.clone(), shared.clone());
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = cancel.clone();
        let _cancel = CancelOnDrop(cancel);
        let kept = self.file_work("keep the disk", move || {
            room.with_room(|| {
                erase_dir(&at)?;
                DirBuilder::new()
                    .mode(0o700)
                    .create(&at)
                    .map_err(|source| io_error("create", &at, source))?;
                hutch_disk::clone_file(&disk, &at.join(MachineDir::DISK))?;
                files::publish(&at, &to, begun.clone(), &cancelled)
            })
        });
        let noted = match kept.await {
            Ok(kept) => self.note_initial(kept).await,
            Err(error) => Err(error),
        };
        if noted.is_err() {
            erase_both(&stage, &target).await;
        }
        noted?;
        self.clock.phase("initial", started);
        info!(machine = %record.id, snapshot = %id, "kept as it was made");
        Ok(())
    }

    async fn note_initial(&self, kept: SnapshotRecord) -> Result<(), Error> {
        let name = rows::snapshot_name(&kept.owner, &kept.machine, &kept.name);
        let rows = (
            vec![Check::Absent(name.clone())],
            vec![
                Write::json(rows::snapshot(&kept.id), &kept)?,
                Write::json(name, &kept.id)?,
            ],
        );
        let noted = self.machine.cell.update_with(rows, |record| {
            record.keep_initial = false;
            record.head = Some(kept.id.clone());
            record.snapshots += 1;
            Ok(())
        });
        noted.await?;
        let mut fleet = self.shared.fleet();
        fleet.snapshots.insert(kept.id.clone(), kept);
        Ok(())
    }
}
