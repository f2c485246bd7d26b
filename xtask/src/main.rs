//! `cargo xtask`: everything that is done to this repository, so that a developer and the automation do the same.
//!
//! One file per task. What the product does belongs into the product; what needs its crates belongs into `tests/`.

mod agent;
mod build;
mod check;
mod command;
mod dependencies;
mod docker;
mod lab;
mod setup;
mod tests;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What a task ends with: a sentence for the person who started it.
type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Builds, checks, tests and measures Hutch
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Xtask {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the programs that builds and tests need; as an ordinary user say which are missing
    Setup {
        /// What only tests need, too
        #[arg(long)]
        tests: bool,
    },
    /// Build the guest's agent: static and small
    Agent {
        /// Put it beside the release build
        #[arg(long)]
        release: bool,
    },
    /// Build the agent and `hutch`
    Build {
        /// As it is shipped: optimised, without the runtime for tests
        #[arg(long)]
        release: bool,
    },
    /// Format, lints, dependencies, house rules
    Check {
        /// Only the house rules and dependencies, which need no build
        #[arg(long)]
        tidy: bool,
    },
    /// Build and run the tests
    Test(tests::Args),
    /// Measure; prints lines `NAME: ratio …`
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Test where KVM is real: in an emulated machine with virtualization
    Lab(lab::Args),
    /// Rewrite golden files after a wanted change
    Bless,
    /// Rebuild and restart `hutch serve` whenever a source file changes
    Dev {
        /// Arguments of `hutch serve`
        #[arg(last = true)]
        serve: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Create to first exec through the server, against the same guest started bare
    Boot {
        /// How many times each, in turn
        #[arg(short, default_value_t = 10)]
        n: u32,
        /// Machines that run when the server's memory is read
        #[arg(long, default_value_t = 20)]
        machines: u32,
        /// Measure the debug build
        #[arg(long)]
        debug: bool,
    },
    /// Warm starts against the same VMM restored bare, snapshots, forks, many machines
    Snapshot {
        /// How many times each, in turn
        #[arg(short, default_value_t = 10)]
        n: u32,
        /// Machines that run at once in the end; 0: that is left out
        #[arg(long, default_value_t = 100)]
        machines: u32,
        /// Measure the debug build
        #[arg(long)]
        debug: bool,
    },
    /// Networks of machines, the gateway against Caddy, many connections, floods; takes root
    Net {
        /// Which of them; by default all
        #[arg(value_parser = ["taps", "http", "connections", "floods"])]
        parts: Vec<String>,
        /// Measure the debug build
        #[arg(long)]
        debug: bool,
    },
}

fn main() -> ExitCode {
    let done = match Xtask::parse().task {
        Task::Setup { tests } => setup::run(tests),
        Task::Agent { release } => agent::build(release).map(drop),
        Task::Build { release } => build::run(release),
        Task::Check { tidy: true } => check::house_rules(),
        Task::Check { tidy: false } => check::run(),
        Task::Test(args) => tests::run(&args),
        Task::Bench {
            what: Bench::Boot { n, machines, debug },
        } => tests::bench_boot(n, machines, !debug),
        Task::Bench {
            what: Bench::Snapshot { n, machines, debug },
        } => tests::bench_snapshot(n, machines, !debug),
        Task::Bench {
            what: Bench::Net { parts, debug },
        } => tests::bench_net(&parts, !debug),
        Task::Lab(args) => lab::run(args),
        Task::Bless => tests::bless(),
        Task::Dev { serve } => build::dev(&serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The top of the repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask/ lies in the repository")
}

/// Where cargo builds to.
fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// The directory of a profile.
fn profile_dir(release: bool) -> PathBuf {
    target_dir().join(if release { "release" } else { "debug" })
}
