//! `hutch get`.

use std::net::SocketAddr;
use std::process::ExitCode;

use hutch_contract::expose::{Access, DEFAULT_HTTP_PORT, Expose, Port, PortKind, PortState};
use hutch_contract::lifetime::{Restart, TtlAction};
use hutch_contract::machine::{Exit, Isolation, Machine};

use super::{App, network};
use crate::error::Error;
use crate::ui::{age, left, printable, span};

/// Show a machine
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch get web
  hutch get web --json | jq -r .id")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let machine = app.client()?.machine(&args.machine).await?;
    if app.ui.json {
        app.ui.object(&machine)?;
    } else {
        for (what, how) in facts(&machine) {
            app.ui
                .line(format_args!("{what:<10} {}", printable(&how)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a person wants to know of a machine, in that order.
fn facts(machine: &Machine) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("name", machine.name.to_string()),
        ("id", machine.id.to_string()),
        ("status", machine.status.as_str().to_owned()),
    ];
    facts.extend(machine.reason.clone().map(|reason| ("reason", reason)));
    facts.extend(
        machine
            .exit
            .as_ref()
            .map(|exit| ("last end", how_it_ended(exit))),
    );
    facts.push((
        "image",
        format!("{} ({})", machine.image_name, machine.image),
    ));
    facts.push((
        "runtime",
        format!("{}, {}", machine.runtime, isolation(machine.isolation)),
    ));
    facts.extend(machine.kernel.clone().map(|kernel| ("kernel", kernel)));
    facts.push((
        "size",
        format!(
            "{} vCPU, {} MiB, {} GiB",
            machine.vcpu, machine.memory_mib, machine.disk_gib
        ),
    ));
    facts.extend(network::facts(machine));
    facts.extend(ways(machine));
    facts.push(("created", format!("{} ago", age(machine.created_at_ms))));
    facts.extend(machine.started_at_ms.map(|at| {
        (
            "started",
            format!(
                "{} ago, {}, {} in all",
                age(at),
                if machine.warm { "warm" } else { "booted" },
                machine.starts
            ),
        )
    }));
    facts.extend(life(machine).map(|life| ("lives", life)));
    facts.extend(
        machine
            .env
            .iter()
            .map(|(key, value)| ("env", format!("{key}={value}"))),
    );
    facts.extend(
        machine
            .labels
            .iter()
            .map(|(key, value)| ("label", format!("{key}={value}"))),
    );
    facts.extend(
        machine
            .operation
            .as_ref()
            .map(|operation| ("operation", operation.to_string())),
    );
    facts.extend(
        machine
            .unapplied
            .iter()
            .map(|what| ("unapplied", what.clone())),
    );
    facts
}

/// When it rests, ends or comes back by itself.
fn life(machine: &Machine) -> Option<String> {
    let life = &machine.lifetime;
    let idle = life.idle_pause_s.map(|idle| {
        let idle = span(idle.into());
        format!("paused when unused for {idle}")
    });
    let end = life.ttl_s.map(|ttl| {
        let what = match life.ttl_action.unwrap_or_default() {
            TtlAction::Pause => "paused",
            TtlAction::Stop => "stopped",
            TtlAction::Delete => "deleted",
        };
        match machine.expires_at_ms {
            Some(at) => format!("{what} in {}", left(at)),
            None => format!("{what} {} after it goes on", span(ttl.into())),
        }
    });
    let back = match life.restart.unwrap_or_default() {
        Restart::Never => None,
        Restart::OnFailure => Some("started again after a failure".to_owned()),
        Restart::Always => Some("always started again".to_owned()),
    };
    let all: Vec<_> = [idle, end, back].into_iter().flatten().collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// How it is reached from outside.
fn ways(machine: &Machine) -> Vec<(&'static str, String)> {
    let mut ways = Vec::new();
    if let Some(url) = &machine.url {
        let access = match machine.access {
            Some(Access::Public) => "everybody",
            _ => "keys and tokens",
        };
        let port = machine.http_port.unwrap_or(DEFAULT_HTTP_PORT);
        ways.push(("url", format!("{url} -> {port}, for {access}")));
        let more = machine.urls.iter();
        ways.extend(more.map(|(port, url)| ("url", format!("{url} -> {port}"))));
        if machine.expose == Expose::ALL {
            ways.push(("urls", "of every port, as PORT-NAME".to_owned()));
        }
    }
    ways.extend(machine.ports.iter().map(|one| ("port", port(one))));
    ways
}

/// A port of the host and where it leads.
pub fn port(port: &Port) -> String {
    let from = SocketAddr::new(port.bind, port.host_port);
    let mut text = format!("{from} -> {}", port.guest_port);
    if port.kind == PortKind::Ssh {
        text += ", SSH";
    }
    if port.state == PortState::Waiting {
        text += ", not listening";
    }
    if let Some(reason) = &port.reason {
        text += &format!(": {reason}");
    }
    text
}

fn how_it_ended(exit: &Exit) -> String {
    match exit {
        Exit::PowerOff => "powered off by the guest".to_owned(),
        Exit::Reboot => "rebooted by the guest".to_owned(),
        Exit::Panic => "the guest's kernel gave up".to_owned(),
        Exit::Killed => "ended as was wanted".to_owned(),
        Exit::Code { code } => {
            format!("the virtual machine monitor ended by itself with code {code}")
        }
        Exit::Signal { signal } => {
            format!("the virtual machine monitor was ended by signal {signal}")
        }
        Exit::Lost => "gone, and nobody saw how".to_owned(),
    }
}

/// How well a machine is kept apart, in words.
pub fn isolation(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::Hardware => "hardware virtualization",
        Isolation::Emulation => "emulation, no security boundary",
        Isolation::SharedKernel => "shared kernel",
        Isolation::None => "no isolation",
    }
}
