//! What a process writes, followed from any byte on, beyond the end of the session that it comes from.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use hutch_contract::exec::ExecExit;
use hutch_contract::id::ProcessId;
use hutch_guest::session::{Chunk, Exit, ExitStatus, Output, Session, Stream};

use super::goes_on;
use crate::Error;
use crate::engine::Machine;
use crate::exec::ready;
use crate::lifetime::Used;

/// What comes from a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of standard output, after so many bytes of both streams.
    Stdout {
        /// Bytes of output before these.
        sequence: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Bytes of standard error, after so many bytes of both streams.
    Stderr {
        /// Bytes of output before these.
        sequence: u64,
        /// The bytes.
        data: Bytes,
    },
    /// So many bytes are gone.
    Dropped(u64),
    /// It has ended; nothing follows.
    Exit(ExecExit),
}

/// A command's output. The process stays in the guest's table, which drops the oldest ended ones by itself: a command may
/// leave others running behind it, and those live on.
pub(crate) struct Following {
    machine: Arc<Machine>,
    session: Used<Session>,
    process: ProcessId,
    output: BoxStream<'static, hutch_guest::session::Result<Output>>,
    /// The first byte that has not been seen.
    next: u64,
}

impl Following {
    /// Attaches to a process in a session, from byte `from` on.
    pub async fn new(
        machine: Arc<Machine>,
        session: Used<Session>,
        process: ProcessId,
        from: u64,
    ) -> Result<Following, Error> {
        let output = session.attach(process.as_str(), from, true).await?;
        Ok(Following {
            machine,
            session,
            process,
            output: output.boxed(),
            next: from,
        })
    }

    /// The session that it comes from now.
    pub fn session(&self) -> Session {
        (*self.session).clone()
    }

    /// Translates the guest's words, and goes on with them after a snapshot, which ends every session with the guest.
    pub fn stream(self) -> BoxStream<'static, Result<ExecOutput, Error>> {
        stream::unfold(Some(self), |following| async {
            let mut following = following?;
            loop {
                let lost = match following.output.next().await {
                    Some(Ok(output)) => {
                        let output = following.translate(output);
                        let over = matches!(output, ExecOutput::Exit(_));
                        return Some((Ok(output), (!over).then_some(following)));
                    }
                    Some(Err(error)) => Some(error),
                    None => None,
                };
                if !following.attach_again().await {
                    return lost.map(|error| (Err(error.into()), None));
                }
            }
        })
        .boxed()
    }

    fn translate(&mut self, output: Output) -> ExecOutput {
        match output {
            Output::Chunk(Chunk {
                stream,
                sequence,
                data,
            }) => {
                self.next = sequence + data.len() as u64;
                match stream {
                    Stream::Stdout => ExecOutput::Stdout { sequence, data },
                    Stream::Stderr => ExecOutput::Stderr { sequence, data },
                }
            }
            Output::Dropped(bytes) => {
                self.next += bytes;
                ExecOutput::Dropped(bytes)
            }
            Output::Exit(exit) => ExecOutput::Exit(exec_exit(&exit)),
        }
    }

    /// Whether the same process' output comes from a new session now. One that was paused by wish is not woken for it.
    async fn attach_again(&mut self) -> bool {
        loop {
            if !goes_on(&self.machine, &self.session).await {
                return false;
            }
            let Ok(session) = ready(&self.machine, "run commands").await else {
                return false;
            };
            self.session = session;
            let again = self.session.attach(self.process.as_str(), self.next, true);
            if let Ok(output) = again.await {
                self.output = output.boxed();
                return true;
            }
        }
    }
}

/// An end as the API tells it.
pub(crate) fn exec_exit(exit: &Exit) -> ExecExit {
    let (exit_code, signal) = match exit.status {
        ExitStatus::Code(code) => (i32::from(code), None),
        ExitStatus::Signal(number) => (128 + i32::from(number), Some(i32::from(number))),
    };
    ExecExit {
        exit_code,
        signal,
        timed_out: exit.timed_out,
    }
}
