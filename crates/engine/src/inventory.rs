//! Everything on this host that may be ours: one list, for tests, for `doctor`, and for finding what a crash left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hutch_contract::id::{ImageId, MachineId};
use tracing::{info, warn};

use crate::Error;
use crate::engine::{images_dir, machines_dir, spool_dir, trash_dir, uploads_dir};
use crate::prepare::io_error;

/// Something of ours on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// `process`, `cgroup`, `tap`, `machine directory`, `image directory`, `upload`, `spooled file`, `discarded directory`.
    pub kind: &'static str,
    /// A process' id, or a file's name.
    pub name: String,
}

/// Lists what the server of `data_dir` has outside of its store: with no machine and no image it is empty. It needs no
/// running server.
///
/// A process is ours when it works in a machine's directory: VMMs, shims and all they start do.
///
/// # Errors
/// A directory of ours that cannot be read.
pub fn inventory(data_dir: &Path) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    let (machines, images) = (machines_dir(data_dir), images_dir(data_dir));
    for (kind, names) in [
        ("machine directory", ours::<MachineId>(names(&machines)?)),
        ("image directory", ours::<ImageId>(names(&images)?)),
        ("upload", names(&uploads_dir(data_dir))?),
        ("spooled file", names(&spool_dir(data_dir))?),
        ("discarded directory", names(&trash_dir(data_dir))?),
    ] {
        items.extend(names.into_iter().map(|name| Item { kind, name }));
    }
    if let Ok(tag) = fs::read_to_string(tag_file(data_dir)) {
        let labels = hutch_runtime::cgroup::labels(&tag).into_iter();
        items.extend(labels.map(|name| Item {
            kind: "cgroup",
            name,
        }));
        let prefix = hutch_net::label_prefix(&tag);
        let taps = hutch_net::link::Links::open().and_then(|mut links| links.names(&prefix));
        items.extend(
            taps.into_iter()
                .flatten()
                .map(|name| Item { kind: "tap", name }),
        );
    }
    let Ok(machines) = machines.canonicalize() else {
        items.sort();
        return Ok(items);
    };
    for name in names(Path::new("/proc"))? {
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        // Processes of others, and those that have just ended, cannot be looked at.
        let Ok(cwd) = fs::read_link(format!("/proc/{pid}/cwd")) else {
            continue;
        };
        if cwd.starts_with(&machines) {
            items.push(Item {
                kind: "process",
                name,
            });
        }
    }
    items.sort();
    Ok(items)
}

/// Holds a copy of the instance's tag, for who looks without the store.
fn tag_file(data_dir: &Path) -> PathBuf {
    data_dir.join("tag")
}

/// Lets [`inventory`] know under which tag things outside of the data directory are ours.
pub(crate) fn note_tag(data_dir: &Path, tag: &str) -> Result<(), Error> {
    Ok(hutch_disk::write_atomic(
        &tag_file(data_dir),
        tag.as_bytes(),
        0o644,
    )?)
}

/// Removes the empty cgroups of this tag that are of no machine: what a crash of the host's or a shim's left. One with
/// something in it is left alone.
pub(crate) fn remove_stray_cgroups(tag: &str, is_machine: impl Fn(u16) -> bool) {
    for label in hutch_runtime::cgroup::labels(tag) {
        let slot = hutch_runtime::cgroup::slot(&label, tag);
        if slot.is_some_and(&is_machine) {
            continue;
        }
        match hutch_runtime::cgroup::remove(&label) {
            Ok(()) => info!(label, "removed a cgroup of no machine"),
            Err(error) => warn!(label, %error, "a cgroup of no machine is in use"),
        }
    }
}

/// Those that are ids; what is called otherwise is not ours.
fn ours<Id: FromStr>(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.parse::<Id>().is_ok());
    names
}

fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io_error("list", dir, source)),
    };
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}
