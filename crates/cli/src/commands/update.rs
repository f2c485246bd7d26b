//! `hutch update`.

use std::process::ExitCode;

use clap::ArgGroup;
use hutch_contract::expose::ChangeMachine;

use super::App;
use crate::arguments::Life;
use crate::error::Error;

/// Change when a machine rests, ends or comes back by itself
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["idle_pause", "ttl", "ttl_action", "restart"])))]
#[command(after_help = "Examples:
  hutch update web --idle-pause 10m
  hutch update web --ttl 1h                        an hour from now
  hutch update web --ttl never --idle-pause never
  hutch update web --restart always                also after a reboot of the host")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    #[command(flatten)]
    life: Life,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let change = ChangeMachine {
        lifetime: Some(args.life.request()),
        ..ChangeMachine::default()
    };
    let machine = app.client()?.change(&args.machine, &change).await?;
    if app.ui.json {
        app.ui.object(&machine)?;
    } else {
        app.ui.name(machine.name.as_str())?;
    }
    Ok(ExitCode::SUCCESS)
}
