//! `hutch delete`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::error::Kind;

use super::{App, each};
use crate::error::Error;
use crate::waiting;

/// Delete machines and their disks
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch delete web
  hutch delete --force web db
  hutch delete $(hutch list -q)")]
pub struct Args {
    /// Names or ids of the machines
    #[arg(required = true)]
    machines: Vec<String>,
    /// Do not mind machines that are not there
    #[arg(short, long)]
    force: bool,
    /// Return as soon as it is accepted, not when all is gone
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.machines, async |machine| {
        let deleting = match client.delete(machine, None).await {
            Err(error) if error.code() == Some("machine_not_found") && args.force => return Ok(()),
            result => result?,
        };
        // By id: the name may belong to another machine as soon as this one is gone.
        if let Some(machine) = deleting.filter(|_| !args.no_wait) {
            match waiting::until(&client, machine.id.as_str(), Until::Gone).await {
                Err(Error::Client(error)) if error.kind() == Kind::NotFound => {}
                result => drop(result?),
            }
        }
        Ok(())
    })
    .await
}
