//! Waiting: for a machine to come to a state, for an operation to end, each in requests of bounded length.

use std::time::Duration;

use hutch_contract::client::{Client, Until};
use hutch_contract::error::Kind;
use hutch_contract::id::OperationId;
use hutch_contract::machine::Machine;
use hutch_contract::operation::OperationState;
use tokio::time::Instant;

use crate::error::Error;
use crate::progress::Steps;
use crate::ui::Ui;

/// The longest that we wait for a machine. Much longer than a server lets a start or a stop take, so that its reason
/// is heard, not ours.
pub const LIMIT: Duration = Duration::from_secs(600);
/// The longest that one request waits.
const REQUEST: Duration = Duration::from_secs(30);
/// The least time between two looks at an operation: progress is for people.
const PACE: Duration = Duration::from_millis(100);

/// Waits for a machine; `None` when it is gone.
pub async fn until(client: &Client, machine: &str, until: Until) -> Result<Option<Machine>, Error> {
    let end = Instant::now() + LIMIT;
    loop {
        match client.wait(machine, until, REQUEST).await {
            Err(error) if error.kind() == Kind::Timeout && Instant::now() < end => {}
            Err(error) if error.kind() == Kind::Timeout => {
                let until = match until {
                    Until::Status(status) => status.as_str(),
                    Until::Gone => "gone",
                };
                return Err(Error::StillWaiting {
                    machine: machine.to_owned(),
                    until,
                });
            }
            result => return Ok(result?),
        }
    }
}

/// Follows an operation to its end and shows how far it is; gives the id of what it was done to. To stop following
/// does not stop the operation.
pub async fn operation(client: &Client, id: &OperationId, ui: Ui) -> Result<String, Error> {
    let steps = Steps::new(ui);
    let mut operation = client.operation(id).await?;
    loop {
        match operation.state {
            OperationState::Running { progress } => steps.show(progress.as_ref()),
            OperationState::Succeeded => return Ok(operation.target),
            OperationState::Failed { message, hint, .. } => {
                return Err(Error::Operation { message, hint });
            }
        }
        tokio::time::sleep(PACE).await;
        operation = client
            .wait_operation(id, operation.version, REQUEST)
            .await?;
    }
}
