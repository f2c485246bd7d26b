//! `hutch runtime install`.

use std::process::ExitCode;

use hutch_server::Flags;
use serde_json::json;

use super::App;
use crate::commands::serve;
use crate::error::Error;
use crate::install::{self, Order, Release};
use crate::ui::printable;

/// Download a runtime's official release into the data directory
///
/// Works on this machine and needs no server; one that runs finds the program by itself. The version that is taken
/// without --version is compared with a checksum that is built in. Other versions are compared with the checksum that
/// is published beside them, or with --sha256.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch runtime install firecracker
  hutch runtime install cloud-hypervisor
  hutch runtime install firecracker --version 1.14.0 --from https://mirror.example/firecracker")]
pub struct Args {
    /// firecracker (with its jailer) or cloud-hypervisor
    name: String,
    /// Which version [default: the one that this hutch was tested with]
    #[arg(long)]
    version: Option<String>,
    /// Where versions are instead of the makers' own place: URL/vVERSION/FILE
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// sha256 that the downloaded file must have
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let flags = Flags {
        data_dir: app.place.data_dir.clone(),
        ..Flags::default()
    };
    let programs = serve::load(app, flags)?.config.programs_dir();
    let order = Order {
        release: Release::of(&args.name)?,
        version: args.version,
        from: args.from,
        sha256: args.sha256,
    };
    let installed = install::install(order, &programs, app.ui).await?;
    if app.ui.json {
        let (version, paths) = (installed.version, installed.paths);
        app.ui
            .object(&json!({ "name": args.name, "version": version, "paths": paths }))?;
        return Ok(ExitCode::SUCCESS);
    }
    app.ui.say(format!(
        "{} {} is installed.",
        printable(&args.name),
        installed.version
    ));
    for path in &installed.paths {
        app.ui.line(printable(&path.to_string_lossy()))?;
    }
    Ok(ExitCode::SUCCESS)
}
