//! The built agent as a plain process on this host, spoken to over its unix socket.

mod calls;
mod files;
mod harness;
mod output;
mod processes;
