//! What tests run in the place of programs: `hutch-stub-vmm vmm AGENT`, `hutch-stub-vmm lie HOW WHERE`,
//! `hutch-stub-vmm guest PORT PROGRAM` (a guest's door), `hutch-stub-vmm serve --unix PATH` (a container's guest) and
//! `hutch-stub-vmm shim`. No part of a release.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next();
    match command.as_deref().and_then(|command| command.to_str()) {
        Some("shim") => hutch_runtime::shim::main(),
        Some("serve") => hutch_runtime::stub::vmm::serve(arguments),
        Some("vmm") => hutch_runtime::stub::vmm::main(arguments),
        Some("guest") => hutch_runtime::stub::guest::main(arguments),
        Some("lie") => hutch_runtime::stub::liar::main(arguments),
        _ => ExitCode::from(2),
    }
}
