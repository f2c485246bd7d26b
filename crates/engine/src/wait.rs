//! Waiting until a machine is what somebody waits for, or will never be.

use std::time::Duration;

use hutch_contract::id::MachineId;
use hutch_contract::machine::{Machine, Status};
use hutch_contract::record::Observed;
use tokio::time::timeout;

use crate::rows::Current;
use crate::{Engine, Error, Principal, plan};

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A status.
    Status(Status),
    /// That the machine is gone.
    Gone,
}

impl Engine {
    /// Waits until the machine is what `target` says. `None`: it is gone, as was wanted.
    ///
    /// # Errors
    /// [`Error::MachineFailed`] or [`Error::WrongStatus`] when it will not come, [`Error::Timeout`] when it has not.
    pub async fn wait(
        &self,
        who: &Principal,
        reference: &str,
        target: Target,
        limit: Duration,
    ) -> Result<Option<Machine>, Error> {
        let machine = match self.find_machine(who, reference) {
            // An id is never given again: what is waited for has come already.
            Err(Error::NotFound { .. })
                if target == Target::Gone && reference.parse::<MachineId>().is_ok() =>
            {
                return Ok(None);
            }
            found => found?,
        };
        let name = machine.name();
        let mut records = machine.cell.watch();
        let arrived = records.wait_for(|now| arrival(now.as_ref(), target, &name).is_some());
        let current = match timeout(limit, arrived).await {
            Ok(Ok(current)) => current.clone(),
            Ok(Err(_)) => None,
            Err(_) => {
                return Err(Error::timeout(
                    format!("waiting for machine `{name}`"),
                    limit,
                ));
            }
        };
        match arrival(current.as_ref(), target, &name) {
            None => Err(Error::not_found("machine", &name)),
            Some(arrived) => Ok(arrived?.map(|current| self.shared.view(current))),
        }
    }
}

/// What waiting for `target` comes to when this is the record; `None`: wait on.
fn arrival<'a>(
    current: Option<&'a Current>,
    target: Target,
    name: &str,
) -> Option<Result<Option<&'a Current>, Error>> {
    let Some(current) = current else {
        return Some(match target {
            Target::Gone => Ok(None),
            Target::Status(_) => Err(Error::not_found("machine", name)),
        });
    };
    let record = &current.record;
    let status = plan::status(record);
    let Target::Status(wanted) = target else {
        return None;
    };
    if status == wanted {
        return Some(Ok(Some(current)));
    }
    match (status, &record.observed) {
        (Status::Failed, Observed::Failed { reason, .. }) => Some(Err(Error::MachineFailed {
            name: record.name.to_string(),
            reason: reason.clone(),
        })),
        (Status::Stopped | Status::Paused, _) if wanted == Status::Running => Some(Err(
            Error::wrong_status(&record.name, status, "come to run"),
        )),
        (Status::Stopped, _) if wanted == Status::Paused => {
            Some(Err(Error::wrong_status(&record.name, status, "be paused")))
        }
        (Status::Deleting, _) => Some(Err(Error::wrong_status(&record.name, status, "come back"))),
        _ => None,
    }
}
