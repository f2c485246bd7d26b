//! `hutch exec`.

use std::process::ExitCode;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_contract::exec::Exec;
use tokio::io::AsyncReadExt;

use super::App;
use crate::arguments::{Surroundings, key_value, map};
use crate::error::Error;
use crate::output;

/// The most that can be piped into a command.
const MAX_STDIN_BYTES: u64 = 1024 * 1024;

/// Run a command in a machine
///
/// Its output appears as it comes, and its exit code becomes that of hutch; 125 means that not the command failed but
/// we did.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch exec web -- uname -a
  hutch exec -e MODE=test -w /srv web -- make check
  hutch exec -i web -- sh < setup.sh")]
pub struct Args {
    /// Pipe standard input into the command, up to 1 MiB
    #[arg(short, long)]
    interactive: bool,
    /// Environment of the command
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    surroundings: Surroundings,
    /// Name or id of the machine
    machine: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let stdin = if args.interactive {
        Some(BASE64_STANDARD.encode(standard_input().await?))
    } else {
        None
    };
    let exec = Exec {
        stdin_base64: stdin,
        ..args.surroundings.exec(args.command, map(&args.env))
    };
    let events = client.exec_stream(&args.machine, &exec).await?;
    let exit = output::of_command(events, app.ui).await?;
    Ok(output::exit_code(&exit))
}

async fn standard_input() -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let mut limited = tokio::io::stdin().take(MAX_STDIN_BYTES + 1);
    let read = limited.read_to_end(&mut bytes).await;
    read.map_err(|source| Error::Process {
        action: "read standard input",
        source,
    })?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        return Err(Error::StdinTooLarge);
    }
    Ok(bytes)
}
