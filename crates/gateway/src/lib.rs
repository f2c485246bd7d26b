//! What the internet talks to on its way into machines: TCP ports and HTTP by host name. It knows no engine: whoever
//! starts it says by [`Machines`] what there is, who may come in, and how a port is reached.
//!
//! Reading order: [`Machines`], [`tcp`], then `http/serve.rs` (connections), `http/forward.rs` (requests) and what they
//! ask: `http/route.rs`, `http/access.rs`, `http/headers.rs` are pure. [`caddy`] puts TLS in front of it.

pub mod caddy;
mod copy;
pub mod http;
pub mod limits;
mod machines;
pub mod tcp;
pub mod token;

pub use machines::{Access, BoxStream, DialError, Found, KeySays, Machines, Ports, Stream};
