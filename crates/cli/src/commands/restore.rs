//! `hutch restore`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;
use hutch_contract::snapshot::RestoreMachine;

use super::App;
use crate::error::Error;
use crate::waiting;

/// Put a machine back to one of its snapshots; what was written since is lost
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch restore web before
  hutch restore web before --disk-only")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    /// Name or id of the snapshot
    snapshot: String,
    /// Leave its memory out: boot from its disk
    #[arg(long)]
    disk_only: bool,
    /// Return as soon as it is accepted, not when it has happened
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let request = RestoreMachine {
        snapshot: args.snapshot,
        disk_only: args.disk_only,
    };
    let mut machine = client.restore(&args.machine, &request, None).await?;
    if !args.no_wait {
        if let Some(operation) = &machine.operation {
            waiting::operation(&client, operation, app.ui).await?;
        }
        machine = client.machine(machine.id.as_str()).await?;
        if machine.status == Status::Starting {
            let running = Until::Status(Status::Running);
            let arrived = waiting::until(&client, machine.id.as_str(), running).await?;
            machine = arrived.unwrap_or(machine);
        }
    }
    match app.ui.json {
        true => app.ui.object(&machine)?,
        false => app.ui.name(machine.name.as_str())?,
    }
    Ok(ExitCode::SUCCESS)
}
