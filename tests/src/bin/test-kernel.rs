//! Prints the path of a kernel for guests, made as the server makes it; its modules for booting lie beside it in
//! `boot/`. `cargo xtask test` gives both to the tests that put guests of their own together.

use std::process::ExitCode;

use hutch_image::KernelSource;

fn main() -> ExitCode {
    let agent = hutch_tests::programs().join("guest/hutch-agent");
    let cache = hutch_tests::cache_dir();
    match hutch_image::boot_set(&cache, &agent, &KernelSource::Distribution, &mut |_| {}) {
        Ok(boot_set) => {
            println!("{}", boot_set.kernel.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("no kernel for guests: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
