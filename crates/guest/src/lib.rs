//! The guest protocol: what the host and the agent inside a machine say to each other.

pub mod limits;
pub mod link;
pub mod pb;
pub mod serve;

#[cfg(feature = "host")]
mod error;

#[cfg(feature = "host")]
pub use error::{Error, Result};
