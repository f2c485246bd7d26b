//! Operations: durable rows of something long that is being done, with progress in memory.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hutch_contract::error::Kind;
use hutch_contract::id::OperationId;
use hutch_contract::operation::{Operation, OperationState, Progress};
use hutch_contract::record::{FORMAT, ImageWork, OperationRecord};
use hutch_store::Write;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::access::{self, Access};
use crate::engine::Shared;
use crate::{Engine, Error, Principal, rows};

/// Operations whose end is remembered; older ones are dropped.
const KEPT: usize = 1000;
/// Servers that may begin with the same work: it may be what ends them.
const TRIES: u32 = 3;

/// An operation in memory, to be looked at and waited for.
pub(crate) struct Running {
    pub record: OperationRecord,
    /// Its state, and a count of its changes.
    state: watch::Sender<(OperationState, u64)>,
    /// What sort of failure it ended with, in this server.
    failure: OnceLock<(Kind, &'static str)>,
}

/// The end of an operation, to be committed, then shown.
pub(crate) struct Ending {
    pub writes: Vec<Write>,
    state: OperationState,
    failure: Option<(Kind, &'static str)>,
    dropped: Vec<OperationId>,
}

impl Running {
    pub fn new(record: OperationRecord) -> Running {
        let state = watch::Sender::new((record.state.clone(), 1));
        Running {
            record,
            state,
            failure: OnceLock::new(),
        }
    }

    /// Tells who looks how far it is.
    pub fn progress(&self, progress: Progress) {
        self.set(OperationState::Running {
            progress: Some(progress),
        });
    }

    fn set(&self, new: OperationState) {
        self.state.send_modify(|(state, version)| {
            *state = new;
            *version += 1;
        });
    }

    fn show(&self) -> Operation {
        let (state, version) = self.state.borrow().clone();
        Operation {
            id: self.record.id.clone(),
            kind: self.record.kind.clone(),
            target: self.record.target.clone(),
            state,
            created_at_ms: self.record.created_at_ms,
            version,
        }
    }

    fn finished(&self) -> bool {
        !matches!(self.state.borrow().0, OperationState::Running { .. })
    }
}

impl Shared {
    /// A new operation and the write that makes it durable.
    pub fn new_operation(
        &self,
        who: &Principal,
        kind: &str,
        target: String,
        work: Option<ImageWork>,
    ) -> Result<(OperationRecord, Write), Error> {
        let record = OperationRecord {
            format: FORMAT,
            id: OperationId::new(),
            owner: who.owner.clone(),
            kind: kind.to_owned(),
            target,
            state: OperationState::Running { progress: None },
            created_at_ms: self.now_ms(),
            work,
        };
        let write = Write::json(rows::operation(&record.id), &record)?;
        Ok((record, write))
    }

    /// Lets an operation whose row is durable be seen.
    pub fn show_operation(&self, record: OperationRecord) -> Arc<Running> {
        let running = Arc::new(Running::new(record));
        self.fleet()
            .operations
            .insert(running.record.id.clone(), running.clone());
        running
    }

    /// Records how an operation ended, together with `writes`. `show` is called once that is durable and before anybody
    /// hears of it.
    ///
    /// # Errors
    /// The store's; the operation is then still running as far as anybody can see, and `recover` ends it.
    pub async fn end_operation(
        &self,
        running: &Running,
        outcome: Result<(), &Error>,
        mut writes: Vec<Write>,
        show: impl FnOnce(),
    ) -> Result<(), Error> {
        let mut ending = self.operation_end(running, outcome)?;
        writes.append(&mut ending.writes);
        self.store.commit(Vec::new(), writes).await?;
        show();
        self.show_end(running, ending);
        Ok(())
    }

    /// What is to be committed when an operation ends: that, and that the oldest ended ones are dropped.
    pub fn operation_end(
        &self,
        running: &Running,
        outcome: Result<(), &Error>,
    ) -> Result<Ending, Error> {
        let record = OperationRecord {
            state: ended(outcome),
            work: None,
            ..running.record.clone()
        };
        let mut writes = vec![Write::json(rows::operation(&record.id), &record)?];
        let dropped: Vec<_> = {
            let fleet = self.fleet();
            let excess = fleet.operations.len().saturating_sub(KEPT);
            let finished = fleet.operations.values().filter(|op| op.finished());
            let oldest = finished.take(excess.min(16));
            oldest.map(|op| op.record.id.clone()).collect()
        };
        writes.extend(dropped.iter().map(|id| Write::Delete(rows::operation(id))));
        Ok(Ending {
            writes,
            state: record.state,
            failure: outcome.err().map(|error| (error.kind(), error.code())),
            dropped,
        })
    }

    /// Lets an end that is durable be seen.
    pub fn show_end(&self, running: &Running, ending: Ending) {
        for id in &ending.dropped {
            self.fleet().operations.remove(id);
        }
        if let Some(failure) = ending.failure {
            running.failure.get_or_init(|| failure);
        }
        running.set(ending.state);
    }
}

fn ended(outcome: Result<(), &Error>) -> OperationState {
    match outcome {
        Ok(()) => OperationState::Succeeded,
        Err(error) => OperationState::Failed {
            code: error.code().to_owned(),
            message: error.chain(),
            hint: error.hint(),
        },
    }
}

impl Engine {
    /// One operation.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn operation(&self, who: &Principal, id: &OperationId) -> Result<Operation, Error> {
        Ok(self.find_operation(who, id)?.show())
    }

    /// The operation once it has changed since `after_version` or has ended, or as it is when `limit` is over.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn wait_operation(
        &self,
        who: &Principal,
        id: &OperationId,
        after_version: u64,
        limit: Duration,
    ) -> Result<Operation, Error> {
        let running = self.find_operation(who, id)?;
        let mut states = running.state.subscribe();
        let newer = |(state, version): &(OperationState, u64)| {
            *version > after_version || !matches!(state, OperationState::Running { .. })
        };
        // Not having changed is no error: the caller asks again.
        drop(timeout(limit, states.wait_for(newer)).await);
        Ok(running.show())
    }

    /// Waits until an operation has ended.
    ///
    /// # Errors
    /// That with which it ended, or [`Error::Timeout`].
    pub async fn finish(
        &self,
        who: &Principal,
        id: &OperationId,
        limit: Duration,
    ) -> Result<(), Error> {
        let running = self.find_operation(who, id)?;
        let mut states = running.state.subscribe();
        let over =
            |(state, _): &(OperationState, u64)| !matches!(state, OperationState::Running { .. });
        let state = match timeout(limit, states.wait_for(over)).await {
            Ok(Ok(state)) => state.0.clone(),
            Ok(Err(_)) => return Err(Error::Interrupted),
            Err(_) => {
                let what = format!("waiting for operation `{id}`");
                return Err(Error::timeout(what, limit));
            }
        };
        let OperationState::Failed { message, hint, .. } = state else {
            return Ok(());
        };
        let interrupted = || (Error::Interrupted.kind(), Error::Interrupted.code());
        let (kind, code) = running.failure.get().copied().unwrap_or_else(interrupted);
        Err(Error::Told {
            kind,
            code,
            message,
            hint,
        })
    }

    fn find_operation(&self, who: &Principal, id: &OperationId) -> Result<Arc<Running>, Error> {
        access::check(who, Access::Read)?;
        let found = self.shared.fleet().operations.get(id).cloned();
        found
            .filter(|running| access::sees(who, &running.record.owner))
            .ok_or_else(|| Error::not_found("operation", id.as_str()))
    }

    /// Loads all operations and returns those to go on with, which the end of the last server interrupted. What cannot
    /// be gone on with, or has seen too many servers end, is ended; its files are orphans and erased with them.
    ///
    /// `by_machines`: those that machines go on with by themselves.
    pub(crate) async fn load_operations(
        &self,
        by_machines: &BTreeSet<OperationId>,
    ) -> Result<Vec<Arc<Running>>, Error> {
        let shared = &self.shared;
        let mut unfinished = Vec::new();
        for row in rows::all::<OperationRecord>(shared.store.as_ref(), "operation/").await? {
            rows::known_format(&row.key, row.value.format)?;
            let mut record = row.value;
            let over = !matches!(record.state, OperationState::Running { .. });
            if over || by_machines.contains(&record.id) {
                shared.show_operation(record);
                continue;
            }
            let again = record.work.as_mut().is_some_and(|work| {
                work.tries += 1;
                work.tries <= TRIES
            });
            if again {
                let write = Write::json(row.key, &record)?;
                shared.store.commit(Vec::new(), vec![write]).await?;
                unfinished.push(shared.show_operation(record));
            } else {
                let running = shared.show_operation(record);
                let freed = self.names_reserved_for(&running.record.target).await?;
                shared
                    .end_operation(&running, Err(&Error::Interrupted), freed, || {})
                    .await?;
            }
        }
        Ok(unfinished)
    }
}
