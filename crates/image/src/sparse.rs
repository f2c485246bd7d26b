//! The map of a GNU sparse file: where its pieces of data lie in a file full of holes.

use crate::refusal::Refusal;
use std::collections::VecDeque;

/// The pieces that are still to come, and where the reader stands.
#[derive(Debug)]
pub(crate) struct SparseMap {
    pieces: VecDeque<(u64, u64)>,
    at: u64,
    total: u64,
}

impl SparseMap {
    /// `pieces` as (offset, bytes), `total` the size of the file, `stored` the bytes that the
    /// archive has of it.
    pub(crate) fn new(pieces: Vec<(u64, u64)>, total: u64, stored: u64) -> Result<Self, Refusal> {
        let mut end = 0u64;
        let mut sum = 0u64;
        for (at, len) in &pieces {
            if *at < end {
                return Err(Refusal::BadSparseMap);
            }
            end = at.checked_add(*len).ok_or(Refusal::BadSparseMap)?;
            sum += len;
        }
        if end > total || sum != stored {
            return Err(Refusal::BadSparseMap);
        }
        let pieces = pieces.into_iter().filter(|(_, len)| *len > 0).collect();
        Ok(Self {
            pieces,
            at: 0,
            total,
        })
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of hole from here on.
    pub(crate) fn hole_here(&self) -> u64 {
        self.pieces
            .front()
            .map_or(self.total, |(at, _)| *at)
            .saturating_sub(self.at)
    }

    /// Bytes of data from here to the end of this piece.
    pub(crate) fn data_here(&self) -> u64 {
        self.pieces
            .front()
            .map_or(0, |(at, len)| at + len - self.at)
    }

    pub(crate) fn advance(&mut self, bytes: u64) {
        self.at += bytes;
        if self
            .pieces
            .front()
            .is_some_and(|(at, len)| at + len <= self.at)
        {
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_make_no_sense_are_refused() {
        let map = |pieces: &[(u64, u64)], total, stored| {
            SparseMap::new(pieces.to_vec(), total, stored).map(|map| map.total())
        };
        assert_eq!(
            map(&[(0, 512), (1024, 512), (4096, 0)], 4096, 1024),
            Ok(4096)
        );
        assert_eq!(
            map(&[(512, 512), (0, 512)], 4096, 1024),
            Err(Refusal::BadSparseMap)
        );
        assert_eq!(
            map(&[(0, 1024), (512, 512)], 4096, 1536),
            Err(Refusal::BadSparseMap)
        );
        assert_eq!(map(&[(4000, 512)], 4096, 512), Err(Refusal::BadSparseMap));
        assert_eq!(map(&[(0, 512)], 4096, 1024), Err(Refusal::BadSparseMap));
        assert_eq!(map(&[(u64::MAX, 2)], 4096, 2), Err(Refusal::BadSparseMap));
    }
}
