//! What a VMM has of its guest's memory for itself, brought into a file: the pages that it wrote, which are all that
//! there is of one that was booted, and all that differs from the file that it began with otherwise.
//!
//! The kernel tells which they are (`/proc/PID/pagemap`, see pagemap.rst): those that are there, in memory or swapped
//! out, and belong to no file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::CHUNK;

/// The size of a page of x86-64, whose guests these are.
pub(crate) const PAGE: usize = 4096;
/// Bytes of an entry of a page map.
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// The memory of a guest in its VMM. It is that process', also when its number has become another's.
#[derive(Debug)]
pub(crate) struct Pages {
    memory: File,
    map: File,
    /// Where it is mapped.
    at: u64,
    size: u64,
}

impl Pages {
    /// Of `size` bytes from the address `at` in a process. What the addresses mean there is the VMM's word.
    pub(crate) fn of(pid: u32, at: u64, size: u64) -> io::Result<Self> {
        let whole = [at, size].iter().all(|n| n.is_multiple_of(PAGE as u64));
        if !whole || at.checked_add(size).is_none() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            memory: File::open(format!("/proc/{pid}/mem"))?,
            map: File::open(format!("/proc/{pid}/pagemap"))?,
            at,
            size,
        })
    }

    /// Writes the memory of a VMM that began with none to an empty file. Answers how many bytes were written, as does the
    /// next.
    pub(crate) fn save(&self, into: &File, cancel: &AtomicBool) -> io::Result<u64> {
        into.set_len(self.size)?;
        self.write(into, true, cancel)
    }

    /// Brings a file up to date that holds what the VMM began with, or what was saved of it before.
    pub(crate) fn update(&self, into: &File, cancel: &AtomicBool) -> io::Result<u64> {
        match into.metadata()?.len() == self.size {
            true => self.write(into, false, cancel),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn write(&self, into: &File, fresh: bool, cancel: &AtomicBool) -> io::Result<u64> {
        let mut entries = vec![0; CHUNK];
        let (mut now, mut then) = (vec![0; CHUNK], vec![0; CHUNK]);
        let (mut at, mut written) = (0, 0);
        while at < self.size {
            let pages = (self.size - at) / PAGE as u64;
            let pages = usize::try_from(pages).unwrap_or(CHUNK).min(CHUNK / ENTRY);
            let map = &mut entries[..pages * ENTRY];
            let first = (self.at + at) / PAGE as u64;
            self.map.read_exact_at(map, first * ENTRY as u64)?;
            for (from, to) in own_runs(map) {
                if cancel.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let size = (to - from) * PAGE;
                let (now, then) = (&mut now[..size], &mut then[..size]);
                let place = at + (from * PAGE) as u64;
                self.memory.read_exact_at(now, self.at + place)?;
                if !fresh {
                    into.read_exact_at(then, place)?;
                }
                written += write_changed(into, place, now, (!fresh).then_some(&*then))?;
            }
            at += (pages * PAGE) as u64;
        }
        Ok(written)
    }
}

/// From which page to which others are the VMM's own, in pieces of [`CHUNK`] at most.
fn own_runs(map: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let entries = map.chunks_exact(ENTRY).map(|entry| {
        let entry = entry.try_into().expect("chunks have the size of an entry");
        u64::from_ne_bytes(entry)
    });
    for (page, entry) in entries.enumerate() {
        if entry & (PRESENT | SWAPPED) == 0 || entry & OF_A_FILE != 0 {
            continue;
        }
        match runs.last_mut() {
            Some((from, to)) if *to == page && page - *from < CHUNK / PAGE => *to += 1,
            _ => runs.push((page, page + 1)),
        }
    }
    runs
}

/// Writes the pages that are not what was there `then`; without it, all that are not zero. Answers how many bytes.
pub(super) fn write_changed(
    into: &File,
    at: u64,
    now: &[u8],
    then: Option<&[u8]>,
) -> io::Result<u64> {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    if then == Some(now) {
        return Ok(0);
    }
    let changed = |from: usize| {
        let to = (from + PAGE).min(now.len());
        let before = then.map_or(&ZEROS[..to - from], |then| &then[from..to]);
        now[from..to] != *before
    };
    let (mut from, mut written) = (0, 0);
    while from < now.len() {
        let mut to = from;
        while to < now.len() && changed(to) {
            to = (to + PAGE).min(now.len());
        }
        if to > from {
            into.write_all_at(&now[from..to], at + from as u64)?;
            written += (to - from) as u64;
        }
        from = to + PAGE;
    }
    Ok(written)
}
