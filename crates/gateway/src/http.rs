//! The HTTP gateway: `{name}.{BASE_DOMAIN}` and `{port}-{name}.{BASE_DOMAIN}` to ports of machines.
//!
//! ```text
//! accept → serve ── sniff ─► wire + guard (bytes) ─► hyper ─► forward ─► route, access, headers ─► pool ─► machine
//!                                                                └─► upgrade (WebSockets) ───────────────►
//! ```

mod access;
mod body;
mod clients;
mod forward;
mod guard;
mod head;
mod headers;
mod pages;
mod pool;
mod route;
mod serve;
mod upgrade;
mod wire;

pub use route::named;
pub use serve::{Gateway, HttpConfig, Listener};
