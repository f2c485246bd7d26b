//! The bytes that a process has written and that are still kept: stdout and stderr under one sequence. Pure; who waits
//! for whom is decided in `output`.

use std::collections::VecDeque;

use bytes::Bytes;

/// Which of the two streams a byte came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Stream of all its bytes.
    pub stream: Stream,
    /// Sequence number of the first byte.
    pub sequence: u64,
    /// At least one byte.
    pub data: Bytes,
}

/// Neighbouring bytes of one stream; begins where the run before it ends.
struct Run {
    stream: Stream,
    end: u64,
}

/// A bounded queue of bytes. It uses memory for what it holds, not for what it could hold.
pub struct Ring {
    bytes: VecDeque<u8>,
    runs: VecDeque<Run>,
    /// Sequence number of the first byte kept.
    start: u64,
}

/// A run costs memory too: a process that changes streams with every byte counts as if it wrote this much each time.
const RUN_COST: usize = 16;

impl Ring {
    /// Keeps nothing yet.
    pub fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            runs: VecDeque::new(),
            start: 0,
        }
    }

    /// Sequence number of the first byte kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Sequence number of the next byte to come.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// What the contents cost, in bytes.
    pub fn cost(&self) -> usize {
        self.bytes.len() + self.runs.len() * RUN_COST
    }

    /// Drops bytes before `floor` as far as needed to have room for `wanted` within `capacity`, and says how much room
    /// there is then.
    pub fn make_room(&mut self, capacity: usize, wanted: usize, floor: u64) -> usize {
        while self.cost() + wanted + RUN_COST > capacity && self.start < floor.min(self.end()) {
            let excess = self.cost() + wanted + RUN_COST - capacity;
            let Some(run) = self.runs.front() else { break };
            let until = run.end.min(floor).min(self.start + excess as u64);
            self.bytes.drain(..(until - self.start) as usize);
            if run.end == until {
                self.runs.pop_front();
            }
            self.start = until;
        }
        capacity.saturating_sub(self.cost() + RUN_COST)
    }

    /// Appends. The ring grows beyond any capacity when the caller does not ask for room first.
    pub fn push(&mut self, stream: Stream, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.bytes.extend(data);
        let end = self.end();
        match self.runs.back_mut() {
            Some(run) if run.stream == stream => run.end = end,
            _ => self.runs.push_back(Run { stream, end }),
        }
    }

    /// The bytes from `sequence` on, at most `limit` and of one stream. `None` before the start and at the end.
    pub fn read(&self, sequence: u64, limit: usize) -> Option<Piece> {
        if sequence < self.start || sequence >= self.end() {
            return None;
        }
        let run = &self.runs[self.runs.partition_point(|run| run.end <= sequence)];
        let from = (sequence - self.start) as usize;
        let to = ((run.end - self.start) as usize).min(from.saturating_add(limit));
        let (head, tail) = self.bytes.as_slices();
        let mut data = Vec::with_capacity(to - from);
        data.extend_from_slice(&head[from.min(head.len())..to.min(head.len())]);
        data.extend_from_slice(
            &tail[from.saturating_sub(head.len())..to.saturating_sub(head.len())],
        );
        Some(Piece {
            stream: run.stream,
            sequence,
            data: data.into(),
        })
    }

    /// Forgets all contents, as if they had been dropped for room.
    pub fn clear(&mut self) {
        self.start = self.end();
        self.bytes = VecDeque::new();
        self.runs = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn streams() -> impl Strategy<Value = Stream> {
        prop_oneof![Just(Stream::Stdout), Just(Stream::Stderr)]
    }

    proptest! {
        /// Whatever is written and dropped: what is kept is the end of what was written, unchanged, in order and with
        /// the right stream, and bytes at or after the floor are never dropped.
        #[test]
        fn keeps_the_end_of_what_was_written(
            writes in prop::collection::vec((streams(), 1usize..200, 0u64..400), 1..60),
            capacity in 64usize..1024,
            limit in 1usize..100,
        ) {
            let mut ring = Ring::new();
            let mut written: Vec<(Stream, u8)> = Vec::new();
            for (stream, length, behind) in writes {
                let floor = ring.end().saturating_sub(behind);
                let before = ring.start();
                let room = ring.make_room(capacity, length, floor);
                prop_assert!(ring.start() <= floor.max(before));
                prop_assert!(ring.cost() + room <= capacity || room == 0);
                let length = length.min(room);
                let data: Vec<u8> = (0..length).map(|i| (written.len() + i) as u8).collect();
                ring.push(stream, &data);
                written.extend(data.iter().map(|byte| (stream, *byte)));
                prop_assert!(ring.cost() <= capacity);
                prop_assert_eq!(ring.end(), written.len() as u64);
            }
            let mut at = ring.start();
            while let Some(piece) = ring.read(at, limit) {
                prop_assert!(!piece.data.is_empty() && piece.data.len() <= limit);
                prop_assert_eq!(piece.sequence, at);
                for byte in &piece.data {
                    prop_assert_eq!((piece.stream, *byte), written[at as usize]);
                    at += 1;
                }
            }
            prop_assert_eq!(at, ring.end());
        }

        /// Without anybody to hold it, there is always room, and never more than needed is dropped.
        #[test]
        fn without_a_floor_the_oldest_go(
            lengths in prop::collection::vec(1usize..300, 1..40),
        ) {
            let capacity = 512;
            let mut ring = Ring::new();
            for length in lengths {
                let end = ring.end();
                prop_assert!(ring.make_room(capacity, length, end) >= length);
                ring.push(Stream::Stdout, &vec![7; length]);
                let kept = (ring.end() - ring.start()) as usize;
                prop_assert!(ring.start() == 0 || kept + 4 * RUN_COST >= capacity);
            }
        }
    }

    #[test]
    fn a_process_that_changes_streams_with_every_byte_is_bounded() {
        let mut ring = Ring::new();
        for i in 0..10_000 {
            let end = ring.end();
            assert!(ring.make_room(1024, 1, end) >= 1);
            let stream = [Stream::Stdout, Stream::Stderr][i % 2];
            ring.push(stream, b"x");
        }
        assert!(ring.cost() <= 1024);
        assert!(ring.runs.len() <= 1024 / RUN_COST);
    }
}
