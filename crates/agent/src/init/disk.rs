//! Which block device is the root, and which one holds the modules. Found by serial, waited for by event.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Modules;
use crate::error::{Context, Error, Result};
use crate::params::{Boot, Disk};
use crate::uevent::Uevents;

/// Time for disks to appear after the modules are loaded. Emulated machines are slow, and nothing is lost by patience.
const PATIENCE: Duration = Duration::from_secs(30);
/// There once the driver is, also before there is a disk (Linux, `drivers/base/bus.c`).
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";
/// Serials of the device list.
const ROOT: &str = "root";
const MODULES: &str = "modules";

/// Device nodes.
#[derive(Debug, PartialEq, Eq)]
pub struct Disks {
    /// The machine's own disk.
    pub root: PathBuf,
    /// The read-only disk with kernel modules, when there is one.
    pub modules: Option<PathBuf>,
}

/// Finds the disks, waiting for those that were asked for.
///
/// # Errors
/// [`Error::NoDisk`], naming what there is; [`Error::NoDriver`] at once when waiting is in vain.
pub fn find(boot: &Boot, modules: &Modules) -> Result<Disks> {
    let by_node = matches!(boot.root, Some(Disk::Node(_)));
    if !by_node && !Path::new(DRIVER).exists() {
        return Err(Error::NoDriver {
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            modules: modules.in_words(),
        });
    }
    // Subscribed before the first look, so that nothing appears unseen in between.
    let news = Uevents::open().what("listen for devices")?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let present = virtio_disks();
        match choose(boot, &present, Path::exists) {
            Ok(disks) => return Ok(disks),
            Err(wanted) if !news.wait(deadline) => {
                let names = present
                    .iter()
                    .map(|(name, serial)| format!("{name} ({serial})"));
                let names: Vec<_> = names.collect();
                let none = || "none".to_owned();
                return Err(Error::NoDisk {
                    wanted,
                    waited_s: PATIENCE.as_secs(),
                    present: Some(names.join(", "))
                        .filter(|names| !names.is_empty())
                        .unwrap_or_else(none),
                });
            }
            Err(_) => {}
        }
    }
}

impl Modules {
    fn in_words(&self) -> String {
        match &self.first {
            Some(first) => format!(
                "{} of the {} modules that came with it did not load, first {first}",
                self.refused, self.listed
            ),
            None if self.listed == 0 => "no modules came with it".to_owned(),
            None => format!(
                "none of the {} modules that came with it has it",
                self.listed
            ),
        }
    }
}

/// Name and serial of each virtio block device, in the order of their names.
fn virtio_disks() -> Vec<(String, String)> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("vd")).collect();
    names.sort();
    let with_serial = names.into_iter().map(|name| {
        let serial = fs::read_to_string(format!("/sys/block/{name}/serial"));
        (name, serial.unwrap_or_default().trim().to_owned())
    });
    with_serial.collect()
}

/// Decides from what is present; the error is what is missing.
fn choose(
    boot: &Boot,
    present: &[(String, String)],
    exists: impl Fn(&Path) -> bool,
) -> std::result::Result<Disks, String> {
    let by_serial = |wanted: &str| {
        let found = present.iter().find(|(_, serial)| serial == wanted);
        found.map(|(name, _)| Path::new("/dev").join(name))
    };
    let asked = |disk: &Disk| match disk {
        Disk::Serial(serial) => by_serial(serial).ok_or(format!("with serial {serial}")),
        Disk::Node(node) if exists(node) => Ok(node.clone()),
        Disk::Node(node) => Err(node.display().to_string()),
    };
    let root = match &boot.root {
        Some(disk) => asked(disk)?,
        // Some VMMs set no serial of our choice; the device list has the root first.
        None => by_serial(ROOT)
            .or_else(|| {
                let first = present.first().filter(|(_, serial)| serial != MODULES);
                first.map(|(name, _)| Path::new("/dev").join(name))
            })
            .ok_or(format!("with serial {ROOT}"))?,
    };
    let modules = match &boot.modules {
        Some(disk) => Some(asked(disk)?),
        None => by_serial(MODULES),
    };
    Ok(Disks { root, modules })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(cmdline: &str, present: &[(&str, &str)]) -> Option<(String, Option<String>)> {
        let present: Vec<_> = present
            .iter()
            .map(|(name, serial)| (name.to_string(), serial.to_string()))
            .collect();
        let boot = Boot::parse(cmdline).unwrap();
        let disks = choose(&boot, &present, |node| node == Path::new("/dev/sda")).ok()?;
        let text = |path: PathBuf| path.display().to_string();
        Some((text(disks.root), disks.modules.map(text)))
    }

    #[test]
    fn serials_decide_and_the_first_disk_stands_in_for_a_missing_one() {
        let both = [("vda", "modules"), ("vdb", "root")];
        assert_eq!(
            chosen("", &both),
            Some(("/dev/vdb".into(), Some("/dev/vda".into())))
        );
        assert_eq!(chosen("", &[("vda", "")]), Some(("/dev/vda".into(), None)));
        assert_eq!(chosen("", &[("vda", "modules")]), None);
        assert_eq!(chosen("", &[]), None);
    }

    #[test]
    fn what_became_of_the_modules_is_said() {
        let mut modules = Modules::default();
        assert_eq!(modules.in_words(), "no modules came with it");
        modules.listed = 3;
        assert!(modules.in_words().starts_with("none of the 3"));
        modules.refused = 2;
        modules.first = Some("/lib/modules/virtio.ko: Exec format error".into());
        assert_eq!(
            modules.in_words(),
            "2 of the 3 modules that came with it did not load, first /lib/modules/virtio.ko: Exec format error"
        );
    }

    #[test]
    fn a_disk_that_was_asked_for_is_waited_for() {
        assert_eq!(chosen("hutch.root=serial:root", &[("vda", "")]), None);
        assert_eq!(
            chosen("hutch.modules=serial:modules", &[("vda", "root")]),
            None
        );
        assert_eq!(chosen("hutch.root=/dev/vdb", &[("vda", "root")]), None);
        assert_eq!(
            chosen("hutch.root=/dev/sda", &[]),
            Some(("/dev/sda".into(), None))
        );
    }
}
