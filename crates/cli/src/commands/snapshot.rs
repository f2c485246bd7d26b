//! `hutch snapshot`: one file per verb, and one row each here.

mod create;
mod ls;
mod rm;

use std::process::ExitCode;

use clap::Subcommand;

use super::App;
use crate::error::Error;

/// Keep machines as they are, to restore or fork them later
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch snapshot create web before
  hutch restore web before
  hutch snapshot ls web --tree")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    #[command(visible_alias = "delete")]
    Rm(rm::Args),
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    match args.verb {
        Verb::Create(args) => create::run(args, app).await,
        Verb::Ls(args) => ls::run(args, app).await,
        Verb::Rm(args) => rm::run(args, app).await,
    }
}

/// A time that machines stood still for.
pub fn stood_still(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}
