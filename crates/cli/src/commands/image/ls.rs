//! `hutch image ls`.

use std::process::ExitCode;

use super::{App, origin};
use crate::error::Error;
use crate::ui::{age, size};

/// List images
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image ls
  hutch image ls -q")]
pub struct Args {
    /// Names only
    #[arg(short, long)]
    quiet: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let images = app.client()?.all_images().await?;
    if args.quiet {
        for image in &images {
            app.ui.name(image.name.as_str())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    app.ui.rows(
        ["NAME", "FROM", "DISK", "USED", "AGE", "ID"],
        &images,
        |image| {
            [
                image.name.to_string(),
                origin(&image.source),
                size(image.size_bytes),
                size(image.used_bytes),
                age(image.created_at_ms),
                image.id.to_string(),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
