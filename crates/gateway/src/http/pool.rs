//! Connections to guests that wait for another request. One that belongs to an earlier incarnation of its machine is
//! never used again, since the incarnation is part of what it is found by.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout};

use super::body::{BoxError, Progress, Upload};
use super::pages::Code;
use crate::limits::lock;
use crate::{BoxStream, DialError, Machines};

/// How long a connection may wait: less than servers let theirs (Node.js 5 s, most others more), since a request that
/// meets the end of its connection when it was sent already cannot go out again.
const IDLE: Duration = Duration::from_secs(4);
/// Connections that wait, per port of a machine: few enough that those of a few ports do not use up the places for
/// connections that a machine without a tap has.
const IDLE_PER_PORT: usize = 16;
/// How long a connection may take to be ready again after an answer.
const SETTLE: Duration = Duration::from_secs(5);
/// Largest head of an answer, in bytes and lines.
const HEAD_BYTES: usize = 64 * 1024;
const HEADERS: usize = 200;

/// A port of one incarnation of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Target {
    pub(super) id: String,
    pub(super) incarnation: u64,
    pub(super) port: u16,
}

type Sender = http1::SendRequest<Upload>;

/// Connections that wait.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<HashMap<Target, Vec<(Sender, Instant)>>>,
}

/// A connection that is in use.
pub(super) struct Lent {
    pool: Arc<Pool>,
    target: Target,
    sender: Sender,
}

impl Pool {
    /// Sends a request, on a connection that waits or on a new one, and answers when the answer's head is there.
    pub(super) async fn send(
        self: &Arc<Self>,
        machines: &dyn Machines,
        target: Target,
        mut request: Request<Upload>,
        dial_limit: Duration,
        progress: &Progress,
    ) -> Result<(Response<Incoming>, Lent), Code> {
        loop {
            let waiting = self.take(&target);
            let reused = waiting.is_some();
            let mut sender = match waiting {
                Some(sender) => sender,
                None => open(dial(machines, &target, dial_limit).await?).await?,
            };
            progress.connected();
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let lent = Lent {
                        pool: self.clone(),
                        target,
                        sender,
                    };
                    return Ok((response, lent));
                }
                Err(mut failed) => match failed.take_message() {
                    // It was not sent: the guest has ended this connection meanwhile.
                    Some(again) if reused => request = again,
                    _ => {
                        tracing::debug!(machine = target.id, error = %failed.error(), "no answer");
                        return Err(Code::Broken);
                    }
                },
            }
        }
    }

    fn take(&self, target: &Target) -> Option<Sender> {
        let mut idle = lock(&self.idle);
        let waiting = idle.get_mut(target)?;
        while let Some((sender, since)) = waiting.pop() {
            if sender.is_ready() && since.elapsed() < IDLE {
                return Some(sender);
            }
        }
        idle.remove(target);
        None
    }

    fn put(&self, target: Target, sender: Sender) {
        let mut idle = lock(&self.idle);
        let waiting = idle.entry(target).or_default();
        if waiting.len() < IDLE_PER_PORT {
            waiting.push((sender, Instant::now()));
        }
    }

    /// Lets go what has waited for too long.
    pub(super) fn sweep(&self) {
        lock(&self.idle).retain(|_, waiting| {
            waiting.retain(|(sender, since)| sender.is_ready() && since.elapsed() < IDLE);
            !waiting.is_empty()
        });
    }
}

impl Lent {
    /// Back to where it waits, once it is ready again.
    pub(super) fn give_back(self) {
        let Self {
            pool,
            target,
            mut sender,
        } = self;
        if sender.is_closed() {
            return;
        }
        if sender.is_ready() {
            return pool.put(target, sender);
        }
        tokio::spawn(async move {
            if let Ok(Ok(())) = timeout(SETTLE, sender.ready()).await {
                pool.put(target, sender);
            }
        });
    }
}

/// Connects to a machine's port.
pub(super) async fn dial(
    machines: &dyn Machines,
    target: &Target,
    limit: Duration,
) -> Result<BoxStream, Code> {
    let dialled = timeout(limit, machines.dial(&target.id, target.port)).await;
    dialled.unwrap_or(Err(DialError::Timeout)).map_err(|error| {
        tracing::debug!(machine = target.id, port = target.port, %error, "not connected");
        match error {
            DialError::NoSuchMachine => Code::NoSuchMachine,
            DialError::Stopped => Code::Stopped,
            DialError::NothingListens => Code::NothingListens,
            DialError::Timeout => Code::DialTimeout,
            DialError::Busy => Code::Busy,
            DialError::Failed(_) => Code::Broken,
        }
    })
}

/// How we speak to guests.
pub(super) fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES).max_headers(HEADERS);
    builder
}

async fn open(stream: BoxStream) -> Result<Sender, Code> {
    let (sender, connection) = builder()
        .handshake::<_, Upload>(TokioIo::new(stream))
        .await
        .map_err(|_| Code::Broken)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %BoxError::from(error), "a connection to a guest ended");
        }
    });
    Ok(sender)
}
