//! Files that hold disks: copy-on-write clones, the pool that they are cheap in, growth, free space, publishing that
//! survives a crash, and exports to stores of objects.
//!
//! All but the exports is synchronous. Plain files only are known: no filesystem inside a disk is read, and no machine,
//! image or store of records is known.

mod clone;
mod error;
pub mod exports;
pub mod pool;
mod publish;
mod space;
#[cfg(test)]
mod test_support;

pub use clone::{Cloned, Method, clone_file, reflink_supported};
pub use error::{Error, Kind};
pub use publish::{publish_dir, publish_file, sync_dir, write_atomic};
pub use space::{free_bytes, grow};
