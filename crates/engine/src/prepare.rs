//! The files of a machine: made in one go, complete or made again, erased without following anything.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use hutch_contract::record::MachineRecord;
use hutch_image::BootSet;
use hutch_runtime::MachineDir;
use hutch_runtime::ring::RingReader;

use crate::Error;

/// Last file to be written: with it the directory is complete.
const COMPLETE: &str = "machine.json";
/// Beside the machines: what they share and cannot link to where it is.
const SHARED: &str = "shared";
/// Console text quoted in the reason of a failed start, in bytes.
const CONSOLE_TAIL: usize = 512;
/// Bytes in a GiB.
const GIB: u64 = 1 << 30;

/// Whether [`prepare`] has finished for this directory.
pub(crate) fn is_complete(dir: &MachineDir) -> bool {
    dir.path().join(COMPLETE).is_file()
}

/// Makes the directory and, where the machine has one, the disk. What an earlier, broken attempt left is erased first.
pub(crate) fn prepare(
    dir: &MachineDir,
    image_disk: Option<&Path>,
    record: &MachineRecord,
) -> Result<(), Error> {
    erase(dir)?;
    // Other users pass through (a VMM runs as a user of its own) and see nothing.
    fs::DirBuilder::new()
        .mode(0o711)
        .create(dir.path())
        .map_err(|source| io_error("create", dir.path(), source))?;
    let Some(image_disk) = image_disk else {
        return Ok(());
    };
    hutch_disk::clone_file(image_disk, &dir.file(MachineDir::DISK))?;
    hutch_disk::grow(
        &dir.file(MachineDir::DISK),
        u64::from(record.disk_gib) * GIB,
    )?;
    fs::set_permissions(
        dir.file(MachineDir::DISK),
        fs::Permissions::from_mode(0o600),
    )
    .map_err(|source| io_error("protect", &dir.file(MachineDir::DISK), source))?;
    // Before the mark: after a power cut a marked disk is whole.
    fs::File::open(dir.file(MachineDir::DISK))
        .and_then(|disk| disk.sync_all())
        .map_err(|source| io_error("sync", &dir.file(MachineDir::DISK), source))
}

/// Marks the directory as complete.
pub(crate) fn complete(dir: &MachineDir, record: &MachineRecord) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(record).expect("records have string keys only");
    hutch_disk::write_atomic(&dir.path().join(COMPLETE), &text, 0o600)?;
    Ok(())
}

/// Puts kernel, initramfs and modules disk into the directory: links, so that they cost nothing and outlive an upgrade.
/// `elf`: the VMM takes no other kernel.
pub(crate) fn link_boot_set(dir: &MachineDir, boot_set: &BootSet, elf: bool) -> Result<(), Error> {
    let kernel = match (&boot_set.elf, elf) {
        (Some(kernel), true) => kernel,
        (None, true) => {
            return Err(Error::NoKernel {
                reason: format!(
                    "the runtime needs an ELF kernel, and none can be unpacked from {}",
                    boot_set.kernel_release
                ),
                hint: Some("name the vmlinux of that kernel in the configuration".into()),
            });
        }
        (_, false) => &boot_set.kernel,
    };
    for (from, file) in [
        (Some(kernel), MachineDir::KERNEL),
        (Some(&boot_set.initramfs), MachineDir::INITRAMFS),
        (boot_set.modules_disk.as_ref(), MachineDir::MODULES),
    ] {
        let to = dir.file(file);
        let Some(from) = from else {
            // Of another kernel, which it had before.
            remove_if_there(&to)?;
            continue;
        };
        let staged = to.with_extension("new");
        remove_if_there(&staged)?;
        link(from, &staged, dir.path())?;
        fs::rename(&staged, &to).map_err(|source| io_error("replace", &to, source))?;
        // Where both are the same file already, rename(2) does nothing.
        drop(fs::remove_file(&staged));
    }
    Ok(())
}

/// Links a file that is only read. From another file system, or where the kernel forbids links to files of others, it is
/// copied once for all machines of this place: they share its pages in memory, too.
fn link(from: &Path, to: &Path, machine_dir: &Path) -> Result<(), Error> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let inspect = |source| io_error("inspect", from, source);
    let meta = fs::metadata(from).map_err(inspect)?;
    let place = machine_dir.parent().and_then(Path::parent);
    let shared = place.unwrap_or(machine_dir).join(SHARED);
    // Such a file is published whole and never changed.
    let (device, inode, size) = (meta.dev(), meta.ino(), meta.len());
    let (seconds, nanoseconds) = (meta.mtime(), meta.mtime_nsec());
    let copy = shared.join(format!(
        "{device:x}-{inode:x}-{size:x}-{seconds:x}-{nanoseconds:x}"
    ));
    if !copy.is_file() {
        tracing::debug!(from = %from.display(), "copying instead of linking");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&shared)
            .map_err(|source| io_error("create", &shared, source))?;
        hutch_disk::clone_file(from, to)?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o644))
            .map_err(|source| io_error("protect", to, source))?;
        hutch_disk::publish_file(to, &copy)?;
    }
    fs::hard_link(&copy, to).map_err(|source| io_error("link", to, source))
}

/// Removes copies that [`link`] made and no machine has any more. Only while no machine is prepared.
pub(crate) fn sweep_shared(data_dir: &Path) -> Result<(), Error> {
    let shared = hutch_disk::pool::place(data_dir).join(SHARED);
    let Ok(entries) = fs::read_dir(&shared) else {
        return Ok(());
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if fs::metadata(&path).is_ok_and(|meta| meta.nlink() == 1) {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

/// Erases the directory with all in it; one that is not there is erased already.
pub(crate) fn erase(dir: &MachineDir) -> Result<(), Error> {
    erase_dir(dir.path())
}

/// Erases a directory of ours. Links in it are removed, never followed.
pub(crate) fn erase_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("erase", path, error))
        }
        _ => Ok(()),
    }
}

/// The end of what the guest's console said, on one line.
pub(crate) fn console_tail(dir: &MachineDir) -> String {
    let tail = RingReader::open(&dir.console()).and_then(|ring| ring.tail(0, CONSOLE_TAIL));
    let Ok(bytes) = tail else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(3)..]
        .join(" / ")
        .escape_debug()
        .to_string()
}

pub(crate) fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path, error))
        }
        _ => Ok(()),
    }
}

pub(crate) fn io_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
