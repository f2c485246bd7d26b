//! Loop devices: one for each file, never two, and none that outlives its mount.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::sys;

/// What loop devices are asked for.
pub(super) const CONTROL: &str = "/dev/loop-control";
/// Sectors of the device: every host disk takes direct I/O of that size, and btrfs has no smaller blocks.
pub(super) const BLOCK: u32 = 4096;
/// Attempts at a free device while others take them.
const TRIES: u32 = 64;

/// A loop device that holds a file. It lets go of the file when this is dropped, unless it is mounted by then.
pub(super) struct Device {
    file: File,
    pub path: PathBuf,
}

impl Device {
    /// The device of this file: the one that it has, since with two both would write as if alone, else a free one.
    pub fn of(backing: &File) -> Result<Device, Errno> {
        if let Some(device) = Device::find(backing)? {
            return Ok(device);
        }
        let control = open(Path::new(CONTROL))?;
        for _ in 0..TRIES {
            let number = sys::free_loop(&control)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = open(&path)?;
            match attach(&file, backing) {
                Ok(()) => return Ok(Device { file, path }),
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::BUSY)
    }

    /// The device that has this file already.
    pub fn find(backing: &File) -> Result<Option<Device>, Errno> {
        let names = std::fs::read_dir("/dev").map_err(errno)?;
        for name in names.flatten().map(|entry| entry.file_name()) {
            let is_loop = name
                .to_str()
                .and_then(|name| name.strip_prefix("loop"))
                .is_some_and(|number| number.parse::<u32>().is_ok());
            if !is_loop {
                continue;
            }
            let path = Path::new("/dev").join(&name);
            // As long as it is open here, it does not let go of what it has.
            if let Ok(file) = open(&path)
                && holds(&file, backing)?
            {
                return Ok(Some(Device { file, path }));
            }
        }
        Ok(None)
    }

    /// The device at `path`, if it has this file.
    pub fn at(path: &Path, backing: &File) -> Result<Option<Device>, Errno> {
        let file = open(path)?;
        let found = holds(&file, backing)?;
        Ok(found.then(|| Device {
            file,
            path: path.to_owned(),
        }))
    }

    /// Lets the device be as large as its file has become.
    pub fn follow(&self) -> Result<(), Errno> {
        sys::set_capacity(&self.file)
    }

    /// Whether it goes past the page cache.
    #[cfg(test)]
    pub fn is_direct(&self) -> bool {
        sys::status(&self.file).unwrap().flags & sys::DIRECT_IO != 0
    }
}

fn attach(device: &File, backing: &File) -> Result<(), Errno> {
    let flags = sys::AUTOCLEAR | sys::DIRECT_IO;
    match sys::configure(device, backing, BLOCK, flags) {
        // Some kernels refuse what others would do without.
        Err(Errno::INVAL) => sys::configure(device, backing, BLOCK, sys::AUTOCLEAR),
        result => result,
    }
}

/// Whether the device has this file, and may write to it.
fn holds(device: &File, backing: &File) -> Result<bool, Errno> {
    let info = match sys::status(device) {
        Ok(info) => info,
        Err(Errno::NXIO) => return Ok(false),
        Err(errno) => return Err(errno),
    };
    let meta = backing.metadata().map_err(errno)?;
    let same = (info.device, info.inode) == (meta.dev(), meta.ino());
    match same && info.flags & sys::READ_ONLY != 0 {
        true => Err(Errno::ROFS),
        false => Ok(same),
    }
}

fn open(path: &Path) -> Result<File, Errno> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).map_err(errno)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
