//! What a user is promised, with real servers, real guests and real crashes. Every test leaves nothing behind.
//!
//! A test whose name has `qemu` in it boots real guests; the others use the stub, whose machines are processes with the
//! real agent.

#![expect(clippy::unwrap_used, reason = "these are tests")]

mod bad_input;
mod bridges;
mod crash;
mod egress;
mod egress6;
mod identity;
mod import;
mod isolation;
mod kernels;
mod life;
mod memory;
mod pause;
mod reach;
mod shell;
mod snapshots;
mod tls;
mod warm;
