//! The server: configuration, the HTTP API, who may call it, start and end. What is decided is decided in the engine.
//!
//! Reading order: [`config`] says what a server is told, [`serve`] starts and ends it, `auth` lets requests in, `http`
//! answers them; `gateway` and `forward` lead from outside into machines, `caddy` brings HTTPS.

pub mod config;
pub mod serve;

mod auth;
mod caddy;
mod error;
mod forward;
mod gateway;
mod http;

pub use config::{Config, Flags, Host, Loaded};
pub use error::Error;
pub use hutch_engine::{build_disk_main, shim_main};
pub use serve::{Running, Server};

use hutch_contract::node::Finding;

/// Looks at what this host offers; needs no running server.
pub async fn doctor(config: &Config) -> Vec<Finding> {
    let mut findings = hutch_engine::doctor(&config.engine()).await;
    findings.push(gateway::finding(config));
    findings.push(caddy::finding(config).await);
    findings
}

/// The OpenAPI document of the API, as JSON.
pub fn openapi() -> String {
    http::document()
        .to_pretty_json()
        .expect("a document is JSON")
}
