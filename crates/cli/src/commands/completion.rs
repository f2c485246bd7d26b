//! `hutch completion`.

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::error::Error;

/// Print a script that completes hutch's arguments in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch completion bash > /etc/bash_completion.d/hutch
  hutch completion zsh > ~/.zfunc/_hutch")]
pub struct Args {
    /// The shell
    shell: Shell,
}

pub fn run(args: Args) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "hutch", &mut script);
    std::io::stdout()
        .write_all(&script)
        .map_err(Error::stdout)?;
    Ok(ExitCode::SUCCESS)
}
