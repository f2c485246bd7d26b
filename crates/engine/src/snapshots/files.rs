//! The files of a snapshot: digested, published whole, and looked at before they are used.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use hutch_contract::record::{Fit, SnapshotFile, SnapshotRecord};
use hutch_runtime::MachineDir;

use crate::prepare::io_error;
use crate::{Error, keys};

/// A copy of the record, for who has the directory and not the store.
const MANIFEST: &str = "manifest.json";

/// Digests what lies in `stage`, writes the manifest, and publishes the directory as `target`. Returns the record with
/// what it came to know.
pub(crate) fn publish(
    stage: &Path,
    target: &Path,
    record: SnapshotRecord,
    cancel: &AtomicBool,
) -> Result<SnapshotRecord, Error> {
    let mut files = Vec::new();
    for name in names(stage)? {
        let path = stage.join(&name);
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let file = describe(&path, &name)?;
        // Nothing may change it. Who may read the memory is the runtime's to say; a disk is read by clones only.
        let protect = |source| io_error("protect", &path, source);
        let metadata = fs::metadata(&path).map_err(protect)?;
        let mode = match name == MachineDir::DISK {
            true => 0o400,
            false => metadata.mode() & 0o444 | 0o400,
        };
        // That one is other machines' too, as it is.
        if name != MachineDir::MODULES {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(protect)?;
        }
        files.push(file);
    }
    let mut record = SnapshotRecord { files, ..record };
    let manifest = serde_json::to_vec_pretty(&record).expect("records have string keys only");
    hutch_disk::write_atomic(&stage.join(MANIFEST), &manifest, 0o400)?;
    record.manifest_sha256 = keys::sha256_hex(&manifest);
    hutch_disk::publish_dir(stage, target)?;
    Ok(record)
}

/// Looks whether the directory holds exactly what its own manifest says, byte for byte, and returns that.
///
/// # Errors
/// [`Error::SnapshotBroken`].
pub(crate) fn verify_whole(dir: &Path, cancel: &AtomicBool) -> Result<SnapshotRecord, Error> {
    let broken = |problem: String| Error::SnapshotBroken {
        name: dir.display().to_string(),
        problem,
    };
    let text = fs::read(dir.join(MANIFEST));
    let text = text.map_err(|error| broken(format!("{MANIFEST} cannot be read: {error}")))?;
    let record: SnapshotRecord = serde_json::from_slice(&text)
        .map_err(|error| broken(format!("{MANIFEST} makes no sense: {error}")))?;
    let record = SnapshotRecord {
        manifest_sha256: keys::sha256_hex(&text),
        ..record
    };
    verify(dir, &record, cancel)?;
    Ok(record)
}

/// Looks whether the directory holds exactly what the record says, byte for byte.
///
/// # Errors
/// [`Error::SnapshotBroken`].
pub(crate) fn verify(
    dir: &Path,
    record: &SnapshotRecord,
    cancel: &AtomicBool,
) -> Result<(), Error> {
    let broken = |problem: String| Error::SnapshotBroken {
        name: record.name.to_string(),
        problem,
    };
    let manifest = fs::read(dir.join(MANIFEST));
    let manifest =
        manifest.map_err(|error| broken(format!("{MANIFEST} cannot be read: {error}")))?;
    if keys::sha256_hex(&manifest) != record.manifest_sha256 {
        return Err(broken(format!("{MANIFEST} is not what was written")));
    }
    for file in &record.files {
        let name = &file.name;
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let found = describe(&dir.join(name), name);
        let unread = |error: Error| broken(format!("{name} cannot be read: {}", error.chain()));
        let found = found.map_err(unread)?;
        if found.size_bytes != file.size_bytes {
            return Err(broken(format!(
                "{name} has {} bytes, and had {}",
                found.size_bytes, file.size_bytes
            )));
        }
        if found.sha256 != file.sha256 {
            return Err(broken(format!("{name} is not what was written")));
        }
    }
    Ok(())
}

/// Puts links to all of a snapshot's files but its manifest into the directory `into`, so that what uses them outlives
/// the snapshot. What was there is replaced.
pub(crate) fn link(snapshot: &Path, into: &Path) -> Result<(), Error> {
    crate::prepare::erase_dir(into)?;
    // The VMM's user passes through.
    fs::DirBuilder::new()
        .create(into)
        .and_then(|()| fs::set_permissions(into, fs::Permissions::from_mode(0o711)))
        .map_err(|source| io_error("create", into, source))?;
    for name in names(snapshot)?.into_iter().filter(|name| name != MANIFEST) {
        let to = into.join(&name);
        fs::hard_link(snapshot.join(&name), &to).map_err(|source| io_error("link", &to, source))?;
    }
    Ok(())
}

/// Puts a link to the machine's disk of modules into the directory `into`: the kernel that is in its memory has it mounted.
pub(crate) fn keep_modules(dir: &MachineDir, into: &Path) -> Result<(), Error> {
    link_one(
        &dir.file(MachineDir::MODULES),
        &into.join(MachineDir::MODULES),
    )
}

/// Gives the machine the disk of modules that the kernel in a snapshot's memory has, not the one of today's kernel.
pub(crate) fn use_modules(from: &Path, dir: &MachineDir) -> Result<(), Error> {
    let to = dir.file(MachineDir::MODULES);
    crate::prepare::remove_if_there(&to)?;
    link_one(&from.join(MachineDir::MODULES), &to)
}

/// What is not there is not linked.
fn link_one(from: &Path, to: &Path) -> Result<(), Error> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("link", to, error)),
        _ => Ok(()),
    }
}

/// Clones the snapshot's disk beside the machine's. [`take_over`] puts it in place.
pub(crate) fn stage_disk(from: &Path, dir: &MachineDir) -> Result<(), Error> {
    let staged = staged_disk(dir);
    match fs::remove_file(&staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove", &staged, error));
        }
        _ => {}
    }
    hutch_disk::clone_file(from, &staged)?;
    fs::set_permissions(&staged, fs::Permissions::from_mode(0o600))
        .and_then(|()| File::open(&staged)?.sync_all())
        .map_err(|source| io_error("sync", &staged, source))
}

/// Puts the staged disk in the place of the machine's, whose VMM is gone.
pub(crate) fn take_over(dir: &MachineDir) -> Result<(), Error> {
    let to = dir.file(MachineDir::DISK);
    fs::rename(staged_disk(dir), &to).map_err(|source| io_error("replace", &to, source))?;
    Ok(hutch_disk::sync_dir(dir.path())?)
}

/// Drops a disk that was staged and is not wanted any more.
pub(crate) fn unstage(dir: &MachineDir) {
    // Not there, mostly; else it goes with the machine at the latest.
    drop(fs::remove_file(staged_disk(dir)));
}

fn staged_disk(dir: &MachineDir) -> std::path::PathBuf {
    dir.file(MachineDir::DISK).with_extension("new")
}

/// Bytes of the file's blocks.
pub(crate) fn used_bytes(path: &Path) -> Result<u64, Error> {
    let metadata = fs::metadata(path).map_err(|source| io_error("look at", path, source))?;
    Ok(metadata.blocks() * 512)
}

/// Whether a snapshot that was taken with `then` can be restored with `now`; if not, why.
pub(crate) fn misfit(then: &Fit, now: &Fit) -> Option<String> {
    [
        ("the VMM was", &then.vmm, &now.vmm),
        (
            "it was accelerated by",
            &then.acceleration,
            &now.acceleration,
        ),
        ("the processor was", &then.cpu, &now.cpu),
    ]
    .into_iter()
    .find(|(_, then, now)| then != now)
    .map(|(what, then, now)| format!("{what} {then}, and is {now} now"))
}

/// The host's processor: its name, and a digest of what decides whether memory of one fits the other.
pub(crate) fn cpu() -> String {
    static CPU: OnceLock<String> = OnceLock::new();
    CPU.get_or_init(read_cpu).clone()
}

fn read_cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.split(':').next().map(str::trim) == Some(name));
        line.and_then(|line| line.split_once(':'))
            .map_or("", |(_, value)| value.trim())
    };
    let facts = [
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "flags",
        "Features",
    ]
    .map(field);
    let digest = keys::sha256_hex(facts.join("\n").as_bytes());
    format!("{} ({})", field("model name"), &digest[..12])
}

fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let list = |source| io_error("list", dir, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        names.push(
            entry
                .map_err(list)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    Ok(names)
}

fn describe(path: &Path, name: &str) -> Result<SnapshotFile, Error> {
    let read = |source| io_error("read", path, source);
    let file = File::open(path).map_err(read)?;
    let size_bytes = file.metadata().map_err(read)?.len();
    let (sha256, used_bytes) = hutch_image::disk_digest(&file, &mut |_| {})?;
    Ok(SnapshotFile {
        name: name.to_owned(),
        size_bytes,
        used_bytes,
        sha256,
    })
}
