//! `hutch network`.

use std::process::ExitCode;

use hutch_contract::machine::Machine;
use hutch_contract::network::{MachineNetwork, NetworkMode};

use super::App;
use crate::arguments::Policy;
use crate::error::Error;
use crate::ui::printable;

/// Show whom a machine may talk to, or change it
///
/// With any of the options the machine gets just the policy that they say, at once: connections that it denies are
/// ended, others go on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch network web
  hutch network web --egress public --group backend
  hutch network builder --egress none --allow crates.io --allow '*.crates.io'")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    #[command(flatten)]
    policy: Policy,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let machine = match args.policy.is_given() {
        true => {
            let policy = args.policy.request();
            client.set_network(&args.machine, &policy).await?
        }
        false => client.machine(&args.machine).await?,
    };
    if app.ui.json {
        app.ui.object(&machine.network)?;
        return Ok(ExitCode::SUCCESS);
    }
    for (what, how) in facts(&machine) {
        app.ui
            .line(format_args!("{what:<10} {}", printable(&how)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a person wants to know of a machine's network, in that order.
pub fn facts(machine: &Machine) -> Vec<(&'static str, String)> {
    let Some(network) = &machine.network else {
        return Vec::new();
    };
    let mut facts = vec![("network", in_words(network))];
    let policy = &network.policy;
    for (what, list) in [("allow", &policy.allow), ("deny", &policy.deny)] {
        facts.extend(list.iter().map(|entry| (what, entry.clone())));
    }
    facts.extend(
        policy
            .groups
            .iter()
            .map(|group| ("group", group.to_string())),
    );
    facts
}

fn in_words(network: &MachineNetwork) -> String {
    let addresses = [
        network.ipv4.map(|address| address.to_string()),
        network.ipv6.map(|address| address.to_string()),
    ];
    let addresses = addresses.into_iter().flatten().collect::<Vec<_>>();
    let egress = network.policy.egress.as_str();
    match network.mode {
        NetworkMode::Routed | NetworkMode::Bridge => {
            format!("{egress}, {}", addresses.join(", "))
        }
        NetworkMode::User => egress.to_owned(),
        NetworkMode::None => "none; ports are reached through the agent".to_owned(),
        NetworkMode::Runtime => "the runtime's own".to_owned(),
    }
}
