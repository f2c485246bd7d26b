//! From the initramfs to the machine's own root. Paths in the image are resolved inside it: its links are its users'.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};

use super::disk::Disks;
use crate::error::{Context, Result, say};
use crate::files;

const NEW_ROOT: &str = "/newroot";
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// File systems that a modules disk may have.
const MODULES_KINDS: [&str; 3] = ["ext4", "squashfs", "erofs"];

/// A mounted root that is not yet ours.
pub struct Root(OwnedFd);

/// Mounts the root disk, read-only when the disk is, and the modules over its `/lib/modules`.
///
/// # Errors
/// The root cannot be mounted.
pub fn mount_root(disks: &Disks) -> Result<Root> {
    match rustix::fs::mkdir(NEW_ROOT, Mode::RWXU) {
        Err(errno) if errno != Errno::EXIST => return Err(errno).path("make directory", NEW_ROOT),
        _ => {}
    }
    let mount_as = |flags| mount(&disks.root, NEW_ROOT, "ext4", flags, None);
    match mount_as(MountFlags::RELATIME) {
        Err(Errno::ROFS | Errno::ACCESS) => {
            say(&format!("{} is read-only", disks.root.display()));
            mount_as(MountFlags::RDONLY).path("mount", &disks.root)?;
        }
        result => result.path("mount", &disks.root)?,
    }
    let root = openat(CWD, NEW_ROOT, DIRECTORY, Mode::empty()).path("open", NEW_ROOT)?;
    let root = Root(root);
    if let Some(modules) = &disks.modules {
        root.mount_modules(modules);
    }
    Ok(root)
}

impl Root {
    /// Opens a directory of the image, making it when it is missing.
    fn directory(&self, path: &str) -> rustix::io::Result<OwnedFd> {
        let open = |path: &str| {
            openat2(
                &self.0,
                path,
                DIRECTORY,
                Mode::empty(),
                ResolveFlags::IN_ROOT,
            )
        };
        match open(path) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = if parent == "." {
            open(".")?
        } else {
            self.directory(parent)?
        };
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => open(path),
            Err(errno) => Err(errno),
        }
    }

    /// A machine without them still works, but for what needs modules.
    fn mount_modules(&self, disk: &Path) {
        let target = match self.directory("lib/modules") {
            Ok(target) => target,
            Err(errno) => {
                return say(&format!(
                    "no place for modules: {}",
                    std::io::Error::from(errno)
                ));
            }
        };
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        let mut refused = Errno::NODEV;
        for kind in MODULES_KINDS {
            match mount(disk, by_number(&target), kind, flags, None) {
                Ok(()) => return,
                Err(errno) => refused = errno,
            }
        }
        say(&format!(
            "mount {}: {}",
            disk.display(),
            std::io::Error::from(refused)
        ));
    }
}

/// A path to an open directory that no link of the image can redirect.
fn by_number(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Makes the root ours: moves the kernel's file systems into it, leaves the initramfs and frees its memory, and mounts
/// what every machine expects.
///
/// # Errors
/// The image has no place for the kernel's file systems and is read-only, or a mount fails.
pub fn switch(root: Root) -> Result<()> {
    let initramfs = openat(CWD, "/", DIRECTORY, Mode::empty()).path("open", "/")?;
    // /proc last: the targets are reached through it.
    for name in ["dev", "sys", "proc"] {
        let target = root
            .directory(name)
            .path("open", Path::new(NEW_ROOT).join(name))?;
        mount_move(format!("/{name}"), by_number(&target)).path("move", format!("/{name}"))?;
    }
    rustix::process::fchdir(&root.0).path("enter", NEW_ROOT)?;
    drop(root);
    mount_move(".", "/").path("move", NEW_ROOT)?;
    rustix::process::chroot(".").path("switch to", NEW_ROOT)?;
    rustix::process::chdir("/").path("enter", "/")?;
    free(initramfs);
    standard_mounts();
    Ok(())
}

/// Removes all files of the initramfs. The one we run from lives on without a name.
fn free(initramfs: OwnedFd) {
    let device = rustix::fs::fstat(&initramfs).map(|stat| stat.st_dev);
    if let Ok(device) = device {
        let _ = files::remove::empty(initramfs, Some(device));
    }
}

/// Says what did not work, which is no reason to give up: a machine lacks something then, and its console tells what.
fn report(what: &str, result: rustix::io::Result<()>) {
    if let Err(errno) = result {
        say(&format!("{what}: {}", std::io::Error::from(errno)));
    }
}

/// Makes a mount point; whether it is new.
fn place(target: &str) -> bool {
    match rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => false,
        result => {
            report(&format!("make directory {target}"), result);
            result.is_ok()
        }
    }
}

fn mount_at(target: &str, kind: &str, flags: MountFlags, data: &CStr) {
    place(target);
    let result = mount(kind, target, kind, flags, Some(data));
    report(&format!("mount {target}"), result);
}

/// Mounts that programs expect.
fn standard_mounts() {
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("/run", "tmpfs", shared, c"mode=755");
    mount_at(
        "/dev/pts",
        "devpts",
        devices,
        c"gid=5,mode=620,ptmxmode=666",
    );
    mount_at("/dev/shm", "tmpfs", shared, c"mode=1777");
    if !Path::new("/tmp").exists() && place("/tmp") {
        mount_at("/tmp", "tmpfs", shared, c"mode=1777");
    }
    let flags = shared | MountFlags::NOEXEC;
    let cgroups = "/sys/fs/cgroup";
    // Moving processes between groups is cheap with it (Linux 6.0).
    let quick = Some(c"nsdelegate,favordynmods");
    if mount("cgroup2", cgroups, "cgroup2", flags, quick).is_err() {
        mount_at(cgroups, "cgroup2", flags, c"nsdelegate");
    }
    // What udev would make.
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (target, link) in links {
        let _ = symlinkat(target, CWD, link);
    }
}
