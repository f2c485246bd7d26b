//! Whole engines over the real store, with machines of the stub runtime: behaviour, abuse, crashes.

#![expect(clippy::unwrap_used, reason = "tests")]

mod crash;
mod dial;
mod forks;
mod images;
mod initial;
mod inside;
mod lab;
mod life;
mod pause;
mod pool;
mod races;
mod sick;
mod snapshots;
mod sys;
