//! `hutch create`.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;

use super::App;
use crate::arguments::Shape;
use crate::creating::{create, idempotency_key, show_timings};
use crate::error::Error;
use crate::waiting;

/// Create a machine and wait until it runs
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch create debian-base --name web
  hutch create busybox --memory 256 --env MODE=test --label team=a
  hutch create debian-base --name web --cold --timings
  hutch create debian-base --name web --publish 8000:80 --public --expose 3000")]
pub struct Args {
    #[command(flatten)]
    shape: Shape,
    /// Return as soon as it is accepted, not when it runs
    #[arg(long, conflicts_with = "timings")]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let mut machine = create(&client, &args.shape.request(), &idempotency_key(), app.ui).await?;
    if !args.no_wait {
        let running =
            waiting::until(&client, machine.id.as_str(), Until::Status(Status::Running)).await?;
        machine = running.unwrap_or(machine);
    }
    if args.shape.timings {
        show_timings(&machine, app.ui);
    }
    if app.ui.json {
        app.ui.object(&machine)?;
    } else {
        app.ui.name(machine.name.as_str())?;
    }
    Ok(ExitCode::SUCCESS)
}
