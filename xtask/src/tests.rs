//! `cargo xtask test`, `bless` and `bench`.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use crate::Result;
use crate::build::{self, FEATURES};
use crate::command::{self, cargo, command, output};
use crate::{agent, docker, setup};

/// Which tests.
#[derive(ClapArgs)]
pub struct Args {
    /// Only those of the crates, without real guests
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only those of `tests/`, with real servers and guests
    #[arg(long)]
    e2e: bool,
    /// Further arguments of `cargo nextest run`
    #[arg(last = true)]
    nextest: Vec<String>,
}

/// Builds everything in one go and runs the tests.
pub fn run(args: &Args) -> Result {
    setup::run(true)?;
    agent::build(false)?;
    // Programs and tests together: the tests of one crate start the programs of another.
    command::run(&mut cargo([
        "build",
        "--workspace",
        "--all-targets",
        "--features",
        FEATURES,
    ]))?;
    let mut nextest = cargo(["nextest", "run", "--workspace", "--features", FEATURES]);
    if let Some(kernel) = test_kernel() {
        nextest.env("HUTCH_TEST_MODULES", kernel.with_file_name("boot"));
        nextest.env("HUTCH_TEST_KERNEL", kernel);
    }
    // Lives until the tests have ended.
    let engine = match std::env::var_os("HUTCH_TEST_DOCKER") {
        Some(_) => None,
        None => docker::start()?,
    };
    if let Some(engine) = &engine {
        nextest.env("HUTCH_TEST_DOCKER", engine.socket());
    }
    match args {
        Args { unit: true, .. } => nextest.args(["--exclude", "hutch-tests"]),
        Args { e2e: true, .. } => nextest.args(["-E", "package(hutch-tests)"]),
        _ => &mut nextest,
    };
    command::run(nextest.args(&args.nextest))
}

/// A kernel for the tests that put guests of their own together. Without it they say what they skip.
fn test_kernel() -> Option<PathBuf> {
    let program = crate::profile_dir(false).join("test-kernel");
    match output(&mut command::<&str>(&program.to_string_lossy(), [])) {
        Ok(path) => Some(PathBuf::from(path.trim())),
        Err(error) => {
            eprintln!("skipped: tests with guests of their own, since {error}");
            None
        }
    }
}

/// Writes the golden files anew. What changed is to be read in the diff.
pub fn bless() -> Result {
    let mut nextest = cargo(["nextest", "run", "--workspace", "--exclude", "hutch-tests"]);
    let nextest = nextest.args(["--features", FEATURES, "--no-fail-fast"]);
    command::run(nextest.envs([("UPDATE_GOLDEN", "1"), ("INSTA_UPDATE", "always")]))
}

/// Measures boots. The measuring programs are in `tests/`, with the harness that they share.
pub fn bench_boot(n: u32, machines: u32, release: bool) -> Result {
    bench(
        "bench-boot",
        &[n.to_string(), machines.to_string()],
        release,
    )
}

/// Measures warm starts, snapshots, forks, and how many machines there can be.
pub fn bench_snapshot(n: u32, machines: u32, release: bool) -> Result {
    bench(
        "bench-snapshot",
        &[n.to_string(), machines.to_string()],
        release,
    )
}

/// Measures networks of machines, and the ways into them.
pub fn bench_net(parts: &[String], release: bool) -> Result {
    bench("bench-net", parts, release)
}

fn bench(program: &str, arguments: &[String], release: bool) -> Result {
    setup::run(false)?;
    build::run(release)?;
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    command::run(
        cargo([
            "run",
            "--quiet",
            "--package",
            "hutch-tests",
            "--bin",
            program,
        ])
        .args(profile)
        .arg("--")
        .args(arguments)
        .env("HUTCH_TEST_PROGRAMS", crate::profile_dir(release)),
    )
}
