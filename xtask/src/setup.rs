//! `cargo xtask setup`: the programs that Hutch and its tests run, from Debian's packages and from crates.io.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::Result;
use crate::command::{self, cargo, command, output, which};

/// A program and the Debian package that brings it.
struct Need {
    program: &'static str,
    package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// What running machines takes: QEMU by the name of the host's architecture comes besides.
const TO_RUN: [Need; 4] = [
    need("mmdebstrap", "mmdebstrap"),
    need("e2fsck", "e2fsprogs"),
    need("busybox", "busybox-static"),
    need("cc", "gcc"),
];

/// What some tests hold ours against, or run beside it.
const TO_TEST: [Need; 7] = [
    need("dockerd", "docker.io"),
    need("nft", "nftables"),
    need("ip", "iproute2"),
    need("passt", "passt"),
    need("pebble", "pebble"),
    need("mkfs.btrfs", "btrfs-progs"),
    need("mkfs.xfs", "xfsprogs"),
];

/// Likewise, and started by their packages where there is systemd.
const SERVICES: [Need; 1] = [need("caddy", "caddy")];

/// After that the package lists are loaded again before something is installed.
const LISTS_AGE: Duration = Duration::from_secs(24 * 3600);
const LISTS: &str = "/var/lib/apt/lists";

/// Installs what is missing.
pub fn run(tests: bool) -> Result {
    let qemu = match std::env::consts::ARCH {
        "aarch64" => need("qemu-system-aarch64", "qemu-system-arm"),
        _ => need("qemu-system-x86_64", "qemu-system-x86"),
    };
    let missing: Vec<_> = TO_RUN
        .iter()
        .chain([&qemu])
        .filter(|need| which(need.program).is_none())
        .map(|need| need.package)
        .chain((!Path::new("/usr/include/stdio.h").exists()).then_some("libc6-dev"))
        .collect();
    packages(&missing)?;
    if tests {
        for_tests();
    }
    if tests && which("cargo-nextest").is_none() {
        eprintln!("cargo-nextest is missing and is built now: this takes some minutes, once");
        command::run(&mut cargo(["install", "--locked", "cargo-nextest"]))?;
    }
    Ok(())
}

/// For some tests only: they say what they skip without it.
fn for_tests() {
    let missing = |needs: &[Need]| -> Vec<&'static str> {
        let missing = needs.iter().filter(|need| which(need.program).is_none());
        missing.map(|need| need.package).collect()
    };
    let mut wanted = missing(&TO_TEST);
    let services = missing(&SERVICES);
    match Path::new("/run/systemd/system").exists() {
        // There the package would start a server on the user's ports.
        true if !services.is_empty() => {
            let names = services.join(" ");
            eprintln!("skipped: the installation of {names}, which would start as a service here");
        }
        _ => wanted.extend(services),
    }
    if wanted.is_empty() {
        return;
    }
    let id = output(&mut command("id", ["-u"])).unwrap_or_default();
    let installed = match id.trim() {
        "0" => packages(&wanted),
        _ => Err("only root can install and start it".into()),
    };
    if let Err(error) = installed {
        let names = wanted.join(" ");
        eprintln!("skipped: the installation of {names}, since {error}");
    }
}

fn packages(missing: &[&str]) -> Result {
    // The kernel for guests is downloaded by apt, too.
    let lists = lists_age();
    if missing.is_empty() && lists.is_some() {
        return Ok(());
    }
    let id = output(&mut command("id", ["-u"]))?;
    if which("apt-get").is_none() {
        if missing.is_empty() {
            return Ok(());
        }
        let names = missing.join(" ");
        return Err(format!("there is no apt-get here: install what brings {names}").into());
    }
    let install = [&["install", "--yes", "--no-install-recommends"], missing].concat();
    if id.trim() != "0" {
        let update = if lists.is_none() {
            "sudo apt-get update; "
        } else {
            ""
        };
        if missing.is_empty() {
            eprintln!("apt has no package lists, which the kernel for guests needs: {update}");
            return Ok(());
        }
        return Err(format!("please run: {update}sudo apt-get {}", install.join(" ")).into());
    }
    let fresh = lists.is_some_and(|age| age < LISTS_AGE);
    if !fresh {
        apt(&["update"])?;
    }
    if missing.is_empty() {
        return Ok(());
    }
    match apt(&install) {
        Err(error) if fresh => {
            eprintln!("xtask: {error}; again with fresh package lists");
            apt(&["update"])?;
            apt(&install)
        }
        result => result,
    }
}

fn apt(arguments: &[&str]) -> Result {
    let mut apt = command("apt-get", ["--quiet=2"]);
    command::run(apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// How old the newest package list is; `None` when there is none.
fn lists_age() -> Option<Duration> {
    let lists = fs::read_dir(LISTS).ok()?.flatten();
    let lists = lists.filter(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
    let times = lists.filter_map(|entry| entry.metadata().ok()?.modified().ok());
    times
        .max()
        .map(|newest| newest.elapsed().unwrap_or_default())
}
