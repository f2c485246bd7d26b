//! `hutch snapshot rm`.

use std::process::ExitCode;

use super::App;
use crate::commands::each;
use crate::error::Error;

/// Remove snapshots; machines made from them live on
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch snapshot rm web:before
  hutch snapshot rm --force web:s1 web:s2")]
pub struct Args {
    /// Ids of the snapshots, or MACHINE:NAME
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
    /// Do not mind snapshots that are not there
    #[arg(short, long)]
    force: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.snapshots, async |snapshot| {
        match client.delete_snapshot(snapshot).await {
            Err(error) if error.code() == Some("snapshot_not_found") && args.force => Ok(()),
            result => Ok(result?),
        }
    })
    .await
}
