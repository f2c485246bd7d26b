//! `lab-disk TAR DISK`: makes an ext4 disk of a root filesystem, as images are made. `cargo xtask lab` boots it.

use std::error::Error;
use std::fs::File;
use std::process::ExitCode;

use hutch_image::{Limits, Purpose, build_disk};

fn main() -> ExitCode {
    match make() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("no disk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn make() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let mut next = || arguments.next().ok_or("usage: lab-disk TAR DISK");
    let (tar, disk) = (File::open(next()?)?, File::create(next()?)?);
    build_disk(
        &mut [tar],
        &disk,
        Purpose::Root,
        &Limits::default(),
        &mut |_| {},
    )?;
    Ok(())
}
