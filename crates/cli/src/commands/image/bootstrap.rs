//! `hutch image bootstrap`.

use std::process::ExitCode;

use hutch_contract::image::BootstrapImage;
use hutch_contract::name::Name;

use super::App;
use crate::creating;
use crate::error::Error;

/// Make an image from a distribution's packages
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch image bootstrap debian
  hutch image bootstrap debian --suite bookworm --name bookworm
  hutch image bootstrap busybox")]
pub struct Args {
    /// What to make it from: debian, or busybox for the host's static busybox
    distribution: String,
    /// Release of the distribution [default: the host's own, else the newest known]
    #[arg(long)]
    suite: Option<String>,
    /// Name of the image [default: debian-base or busybox]
    #[arg(long)]
    name: Option<Name>,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let wanted = BootstrapImage {
        distribution: args.distribution,
        suite: args.suite,
        name: args.name,
    };
    let image = creating::image(&app.client()?, &wanted, app.ui).await?;
    if app.ui.json {
        app.ui.object(&image)?;
    } else {
        app.ui.name(image.name.as_str())?;
    }
    Ok(ExitCode::SUCCESS)
}
