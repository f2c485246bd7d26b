//! `hutch fork`.

use std::process::ExitCode;

use hutch_contract::client::{Client, Until};
use hutch_contract::machine::{Machine, Status};
use hutch_contract::name::Name;
use hutch_contract::snapshot::{Copied, ForkMachine, MAX_FORK};

use super::App;
use super::snapshot::stood_still;
use crate::creating::{idempotency_key, unless_unknown};
use crate::error::Error;
use crate::waiting;

/// Make copies of a machine, each with a name, an address and an identity of its own
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch fork web
  hutch fork web -n 3 --prefix try
  hutch fork web --from before --name web-old
  hutch fork web -n 20 --memory")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    /// How many copies [default: 1]
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FORK)))]
    count: Option<u32>,
    /// Go on from the machine's memory instead of booting from its disk
    #[arg(short, long)]
    memory: bool,
    /// As it was at this snapshot [default: as it is now]
    #[arg(long, value_name = "SNAPSHOT")]
    from: Option<String>,
    /// Name of a copy; once for each [default: three words]
    #[arg(long)]
    name: Vec<Name>,
    /// Names PREFIX-1, PREFIX-2, ...
    #[arg(long, conflicts_with = "name")]
    prefix: Option<Name>,
    /// Return as soon as it is accepted, not when the copies run
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let request = ForkMachine {
        count: args.count,
        memory: args.memory,
        snapshot: args.from,
        names: args.name,
        name_prefix: args.prefix,
    };
    let key = idempotency_key();
    let forked =
        unless_unknown(async || client.fork(&args.machine, &request, None, Some(&key)).await)
            .await?;
    if let Some(us) = forked.pause_us {
        app.ui
            .say(format!("The machine stood still for {}.", stood_still(us)));
    }
    let copies = forked.copies.into_iter();
    let copies = copies.map(|copy| arrived(&client, copy, !args.no_wait));
    let mut first_failure = None;
    for copy in futures::future::join_all(copies).await {
        match copy {
            Ok(machine) if app.ui.json => app.ui.object(&machine)?,
            Ok(machine) => app.ui.name(machine.name.as_str())?,
            Err(error) => {
                error.report(app.ui);
                first_failure.get_or_insert(error.exit_code(None));
            }
        }
    }
    match first_failure {
        Some(exit_code) => Err(Error::Reported { exit_code }),
        None => Ok(ExitCode::SUCCESS),
    }
}

async fn arrived(client: &Client, copy: Copied, wait: bool) -> Result<Machine, Error> {
    match copy {
        Copied::Machine(machine) if wait => {
            let running = Until::Status(Status::Running);
            let now = waiting::until(client, machine.id.as_str(), running).await?;
            Ok(now.unwrap_or(*machine))
        }
        Copied::Machine(machine) => Ok(*machine),
        Copied::Error { message, hint, .. } => Err(Error::Operation { message, hint }),
    }
}
