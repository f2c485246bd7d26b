//! `hutch start`, `stop`, `restart`, `pause` and `resume`: the levels that machines are wanted at.

use std::process::ExitCode;

use hutch_contract::client::Until;
use hutch_contract::machine::Status;

use super::{App, each};
use crate::error::Error;
use crate::waiting;

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub enum Level {
    /// That it runs.
    Start,
    /// That it does not.
    Stop,
    /// That it stops and runs again.
    Restart,
    /// That it keeps its memory and does not execute.
    Pause,
    /// That it goes on.
    Resume,
}

/// Which machines.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids of the machines
    #[arg(required = true)]
    machines: Vec<String>,
    /// Return as soon as it is accepted, not when it has happened
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(level: Level, args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.machines, async |machine| {
        let target = match level {
            Level::Start => client.start(machine, None).await.map(|_| Status::Running),
            Level::Stop => client.stop(machine, None).await.map(|_| Status::Stopped),
            Level::Pause => client.pause(machine, None).await.map(|_| Status::Paused),
            Level::Resume => client.resume(machine, None).await.map(|_| Status::Running),
            Level::Restart => client.restart(machine, None).await.map(|_| Status::Running),
        }?;
        if !args.no_wait {
            waiting::until(&client, machine, Until::Status(target)).await?;
        }
        Ok(())
    })
    .await
}
