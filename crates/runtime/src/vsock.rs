//! The way to an agent that listens on a vsock port, through the unix socket that Firecracker and Cloud Hypervisor make
//! for it: `CONNECT port\n`, answered by `OK port\n` or, when nobody listens in the guest, by the end of the connection.
//! See Firecracker's `docs/vsock.md`. What is said afterwards is the agent's affair.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::process::printable;
use crate::{Channel, Error, MachineDir};

/// The port of the agent. Below 1024, so that no user of the guest can take it while the agent is down.
pub(crate) const PORT: u32 = 1003;
/// The guest's address; the same in every machine, since no guest can send to another.
pub(crate) const GUEST_CID: u32 = 3;
/// Time for a guest whose agent does not listen yet. The caller comes again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Until an attempt after one that was refused; what a boot may lose by asking too early.
const AGAIN: Duration = Duration::from_millis(5);
/// Until an attempt beside those that are silent: grows from the first to the second. A guest whose driver is not loaded
/// yet answers nothing, and the request may be lost, so silence means nothing.
const BESIDE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));
/// The most attempts at the same time.
const OPEN: usize = 4;
/// The longest answer: `OK ` and a number of 32 bits.
const ANSWER: usize = 16;

/// Connects to the agent through the socket `socket` in `own`, a directory of the VMM's user.
///
/// # Errors
/// [`Error::NotRunning`] when the VMM does not listen, [`Error::Timeout`] when the guest does not,
/// [`Error::Monitor`] for an answer that is none.
pub(crate) async fn connect(dir: &MachineDir, own: &str, socket: &str) -> Result<Channel, Error> {
    let end = Instant::now() + PATIENCE;
    let mut attempts = JoinSet::new();
    let mut open = VecDeque::new();
    let mut beside = BESIDE.0;
    while Instant::now() < end {
        let (dir, own, socket) = (dir.clone(), own.to_owned(), socket.to_owned());
        open.push_back(attempts.spawn(async move { attempt(&dir, &own, &socket).await }));
        if open.len() > OPEN {
            open.pop_front().inspect(tokio::task::AbortHandle::abort);
        }
        let mut next = Instant::now() + beside;
        beside = (beside * 5 / 4).min(BESIDE.1);
        loop {
            tokio::select! {
                biased;
                Some(ended) = attempts.join_next() => match ended {
                    Ok(Ok(Some(stream))) => return Ok(Channel::Connection(Box::new(stream))),
                    Ok(Ok(None)) => {
                        next = next.min(Instant::now() + AGAIN);
                        beside = BESIDE.0;
                    }
                    Ok(Err(error)) => return Err(error),
                    // Given up above.
                    Err(_) => {}
                },
                () = sleep_until(next.min(end)) => break,
            }
        }
    }
    Err(Error::Timeout {
        what: "answer of the agent's port",
        seconds: PATIENCE.as_secs(),
    })
}

/// `None` when the guest refuses.
async fn attempt(dir: &MachineDir, own: &str, socket: &str) -> Result<Option<UnixStream>, Error> {
    let mut stream = dir.connect_in(own, socket).await?;
    // In one write: Firecracker takes what it finds at the first look for the whole line.
    let line = format!("CONNECT {PORT}\n");
    if stream.write_all(line.as_bytes()).await.is_err() {
        return Ok(None);
    }
    let mut answer = Vec::with_capacity(ANSWER);
    // Byte by byte: what follows the line is the agent's.
    while answer.last() != Some(&b'\n') && answer.len() < ANSWER {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(_) if answer.is_empty() => return Ok(None),
            Err(_) => break,
        }
    }
    let number = answer
        .strip_prefix(b"OK ")
        .and_then(|rest| rest.strip_suffix(b"\n"));
    match number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit)) {
        true => Ok(Some(stream)),
        false => Err(Error::Monitor {
            command: "CONNECT",
            answer: printable(&answer, ANSWER),
        }),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    /// Answers each connection with the next of `answers`; `None` hangs up.
    fn vmm(answers: &'static [Option<&'static [u8]>]) -> (tempfile::TempDir, MachineDir) {
        let files = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(files.path());
        std::fs::create_dir_all(dir.file(MachineDir::VMM)).unwrap();
        let listener = UnixListener::bind(dir.file("run/vmm/v.sock")).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                assert_eq!(line, format!("CONNECT {PORT}\n"));
                if let Some(answer) = answer {
                    stream.get_mut().write_all(answer).await.unwrap();
                }
            }
        });
        (files, dir)
    }

    #[tokio::test]
    async fn a_guest_that_refuses_is_asked_again_and_its_first_words_are_kept() {
        let (_files, dir) = vmm(&[None, None, Some(b"OK 1073741824\nhello")]);
        let Channel::Connection(mut stream) =
            connect(&dir, MachineDir::VMM, "v.sock").await.unwrap()
        else {
            panic!("a connection of its own");
        };
        let mut words = String::new();
        stream.read_to_string(&mut words).await.unwrap();
        assert_eq!(words, "hello");
    }

    #[tokio::test]
    async fn a_request_that_was_lost_is_not_waited_for() {
        let files = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(files.path());
        std::fs::create_dir_all(dir.file(MachineDir::VMM)).unwrap();
        let listener = UnixListener::bind(dir.file("run/vmm/v.sock")).unwrap();
        let silent_ones = async {
            let mut silent = Vec::new();
            while silent.len() < 2 * OPEN {
                silent.push(listener.accept().await.unwrap().0);
            }
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            (silent, stream)
        };
        let connected = connect(&dir, MachineDir::VMM, "v.sock");
        let (connected, (silent, _answered)) = tokio::join!(connected, silent_ones);
        assert!(connected.is_ok());
        for stream in silent {
            let mut said = String::new();
            let mut stream = BufReader::new(stream);
            // All that was not answered is given up.
            while stream.read_line(&mut said).await.unwrap() > 0 {}
        }
    }

    #[tokio::test]
    async fn nonsense_is_refused_and_bounded() {
        const ANSWERS: [&[Option<&[u8]>]; 5] = [
            &[Some(b"OK \n")],
            &[Some(b"OK 12")],
            &[Some(b"OK x\n")],
            &[Some(b"\x1b[31mno\n")],
            &[Some(&[b'O'; 100_000])],
        ];
        for answer in ANSWERS {
            let (_files, dir) = vmm(answer);
            match connect(&dir, MachineDir::VMM, "v.sock").await {
                Err(Error::Monitor { answer, .. }) => assert!(answer.len() <= ANSWER, "{answer}"),
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("{answer:?} is no consent"),
            }
        }
    }

    #[tokio::test]
    async fn without_a_vmm_there_is_no_waiting() {
        let files = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(files.path());
        std::fs::create_dir_all(dir.file(MachineDir::VMM)).unwrap();
        let missing = connect(&dir, MachineDir::VMM, "v.sock").await;
        assert!(matches!(missing, Err(Error::NotRunning { .. })));
    }
}
