//! A VMM that runs and lies on its socket, for tests of what real runtimes make of one.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

use crate::sys;

/// The program: `hutch-stub-vmm lie HOW WHERE`. `WHERE` is `fd:N`, a listening socket that it inherits, or the path of
/// one to make. `HOW`: `close` ends each connection, `silence` says nothing, `garbage` answers with what means
/// nothing, `flood` with a line without end, `line=TEXT` with that line to whatever it is asked, again and again.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (how, place) = (arguments.next(), arguments.next());
    let (Some(how), Some(place)) = (
        how.and_then(|how| how.into_string().ok()),
        place.and_then(|place| place.into_string().ok()),
    ) else {
        return ExitCode::from(2);
    };
    match lie(&how, &place) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "liar: {error}");
            ExitCode::FAILURE
        }
    }
}

fn lie(how: &str, place: &str) -> io::Result<()> {
    let listener = match place.strip_prefix("fd:") {
        Some(fd) => {
            let fd = fd.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
            UnixListener::from(sys::inherited(fd)?)
        }
        None => UnixListener::bind(place)?,
    };
    let mut open = Vec::new();
    loop {
        let (stream, _) = listener.accept()?;
        match how {
            "close" => {}
            "silence" => open.push(stream),
            // A peer that goes away is no reason to end.
            _ => drop(answer(stream, how)),
        }
    }
}

fn answer(mut stream: UnixStream, how: &str) -> io::Result<()> {
    let line = how.strip_prefix("line=").map(|line| format!("{line}\n"));
    loop {
        match (&line, how) {
            (Some(line), _) => stream.write_all(line.as_bytes())?,
            (None, "flood") => {
                stream.write_all(&[b'a'; 4096])?;
                continue;
            }
            _ => stream.write_all(b"\xff\0\x1b[2J{{{ no protocol at all\r\n\r\n")?,
        }
        if stream.read(&mut [0; 4096])? == 0 {
            return Ok(());
        }
    }
}
