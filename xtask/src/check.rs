//! `cargo xtask check`: what a change must pass before its tests matter.

use crate::Result;
use crate::build::FEATURES;
use crate::command::{cargo, run as go, which};
use crate::{dependencies, tidy};

/// Everything.
pub fn run() -> Result {
    house_rules()?;
    go(&mut cargo(["fmt", "--all", "--check"]))?;
    go(cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--features",
        FEATURES,
    ])
    .args(["--", "-D", "warnings"]))?;
    cargo_deny()
}

/// What needs no build.
pub fn house_rules() -> Result {
    let broken: Vec<String> = [tidy::check()?, dependencies::check()?].concat();
    for rule in &broken {
        eprintln!("{rule}");
    }
    if broken.is_empty() {
        eprintln!("tidy: house rules, crate borders, licences, sources and versions are in order");
        Ok(())
    } else {
        Err(format!("{} house rules are broken", broken.len()).into())
    }
}

/// Advisories, and once more what [`dependencies`] looks at.
fn cargo_deny() -> Result {
    if which("cargo-deny").is_none() {
        eprintln!("skipped: cargo-deny is not installed, so no advisories were looked at");
        return Ok(());
    }
    let without_network = ["--all-features", "check", "bans", "licenses", "sources"];
    go(cargo(["deny"]).args(without_network))?;
    if cargo(["deny", "fetch", "db"]).output()?.status.success() {
        go(&mut cargo([
            "deny",
            "--all-features",
            "check",
            "advisories",
        ]))
    } else {
        eprintln!("skipped: the advisory database cannot be reached");
        Ok(())
    }
}
