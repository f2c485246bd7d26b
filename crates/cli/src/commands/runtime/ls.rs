//! `hutch runtime ls`.

use std::process::ExitCode;

use super::App;
use crate::commands::get::isolation;
use crate::error::Error;

/// List what can run machines on the server's host
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch runtime ls
  hutch runtime ls --json | jq -r 'select(.usable).path'")]
pub struct Args {}

pub async fn run(_: Args, app: &App) -> Result<ExitCode, Error> {
    let runtimes = app.client()?.runtimes().await?;
    app.ui.rows(
        [
            "NAME",
            "USABLE",
            "VERSION",
            "ACCELERATION",
            "ISOLATION",
            "NOTE",
        ],
        &runtimes,
        |runtime| {
            let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            [
                runtime.name.clone(),
                if runtime.usable { "yes" } else { "no" }.to_owned(),
                or_dash(&runtime.version),
                or_dash(&runtime.acceleration),
                isolation(runtime.capabilities.isolation).to_owned(),
                runtime.reason.clone().unwrap_or_default(),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
