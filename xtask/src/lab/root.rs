//! The lab's Debian: a disk made from packages, kept in the cache, and its own kernel with a small initramfs.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Result;
use crate::build;
use crate::command::{self, command};

/// What is in it. `mmdebstrap` is not: there is no mirror inside.
const PACKAGES: [&str; 14] = [
    "busybox-static",
    "btrfs-progs",
    "curl",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "mount",
    "nftables",
    "procps",
    "qemu-system-x86",
    "socat",
    "strace",
    "util-linux",
    "xz-utils",
];
/// Debian 12's own kernel has less of Landlock than Cloud Hypervisor asks for, so there it is the newer one that is kept
/// beside it.
const KERNELS: [(&str, &str); 1] = [("bookworm", "linux-image-6.12-cloud-amd64")];
const KERNEL: &str = "linux-image-cloud-amd64";
const SCRIPT: &str = include_str!("root.sh");
/// What the disk is grown to: room for tests. Sparse here.
const SIZE: &str = "8G";
/// Release for a host that is no Debian.
const SUITE: &str = "bookworm";
/// How long a root is kept that another recipe has followed.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// A Debian to boot.
pub struct Root {
    pub disk: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// Finds it in `lab`, the lab's directory in the cache, or makes it. The caller has the lab's lock.
pub fn root(lab: &Path) -> Result<Root> {
    let recipe = recipe();
    let mut hasher = DefaultHasher::new();
    recipe.hash(&mut hasher);
    // One for each recipe: other checkouts may have others.
    let dir = lab.join(format!("root-{:016x}", hasher.finish()));
    let root = Root {
        disk: dir.join("disk.raw"),
        kernel: dir.join("kernel"),
        initramfs: dir.join("initramfs"),
    };
    let done = dir.join("recipe");
    if done.exists() {
        return Ok(root);
    }
    eprintln!("the lab's Debian is made now: this takes some minutes, once");
    sweep(lab)?;
    drop(fs::remove_dir_all(&dir));
    fs::create_dir_all(&dir)?;
    make(&dir, &root)?;
    fs::write(done, recipe)?;
    Ok(root)
}

/// Removes roots that are no longer made.
fn sweep(lab: &Path) -> Result {
    for entry in fs::read_dir(lab)? {
        let entry = entry?;
        let is_root = entry.file_name().to_string_lossy().starts_with("root-");
        let old = entry.metadata()?.modified()?.elapsed().unwrap_or_default() > KEPT;
        if is_root && old {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Another text makes another root.
fn recipe() -> String {
    let packages = packages(&suite()).join("\n");
    format!("{} {SIZE}\n{packages}\n{SCRIPT}", suite())
}

fn make(dir: &Path, root: &Root) -> Result {
    let script = dir.join("root.sh");
    fs::write(&script, SCRIPT)?;
    let tar = dir.join("root.tar");
    let mut debian = command("mmdebstrap", ["--quiet", "--variant=minbase"]);
    debian
        .arg(format!("--include={}", packages(&suite()).join(",")))
        .args(["doc", "info", "locale", "man"].map(|kind| {
            // They only take time.
            format!("--dpkgopt=path-exclude=/usr/share/{kind}/*")
        }))
        .arg(format!(
            "--customize-hook=chroot \"$1\" sh -s <'{}'",
            script.display()
        ))
        .arg(suite())
        .arg(&tar)
        .args(sources());
    command::run(&mut debian)?;
    let unpack = ["--extract", "--strip-components=2", "--file"];
    command::run(
        command("tar", unpack)
            .arg(&tar)
            .args(["./boot/kernel", "./boot/initramfs"])
            .current_dir(dir),
    )?;
    let lab_disk = crate::profile_dir(false).join("lab-disk");
    if !lab_disk.exists() {
        build::run(false)?;
    }
    command::run(&mut command(
        &lab_disk.to_string_lossy(),
        [&tar, &root.disk],
    ))?;
    fs::remove_file(tar)?;
    command::run(command("resize2fs", [&root.disk]).arg(SIZE))
}

fn packages(suite: &str) -> Vec<&'static str> {
    let kernel = KERNELS.into_iter().find(|(name, _)| *name == suite);
    let kernel = kernel.map_or(KERNEL, |(_, kernel)| kernel);
    PACKAGES.into_iter().chain([kernel]).collect()
}

/// Programs that were built here run on the same release.
fn suite() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    let debian = value("ID=").as_deref() == Some("debian");
    let name = value("VERSION_CODENAME=").filter(|_| debian);
    name.unwrap_or_else(|| SUITE.to_owned())
}

/// The host's own mirrors of Debian. With none, `mmdebstrap` knows one.
fn sources() -> Vec<&'static str> {
    let files = [
        "/etc/apt/sources.list",
        "/etc/apt/sources.list.d/debian.sources",
    ];
    let says_something = |path: &&str| {
        fs::read_to_string(path).is_ok_and(|text| text.contains("deb") && text.contains(&suite()))
    };
    files.into_iter().filter(says_something).collect()
}

/// The lab's directory in the cache, ours until the file is dropped.
pub fn take(cache: &Path) -> Result<(PathBuf, File)> {
    let lab = cache.join("lab");
    fs::create_dir_all(&lab)?;
    let lock = File::create(lab.join("lock"))?;
    if lock.try_lock().is_err() {
        eprintln!("another run has the lab; waiting for its end");
        lock.lock()?;
    }
    Ok((lab, lock))
}
