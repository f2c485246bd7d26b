//! Kernel packages from the distribution, by `apt-get download`, which needs no root and respects
//! the mirrors and proxies that the host's apt is set up with.

use crate::error::{Error, printable};
use crate::progress::{OnProgress, Progress};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Packages that stand for "the newest kernel for virtual machines", best first, per architecture
/// as Rust names it.
const KERNELS: [(&str, &[&str]); 2] = [
    (
        "x86_64",
        &[
            "linux-image-cloud-amd64",
            "linux-image-virtual",
            "linux-image-amd64",
        ],
    ),
    (
        "aarch64",
        &[
            "linux-image-cloud-arm64",
            "linux-image-virtual",
            "linux-image-arm64",
        ],
    ),
];

/// Downloaded packages.
pub(crate) struct Packages {
    /// The kernel's package, and one for its modules where that is another.
    pub(crate) files: Vec<PathBuf>,
    /// Package and version.
    pub(crate) key: String,
}

/// Downloads the distribution's kernel to the directory `into`.
pub(crate) fn download_kernel(into: &Path, progress: OnProgress<'_>) -> Result<Packages, Error> {
    progress(Progress::step("looking for the distribution's kernel", 0));
    let candidates = KERNELS
        .iter()
        .find(|(architecture, _)| *architecture == std::env::consts::ARCH)
        .map_or(&[][..], |(_, names)| names);
    for meta in candidates {
        let Some(image) = dependency(meta, "linux-image-")? else {
            continue;
        };
        // Ubuntu keeps the modules apart.
        let modules = dependency(&image, "linux-modules-")?;
        let key = format!("{image}_{}", version(&image)?.replace(':', "~"));
        let names: Vec<&str> = [Some(image.as_str()), modules.as_deref()]
            .into_iter()
            .flatten()
            .collect();
        progress(Progress::step(format!("downloading {image}"), 0));
        let mut command = Command::new("apt-get");
        command
            .args(["download", "--quiet", "-o", "APT::Sandbox::User=root"])
            .args(names);
        succeed(run(command.current_dir(into), "apt-get")?, "apt-get")?;
        return Ok(Packages {
            files: debs(into)?,
            key,
        });
    }
    Err(Error::Program {
        program: "apt-cache",
        status: "no result".into(),
        words: "no kernel package is known".into(),
        hint: Some("run apt-get update, or give a kernel package (.deb) by path".into()),
    })
}

/// The first package that `package` depends on and that starts with `prefix`.
fn dependency(package: &str, prefix: &str) -> Result<Option<String>, Error> {
    let mut command = Command::new("apt-cache");
    command.args(["depends", "--no-recommends", "--no-suggests", package]);
    // An unknown package is an error for apt-cache, and a "no" for us.
    let output = run(&mut command, "apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    let good = |name: &&str| {
        name.starts_with(prefix)
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".+-".contains(&byte))
    };
    Ok(names.map(str::trim).find(good).map(str::to_owned))
}

fn version(package: &str) -> Result<String, Error> {
    let mut command = Command::new("apt-cache");
    command.args(["show", "--no-all-versions", package]);
    let output = succeed(run(&mut command, "apt-cache")?, "apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .unwrap_or("0");
    Ok(version
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "._+~-:".contains(*c))
        .collect())
}

fn run(command: &mut Command, program: &'static str) -> Result<Output, Error> {
    command.stdin(Stdio::null()).env("LC_ALL", "C");
    crate::sys::bind(command, &[], None, Signal::KILL);
    command.output().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::MissingProgram {
            program,
            package: "apt",
        },
        _ => Error::Stream {
            action: "run apt",
            source,
        },
    })
}

fn succeed(output: Output, program: &'static str) -> Result<Output, Error> {
    if output.status.success() {
        return Ok(output);
    }
    let hint = "check the network, run apt-get update, or give a kernel package (.deb) by path";
    Err(Error::Program {
        program,
        status: output.status.to_string(),
        words: printable(output.stderr.trim_ascii(), 600),
        hint: Some(hint.into()),
    })
}

fn debs(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut debs: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect();
    debs.sort();
    Ok(debs)
}
