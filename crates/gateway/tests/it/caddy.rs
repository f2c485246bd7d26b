//! A real Caddy before the gateway, on loopback; it and what it makes lies in directories of the test.

mod acme;
mod api;
mod kit;
mod others;
mod own;
mod tls;
