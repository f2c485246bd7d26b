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
    let tar = File::open(next()?)?;
    // It is read again, for its digest.
    let mut disk = File::options();
    let disk = disk.read(true).write(true).create(true).truncate(true);
    let disk = disk.open(next()?)?;
    build_disk(
        &mut [tar],
        &disk,
        Purpose::Root,
        &Limits::default(),
        &mut |_| {},
    )?;
    Ok(())
}
