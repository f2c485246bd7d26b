//! `hutch image inspect`.

use std::process::ExitCode;

use super::{App, origin};
use crate::error::Error;
use crate::ui::{age, printable, size};

/// Show an image
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image inspect debian-base
  hutch image inspect debian-base --json")]
pub struct Args {
    /// Name or id of the image
    image: String,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let image = app.client()?.image(&args.image).await?;
    if app.ui.json {
        app.ui.object(&image)?;
        return Ok(ExitCode::SUCCESS);
    }
    let facts = [
        ("name", image.name.to_string()),
        ("id", image.id.to_string()),
        ("from", origin(&image.source)),
        (
            "disk",
            format!(
                "{}, {} used",
                size(image.size_bytes),
                size(image.used_bytes)
            ),
        ),
        ("sha256", image.sha256),
        ("created", format!("{} ago", age(image.created_at_ms))),
    ];
    for (what, how) in facts {
        app.ui
            .line(format_args!("{what:<10} {}", printable(&how)))?;
    }
    Ok(ExitCode::SUCCESS)
}
