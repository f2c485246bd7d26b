//! `hutch list`.

use std::process::ExitCode;

use hutch_contract::machine::{Machine, Status};

use super::App;
use crate::error::Error;
use crate::ui::age;

/// List machines
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch list
  hutch list --status failed
  hutch delete $(hutch list -q)")]
pub struct Args {
    /// Names only
    #[arg(short, long)]
    quiet: bool,
    /// Only machines in this state
    #[arg(long, value_parser = status)]
    status: Option<Status>,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let machines = app.client()?.all_machines(args.status).await?;
    if args.quiet {
        for machine in &machines {
            app.ui.name(machine.name.as_str())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let heads = [
        "NAME", "STATUS", "IMAGE", "RUNTIME", "VCPU", "MEMORY", "DISK", "AGE", "URL", "PORTS",
    ];
    app.ui.rows(heads, &machines, |machine| {
        [
            machine.name.to_string(),
            machine.status.as_str().to_owned(),
            machine.image_name.to_string(),
            machine.runtime.clone(),
            machine.vcpu.to_string(),
            format!("{} MiB", machine.memory_mib),
            format!("{} GiB", machine.disk_gib),
            age(machine.created_at_ms),
            machine.url.clone().unwrap_or_default(),
            ports(machine),
        ]
    })?;
    Ok(ExitCode::SUCCESS)
}

/// `HOST->GUEST` of each, in a few characters.
fn ports(machine: &Machine) -> String {
    let ports = machine.ports.iter();
    let each = ports.map(|port| format!("{}->{}", port.host_port, port.guest_port));
    each.collect::<Vec<_>>().join(",")
}

fn status(text: &str) -> Result<Status, String> {
    let found = Status::ALL
        .into_iter()
        .find(|status| status.as_str() == text);
    found.ok_or_else(|| {
        format!(
            "expected one of {}",
            Status::ALL.map(Status::as_str).join(", ")
        )
    })
}
