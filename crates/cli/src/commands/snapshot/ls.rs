//! `hutch snapshot ls`.

use std::process::ExitCode;

use hutch_contract::snapshot::{Snapshot, SnapshotState};

use super::{App, stood_still};
use crate::error::Error;
use crate::ui::{age, printable, size};

/// List snapshots
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch snapshot ls
  hutch snapshot ls web --tree
  hutch snapshot ls web --json | jq .used_bytes")]
pub struct Args {
    /// Name or id of a machine [default: all]
    machine: Option<String>,
    /// Names only, as MACHINE:NAME
    #[arg(short, long)]
    quiet: bool,
    /// Show which came after which
    #[arg(long, conflicts_with = "quiet")]
    tree: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let snapshots = app.client()?.all_snapshots(args.machine.as_deref()).await?;
    let full_name = |snapshot: &Snapshot| format!("{}:{}", snapshot.machine_name, snapshot.name);
    if args.quiet {
        for snapshot in &snapshots {
            app.ui.name(&full_name(snapshot))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.tree && !app.ui.json {
        for (depth, snapshot) in tree(&snapshots) {
            let branch = match depth {
                0 => String::new(),
                depth => format!("{}└─ ", "   ".repeat(depth - 1)),
            };
            let memory = if snapshot.memory { ", memory" } else { "" };
            let line = format!(
                "{branch}{}  ({}{memory})",
                full_name(snapshot),
                age(snapshot.created_at_ms)
            );
            app.ui.line(printable(&line))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    app.ui.rows(
        ["NAME", "KIND", "USED", "STOOD STILL", "AGE", "ID"],
        &snapshots,
        |snapshot| {
            let kind = match (snapshot.state, snapshot.memory) {
                (SnapshotState::Creating, _) => "creating",
                (SnapshotState::Ready, true) => "disk, memory",
                (SnapshotState::Ready, false) => "disk",
            };
            [
                full_name(snapshot),
                kind.to_owned(),
                size(snapshot.used_bytes),
                snapshot.pause_us.map_or_else(String::new, stood_still),
                age(snapshot.created_at_ms),
                snapshot.id.to_string(),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Each after its parent, with how far it is from a root. A parent that is not listed is gone, and its children are roots.
fn tree(snapshots: &[Snapshot]) -> Vec<(usize, &Snapshot)> {
    let is_root = |snapshot: &&Snapshot| {
        let parent = snapshot.parent.as_ref();
        parent.is_none_or(|parent| snapshots.iter().all(|other| other.id != *parent))
    };
    let mut lines = Vec::new();
    let mut next: Vec<_> = snapshots
        .iter()
        .filter(is_root)
        .map(|root| (0, root))
        .collect();
    next.reverse();
    while let Some((depth, snapshot)) = next.pop() {
        lines.push((depth, snapshot));
        let children = snapshots.iter().rev();
        let children = children.filter(|other| other.parent.as_ref() == Some(&snapshot.id));
        next.extend(children.map(|child| (depth + 1, child)));
    }
    lines
}
