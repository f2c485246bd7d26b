//! `cargo xtask build` and `dev`: `hutch` with its agent.

use std::process::Child;
use std::time::{Duration, SystemTime};

use crate::Result;
use crate::agent;
use crate::command::{self, cargo, command};

/// What every debug build has: the runtime for tests. One set for all tasks, so that none rebuilds what another built.
pub const FEATURES: &str = "hutch-cli/stub,hutch-engine/stub,hutch-runtime/stub";

/// Builds the agent and the programs.
pub fn run(release: bool) -> Result {
    agent::build(release)?;
    if release {
        command::run(&mut cargo(["build", "--release", "--package", "hutch-cli"]))
    } else {
        command::run(&mut cargo([
            "build",
            "--workspace",
            "--bins",
            "--features",
            FEATURES,
        ]))
    }
}

/// Rebuilds and restarts the server until it is interrupted. Machines outlive each server.
pub fn dev(serve: &[String]) -> Result {
    let mut server: Option<Child> = None;
    let mut built = None;
    loop {
        let newest = newest_source()?;
        if built != Some(newest) {
            built = Some(newest);
            match run(false) {
                Ok(()) => {
                    if let Some(mut old) = server.take() {
                        // Asked, so that it closes its store in order.
                        command("kill", [old.id().to_string()]).status()?;
                        old.wait()?;
                    }
                    let hutch = crate::profile_dir(false).join("hutch");
                    let hutch = hutch.to_str().ok_or("the target directory is not UTF-8")?;
                    server = Some(command(hutch, ["serve"]).args(serve).spawn()?);
                }
                Err(error) => eprintln!("xtask: {error}; waiting for a change"),
            }
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn newest_source() -> Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for file in crate::tidy::sources()? {
        newest = newest.max(crate::root().join(file).metadata()?.modified()?);
    }
    Ok(newest)
}
