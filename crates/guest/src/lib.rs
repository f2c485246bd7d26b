//! The guest protocol: what the host and the agent inside a machine say to each other.

pub mod limits;
pub mod pb;
pub mod serve;
