//! Memory of QEMU's machines: saved and gone on with.
//!
//! QEMU says how its devices are (`xen-save-devices-state`, which is of no use to Xen alone: it leaves out what is
//! memory), and what the guest's memory is we read in its process: see `memory/pages.rs`. So a machine that was booted,
//! one that went on from a snapshot, and one that went on from a snapshot of that are all the same: what is written is
//! what each has written itself. One that goes on maps the file privately (`memory.rs`).

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::{MEMORY_FD, NAME, Qemu, STATE_FD};
use crate::launch::{Launch, LaunchMemory, Open, read_json};
use crate::memory::pages::Pages;
use crate::memory::{self, FileId};
use crate::qmp::{self, Monitor};
use crate::{Error, MachineDir, MachineSpec, process};

/// The set of descriptors that the state goes to, in QEMU's words.
const SET: u32 = 1;
/// The largest state of devices that is believed to be one; those of our machines have some 20 KiB.
const STATE_MAX: u64 = 16 << 20;

/// Ends work on another thread that nobody waits for any more.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Qemu {
    /// Writes the memory and the state of the devices to `into`.
    pub(super) async fn save(&self, dir: &MachineDir, into: &Path) -> Result<(), Error> {
        let launch: Launch =
            read_json(&dir.file(MachineDir::LAUNCH)).ok_or_else(|| Error::NotRunning {
                dir: dir.path().to_owned(),
            })?;
        let (state, theirs) = state_file().map_err(Error::io("make a file for", into))?;
        let talk = async {
            let mut monitor = Monitor::connect(dir).await?;
            let at = stands_still_at(&mut monitor).await?;
            save_devices(&mut monitor, theirs).await?;
            Ok(at)
        };
        let what = "saving the state of the devices";
        let at = qmp::answered(&self.breakers, dir, what, talk).await?;
        let cancel = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(cancel.clone());
        let (dir, into) = (dir.clone(), into.to_owned());
        let saved = tokio::task::spawn_blocking(move || {
            keep_state(state, &into.join(memory::STATE))?;
            save_memory(&dir, &launch, at, &into.join(memory::FILE), &cancel)
        });
        let written = saved.await.expect("saving memory does not panic")?;
        tracing::debug!(written, "saved what a guest had in memory");
        Ok(())
    }

    /// What a machine goes on from.
    pub(super) async fn goes_on_from(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        from: &Path,
    ) -> Result<(LaunchMemory, Open), Error> {
        let file = dir.path().join(from).join(memory::FILE);
        let memory = self.memories.read(&file).await?;
        if memory.of().size() != bytes(spec.memory_mib) {
            return Err(Error::Setting {
                runtime: NAME,
                setting: "memory that begins as a snapshot's",
                value: format!("{} MiB", spec.memory_mib),
            });
        }
        let memory = LaunchMemory {
            fd: MEMORY_FD,
            path: from.join(memory::FILE).to_string_lossy().into_owned(),
            of: memory.of(),
            memory: Some(memory),
        };
        let state = Open {
            path: from.join(memory::STATE).to_string_lossy().into_owned(),
            fd: STATE_FD,
        };
        Ok((memory, state))
    }
}

fn bytes(memory_mib: u32) -> u64 {
    u64::from(memory_mib) << 20
}

/// Where a guest's memory is in the process of its VMM, which must not execute it.
async fn stands_still_at(monitor: &mut Monitor) -> Result<u64, Error> {
    const STATUS: &str = "query-status";
    const COMMAND: &str = "human-monitor-command";
    let status = monitor.execute(STATUS).await?;
    if status["running"] != Value::Bool(false) {
        return Err(Error::Monitor {
            command: STATUS,
            answer: "it is not paused".to_owned(),
        });
    }
    // The guest's memory begins at its address zero, and is in one piece here whatever it looks like there.
    let order = json!({"command-line": "gpa2hva 0"});
    let answer = monitor.run(COMMAND, order, None).await?;
    let words = answer.as_str().unwrap_or_default();
    let address = words.rsplit("0x").next().map(str::trim);
    let address = address.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    address.ok_or_else(|| Error::Monitor {
        command: COMMAND,
        answer: process::printable(words.as_bytes(), 256),
    })
}

/// A file in memory, and the same to be written only, as QEMU wants it. None of a snapshot's, which it could keep.
fn state_file() -> io::Result<(File, File)> {
    let state = memory::memory_file("hutch-state")?;
    let path = format!("/proc/self/fd/{}", state.as_raw_fd());
    let theirs = File::options().write(true).open(path)?;
    Ok((state, theirs))
}

/// Lets QEMU write how its devices are.
async fn save_devices(monitor: &mut Monitor, state: File) -> Result<(), Error> {
    let set = json!({"fdset-id": SET});
    monitor
        .run("add-fd", set.clone(), Some(state.as_fd()))
        .await?;
    let file = format!("/dev/fdset/{SET}");
    // `live` would take its disks from it.
    let order = json!({"filename": file, "live": false});
    let saved = monitor.run("xen-save-devices-state", order, None).await;
    monitor.run("remove-fd", set, None).await?;
    saved.map(drop)
}

fn keep_state(mut state: File, path: &Path) -> Result<(), Error> {
    let write = |source| Error::io("write", path)(source);
    let mut bytes = Vec::new();
    state.rewind().map_err(write)?;
    (&state)
        .take(STATE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(write)?;
    if bytes.is_empty() || bytes.len() as u64 > STATE_MAX {
        return Err(Error::Monitor {
            command: "xen-save-devices-state",
            answer: format!("a state of {} bytes", bytes.len()),
        });
    }
    std::fs::write(path, &bytes).map_err(write)
}

fn save_memory(
    dir: &MachineDir,
    launch: &Launch,
    at: u64,
    path: &Path,
    cancel: &AtomicBool,
) -> Result<u64, Error> {
    let size = bytes(launch.memory_mib);
    let pages = process::open_vmm(dir, qmp::judge, |pid| Pages::of(pid, at, size))?;
    let written = match &launch.memory {
        None => memory::create(path).and_then(|into| pages.save(&into, cancel)),
        Some(began) => {
            let from = dir.file(&began.path);
            if FileId::of(&from)? != began.of {
                let other = io::Error::other("it is not what the machine began with");
                return Err(Error::io("use", from)(other));
            }
            memory::clone(&from, path).and_then(|into| pages.update(&into, cancel))
        }
    };
    written.map_err(Error::io("write", path))
}
