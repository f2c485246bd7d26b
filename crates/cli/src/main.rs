//! `hutch`: server and command line in one program.
//!
//! The hidden subcommands `shim` and `build-disk` are children of the server; they come before argument parsing and
//! threads, because they must stay small and single-threaded.

mod arguments;
mod commands;
mod creating;
mod error;
mod install;
mod output;
mod progress;
mod signals;
mod target;
mod transfer;
mod ui;
mod waiting;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::commands::{App, Command};
use crate::error::OURS;
use crate::target::Place;
use crate::ui::Ui;

/// MicroVMs on your own machine: boot one, run a command in it, keep it or throw it away
#[derive(Debug, Parser)]
#[command(
    name = "hutch",
    version,
    propagate_version = false,
    disable_help_subcommand = true
)]
#[command(after_help = "Examples:
  hutch run debian-base -- cat /etc/os-release   a command in a machine that lives as long as it
  hutch create debian-base --name web            a machine that stays
  hutch exec web -- uname -a                     a command in it
  hutch doctor                                   what this host can do, and how it could do more")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Write JSON for programs, one object a line
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

fn main() -> ExitCode {
    if let Some(ended) = commands::serve::hidden(std::env::args_os().nth(1).as_deref()) {
        return ended;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            let _nobody_listens = usage.print();
            let code = if usage.use_stderr() && asks_for_a_command(std::env::args_os()) {
                OURS.into()
            } else {
                usage.exit_code()
            };
            return ExitCode::from(u8::try_from(code).unwrap_or(OURS));
        }
    };
    let ours = cli.command.passes_exit_code_on().then_some(OURS);
    let app = App {
        ui: Ui { json: cli.json },
        place: cli.place,
    };
    let ended = tokio::runtime::Runtime::new()
        .map_err(|source| error::Error::Process {
            action: "start threads",
            source,
        })
        .and_then(|runtime| {
            let ended = runtime.block_on(cli.command.run(&app));
            // A thread that still reads standard input would never be done.
            runtime.shutdown_background();
            ended
        });
    ended.unwrap_or_else(|error| {
        error.report(app.ui);
        ExitCode::from(error.exit_code(ours))
    })
}

/// Whether wrong arguments are those of `run` or `exec`, whose exit codes belong to the command in the machine.
fn asks_for_a_command(arguments: impl Iterator<Item = OsString>) -> bool {
    let mut arguments = arguments.skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("run" | "exec") => return true,
            Some("--url" | "--data-dir") => drop(arguments.next()),
            Some(option) if option.starts_with('-') => {}
            _ => return false,
        }
    }
    false
}
