//! Images: root filesystems from tar archives, ext4 disks, distribution packages and busybox, and
//! the kernel, initramfs and modules disk that every machine boots with.
//!
//! Everything here is synchronous. Functions write to paths and files that the caller gives; they
//! know no image store, no machine and no engine.

mod acl;
mod apt;
mod archive;
mod bootstrap;
mod build;
mod busybox;
mod check;
mod child;
mod cpio;
mod deb;
mod error;
mod ext4;
mod kernel;
mod kernel_image;
mod kmod_index;
mod limits;
mod modules;
mod modules_dir;
mod pax;
mod progress;
mod refusal;
mod sources;
mod sparse;
mod sys;
mod tree;
mod unpack;

pub use bootstrap::{Bootstrap, bootstrap};
pub use build::{Built, build_disk, disk_digest};
pub use busybox::busybox;
pub use check::{check_ext4, import_ext4};
pub use child::{Job, SUBCOMMAND, build_in_child, child_main};
pub use error::{Error, Kind};
pub use ext4::Purpose;
pub use kernel::{BootSet, KernelSource, boot_set};
pub use limits::Limits;
pub use progress::{OnProgress, Progress, Unit};
pub use refusal::Refusal;
pub use sources::host_suite;
