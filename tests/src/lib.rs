//! The harness of the end-to-end tests: a [`Lab`] is a real `hutch serve` on a directory of its own, a client of it, and
//! the promise that nothing is left afterwards. The tests themselves are in `e2e/`.
//!
//! Panics are its way to fail: it has no other user than tests and the bench.

#![expect(
    clippy::unwrap_used,
    reason = "a harness fails by panicking, as the tests do"
)]

pub mod bare;
mod docker;
mod host;
mod lab;
mod program;
mod raw;
mod sys;
mod tars;
pub mod world;

pub use host::{Random, cache_dir, is_root, processes_below, qemu, resident_kib, wait_until};
pub use lab::{Lab, Runtime, programs};
pub use program::Ran;
pub use raw::Answer;
pub use tars::{entry, root_tar};

/// Ends a test that lacks something, loudly.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("skipped: {}", format_args!($($why)*));
        return;
    }};
}
