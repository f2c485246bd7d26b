//! Files that hold disks: copy-on-write clones, the pool that they are cheap in, growth, free space, and publishing
//! that survives a crash.
//!
//! Everything here is synchronous and knows plain files only: no filesystem inside a disk is
//! read, and no machine, image or store is known.

mod clone;
mod error;
pub mod pool;
mod publish;
mod space;

pub use clone::{Cloned, Method, clone_file, reflink_supported};
pub use error::{Error, Kind};
pub use publish::{publish_dir, publish_file, sync_dir, write_atomic};
pub use space::{free_bytes, grow};
