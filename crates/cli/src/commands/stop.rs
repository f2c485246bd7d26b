//! `hutch stop`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;

use super::{App, each};
use crate::error::Error;
use crate::waiting;

/// Stop machines; their disks are kept
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch stop web
  hutch stop web db --no-wait")]
pub struct Args {
    /// Names or ids of the machines
    #[arg(required = true)]
    machines: Vec<String>,
    /// Return as soon as it is accepted, not when it has stopped
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.machines, async |machine| {
        client.stop(machine, None).await?;
        if !args.no_wait {
            waiting::until(&client, machine, Until::Status(Status::Stopped)).await?;
        }
        Ok(())
    })
    .await
}
