//! The program that stands for VirtualBox in tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    hutch_runtime::stub::virtualbox::main(std::env::args_os())
}
