//! A door into a test's guest whose channel is vsock: busybox cannot listen there. Like inetd, and no more.

use std::ffi::OsString;
use std::io;
use std::process::{Command, ExitCode, Stdio};

use crate::sys;

/// `hutch-stub-vmm guest PORT PROGRAM`: runs a program for each connection, which is its input and output.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let port = arguments
        .next()
        .and_then(|port| port.to_str()?.parse().ok());
    let (Some(port), Some(program)) = (port, arguments.next()) else {
        return ExitCode::from(2);
    };
    match serve(port, program) {
        Ok(never) => match never {},
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(port: u32, program: OsString) -> io::Result<std::convert::Infallible> {
    let listener = sys::vsock_listener(port)?;
    loop {
        let connection = rustix::net::accept(&listener)?;
        Command::new(&program)
            .stdin(Stdio::from(connection.try_clone()?))
            .stdout(Stdio::from(connection))
            .spawn()?;
    }
}
