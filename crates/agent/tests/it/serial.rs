//! The agent on a serial line: a terminal, whose other end is the test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hutch_guest::link;
use hutch_guest::pb;
use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;
use tokio::net::UnixStream;

use crate::harness::{BOUND, Client, client_on, exec, shell};

/// A terminal and the agent on it.
struct Line {
    agent: Child,
    terminal: std::fs::File,
    _root: tempfile::TempDir,
}

impl Line {
    fn start() -> Self {
        let terminal = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&terminal).unwrap();
        rustix::pty::unlockpt(&terminal).unwrap();
        rustix::io::fcntl_setfd(&terminal, rustix::io::FdFlags::CLOEXEC).unwrap();
        let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
        let root = tempfile::tempdir().unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_hutch-agent"))
            .args(["serve", "--serial", name.to_str().unwrap(), "--root"])
            .arg(root.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // Until the agent has made the line carry bytes as they are, it would echo what we send.
        let raw = || {
            let flags = OFlags::RDWR | OFlags::NOCTTY;
            let line = rustix::fs::open(&*name, flags, rustix::fs::Mode::empty()).unwrap();
            let modes = rustix::termios::tcgetattr(&line).unwrap().local_modes;
            !modes.contains(rustix::termios::LocalModes::ECHO)
        };
        while !raw() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            agent,
            terminal: terminal.into(),
            _root: root,
        }
    }

    /// The host's end. What comes after the host has gone is lost, as on a real line.
    fn host(&self) -> UnixStream {
        let (ours, theirs) = StdStream::pair().unwrap();
        let (mut from, mut to) = (
            theirs.try_clone().unwrap(),
            self.terminal.try_clone().unwrap(),
        );
        std::thread::spawn(move || pump(&mut from, &mut to));
        let (mut from, mut to) = (self.terminal.try_clone().unwrap(), theirs);
        std::thread::spawn(move || pump(&mut from, &mut to));
        ours.set_nonblocking(true).unwrap();
        UnixStream::from_std(ours).unwrap()
    }

    async fn client(&self) -> Client {
        let stream = link::connect(self.host(), BOUND).await.unwrap();
        let mut client = client_on(stream).await;
        client
            .hello(pb::HelloRequest { generation: 1 })
            .await
            .unwrap();
        client
            .configure(pb::ConfigureRequest::default())
            .await
            .unwrap();
        client
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn pump(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(read) = from.read(&mut buffer) {
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn commands_run_over_a_serial_line() {
    let line = Line::start();
    let mut client = line.client().await;
    // Every byte, as a line that is not raw would change some.
    let script =
        "i=0; while [ $i -lt 256 ]; do printf \"\\\\$(printf %03o $i)\"; i=$((i+1)); done; exit 7";
    let seen = exec(&mut client, shell("bytes", script)).await;
    assert_eq!(seen.code(), Some(7));
    assert_eq!(seen.stdout, (0..=255).collect::<Vec<u8>>());
}

#[tokio::test]
async fn more_than_the_line_holds_comes_through() {
    let line = Line::start();
    let mut client = line.client().await;
    let seen = exec(
        &mut client,
        shell("much", "head -c 1000000 /dev/zero | tr '\\0' x"),
    )
    .await;
    assert_eq!(seen.stdout.len() as u64 + seen.dropped, 1_000_000);
    assert!(seen.stdout.iter().all(|byte| *byte == b'x'));
}
