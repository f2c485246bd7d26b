//! `hutch start`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;

use super::{App, each};
use crate::error::Error;
use crate::waiting;

/// Start stopped machines
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch start web
  hutch start web db --no-wait")]
pub struct Args {
    /// Names or ids of the machines
    #[arg(required = true)]
    machines: Vec<String>,
    /// Return as soon as it is accepted, not when it runs
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.machines, async |machine| {
        client.start(machine, None).await?;
        if !args.no_wait {
            waiting::until(&client, machine, Until::Status(Status::Running)).await?;
        }
        Ok(())
    })
    .await
}
