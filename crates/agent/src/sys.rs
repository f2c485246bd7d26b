//! What neither std nor rustix offers safely, each wrapped in a function that cannot be misused by its callers.
//! Everything `unsafe` of the agent is below this module and nowhere else.

pub mod exec;
pub mod fs;
pub mod poll;
pub mod signal;
pub mod vsock;
