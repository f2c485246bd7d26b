//! How large a pool is, and when it grows: pure.

/// A pool grows by multiples of that.
pub(super) const GRAIN: u64 = 64 << 20;
/// No pool is smaller: below it, btrfs has hardly room for its own trees.
const SMALLEST: u64 = 512 << 20;

/// How much of a host a pool takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Its first size in bytes.
    pub first: u64,
    /// When fewer bytes than that are free in it, it grows.
    pub ahead: u64,
    /// Bytes of the host's filesystem that it leaves free.
    pub reserve: u64,
    /// No pool is made with less.
    pub smallest: u64,
}

impl Sizes {
    /// For a host filesystem of `total` bytes: a sixteenth of it ahead, from 512 MiB to 4 GiB, and twice that at first.
    #[must_use]
    pub fn of_host(total: u64, reserve: u64) -> Sizes {
        let ahead = grains(total / 16).clamp(SMALLEST, 4 << 30);
        Sizes {
            first: 2 * ahead,
            ahead,
            reserve,
            smallest: SMALLEST,
        }
    }

    /// The size of a new pool where the host has `free` bytes: no more than half of what it has to spare. None when there
    /// is no room for one.
    pub(super) fn begin(&self, free: u64) -> Option<u64> {
        let size = self.first.min(grains(self.spare(free) / 2));
        (size >= self.smallest).then_some(size)
    }

    /// By how much a pool with `inside` free bytes grows, for `wanted` to be free in it, where the host has `free`. Only
    /// ahead of need it takes no more than that host and pool have equally much to spare: others use the host, too.
    pub(super) fn step(&self, inside: u64, free: u64, wanted: u64) -> u64 {
        let spare = grains(self.spare(free));
        let lead = self.ahead.min(inside.saturating_add(spare) / 2);
        let wanted = wanted.max(lead);
        if inside >= wanted {
            return 0;
        }
        // Not each little write shall lead to a little growth.
        let step = (wanted - inside).max(lead / 2);
        let step = step.div_ceil(GRAIN).saturating_mul(GRAIN);
        step.min(spare)
    }

    fn spare(&self, free: u64) -> u64 {
        free.saturating_sub(self.reserve)
    }
}

fn grains(bytes: u64) -> u64 {
    bytes / GRAIN * GRAIN
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_hosts_have_small_pools() {
        let sizes = Sizes::of_host(20 * GIB, GIB);
        assert_eq!((sizes.first, sizes.ahead), (2560 << 20, 1280 << 20));
        assert_eq!(Sizes::of_host(4000 * GIB, GIB).ahead, 4 * GIB);
        assert_eq!(Sizes::of_host(GIB, GIB).ahead, SMALLEST);
    }

    #[test]
    fn the_reserve_is_neither_begun_nor_grown_into() {
        let sizes = Sizes::of_host(100 * GIB, GIB);
        assert_eq!(sizes.begin(90 * GIB), Some(8 * GIB));
        assert_eq!(sizes.begin(5 * GIB + 1), Some(2 * GIB));
        assert_eq!(sizes.begin(2 * GIB - 1), None);
        assert_eq!(sizes.begin(0), None);
        assert_eq!(sizes.step(0, GIB + GRAIN + 5, 0), GRAIN);
        assert_eq!(sizes.step(0, GIB + GRAIN - 1, 0), 0);
        assert_eq!(sizes.step(0, 0, u64::MAX), 0);
    }

    #[test]
    fn growth_comes_ahead_and_in_steps() {
        let sizes = Sizes::of_host(100 * GIB, GIB);
        assert_eq!(sizes.step(4 * GIB, 50 * GIB, 0), 0);
        assert_eq!(sizes.step(4 * GIB - 1, 50 * GIB, 0), 2 * GIB);
        assert_eq!(sizes.step(GIB, 50 * GIB, 0), 3 * GIB);
        assert_eq!(sizes.step(4 * GIB, 50 * GIB, 10 * GIB), 6 * GIB);
    }

    #[test]
    fn the_last_of_the_host_is_taken_only_when_it_is_needed() {
        let sizes = Sizes::of_host(100 * GIB, GIB);
        assert_eq!(sizes.step(2 * GIB, 3 * GIB, 0), 0);
        assert_eq!(sizes.step(GIB, 4 * GIB, 0), GIB);
        assert_eq!(sizes.step(GIB, 4 * GIB, 4 * GIB), 3 * GIB);
        // As a pool fills, it takes all in the end.
        let (mut inside, mut free, mut written) = (8 * GIB, 20 * GIB, 0);
        while inside > 0 {
            let write = inside.min(100 << 20);
            (inside, written) = (inside - write, written + write);
            let step = sizes.step(inside, free, 0);
            (inside, free) = (inside + step, free - step);
            assert!(free >= sizes.reserve);
        }
        assert!(written >= 27 * GIB - GRAIN);
    }
}
