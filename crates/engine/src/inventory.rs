//! Everything on this host that may be ours: one list, for tests, for `doctor`, and for finding what a crash left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hutch_contract::id::{ImageId, MachineId, SnapshotId};
use tracing::{info, warn};

use crate::elsewhere::elsewhere;
use crate::engine::{images_dir, machines_dir, snapshots_dir, spool_dir, trash_dir, uploads_dir};
use crate::prepare::io_error;
use crate::{Error, network};

/// Something of ours on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// `process`, `cgroup`, `tap`, `neighbour`, `machine directory`, `image directory`, `snapshot directory`, `upload`,
    /// `spooled file`, `discarded directory`; and what [`Item::is_of_the_server`]: `firewall`, `claimed network`,
    /// `bridge`, `part of a Caddy`, `pool`.
    pub kind: &'static str,
    /// A process' id, a file's name, a network; for `part of a Caddy`, its admin API's address.
    pub name: String,
}

/// In a Caddy that is not ours.
const ELSEWHERE: &str = "part of a Caddy";
/// With its file, its loop device and its mount.
const POOL: &str = "pool";

impl Item {
    /// Whether a server has it as long as it runs, also without machines. One that ends without machines takes it along.
    #[must_use]
    pub fn is_of_the_server(&self) -> bool {
        [
            network::FIREWALL,
            network::CLAIM,
            network::BRIDGE,
            ELSEWHERE,
            POOL,
        ]
        .contains(&self.kind)
    }
}

/// Lists what the server of `data_dir` has outside of its store: with no machine, no image and no server it is empty. It
/// needs no running server.
///
/// A process is ours when it works in a machine's directory: VMMs, shims and all they start do. Of the network, what is
/// in the caller's network namespace is listed, as far as the kernel shows it to the caller: the firewall to root alone.
/// What of ours is in a Caddy of somebody else is listed as we noted it, for nothing here asks that Caddy.
///
/// # Errors
/// A directory of ours that cannot be read.
pub fn inventory(data_dir: &Path) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    let (machines, images) = (machines_dir(data_dir), images_dir(data_dir));
    for (kind, names) in [
        ("machine directory", ours::<MachineId>(names(&machines)?)),
        ("image directory", ours::<ImageId>(names(&images)?)),
        (
            "snapshot directory",
            ours::<SnapshotId>(names(&snapshots_dir(data_dir))?),
        ),
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
        let instance = data_dir.display().to_string();
        let network = network::inventory(&tag, &instance).into_iter();
        items.extend(network.map(|(kind, name)| Item { kind, name }));
    }
    if hutch_disk::pool::exists(data_dir) {
        let name = hutch_disk::pool::place(data_dir).display().to_string();
        items.push(Item { kind: POOL, name });
    }
    let parts = elsewhere(data_dir)?.into_iter();
    items.extend(parts.map(|name| Item {
        kind: ELSEWHERE,
        name,
    }));
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
