//! `hutch runtime`: nouns and verbs of runtimes.

use std::process::ExitCode;

use super::App;
use super::get::isolation;
use crate::error::Error;

/// What can run machines
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch runtime ls")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List what can run machines on the server's host
    #[command(
        visible_alias = "list",
        after_help = "Examples:
  hutch runtime ls
  hutch runtime ls --json"
    )]
    Ls,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let Verb::Ls = args.verb;
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
