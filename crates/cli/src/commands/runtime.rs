//! `hutch runtime`: one file per verb, and one row each here.

mod install;
mod ls;

use std::process::ExitCode;

use clap::Subcommand;

use super::App;
use crate::error::Error;

/// What can run machines
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch runtime ls
  hutch runtime install firecracker")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    Install(install::Args),
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    match args.verb {
        Verb::Ls(args) => ls::run(args, app).await,
        Verb::Install(args) => install::run(args, app).await,
    }
}
