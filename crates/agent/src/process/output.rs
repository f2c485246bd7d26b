//! Who may write to a process' ring and who is waiting to read it: back-pressure, dropping, the end.
//!
//! ```text
//!   readers attached ──────────── full ring: the process blocks
//!        │ last one leaves   ▲ attach
//!        ▼                   │
//!   waiting for a reader ──── full ring: the process blocks, for [`GRACE`] at most
//!        │ grace over        ▲ attach
//!        ▼                   │
//!   nobody cares ──────────── full ring: the oldest bytes go
//! ```
//! A process starts in the middle: between `Start` and `Attach` of one exec, and between a lost connection and the
//! next, no output may be lost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::ring::{Piece, Ring, Stream};

/// How long a full ring waits for a reader to come (back).
pub const GRACE: Duration = Duration::from_secs(2);
/// Bytes kept behind the slowest reader: handed to its connection, perhaps not yet received when that breaks.
const BEHIND: u64 = 128 * 1024;
/// Room is given in pieces of at least this size, so that a full ring does not make tiny reads.
const LEAST: usize = 1024;
/// Every ring may use this much, even when all of them together use too much.
const FLOOR_CAPACITY: usize = 64 * 1024;

/// Memory that all rings together use.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// At most `limit` bytes, apart from a small minimum per ring.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            limit,
        })
    }

    /// Whether rings should shrink.
    pub fn is_exceeded(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.limit
    }
}

/// How the leader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Exit code.
    Code(i32),
    /// Signal number.
    Signal(i32),
}

/// The end of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Code or signal.
    pub how: How,
    /// Whether our timeout did it.
    pub timed_out: bool,
    /// Sequence number after the last byte that was written before the exit.
    pub output_end: u64,
}

struct State {
    ring: Ring,
    capacity: usize,
    /// Positions of attached readers by their ids.
    readers: Vec<(u64, u64)>,
    /// Position of the slowest reader, attached now or last; what lies before it was read.
    held: u64,
    next_reader: u64,
    /// When the ring stops waiting for a reader. Set when it first has to wait.
    patience: Option<Instant>,
    nobody_cares: bool,
    exit: Option<Exit>,
    /// Bytes in each pipe that were written before the exit.
    owed: [usize; 2],
}

/// The output of one process.
pub struct Output {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    budget: Arc<Budget>,
}

/// What a reader gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes.
    Chunk(Piece),
    /// So many bytes before the next chunk are gone.
    Dropped(u64),
    /// The last event.
    Exit(Exit),
}

impl Output {
    /// Keeps up to `capacity` bytes as long as the budget allows it.
    pub fn new(capacity: usize, budget: Arc<Budget>) -> Self {
        Self {
            state: Mutex::new(State {
                ring: Ring::new(),
                capacity: capacity.max(4096),
                readers: Vec::new(),
                held: 0,
                next_reader: 0,
                patience: None,
                nobody_cares: false,
                exit: None,
                owed: [0; 2],
            }),
            changed: watch::Sender::new(()),
            budget,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, keeps the budget's count, and wakes everybody.
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = {
            let mut state = self.lock();
            let before = state.ring.cost();
            let result = change(&mut state);
            let after = state.ring.cost();
            self.budget.used.fetch_add(after, Ordering::Relaxed);
            self.budget.used.fetch_sub(before, Ordering::Relaxed);
            result
        };
        self.changed.send_replace(());
        result
    }

    /// Waits until the process may write, and says how many bytes (at least one, at most `wanted`).
    pub async fn room(&self, wanted: usize) -> usize {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let deadline = match self.update_quietly(|state, tight| state.room(wanted, tight)) {
                Room::Bytes(room) => return room,
                Room::After(deadline) => deadline,
            };
            let expired = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                () = expired => self.lock().give_up(),
            }
        }
    }

    /// Like `update`, without waking anybody: making room gives nobody anything to do.
    fn update_quietly<T>(&self, change: impl FnOnce(&mut State, bool) -> T) -> T {
        let tight = self.budget.is_exceeded();
        let mut state = self.lock();
        let before = state.ring.cost();
        let result = change(&mut state, tight);
        self.budget
            .used
            .fetch_add(state.ring.cost(), Ordering::Relaxed);
        self.budget.used.fetch_sub(before, Ordering::Relaxed);
        result
    }

    /// Takes bytes that were read from the process.
    pub fn push(&self, stream: Stream, data: &[u8]) {
        self.update(|state| {
            state.ring.push(stream, data);
            let owed = &mut state.owed[stream as usize];
            let later = data.len().saturating_sub(*owed);
            *owed = owed.saturating_sub(data.len());
            // Written by a background child, but before bytes of the leader that are still in the other pipe.
            if let (Some(exit), true) = (&mut state.exit, state.owed != [0; 2]) {
                exit.output_end += later as u64;
            }
        });
    }

    /// No more will come from `stream`.
    pub fn close(&self, stream: Stream) {
        self.update(|state| {
            // Only when a pipe lost bytes that it had announced, which no kernel does.
            let lost = std::mem::take(&mut state.owed[stream as usize]);
            if let Some(exit) = &mut state.exit {
                exit.output_end -= lost as u64;
            }
        });
    }

    /// The leader is gone; `owed` bytes that it may have written are still in its pipes.
    pub fn exited(&self, how: How, timed_out: bool, owed: [usize; 2]) {
        self.update(|state| {
            state.owed = owed;
            state.exit = Some(Exit {
                how,
                timed_out,
                output_end: state.ring.end() + (owed[0] + owed[1]) as u64,
            });
        });
    }

    /// How the leader ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.lock().exit
    }

    /// Waits for the leader's end.
    pub async fn wait(&self) -> Exit {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(exit) = self.exit() {
                return exit;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether somebody is attached.
    pub fn has_readers(&self) -> bool {
        !self.lock().readers.is_empty()
    }

    /// Frees the memory of an exited process that nobody reads; the bytes count as dropped.
    pub fn clear(&self) {
        self.update(|state| state.ring.clear());
    }
}

enum Room {
    Bytes(usize),
    /// None now; with a deadline, there will be some.
    After(Option<Instant>),
}

impl State {
    fn room(&mut self, wanted: usize, tight: bool) -> Room {
        let capacity = match tight {
            true => self.capacity.min(FLOOR_CAPACITY),
            false => self.capacity,
        };
        let attended = !self.readers.is_empty();
        let floor = if self.held == self.ring.end() || (self.nobody_cares && !attended) {
            self.ring.end()
        } else {
            self.held.saturating_sub(BEHIND.min(capacity as u64 / 4))
        };
        let wanted = wanted.min(capacity / 2);
        let room = self.ring.make_room(capacity, wanted, floor).min(wanted);
        if room >= wanted.min(LEAST) {
            return Room::Bytes(room);
        }
        Room::After(
            (!attended).then(|| *self.patience.get_or_insert_with(|| Instant::now() + GRACE)),
        )
    }

    /// Stops waiting for a reader, unless one came in time.
    fn give_up(&mut self) {
        self.nobody_cares = self.readers.is_empty()
            && self
                .patience
                .is_some_and(|deadline| deadline <= Instant::now());
    }

    fn hold(&mut self) {
        if let Some(slowest) = self.readers.iter().map(|(_, position)| *position).min() {
            self.held = slowest;
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let cost = self.lock().ring.cost();
        self.budget.used.fetch_sub(cost, Ordering::Relaxed);
    }
}

/// An attached reader. Dropping it detaches.
pub struct Reader {
    output: Arc<Output>,
    id: u64,
    position: u64,
    /// Where to stop without an exit event, for readers that do not follow.
    stop: Option<u64>,
    /// End of what was there when attaching; an exit event does not come before it.
    seen: u64,
    changed: watch::Receiver<()>,
    done: bool,
}

impl Reader {
    /// Attaches from sequence number `from` on.
    ///
    /// # Errors
    /// The end, when `from` lies beyond it.
    pub fn attach(output: Arc<Output>, from: u64, follow: bool) -> Result<Self, u64> {
        let changed = output.changed.subscribe();
        let (id, seen) = output.update(|state| {
            let end = state.ring.end();
            if from > end {
                return Err(end);
            }
            let id = state.next_reader;
            state.next_reader += 1;
            state.readers.push((id, from));
            state.hold();
            state.patience = None;
            state.nobody_cares = false;
            Ok((id, end))
        })?;
        Ok(Self {
            output,
            id,
            position: from,
            stop: (!follow).then_some(seen),
            seen,
            changed,
            done: false,
        })
    }

    /// The next event; `None` after the last.
    pub async fn next(&mut self, limit: usize) -> Option<Event> {
        loop {
            if self.done {
                return None;
            }
            self.changed.mark_unchanged();
            if let Some(event) = self.poll(limit) {
                return Some(event);
            }
            if !self.done && self.changed.changed().await.is_err() {
                return None;
            }
        }
    }

    fn poll(&mut self, limit: usize) -> Option<Event> {
        let (start, end, exit) = {
            let state = self.output.lock();
            (state.ring.start(), state.ring.end(), state.exit)
        };
        let last = self
            .stop
            .or(exit.map(|exit| exit.output_end.max(self.seen)));
        if last.is_some_and(|last| self.position >= last) {
            self.done = true;
            let complete = exit.filter(|exit| self.position >= exit.output_end);
            return complete.map(|exit| {
                Event::Exit(Exit {
                    output_end: self.position,
                    ..exit
                })
            });
        }
        if self.position < start {
            let dropped = start - self.position;
            self.advance(start);
            return Some(Event::Dropped(dropped));
        }
        if self.position == end {
            return None;
        }
        let left = last.map_or(u64::MAX, |last| last - self.position);
        let limit = limit.min(usize::try_from(left).unwrap_or(usize::MAX));
        let piece = self.output.lock().ring.read(self.position, limit)?;
        self.advance(self.position + piece.data.len() as u64);
        Some(Event::Chunk(piece))
    }

    fn advance(&mut self, position: u64) {
        self.position = position;
        self.output.update(|state| {
            for reader in &mut state.readers {
                if reader.0 == self.id {
                    reader.1 = position;
                }
            }
            state.hold();
        });
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.output.update(|state| {
            state.readers.retain(|(id, _)| *id != self.id);
            state.hold();
        });
    }
}
