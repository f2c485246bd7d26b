//! `hutch restart`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;

use super::{App, each};
use crate::error::Error;
use crate::waiting;

/// Stop machines and start them again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch restart web
  hutch restart web db --no-wait")]
pub struct Args {
    /// Names or ids of the machines
    #[arg(required = true)]
    machines: Vec<String>,
    /// Return as soon as it is accepted, not when it runs again
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.machines, async |machine| {
        client.restart(machine, None).await?;
        if !args.no_wait {
            waiting::until(&client, machine, Until::Status(Status::Running)).await?;
        }
        Ok(())
    })
    .await
}
