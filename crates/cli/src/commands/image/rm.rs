//! `hutch image rm`.

use std::process::ExitCode;

use super::App;
use crate::commands::each;
use crate::error::Error;

/// Remove images; machines made from them live on
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image rm mine
  hutch image rm --force mine old")]
pub struct Args {
    /// Names or ids of the images
    #[arg(required = true)]
    images: Vec<String>,
    /// Do not mind images that are not there
    #[arg(short, long)]
    force: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    each(app, &args.images, async |image| {
        match client.delete_image(image).await {
            Err(error) if error.code() == Some("image_not_found") && args.force => Ok(()),
            result => Ok(result?),
        }
    })
    .await
}
