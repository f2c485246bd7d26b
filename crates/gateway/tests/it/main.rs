//! The gateway over loopback, between raw clients and machines that are listeners of the test.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod access;
mod caddy;
mod desync;
mod floods;
mod forwarding;
mod pages;
mod streaming;
mod tcp;
mod town;
mod websocket;
