//! The program inside the guest. Which of its roles it plays is decided here.
//!
//! | started as | role |
//! | --- | --- |
//! | PID 1 with `/modules` beside it | [`init`]: boots the machine and looks after the agent |
//! | `@hutch-agent guest CHANNEL` | the agent in a guest, child of the first |
//! | `hutch-agent serve --serial LINE --guest` | the agent in a guest with an init of its own, as a service of that |
//! | `hutch-agent serve …` | the agent as a plain process on a host, without a [`system::System`] |
//!
//! Exit codes of the agent, which PID 1 and other parents act on: 0 power off, [`REBOOT`] restart, 2 wrong arguments,
//! anything else a failure.

mod accounts;
mod agent;
mod calls;
mod channel;
mod dial;
mod error;
mod files;
mod init;
mod params;
mod process;
mod role;
mod status;
mod sys;
mod system;
mod uevent;

use std::process::ExitCode;

use crate::agent::Ending;
use crate::error::{chain, say};
use crate::params::{Command, USAGE};

/// Exit code of an agent that wants the machine restarted.
pub const REBOOT: u8 = 64;

fn main() -> ExitCode {
    if init::is_wanted() {
        init::run();
    }
    let command = match Command::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            say(&format!("{}\n{USAGE}", chain(&error)));
            return ExitCode::from(2);
        }
    };
    let ended = match command {
        Command::Version => {
            use std::io::Write;
            let _ = writeln!(
                std::io::stdout(),
                "hutch-agent {}",
                env!("CARGO_PKG_VERSION")
            );
            return ExitCode::SUCCESS;
        }
        Command::Serve(serve) if serve.guest => {
            // Its parent is no PID 1 of ours: a restart was asked of that one already.
            let ended = role::service(serve.channel);
            ended.map(|ending| Ending {
                reboot: false,
                ..ending
            })
        }
        Command::Serve(serve) => role::serve(serve),
        Command::Guest(channel) => role::guest(channel),
    };
    match ended {
        Ok(ending) if ending.reboot => ExitCode::from(REBOOT),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            say(&chain(&error));
            ExitCode::FAILURE
        }
    }
}
