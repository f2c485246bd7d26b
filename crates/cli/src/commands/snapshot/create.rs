//! `hutch snapshot create`.

use std::process::ExitCode;

use hutch_contract::name::Name;
use hutch_contract::snapshot::{CreateSnapshot, SnapshotImage};

use super::{App, stood_still};
use crate::error::Error;
use crate::waiting;

/// Take a snapshot of a machine; it stands still for a moment
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch snapshot create web
  hutch snapshot create web before
  hutch snapshot create web before --memory
  hutch snapshot create web --as-image mine && hutch create mine")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    /// Name of the snapshot [default: s1, s2, ...]
    name: Option<Name>,
    /// Keep its memory too: after a restore, what runs in it goes on from there
    #[arg(short, long)]
    memory: bool,
    /// Make an image of its disk, too; host keys and the like are in it
    #[arg(long, value_name = "NAME", conflicts_with = "no_wait")]
    as_image: Option<Name>,
    /// Return as soon as it is accepted, not when it is ready
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let request = CreateSnapshot {
        name: args.name,
        memory: args.memory,
    };
    let mut snapshot = client.take_snapshot(&args.machine, &request, None).await?;
    if !args.no_wait
        && let Some(operation) = &snapshot.operation
    {
        waiting::operation(&client, operation, app.ui).await?;
        snapshot = client.snapshot(snapshot.id.as_str()).await?;
    }
    if let Some(name) = args.as_image {
        let image = SnapshotImage { name };
        let accepted = client.snapshot_image(snapshot.id.as_str(), &image).await?;
        waiting::operation(&client, &accepted.operation, app.ui).await?;
    }
    if app.ui.json {
        app.ui.object(&snapshot)?;
    } else {
        app.ui.name(snapshot.name.as_str())?;
        if let Some(us) = snapshot.pause_us {
            app.ui
                .say(format!("The machine stood still for {}.", stood_still(us)));
        }
    }
    Ok(ExitCode::SUCCESS)
}
