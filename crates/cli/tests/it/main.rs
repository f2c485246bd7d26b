//! The real binary, in an empty home, against a small server of our own that answers as the API does. What machines
//! really do is tested elsewhere.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fake;
mod files;
mod hutch;
mod installing;
mod machines;
mod running;
mod serving;
mod speaking;
