//! Whether an ext4 filesystem is whole, in the opinion of `e2fsck`, and taking in disks that came
//! from elsewhere.

use crate::build::{Built, disk_digest};
use crate::error::{Error, printable};
use crate::limits::Limits;
use crate::progress::{OnProgress, Progress};
use rustix::process::Signal;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// `e2fsck` reads filesystems that strangers made: it gets no privilege and a bound on memory.
const E2FSCK_MEMORY_BYTES: u64 = 4 << 30;
/// The user that owns nothing ("nobody" on Debian; the kernel's overflow id).
pub(crate) const NOBODY: u32 = 65_534;

/// Looks through the ext4 filesystem in `path` with `e2fsck -fn`, which changes nothing. As root
/// it runs as nobody, for which the file is readable to all while it runs; the directory around
/// it decides who reaches it. [`Error::Unclean`] has `e2fsck`'s words.
pub fn check_ext4(path: &Path) -> Result<(), Error> {
    let disk = File::open(path).map_err(Error::io("open", path))?;
    let meta = disk.metadata().map_err(Error::io("inspect", path))?;
    // Opened through our descriptor, the path to the file needs no permission.
    let root = rustix::process::geteuid().is_root();
    if root {
        let readable = Permissions::from_mode(meta.mode() & 0o7777 | 0o004);
        disk.set_permissions(readable)
            .map_err(Error::io("change the mode of", path))?;
    }
    let outcome = run_e2fsck(&disk, root);
    if root {
        let mode = Permissions::from_mode(meta.mode() & 0o7777);
        disk.set_permissions(mode)
            .map_err(Error::io("change the mode of", path))?;
    }
    outcome
}

fn run_e2fsck(disk: &File, root: bool) -> Result<(), Error> {
    let start = |program: &str| {
        let mut command = Command::new(program);
        command
            .args(["-f", "-n", "/proc/self/fd/0"])
            .env_clear()
            .env("LC_ALL", "C");
        let stdin = disk.try_clone()?;
        command
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        crate::sys::bind(&mut command, &[], Some(E2FSCK_MEMORY_BYTES), Signal::KILL);
        command.output()
    };
    // Debian keeps it out of the search path of ordinary users.
    let mut outcome = Err(std::io::ErrorKind::NotFound.into());
    for program in ["/usr/sbin/e2fsck", "/sbin/e2fsck", "e2fsck"] {
        outcome = start(program);
        if !matches!(&outcome, Err(error) if error.kind() == std::io::ErrorKind::NotFound) {
            break;
        }
    }
    let output = match outcome {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::MissingProgram {
                program: "e2fsck",
                package: "e2fsprogs",
            });
        }
        Err(source) => {
            return Err(Error::Stream {
                action: "run e2fsck",
                source,
            });
        }
    };
    // Exit code of fsck(8): 0 clean, bit 2 errors left, bit 3 operational error and so on.
    let words = [output.stdout, output.stderr].concat();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(code) if code & 4 != 0 => Err(Error::Unclean {
            report: report(&words),
        }),
        _ => Err(Error::Program {
            program: "e2fsck",
            status: output.status.to_string(),
            words: report(&words),
            hint: None,
        }),
    }
}

/// The first telling lines.
fn report(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .take(12)
        .collect();
    printable(
        lines
            .join("; ")
            .replace("/proc/self/fd/0", "the disk")
            .as_bytes(),
        1000,
    )
}

/// Copies the ext4 disk `source` (a regular file without partition table) to the new file
/// `target`, holes and zeros left out, and checks it. `target` is removed when anything fails.
/// A filesystem smaller than its disk file is fine: the rest is copied too.
pub fn import_ext4(
    source: &File,
    target: &Path,
    limits: &Limits,
    progress: OnProgress<'_>,
) -> Result<Built, Error> {
    let len = examine(source, limits)?;
    let output = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .map_err(Error::io("create", target))?;
    let mut import = || {
        copy(source, &output, len, progress).map_err(Error::io("copy to", target))?;
        check_ext4(target)?;
        let (sha256, used_bytes) = disk_digest(&output, progress)?;
        Ok(Built {
            size_bytes: len,
            used_bytes,
            sha256,
            files: 0,
        })
    };
    import().inspect_err(|_| {
        // The first error is the one to report.
        let _ = std::fs::remove_file(target);
    })
}

/// Looks at the superblock (Linux: `Documentation/filesystems/ext4/super.rst`) and gives the
/// length of the disk.
fn examine(source: &File, limits: &Limits) -> Result<u64, Error> {
    let not = |why| Error::NotExt4 { why };
    let meta = source
        .metadata()
        .map_err(Error::stream("inspect the disk"))?;
    if !meta.is_file() {
        return Err(not("it is not a regular file"));
    }
    if meta.len() > limits.max_disk_bytes {
        return Err(not("it is larger than the limit on disks"));
    }
    let mut superblock = [0; 1024];
    if meta.len() < 2048 {
        return Err(not("it is too short"));
    }
    source
        .read_exact_at(&mut superblock, 1024)
        .map_err(Error::stream("read the superblock"))?;
    let u32_at =
        |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().expect("four bytes"));
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return Err(not("there is no ext4 superblock"));
    }
    let (log_block, incompat) = (u32_at(0x18), u32_at(0x60));
    // INCOMPAT_64BIT gives the upper half of the count a meaning.
    let high = if incompat & 0x80 != 0 {
        u32_at(0x150)
    } else {
        0
    };
    if log_block > 6 {
        return Err(not("its block size makes no sense"));
    }
    let blocks = u64::from(high) << 32 | u64::from(u32_at(4));
    let fits = blocks
        .checked_mul(1024 << log_block)
        .is_some_and(|size| size <= meta.len());
    if blocks == 0 || !fits {
        return Err(not(
            "the filesystem is larger than the disk; the file is cut short",
        ));
    }
    Ok(meta.len())
}

fn copy(source: &File, target: &File, len: u64, progress: OnProgress<'_>) -> std::io::Result<()> {
    use rustix::fs::SeekFrom;
    use rustix::io::Errno;
    target.set_len(len)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        at = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(data) if data < len => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(at))?.min(len);
        while at < end {
            let want = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            source.read_exact_at(&mut buffer[..want], at)?;
            let mut from = at;
            for block in buffer[..want].chunks(4096) {
                if !crate::ext4::is_zero(block) {
                    target.write_all_at(block, from)?;
                }
                from += block.len() as u64;
            }
            at = from;
            progress(Progress::bytes("copying the disk", at, Some(len)));
        }
    }
    Ok(())
}
