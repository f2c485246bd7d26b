//! The calls about processes, and the checks of what a guest says of them.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream as Values, StreamExt};

use super::Session;
use super::call::Incoming;
use super::upload::Upload;
use crate::error::{Error, Result};
use crate::{deadlines, pb};

/// Longest process id, in bytes; the host chooses them.
const ID: usize = 128;

/// A process to start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartProcess {
    /// Chosen by the caller, unique in the machine; starting the same id again answers with the first one's pid.
    pub process_id: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the machine's environment.
    pub environment: BTreeMap<String, String>,
    /// Working directory; empty for the image's.
    pub cwd: String,
    /// Name or number, `user:group` allowed; empty for the image's.
    pub user: String,
    /// Keep standard input open for [`Session::input`]; without it, it is `/dev/null`.
    pub stdin: bool,
    /// Give it a terminal.
    pub pty: Option<PtySize>,
    /// Kill all of it after so long.
    pub timeout: Option<Duration>,
    /// Bytes of output kept; 0 for the agent's default.
    pub ring_bytes: u32,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PtySize {
    /// Lines.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
}

/// One thing that a process' output stream tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Bytes that it wrote.
    Chunk(Chunk),
    /// So many bytes before the next chunk are no longer kept.
    Dropped(u64),
    /// It has ended; nothing follows.
    Exit(Exit),
}

/// Bytes that a process wrote; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where to.
    pub stream: Stream,
    /// Count of output bytes before these, over both streams.
    pub sequence: u64,
    /// The bytes.
    pub data: Bytes,
}

/// Standard output or standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; all output of a process with a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Code or signal.
    pub status: ExitStatus,
    /// Whether its time was up.
    pub timed_out: bool,
    /// Bytes of output that it wrote in all, as the guest counts.
    pub output_end: u64,
}

/// Exit code or signal. What a guest says beyond the ranges is cut to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Exit code.
    Code(u8),
    /// Number of the signal that ended it, 1 to 64.
    Signal(u8),
}

/// A row of a machine's process table. The arguments are guest text: escape them before showing them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As given at its start.
    pub process_id: String,
    /// In the guest.
    pub pid: u32,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// UTC in milliseconds since 1970, by the guest's clock.
    pub started_unix_ms: i64,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
    /// Whether it has a terminal.
    pub pty: bool,
}

impl Session {
    /// Starts a process and answers its pid.
    pub async fn start(&self, process: &StartProcess) -> Result<u32> {
        let process = process.clone();
        let request = pb::StartRequest {
            process_id: process.process_id,
            argv: process.argv,
            environment: process.environment,
            cwd: process.cwd,
            user: process.user,
            stdin: process.stdin,
            pty: process.pty.map(Into::into),
            timeout_ms: process.timeout.map_or(0, at_least_a_millisecond),
            ring_bytes: process.ring_bytes,
        };
        let reply = self
            .unary("Start", deadlines::START, |mut agent| async move {
                agent.start(request).await
            })
            .await?;
        pid("Start", reply.pid)
    }

    /// Output from byte `from` on. With `follow` it ends with the exit, else with what is there now.
    ///
    /// Reading slowly slows the process down and nothing else. Wait on a quiet stream as long as you like: it ends with
    /// the session.
    pub async fn attach(&self, process_id: &str, from: u64, follow: bool) -> Result<OutputStream> {
        let request = pb::AttachRequest {
            process_id: process_id.into(),
            from,
            no_follow: !follow,
        };
        let events = self
            .streaming("Attach", deadlines::STREAM, |mut agent| async move {
                agent.attach(request).await
            })
            .await?;
        Ok(OutputStream {
            events,
            order: Order {
                next: from,
                follow,
                exited: false,
            },
            done: false,
        })
    }

    /// Feeds standard input and, with `eof`, closes it once `data` has ended. Answers how many bytes the process took:
    /// fewer than sent when it closed its end.
    ///
    /// It waits as long as `data` and the process take. Dropping the future leaves standard input open after what was
    /// sent until then.
    pub async fn input(
        &self,
        process_id: &str,
        data: impl Values<Item = Bytes> + Send + 'static,
        eof: bool,
    ) -> Result<u64> {
        const CALL: &str = "Input";
        let message = |process_id: &str, eof| pb::InputChunk {
            process_id: process_id.into(),
            data: Bytes::new(),
            eof,
        };
        let (upload, progress) = Upload::new(
            message(process_id, false),
            data.map(Ok),
            |data| pb::InputChunk {
                data,
                ..Default::default()
            },
            eof.then(|| message("", true)),
            None,
        );
        let call = async {
            let _slot = self.slot().await;
            let reply = self.client().input(upload).await;
            reply.map_err(|status| Error::from_status(CALL, status))
        };
        let accepted = progress
            .watch(CALL, None, Box::pin(call))
            .await?
            .into_inner()
            .accepted;
        if accepted > progress.sent() {
            return Err(Error::Protocol {
                call: CALL,
                what: "more input taken than was sent",
            });
        }
        Ok(accepted)
    }

    /// Answers when the process has ended, or [`Error::Timeout`] after `deadline`.
    pub async fn wait(&self, process_id: &str, deadline: Duration) -> Result<Exit> {
        let request = pb::WaitRequest {
            process_id: process_id.into(),
        };
        let status = self
            .unary("Wait", deadline, |mut agent| async move {
                agent.wait(request).await
            })
            .await?;
        exit("Wait", status)
    }

    /// Sends signal `number` to the leader's process group, or with `all` to everything that the process started.
    pub async fn signal(&self, process_id: &str, number: i32, all: bool) -> Result<()> {
        let request = pb::SignalRequest {
            process_id: process_id.into(),
            signal: number,
            all,
        };
        self.unary("Signal", deadlines::PROCESS, |mut agent| async move {
            agent.signal(request).await
        })
        .await
        .map(drop)
    }

    /// Tells a process' terminal its new size.
    pub async fn resize(&self, process_id: &str, size: PtySize) -> Result<()> {
        let request = pb::ResizeRequest {
            process_id: process_id.into(),
            size: Some(size.into()),
        };
        self.unary("Resize", deadlines::PROCESS, |mut agent| async move {
            agent.resize(request).await
        })
        .await
        .map(drop)
    }

    /// The machine's process table.
    pub async fn processes(&self) -> Result<Vec<Process>> {
        const CALL: &str = "ListProcesses";
        let request = pb::ListProcessesRequest {};
        let reply = self
            .unary(CALL, deadlines::PROCESS, |mut agent| async move {
                agent.list_processes(request).await
            })
            .await?;
        let row = |row: pb::ProcessInfo| {
            let id = &row.process_id;
            if id.is_empty() || id.len() > ID || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(Error::Protocol {
                    call: CALL,
                    what: "an id that we never gave",
                });
            }
            Ok(Process {
                pid: pid(CALL, row.pid)?,
                process_id: row.process_id,
                argv: row.argv,
                started_unix_ms: super::file::sane_time(row.started_unix_ms),
                exit: row.exit.map(|status| exit(CALL, status)).transpose()?,
                pty: row.pty,
            })
        };
        reply.processes.into_iter().map(row).collect()
    }

    /// Kills what is left of a process and drops its row and output.
    pub async fn forget(&self, process_id: &str) -> Result<()> {
        let request = pb::ForgetRequest {
            process_id: process_id.into(),
        };
        self.unary("Forget", deadlines::PROCESS, |mut agent| async move {
            agent.forget(request).await
        })
        .await
        .map(drop)
    }
}

impl From<PtySize> for pb::PtySize {
    fn from(size: PtySize) -> Self {
        Self {
            rows: size.rows,
            cols: size.cols,
        }
    }
}

/// Zero would mean never.
fn at_least_a_millisecond(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_millis())
        .unwrap_or(u64::MAX)
        .max(1)
}

fn pid(call: &'static str, pid: u32) -> Result<u32> {
    let possible = i32::try_from(pid).is_ok_and(|pid| pid > 0);
    if possible {
        Ok(pid)
    } else {
        Err(Error::Protocol {
            call,
            what: "an impossible pid",
        })
    }
}

fn exit(call: &'static str, status: pb::ExitStatus) -> Result<Exit> {
    use pb::exit_status::How;
    let clamp = |number: i32, low, high| number.clamp(low, high) as u8;
    let how = match status.how {
        Some(How::Code(code)) => ExitStatus::Code(clamp(code, 0, 255)),
        Some(How::Signal(signal)) => ExitStatus::Signal(clamp(signal, 1, 64)),
        None => {
            return Err(Error::Protocol {
                call,
                what: "an exit without code or signal",
            });
        }
    };
    Ok(Exit {
        status: how,
        timed_out: status.timed_out,
        output_end: status.output_end,
    })
}

/// A process' output. After an error or the exit nothing follows.
pub struct OutputStream {
    events: Incoming<pb::OutputEvent>,
    order: Order,
    done: bool,
}

impl Values for OutputStream {
    type Item = Result<Output>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let item = match ready!(self.events.poll_message(context)) {
            Some(Ok(event)) => Some(self.order.check(event)),
            Some(Err(error)) => Some(Err(error)),
            None => self.order.check_end().err().map(Err),
        };
        self.done = self.order.exited || !matches!(item, Some(Ok(_)));
        Poll::Ready(item)
    }
}

/// What must come next in an output stream.
struct Order {
    next: u64,
    follow: bool,
    exited: bool,
}

impl Order {
    fn check(&mut self, event: pb::OutputEvent) -> Result<Output> {
        use pb::output_event::Event;
        match event.event {
            Some(Event::Chunk(chunk)) => {
                if chunk.sequence != self.next {
                    return Err(lie("output out of order"));
                }
                let stream = match pb::output_chunk::Stream::try_from(chunk.stream) {
                    Ok(pb::output_chunk::Stream::Stdout) => Stream::Stdout,
                    Ok(pb::output_chunk::Stream::Stderr) => Stream::Stderr,
                    Err(_) => return Err(lie("output of an unknown stream")),
                };
                if chunk.data.is_empty() {
                    return Err(lie("an empty chunk of output"));
                }
                self.skip(chunk.data.len() as u64)?;
                Ok(Output::Chunk(Chunk {
                    stream,
                    sequence: chunk.sequence,
                    data: chunk.data,
                }))
            }
            Some(Event::Dropped(bytes)) => {
                self.skip(bytes)?;
                Ok(Output::Dropped(bytes))
            }
            Some(Event::Exit(status)) => {
                self.exited = true;
                exit("Attach", status).map(Output::Exit)
            }
            None => Err(lie("an output event that says nothing")),
        }
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.next = self
            .next
            .checked_add(bytes)
            .ok_or_else(|| lie("more output than can be"))?;
        Ok(())
    }

    fn check_end(&self) -> Result<()> {
        if self.follow {
            Err(lie("output that ends without an exit"))
        } else {
            Ok(())
        }
    }
}

fn lie(what: &'static str) -> Error {
    Error::Protocol {
        call: "Attach",
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_exit_is_cut_to_a_possible_one() {
        use pb::exit_status::How;
        let status = |how| {
            let status = pb::ExitStatus {
                how: Some(how),
                ..Default::default()
            };
            exit("Wait", status).unwrap().status
        };
        assert_eq!(status(How::Code(3)), ExitStatus::Code(3));
        assert_eq!(status(How::Code(i32::MAX)), ExitStatus::Code(255));
        assert_eq!(status(How::Code(-1)), ExitStatus::Code(0));
        assert_eq!(status(How::Signal(999)), ExitStatus::Signal(64));
        assert_eq!(status(How::Signal(0)), ExitStatus::Signal(1));
        assert!(exit("Wait", pb::ExitStatus::default()).is_err());
    }

    #[test]
    fn dropped_bytes_count_and_cannot_overflow() {
        let event = |event| pb::OutputEvent { event: Some(event) };
        let mut order = Order {
            next: 10,
            follow: true,
            exited: false,
        };
        let dropped = pb::output_event::Event::Dropped(5);
        assert_eq!(order.check(event(dropped)).unwrap(), Output::Dropped(5));
        let chunk = pb::OutputChunk {
            sequence: 15,
            data: Bytes::from_static(b"x"),
            stream: 1,
        };
        assert!(
            order
                .check(event(pb::output_event::Event::Chunk(chunk)))
                .is_ok()
        );
        assert!(
            order
                .check(event(pb::output_event::Event::Dropped(u64::MAX)))
                .is_err()
        );
        assert!(order.check_end().is_err());
    }
}
