//! The built agent as a plain process on this host, spoken to over its unix socket.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod calls;
mod dial;
mod files;
mod harness;
mod output;
mod paths;
mod processes;
mod serial;
