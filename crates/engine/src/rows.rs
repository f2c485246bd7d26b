//! Which records there are under which keys, and the cell that keeps one machine's record in memory.
//!
//! ```text
//! meta/network               NetworkRow: where machines' addresses come from
//! meta/instance              this data directory's tag and owner
//! meta/gateway               the secret of URL tokens
//! machine/ID                 MachineRecord
//! image/ID                   ImageRecord
//! operation/ID               OperationRecord
//! snapshot/ID                SnapshotRecord
//! key/ID                     KeyRecord
//! name/OWNER/machine/NAME    id of the machine that has the name (likewise …/image/…)
//! name/OWNER/snapshot/MACHINE/NAME    id of the machine's snapshot that has the name
//! slot/N                     SlotRow: who has it, or since when it rests
//! port/N                     id of the machine that has that port of the host; its record says for what
//! host/LABEL                 id of the machine that has the host label
//! idempotency/OWNER/HASH     IdempotencyRow
//! ```

use std::sync::Arc;

use hutch_contract::id::{ImageId, KeyId, MachineId, OperationId, OwnerId, SnapshotId};
use hutch_contract::machine::Machine;
use hutch_contract::name::Name;
use hutch_contract::record::{FORMAT, MachineRecord, Observed};
use hutch_store::{Check, Key, Record, Store, Write};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, watch};

use crate::Error;
use crate::drive::joined;
use crate::plan;

/// Rows read from the store at a time.
const PAGE: usize = 500;

/// What this data directory is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub format: u32,
    /// Four characters that all our names on this host carry.
    pub tag: String,
    /// Who has what is made with the first key.
    pub owner: OwnerId,
}

/// A slot's row.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum SlotRow {
    Taken { machine: MachineId },
    Resting { since_ms: u64 },
}

/// The answer to a request that carried an idempotency key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct IdempotencyRow {
    pub format: u32,
    pub request_sha256: String,
    pub reply: Machine,
    pub created_at_ms: u64,
}

fn key(text: String) -> Key {
    Key::new(text).expect("ids, names, numbers and hashes make short printable keys")
}

pub(crate) fn instance() -> Key {
    key("meta/instance".into())
}
pub(crate) fn network() -> Key {
    key("meta/network".into())
}
pub(crate) fn machine(id: &MachineId) -> Key {
    key(format!("machine/{id}"))
}
pub(crate) fn image(id: &ImageId) -> Key {
    key(format!("image/{id}"))
}
pub(crate) fn snapshot(id: &SnapshotId) -> Key {
    key(format!("snapshot/{id}"))
}
pub(crate) fn snapshot_name(owner: &OwnerId, machine: &MachineId, name: &Name) -> Key {
    key(format!("name/{owner}/snapshot/{machine}/{name}"))
}
pub(crate) fn operation(id: &OperationId) -> Key {
    key(format!("operation/{id}"))
}
pub(crate) fn api_key(id: &KeyId) -> Key {
    key(format!("key/{id}"))
}
pub(crate) fn machine_name(owner: &OwnerId, name: &Name) -> Key {
    key(format!("name/{owner}/machine/{name}"))
}
pub(crate) fn image_name(owner: &OwnerId, name: &Name) -> Key {
    key(format!("name/{owner}/image/{name}"))
}
pub(crate) fn gateway() -> Key {
    key("meta/gateway".into())
}
pub(crate) fn port(port: u16) -> Key {
    key(format!("port/{port:05}"))
}
pub(crate) fn host(label: &str) -> Key {
    key(format!("host/{label}"))
}
pub(crate) fn slot(slot: u16) -> Key {
    key(format!("slot/{slot:05}"))
}
pub(crate) fn idempotency(owner: &OwnerId, sha256: &str) -> Key {
    key(format!("idempotency/{owner}/{sha256}"))
}

/// Every row under `prefix`, decoded.
pub(crate) async fn all<T: DeserializeOwned>(
    store: &dyn Store,
    prefix: &str,
) -> Result<Vec<Record<T>>, Error> {
    let mut rows: Vec<Record<T>> = Vec::new();
    loop {
        let after = rows.last().map(|row| row.key.clone());
        let page = store.list_json(prefix, after.as_ref(), PAGE).await?;
        let last = page.len() < PAGE;
        rows.extend(page);
        if last {
            return Ok(rows);
        }
    }
}

/// Refuses a record that a newer version wrote.
pub(crate) fn known_format(key: &Key, format: u32) -> Result<(), Error> {
    if format > FORMAT {
        return Err(Error::NewerRecord {
            key: key.to_string(),
            format,
        });
    }
    Ok(())
}

/// A machine's record as of the last commit.
#[derive(Debug, Clone)]
pub(crate) struct Current {
    pub record: Arc<MachineRecord>,
    pub version: u64,
}

impl Current {
    pub fn new(record: MachineRecord, version: u64) -> Current {
        Current {
            record: Arc::new(record),
            version,
        }
    }

    /// As the API shows it.
    pub fn machine(&self) -> Machine {
        let record = self.record.as_ref();
        let reason = match &record.observed {
            Observed::Failed { reason, .. } | Observed::Unknown { reason } => Some(reason.clone()),
            _ => None,
        };
        Machine {
            id: record.id.clone(),
            name: record.name.clone(),
            status: plan::status(record),
            reason,
            exit: record.exit.clone(),
            image: record.image.clone(),
            image_name: record.image_name.clone(),
            runtime: record.runtime.clone(),
            isolation: record.isolation,
            capabilities: None,
            kernel: record.kernel.clone(),
            vcpu: record.vcpu,
            memory_mib: record.memory_mib,
            disk_gib: record.disk_gib,
            env: record.env.clone(),
            labels: record.labels.clone(),
            network: None,
            lifetime: record.lifetime.clone(),
            expires_at_ms: record.expires_at_ms,
            starts: record.starts,
            warm: record.warm,
            created_at_ms: record.created_at_ms,
            started_at_ms: record.started_at_ms,
            operation: record.work.as_ref().map(|work| work.operation().clone()),
            unapplied: record.unapplied.clone(),
            timings: record.timings.clone(),
            url: None,
            urls: Default::default(),
            http_port: None,
            expose: Default::default(),
            access: None,
            ports: Vec::new(),
            version: self.version,
        }
    }
}

/// One machine's record in memory: the store's last commit of it, changed only through [`Cell::update`].
pub(crate) struct Cell {
    pub id: MachineId,
    store: Arc<dyn Store>,
    /// Held while a change is being committed, so that changes of one machine come one after the other.
    writing: Arc<Mutex<()>>,
    /// `None` once the machine is gone.
    current: watch::Sender<Option<Current>>,
}

impl Cell {
    pub fn new(store: Arc<dyn Store>, current: Current) -> Cell {
        let id = current.record.id.clone();
        Cell {
            id,
            store,
            writing: Arc::default(),
            current: watch::Sender::new(Some(current)),
        }
    }

    /// The record as of the last commit; `None` once the machine is gone.
    pub fn get(&self) -> Option<Current> {
        self.current.borrow().clone()
    }

    /// The record, to wait for its next change.
    pub fn watch(&self) -> watch::Receiver<Option<Current>> {
        self.current.subscribe()
    }

    /// Changes the record by `change`, durably. No change, no commit. Once begun it goes on to its end when the future
    /// is dropped: a commit that memory does not know of would make every later one fail.
    pub async fn update(
        &self,
        change: impl FnOnce(&mut MachineRecord) -> Result<(), Error>,
    ) -> Result<Current, Error> {
        self.update_with((Vec::new(), Vec::new()), change).await
    }

    /// The same with rows of other things in the same commit, when there is one.
    pub async fn update_with(
        &self,
        (mut checks, mut writes): (Vec<Check>, Vec<Write>),
        change: impl FnOnce(&mut MachineRecord) -> Result<(), Error>,
    ) -> Result<Current, Error> {
        let writing = self.writing.clone().lock_owned().await;
        let Some(current) = self.get() else {
            return Err(Error::not_found("machine", self.id.as_str()));
        };
        let mut record = current.record.as_ref().clone();
        change(&mut record)?;
        if record == *current.record {
            return Ok(current);
        }
        let key = machine(&self.id);
        checks.push(Check::Version(key.clone(), current.version));
        writes.push(Write::json(key, &record)?);
        let (store, published) = (self.store.clone(), self.current.clone());
        let committed = tokio::spawn(async move {
            let _writing = writing;
            let revision = store.commit(checks, writes).await?;
            let current = Current::new(record, revision.0);
            published.send_replace(Some(current.clone()));
            Ok(current)
        });
        joined("a change of a machine", committed).await?
    }

    /// Drops the record with its name, ports and host label; its slot begins to rest. `free` is called once that is durable and before
    /// anybody hears of it.
    pub async fn forget(&self, now_ms: u64, free: impl FnOnce()) -> Result<(), Error> {
        let _writing = self.writing.lock().await;
        let Some(current) = self.get() else {
            return Ok(());
        };
        let record = &current.record;
        let key = machine(&self.id);
        let checks = vec![Check::Version(key.clone(), current.version)];
        let ports = record.exposure.ports.iter();
        let ways = ports
            .map(|given| port(given.host_port))
            .chain(record.exposure.host.as_deref().map(host));
        let mut writes = vec![
            Write::Delete(key),
            Write::Delete(machine_name(&record.owner, &record.name)),
            Write::json(slot(record.slot), &SlotRow::Resting { since_ms: now_ms })?,
        ];
        writes.extend(ways.map(Write::Delete));
        self.store.commit(checks, writes).await?;
        free();
        self.current.send_replace(None);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use hutch_contract::machine::Isolation;
    use hutch_contract::record::Wanted;

    /// A record for tests of what only looks at some of its fields.
    pub(crate) fn machine_record() -> MachineRecord {
        MachineRecord {
            format: FORMAT,
            id: MachineId::new(),
            owner: OwnerId::new(),
            name: "a".parse().expect("a name"),
            slot: 1,
            image: ImageId::new(),
            image_name: "busybox".parse().expect("a name"),
            runtime: "stub".into(),
            isolation: Isolation::None,
            kernel: None,
            vcpu: 1,
            memory_mib: 128,
            disk_gib: 1,
            env: Default::default(),
            labels: Default::default(),
            network: Default::default(),
            lifetime: Default::default(),
            expires_at_ms: None,
            wanted: Wanted::Running,
            observed: Observed::Absent,
            generation: 1,
            served: 1,
            restart: false,
            exit: None,
            starts: 0,
            failed_starts: 0,
            created_at_ms: 0,
            started_at_ms: None,
            unapplied: vec![],
            timings: vec![],
            exposure: Default::default(),
            work: None,
            origin: None,
            head: None,
            snapshots: 0,
            resume_from: None,
            keep_initial: false,
            cold: false,
            warm: false,
        }
    }
}
