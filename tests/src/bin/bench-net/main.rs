//! `cargo xtask bench net`: how fast machines come to their network, and how fast others come to machines. Arguments:
//! the parts, of `taps`, `http`, `connections` and `floods`; none are all of them.
//!
//! Whatever is compared is measured in turn, with the same client in the same place. Clients, proxies and servers are
//! processes of their own: this program with another first argument.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

mod client;
mod connections;
mod flood;
mod floods;
mod http;
mod numbers;
mod role;
mod roles;
mod taps;

/// What each part is called, in the order in which they run.
const PARTS: [&str; 4] = ["taps", "http", "connections", "floods"];

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Some((role, rest)) = words.split_first()
        && !PARTS.contains(role)
    {
        return roles::play(role, rest);
    }
    role::many_files();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for part in PARTS {
        if !words.is_empty() && !words.contains(&part) {
            continue;
        }
        match part {
            "taps" => runtime.block_on(taps::run()),
            "http" => runtime.block_on(http::run()),
            "connections" => runtime.block_on(connections::run()),
            _ => floods::run(),
        }
    }
}
