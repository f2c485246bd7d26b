//! Images: root filesystems from tar archives, ext4 disks, distribution packages and busybox, and
//! the kernel, initramfs and modules disk that every machine boots with.
//!
//! Everything here is synchronous. Functions write to paths and files that the caller gives; they
//! know no image store, no machine and no engine.

mod acl;
mod archive;
mod build;
mod check;
mod child;
mod error;
mod ext4;
mod limits;
mod pax;
mod progress;
mod refusal;
mod sparse;
mod sys;
mod tree;
mod unpack;

pub use build::{Built, build_disk, disk_digest};
pub use check::{check_ext4, import_ext4};
pub use child::{Job, SUBCOMMAND, build_in_child, child_main};
pub use error::{Error, Kind};
pub use ext4::Purpose;
pub use limits::Limits;
pub use progress::{OnProgress, Progress, Unit};
pub use refusal::Refusal;
