//! The guest protocol: what the host and the agent inside a machine say to each other.
//!
//! `pb` is the schema, `limits` the numbers both sides hold to. The agent takes [`link::listen`] (where the channel
//! outlives connections) and [`serve::serve`]; the host takes `link::connect` and `session::Session`, with the feature
//! `host`.

#[cfg(feature = "host")]
pub mod deadlines;
#[cfg(feature = "host")]
mod error;
#[cfg(feature = "testing")]
pub mod hostile;
pub mod limits;
pub mod link;
pub mod pb;
pub mod serve;
#[cfg(feature = "host")]
pub mod session;

#[cfg(feature = "host")]
pub use error::{Error, Kind, Result};
