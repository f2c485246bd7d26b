//! Where disks lie so that clones cost nothing: a data directory whose filesystem has reflinks is used as it is; else
//! root has a btrfs of ours in it, in a file behind a loop device.
//!
//! ```text
//! DATA/pool.btrfs.new   allocated, formatted, mounted once; then renamed       half-made: made anew
//! DATA/pool.btrfs       the pool; all that is in it is reached through DATA/pool, or not at all
//! DATA/pool/            where it is mounted
//! ```
//!
//! Nothing is remembered but `pool.btrfs`: the rest is looked at, so each step may be the last before a crash, and after
//! a reboot the same is done as after a first start. The loop device lets go of the file with its last mount
//! (`LO_FLAGS_AUTOCLEAR`), so a server that is killed leaves none without a mount. The mount is in the server's own mount
//! namespace. Another server in another namespace finds the loop device by the file's inode and mounts it once more,
//! which is the same filesystem for the kernel.

mod device;
mod mounts;
mod sizes;
mod sys;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::{Error, free_bytes, publish_file, reflink_supported};
use device::{BLOCK, Device};

pub use sizes::Sizes;

const MOUNT: &str = "pool";
const BACKING: &str = "pool.btrfs";
const HALF_MADE: &str = "pool.btrfs.new";
/// The filesystem's label.
const LABEL: &str = "hutch-pool";
/// Where the program may be when it is not on the path, as with a user's.
const MKFS: [&str; 3] = ["mkfs.btrfs", "/usr/sbin/mkfs.btrfs", "/sbin/mkfs.btrfs"];
/// No discards: they would punch holes into the file, and somebody else would fill the host with what is the pool's. No
/// checksums: direct writes of guests that change a page while it is written would make them wrong, and what a machine
/// has overwritten once needs no new space.
const OPTIONS: &std::ffi::CStr = c"nodiscard,nodatacow";

/// Whether a pool is made. One that is there is used in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Where the data directory has no reflinks and a pool is possible.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Reflinks, by the data directory's filesystem or a pool, or an error.
    Require,
}

/// What [`open`] is told.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whether a pool is made.
    pub mode: Mode,
    /// Bytes of the host's filesystem that the pool leaves free.
    pub reserve: u64,
    /// The directories that lie in a pool. Where one of them is outside with something in it, no pool is made.
    pub contents: &'static [&'static str],
}

/// Why there is no pool, and what helps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Why, as half a sentence.
    pub reason: String,
    /// What to do about it.
    pub hint: &'static str,
}

/// Where disks lie.
#[derive(Debug)]
pub enum Storage {
    /// In the data directory, which has reflinks.
    Native,
    /// In a pool of ours.
    Pool(Pool),
    /// In the data directory, and clones are copies.
    Copies(Obstacle),
}

/// A mounted pool.
#[derive(Debug)]
pub struct Pool {
    backing: PathBuf,
    dir: PathBuf,
    device: PathBuf,
    contents: &'static [&'static str],
    sizes: Sizes,
    growing: Mutex<()>,
}

/// What is free where disks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Bytes free in the pool, or in the data directory where there is none.
    pub free: u64,
    /// Bytes free in the host's filesystem around the pool, where there is one.
    pub around: Option<u64>,
}

impl Room {
    /// Bytes that may be written: to what is free comes what the pool can still grow by, which leaves `reserve` to the
    /// host.
    #[must_use]
    pub fn usable(&self, reserve: u64) -> u64 {
        let growth = self
            .around
            .map_or(0, |around| around.saturating_sub(reserve));
        self.free.saturating_add(growth)
    }
}

/// The directory that disks lie under: the pool of `data_dir` if it has one, mounted or not, else `data_dir`.
#[must_use]
pub fn place(data_dir: &Path) -> PathBuf {
    match exists(data_dir) {
        true => data_dir.join(MOUNT),
        false => data_dir.to_owned(),
    }
}

/// Whether `data_dir` has a pool, mounted or not.
#[must_use]
pub fn exists(data_dir: &Path) -> bool {
    data_dir.join(BACKING).is_file()
}

/// Whether the pool of `data_dir` is mounted, as this thread sees it.
#[must_use]
pub fn is_mounted(data_dir: &Path) -> bool {
    exists(data_dir) && matches!(mounted_at(&data_dir.join(MOUNT)), Ok(Some(_)))
}

/// What is free where disks of `data_dir` lie.
pub fn room(data_dir: &Path) -> Result<Room, Error> {
    let around = free_bytes(data_dir)?;
    match exists(data_dir) {
        true => Ok(Room {
            free: free_bytes(&data_dir.join(MOUNT))?,
            around: Some(around),
        }),
        false => Ok(Room {
            free: around,
            around: None,
        }),
    }
}

/// Mounts the pool of `data_dir`, or makes one where that is needed and possible. Only one process may do so at a time.
///
/// # Errors
/// [`Error::Pool`] for a pool that is there and cannot be mounted: what is in it must not seem lost. The same for
/// [`Mode::Require`] without reflinks.
pub fn open(data_dir: &Path, settings: &Settings) -> Result<Storage, Error> {
    open_sized(data_dir, settings, None)
}

fn open_sized(
    data_dir: &Path,
    settings: &Settings,
    sizes: Option<Sizes>,
) -> Result<Storage, Error> {
    // As the table of mounts has it.
    let data_dir = data_dir
        .canonicalize()
        .map_err(Error::io("inspect", data_dir))?;
    let sizes = match sizes {
        Some(sizes) => sizes,
        None => Sizes::of_host(total_bytes(&data_dir)?, settings.reserve),
    };
    if exists(&data_dir) {
        return Pool::mount(&data_dir, settings, sizes).map(Storage::Pool);
    }
    discard_half_made(&data_dir)?;
    if reflink_supported(&data_dir) {
        return Ok(Storage::Native);
    }
    let made = match obstacle_sized(&data_dir, settings, &sizes) {
        Some(obstacle) => Err(obstacle),
        None => Pool::make(&data_dir, settings, sizes),
    };
    match made {
        Ok(pool) => Ok(Storage::Pool(pool)),
        Err(obstacle) if settings.mode == Mode::Require => Err(Error::Pool {
            path: data_dir.join(BACKING),
            reason: obstacle.reason,
            hint: obstacle.hint,
        }),
        Err(obstacle) => Ok(Storage::Copies(obstacle)),
    }
}

/// Why [`open`] would not make a pool here, as far as that is seen without trying.
#[must_use]
pub fn obstacle(data_dir: &Path, settings: &Settings) -> Option<Obstacle> {
    let total = total_bytes(data_dir).unwrap_or(0);
    obstacle_sized(data_dir, settings, &Sizes::of_host(total, settings.reserve))
}

fn obstacle_sized(data_dir: &Path, settings: &Settings, sizes: &Sizes) -> Option<Obstacle> {
    let because = |reason: &str, hint| {
        let reason = reason.to_owned();
        Some(Obstacle { reason, hint })
    };
    let is_empty = |name: &&str| !is_filled(&data_dir.join(name));
    if settings.mode == Mode::Off {
        return because("the configuration says so", "set disk.pool to auto");
    }
    if !rustix::process::geteuid().is_root() {
        return because(
            "only root can mount one",
            "run the server as root, or put the data directory on btrfs or XFS",
        );
    }
    if !settings.contents.iter().all(is_empty) {
        return because(
            "images or machines lie outside of one",
            "delete them all and restart the server, which then makes a pool",
        );
    }
    if matches!(mounted_at(&data_dir.join(MOUNT)), Ok(Some(_))) {
        return because(
            "something else is mounted where it would be",
            "unmount DATA_DIR/pool",
        );
    }
    if !Path::new(device::CONTROL).exists() {
        return because(
            "there is no /dev/loop-control",
            "load the module `loop`, or give the container the host's loop devices",
        );
    }
    if mkfs().is_none() {
        return because("there is no mkfs.btrfs", "install btrfs-progs");
    }
    match free_bytes(data_dir) {
        Ok(free) if sizes.begin(free).is_none() => because(
            "the host's disk has no room for one",
            "free some space, or lower limits.disk_reserve_mib",
        ),
        _ => None,
    }
}

impl Pool {
    /// The directory that is in the pool.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Mounts the pool that is there, and finishes a growth that was broken off.
    fn mount(data_dir: &Path, settings: &Settings, sizes: Sizes) -> Result<Pool, Error> {
        let backing = data_dir.join(BACKING);
        let failed = |action: &'static str| {
            let path = backing.clone();
            move |errno: Errno| Error::Pool {
                path,
                reason: format!("it is there, and cannot be {action}: {errno}"),
                hint: "images and machines are in it; a server with the same rights as the one that made it mounts it",
            }
        };
        let file = open_file(&backing)?;
        let dir = data_dir.join(MOUNT);
        let device = match mounted_at(&dir)? {
            Some(source) => match Device::at(&source, &file) {
                Ok(Some(device)) => device,
                _ => {
                    let (source, point) = (source.display(), dir.display());
                    return Err(Error::Pool {
                        path: backing.clone(),
                        reason: format!("{source} is mounted on {point}, and is something else"),
                        hint: "unmount it",
                    });
                }
            },
            None => {
                make_dir(&dir)?;
                let device = Device::of(&file).map_err(failed("attached to a loop device"))?;
                reached("attached again");
                mount(&device, &dir).map_err(failed("mounted"))?;
                device
            }
        };
        reached("mounted again");
        let pool = Pool::new(data_dir, settings, sizes, &device);
        pool.fill_holes(&file)?;
        pool.settle(&device, "settled")?;
        Ok(pool)
    }

    /// Makes a pool: whole, or nothing is left.
    fn make(data_dir: &Path, settings: &Settings, sizes: Sizes) -> Result<Pool, Obstacle> {
        let made = Pool::try_make(data_dir, settings, sizes);
        if made.is_err() {
            // The first reason is the one to tell; a leftover is discarded by the next start.
            let _ = discard_half_made(data_dir);
        }
        made
    }

    fn try_make(data_dir: &Path, settings: &Settings, sizes: Sizes) -> Result<Pool, Obstacle> {
        let because = |action: &'static str, hint: &'static str| {
            move |errno: Errno| Obstacle {
                reason: format!("it cannot be {action}: {errno}"),
                hint,
            }
        };
        let other = |error: Error| Obstacle {
            reason: error.to_string(),
            hint: "see the server's log",
        };
        let half_made = data_dir.join(HALF_MADE);
        let size = free_bytes(data_dir).ok().and_then(|free| sizes.begin(free));
        let size = size.ok_or_else(|| Obstacle {
            reason: "the host's disk has no room for one".to_owned(),
            hint: "free some space, or lower limits.disk_reserve_mib",
        })?;
        let file = create_file(&half_made).map_err(other)?;
        reached("created");
        allocate(&file, 0, size).map_err(because(
            "allocated",
            "put the data directory on btrfs, XFS or ext4",
        ))?;
        reached("allocated");
        format(&half_made)?;
        reached("formatted");
        let device = Device::of(&file).map_err(because(
            "attached to a loop device",
            "give the server the host's loop devices",
        ))?;
        reached("attached");
        let dir = data_dir.join(MOUNT);
        make_dir(&dir).map_err(other)?;
        mount(&device, &dir).map_err(because(
            "mounted",
            "the server needs CAP_SYS_ADMIN, and the kernel btrfs",
        ))?;
        reached("mounted");
        // Others pass through and see nothing, as in the data directory.
        fs::set_permissions(&dir, Permissions::from_mode(0o711))
            .map_err(|error| other(Error::io("protect", &dir)(error)))?;
        // Once this is durable, so is what is in the pool: it syncs into this file.
        publish_file(&half_made, &data_dir.join(BACKING)).map_err(other)?;
        reached("published");
        Ok(Pool::new(data_dir, settings, sizes, &device))
    }

    fn new(data_dir: &Path, settings: &Settings, sizes: Sizes, device: &Device) -> Pool {
        Pool {
            backing: data_dir.join(BACKING),
            dir: data_dir.join(MOUNT),
            device: device.path.clone(),
            contents: settings.contents,
            sizes,
            growing: Mutex::new(()),
        }
    }

    /// Bytes that the pool takes of the host.
    pub fn size(&self) -> Result<u64, Error> {
        let meta = fs::metadata(&self.backing);
        Ok(meta
            .map_err(Error::io("read the size of", &self.backing))?
            .len())
    }

    /// Makes the pool larger where less than its usual lead is free in it, or less than `wanted` bytes, as far as the
    /// host's reserve allows. Returns by how many bytes it grew. Machines notice nothing; costs two `statfs` calls when
    /// there is nothing to do.
    ///
    /// # Errors
    /// [`Kind::Full`](crate::Kind::Full) when somebody else took the host's space meanwhile; the pool is as before.
    pub fn grow(&self, wanted: u64) -> Result<u64, Error> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = free_bytes(&self.dir)?;
        let around = free_bytes(self.backing.parent().unwrap_or(&self.dir))?;
        let step = self.sizes.step(inside, around, wanted);
        if step == 0 {
            return Ok(0);
        }
        let file = open_file(&self.backing)?;
        let device = Device::at(&self.device, &file)
            .map_err(|errno| Error::io("open", &self.device)(errno.into()))?
            .ok_or_else(|| Error::Pool {
                path: self.backing.clone(),
                reason: format!("it is not behind {} any more", self.device.display()),
                hint: "restart the server",
            })?;
        let before = self.size()?;
        if let Err(errno) = allocate(&file, before, step) {
            // What was got is of no use; the device knows nothing of it yet.
            let _ = file.set_len(before);
            return Err(Error::io("grow", &self.backing)(errno.into()));
        }
        reached("grown");
        self.settle(&device, "device grown")?;
        Ok(step)
    }

    /// Runs `work`, and once more after having grown the pool when `work` has filled it. `wanted`: bytes that it writes.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn with_room<T, E>(
        &self,
        wanted: u64,
        is_full: impl Fn(&E) -> bool,
        mut work: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        match work() {
            Err(error) if is_full(&error) => match self.grow(wanted) {
                Ok(1..) => work(),
                _ => Err(error),
            },
            result => result,
        }
    }

    /// Allocates what a copy of the file, or a growth that was broken off, has left open. Where the host has no room for
    /// that, it stays so.
    fn fill_holes(&self, file: &File) -> Result<(), Error> {
        let whole = self.size()?.next_multiple_of(BLOCK.into());
        match allocate(file, 0, whole) {
            Ok(()) | Err(Errno::NOSPC) => Ok(()),
            Err(errno) => Err(Error::io("allocate", &self.backing)(errno.into())),
        }
    }

    /// Device and filesystem become as large as the file.
    fn settle(&self, device: &Device, step: &str) -> Result<(), Error> {
        let failed = |action| move |errno: Errno| Error::io(action, &self.backing)(errno.into());
        device.follow().map_err(failed("resize the device of"))?;
        reached(step);
        let mounted = File::open(&self.dir).map_err(Error::io("open", &self.dir))?;
        sys::fill_device(&mounted).map_err(failed("resize the filesystem in"))
    }

    /// Unmounts the pool if nobody works in it, and returns whether it did; one in which nothing is left is erased then.
    /// VMMs work in it: as long as one runs, the pool stays.
    ///
    /// # Errors
    /// What the system says.
    pub fn release(&self) -> Result<bool, Error> {
        let is_empty = |name: &&str| !is_filled(&self.dir.join(name));
        let is_empty = self.contents.iter().all(is_empty);
        match rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => return Ok(false),
            Err(errno) => return Err(Error::io("unmount", &self.dir)(errno.into())),
        }
        reached("released");
        if is_empty {
            fs::remove_file(&self.backing).map_err(Error::io("erase", &self.backing))?;
            // An empty directory is in nobody's way.
            let _ = fs::remove_dir(&self.dir);
        }
        Ok(true)
    }
}

/// Unmounts and erases what a crash left of a pool in which nothing can be yet.
fn discard_half_made(data_dir: &Path) -> Result<(), Error> {
    let (half_made, dir) = (data_dir.join(HALF_MADE), data_dir.join(MOUNT));
    let Ok(file) = open_file(&half_made) else {
        return Ok(());
    };
    while let Some(source) = mounted_at(&dir)? {
        // Something else there is an obstacle of its own.
        if !matches!(Device::at(&source, &file), Ok(Some(_))) {
            break;
        }
        rustix::mount::unmount(&dir, UnmountFlags::NOFOLLOW)
            .map_err(|errno| Error::io("unmount", &dir)(errno.into()))?;
    }
    fs::remove_file(&half_made).map_err(Error::io("erase", &half_made))?;
    // An empty directory is in nobody's way.
    let _ = fs::remove_dir(&dir);
    Ok(())
}

/// The source of what is mounted at `dir`.
fn mounted_at(dir: &Path) -> Result<Option<PathBuf>, Error> {
    match dir.canonicalize() {
        Ok(point) => mounts::source(&point).map_err(Error::io("look for mounts of", dir)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("inspect", dir)(error)),
    }
}

fn mount(device: &Device, dir: &Path) -> Result<(), Errno> {
    // Neither nodev nor noexec: a VMM's jail is in its machine's directory.
    let flags = MountFlags::NOATIME | MountFlags::NOSUID;
    rustix::mount::mount(&device.path, dir, "btrfs", flags, OPTIONS)
}

/// Formats without discards; the defaults are good for the rest. With two copies of metadata, mkfs gives it 256 MiB from
/// the start; with one it would get 8 MiB and, once data has taken all else, no more: then no file can be made, even after
/// others were deleted.
fn format(file: &Path) -> Result<(), Obstacle> {
    let failed = |reason: String| Obstacle {
        reason: format!("it cannot be formatted: {reason}"),
        hint: "install a newer btrfs-progs",
    };
    let program = mkfs().ok_or_else(|| failed("there is no mkfs.btrfs".to_owned()))?;
    let output = Command::new(program)
        .args(["--quiet", "--nodiscard", "--force"])
        .args(["--metadata", "dup", "--data", "single", "--label", LABEL])
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let words = String::from_utf8_lossy(&output.stderr);
            let last = words.trim().lines().last().unwrap_or_default();
            Err(failed(format!(
                "{program}: {}",
                last.chars().take(200).collect::<String>()
            )))
        }
    }
}

/// The program that makes btrfs, if there is one.
fn mkfs() -> Option<&'static str> {
    MKFS.into_iter().find(|program| {
        let mut command = Command::new(program);
        command
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

/// Gives a file all of its space, so that no write into the pool can fail for want of it.
fn allocate(file: &File, from: u64, bytes: u64) -> Result<(), Errno> {
    rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), from, bytes))
}

fn total_bytes(dir: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(dir).map_err(|errno| Error::io("inspect", dir)(errno.into()))?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// Whether `dir` has something in it; one that cannot be read counts.
fn is_filled(dir: &Path) -> bool {
    match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

fn open_file(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.open(path).map_err(Error::io("open", path))
}

fn create_file(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(Error::io("create", path))
}

fn make_dir(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io("create", path)(error))
        }
        _ => Ok(()),
    }
}

/// Where tests kill the process.
fn reached(_step: &str) {
    #[cfg(test)]
    tests::die_at(_step);
}
