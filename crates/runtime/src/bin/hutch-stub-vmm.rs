//! The VMM, the launcher and a guest's door of tests: `hutch-stub-vmm vmm AGENT`, `hutch-stub-vmm shim` and
//! `hutch-stub-vmm guest PORT PROGRAM`. No part of a release.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next();
    match command.as_deref().and_then(|command| command.to_str()) {
        Some("shim") => hutch_runtime::shim::main(),
        Some("vmm") => hutch_runtime::stub::vmm::main(arguments),
        Some("guest") => hutch_runtime::stub::guest::main(arguments),
        _ => ExitCode::from(2),
    }
}
