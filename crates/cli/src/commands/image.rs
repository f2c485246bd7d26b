//! `hutch image`: one file per verb, and one row each here.

mod bootstrap;
mod import;
mod inspect;
mod ls;
mod rm;

use std::process::ExitCode;

use clap::Subcommand;
use hutch_contract::image::ImageSource;

use super::App;
use crate::error::Error;

/// Images that machines are made from
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image ls
  hutch image bootstrap debian
  hutch image import rootfs.tar.xz --name mine")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    Import(import::Args),
    Bootstrap(bootstrap::Args),
    #[command(visible_alias = "get")]
    Inspect(inspect::Args),
    #[command(visible_alias = "delete")]
    Rm(rm::Args),
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    match args.verb {
        Verb::Ls(args) => ls::run(args, app).await,
        Verb::Import(args) => import::run(args, app).await,
        Verb::Bootstrap(args) => bootstrap::run(args, app).await,
        Verb::Inspect(args) => inspect::run(args, app).await,
        Verb::Rm(args) => rm::run(args, app).await,
    }
}

/// Where an image came from, in words.
fn origin(source: &ImageSource) -> String {
    match source {
        ImageSource::Tar => "tar".to_owned(),
        ImageSource::Ext4 => "ext4".to_owned(),
        ImageSource::Bootstrap {
            distribution,
            suite,
        } => format!("{distribution} {suite}"),
        ImageSource::Snapshot { machine, snapshot } => format!("{machine}:{snapshot}"),
        ImageSource::Busybox => "busybox".to_owned(),
    }
}
