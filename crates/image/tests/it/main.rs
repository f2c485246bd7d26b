//! Images as a user meets them: archives in, disks out, hostile input refused.
#![expect(clippy::unwrap_used, reason = "tests")]

mod archives;
mod boot;
mod child;
mod content;
mod hostile;
mod import;
mod layers;
