//! `hutch logs`.

use std::process::ExitCode;

use super::App;
use crate::error::Error;
use crate::output;

/// Show what a machine's console printed
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch logs web
  hutch logs -f web")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    /// The console alone, nothing that a command of the image printed
    #[arg(long)]
    console: bool,
    /// Go on with what it prints from now on
    #[arg(short, long)]
    follow: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    // The console is all that there is today, so `--console` changes nothing.
    let log = app.client()?.logs(&args.machine, 0, args.follow).await?;
    output::of_bytes(log.bytes).await?;
    Ok(ExitCode::SUCCESS)
}
