//! The QEMU Machine Protocol, as far as machines are paused, stopped and watched with it. Which commands make sense
//! when is the runtimes' affair. The VMM may have been taken over by its guest: lines are bounded, waits have deadlines,
//! text is made printable.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use hutch_contract::machine::Exit;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;

use crate::breaker::Breakers;
use crate::launch::{ExitStatus, Launch};
use crate::process::{Evidence, Process, panicked, printable};
use crate::{Error, MachineDir, RuntimeConfig};

/// Time for a whole command, connection included. A VMM that is stopped or stuck answers never.
const COMMAND: Duration = Duration::from_secs(4);
/// The longest line that we read; answers to our commands are far below.
const LINE: u64 = 1024 * 1024;
/// Makes an event monitor speak.
pub(crate) const GREETING: &str = "{\"execute\":\"qmp_capabilities\"}\n";

/// Launches a VMM that speaks QMP and waits until it does. Nothing is left running after an error.
pub(crate) async fn launch(
    runtime: &'static str,
    config: &RuntimeConfig,
    dir: &MachineDir,
    what: Launch,
    within: Duration,
) -> Result<Process, Error> {
    let ready = async { Monitor::connect(dir).await.map(drop) };
    crate::launch::until_ready(runtime, config, dir, what, judge, within, ready).await
}

/// Runs one command on a connection of its own: QEMU serves one at a time, the next waits.
///
/// # Errors
/// [`Error::NotRunning`] when nothing listens, [`Error::Timeout`], [`Error::Hung`] for a VMM that has been silent
/// before, [`Error::Monitor`] for a refusal.
pub(crate) async fn execute(
    breakers: &Breakers,
    dir: &MachineDir,
    command: &'static str,
) -> Result<Value, Error> {
    let talk = async {
        let mut monitor = Monitor::connect(dir).await?;
        monitor.execute(command).await
    };
    answered(breakers, dir, command, talk).await
}

/// Waits for a conversation with a VMM, connection included, whose commands are quickly done: all of it is `what`.
///
/// # Errors
/// As [`execute`], and what the conversation says.
pub(crate) async fn answered<T>(
    breakers: &Breakers,
    dir: &MachineDir,
    what: &'static str,
    talk: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let done = async {
        let done = tokio::time::timeout(COMMAND, talk).await;
        done.unwrap_or(Err(Error::Timeout {
            what,
            seconds: COMMAND.as_secs(),
        }))
    };
    breakers.guard(dir, done).await
}

/// A connection to a VMM's monitor. The caller sets deadlines.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Returns once the VMM is up and has greeted.
    pub(crate) async fn connect(dir: &MachineDir) -> Result<Self, Error> {
        let stream = dir.connect(MachineDir::MONITOR_SOCKET).await?;
        let mut monitor = Self {
            stream: BufReader::new(stream),
        };
        monitor.message("connect").await?;
        monitor.execute("qmp_capabilities").await?;
        Ok(monitor)
    }

    /// Runs a command without arguments and passes over events until its answer.
    pub(crate) async fn execute(&mut self, command: &'static str) -> Result<Value, Error> {
        self.run(command, json!({}), None).await
    }

    /// Runs a command, which may be about a descriptor, and passes over events until its answer.
    pub(crate) async fn run(
        &mut self,
        command: &'static str,
        arguments: Value,
        about: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Error> {
        let refused = |answer: &[u8]| Error::Monitor {
            command,
            answer: printable(answer, 512),
        };
        let order = json!({"execute": command, "arguments": arguments, "id": command});
        let line = format!("{order}\n");
        let stream = self.stream.get_mut();
        let sent = match about {
            Some(fd) => send_with(stream, line.as_bytes(), fd).await,
            None => stream.write_all(line.as_bytes()).await,
        };
        sent.map_err(|error| refused(error.to_string().as_bytes()))?;
        loop {
            let mut message = self.message(command).await?;
            if message.get("id").and_then(Value::as_str) != Some(command) {
                continue;
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let why = message.pointer("/error/desc").and_then(Value::as_str);
            return Err(refused(why.unwrap_or("no reason given").as_bytes()));
        }
    }

    async fn message(&mut self, command: &'static str) -> Result<Value, Error> {
        let wrong = |answer: &str| Error::Monitor {
            command,
            answer: answer.to_owned(),
        };
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(LINE);
        match bounded.read_until(b'\n', &mut line).await {
            Err(error) => Err(wrong(&error.to_string())),
            Ok(_) if line.last() != Some(&b'\n') => Err(wrong("the connection ended")),
            Ok(_) => serde_json::from_slice(&line).map_err(|_| wrong("an answer that is no JSON")),
        }
    }
}

/// Sends bytes, and with the first of them a descriptor.
async fn send_with(
    stream: &mut UnixStream,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
) -> std::io::Result<()> {
    let send = || {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let (bytes, flags) = ([IoSlice::new(bytes)], SendFlags::NOSIGNAL);
        Ok(rustix::net::sendmsg(&*stream, &bytes, &mut control, flags)?)
    };
    let sent = stream.async_io(Interest::WRITABLE, send).await?;
    stream.write_all(&bytes[sent..]).await
}

#[derive(Deserialize)]
struct Event {
    event: String,
    #[serde(default)]
    data: Value,
}

/// What an end of QEMU meant: from its exit status, its last `SHUTDOWN` event (`ShutdownCause` in QEMU's
/// `qapi/run-state.json`) and, since a panicking kernel just resets, the console.
pub(crate) fn judge(evidence: &Evidence) -> Exit {
    match evidence.status {
        ExitStatus::Signal(signal) => return Exit::Signal { signal },
        ExitStatus::Code(0) => {}
        ExitStatus::Code(code) => return Exit::Code { code },
    }
    let events = evidence.events.split(|byte| *byte == b'\n');
    let mut events = events.filter_map(|line| serde_json::from_slice::<Event>(line).ok());
    let shutdown = events.rfind(|event| event.event == "SHUTDOWN");
    let reason = shutdown.as_ref().and_then(|event| event.data.get("reason"));
    match reason.and_then(Value::as_str) {
        Some("guest-shutdown") => Exit::PowerOff,
        Some("guest-reset") if panicked(&evidence.console) => Exit::Panic,
        Some("guest-reset") => Exit::Reboot,
        Some("guest-panic") => Exit::Panic,
        Some("host-qmp-quit" | "host-qmp-system-reset") => Exit::Killed,
        Some("host-signal") => Exit::Signal {
            signal: libc::SIGTERM,
        },
        _ => Exit::Code { code: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(code: i32, events: &str, console: &str) -> Exit {
        judge(&Evidence {
            status: ExitStatus::Code(code),
            events: events.as_bytes().to_vec(),
            console: console.as_bytes().to_vec(),
            words: Vec::new(),
        })
    }

    fn shutdown(reason: &str) -> String {
        let cut_by_the_ring = "ion\": 3}}\r\n";
        let event = format!(
            r#"{{"timestamp": {{"seconds": 1, "microseconds": 2}}, "event": "SHUTDOWN", "data": {{"guest": true, "reason": "{reason}"}}}}"#
        );
        format!("{cut_by_the_ring}{{\"return\": {{}}}}\r\n{event}\r\n{{\"event\": \"STOP\"}}\r\n")
    }

    #[test]
    fn ends_are_told_apart() {
        let panic = "[ 1.0] Kernel panic - not syncing: sysrq triggered crash\r\n";
        assert_eq!(ended(0, &shutdown("guest-shutdown"), ""), Exit::PowerOff);
        assert_eq!(ended(0, &shutdown("guest-shutdown"), panic), Exit::PowerOff);
        assert_eq!(ended(0, &shutdown("guest-reset"), "bye"), Exit::Reboot);
        assert_eq!(ended(0, &shutdown("guest-reset"), panic), Exit::Panic);
        assert_eq!(ended(0, &shutdown("guest-panic"), ""), Exit::Panic);
        assert_eq!(ended(0, &shutdown("host-qmp-quit"), ""), Exit::Killed);
        assert_eq!(
            ended(0, &shutdown("host-signal"), ""),
            Exit::Signal { signal: 15 }
        );
        assert_eq!(
            ended(0, &shutdown("something-new"), ""),
            Exit::Code { code: 0 }
        );
        assert_eq!(ended(0, "", ""), Exit::Code { code: 0 });
        assert_eq!(
            ended(1, &shutdown("guest-shutdown"), ""),
            Exit::Code { code: 1 }
        );
    }

    #[test]
    fn a_signal_is_a_signal_whatever_was_said() {
        let exit = judge(&Evidence {
            status: ExitStatus::Signal(11),
            events: shutdown("guest-shutdown").into_bytes(),
            console: Vec::new(),
            words: Vec::new(),
        });
        assert_eq!(exit, Exit::Signal { signal: 11 });
    }
}
