//! Everything that leaves or outlives a process: the types of the HTTP API, the records in the store, ids and names.
//!
//! Data and its validation only; no IO but the API client (feature `client`). Golden files hold each shape still.

pub mod error;
pub mod exec;
pub mod expose;
pub mod file;
pub mod id;
pub mod image;
pub mod key;
pub mod lifetime;
pub mod machine;
pub mod name;
pub mod network;
pub mod node;
pub mod operation;
pub mod page;
pub mod process;
pub mod record;
pub mod snapshot;

#[cfg(feature = "client")]
pub mod client;
