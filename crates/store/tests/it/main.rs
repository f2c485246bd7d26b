//! What every store promises, checked on each, and what the SQLite store promises beyond.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod conformance;
mod durability;
mod model;
mod sqlite;
mod sys;
