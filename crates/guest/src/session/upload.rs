//! Sends a stream of bytes to the guest in pieces, and notices when the guest takes no more of it or when the source
//! fails: then the call must be dropped, which resets it, so that half of a file is never taken for the whole.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use tokio::sync::Notify;

use crate::error::{Error, Result};
use crate::limits;

/// Messages made of a source's bytes, with one before and perhaps one after them.
pub(super) struct Upload<S, M> {
    source: Pin<Box<S>>,
    piece: Bytes,
    ready: VecDeque<M>,
    message: fn(Bytes) -> M,
    last: Option<M>,
    size: Option<u64>,
    stage: Stage,
    progress: Arc<Progress>,
}

#[derive(PartialEq)]
enum Stage {
    Source,
    Ended,
    Failed,
}

/// How far an upload has come.
#[derive(Default)]
pub(super) struct Progress {
    state: Mutex<State>,
    failed: Notify,
}

#[derive(Default)]
struct State {
    sent: u64,
    polls: u64,
    /// It is the source that has nothing at the moment.
    idle: bool,
    failure: Option<io::Error>,
}

impl<S, M> Upload<S, M>
where
    S: Stream<Item = io::Result<Bytes>> + Send,
{
    pub(super) fn new(
        first: M,
        source: S,
        message: fn(Bytes) -> M,
        last: Option<M>,
        size: Option<u64>,
    ) -> (Self, Arc<Progress>) {
        let progress = Arc::<Progress>::default();
        let upload = Self {
            source: Box::pin(source),
            piece: Bytes::new(),
            ready: VecDeque::from([first]),
            message,
            last,
            size,
            stage: Stage::Source,
            progress: progress.clone(),
        };
        (upload, progress)
    }

    /// Takes the source's next bytes into `piece`, or leaves [`Stage::Source`].
    fn poll_source(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let polled = self.source.poll_next_unpin(context);
        self.progress.lock().idle = polled.is_pending();
        let sent = self.progress.lock().sent;
        let surplus = |more: u64| self.size.is_some_and(|size| sent + more > size);
        let failure = match ready!(polled) {
            Some(Ok(bytes)) if !surplus(bytes.len() as u64) => {
                self.piece = bytes;
                return Poll::Ready(());
            }
            Some(Ok(_)) => io::Error::new(io::ErrorKind::InvalidData, "more bytes than declared"),
            None if self.size.is_none_or(|size| size == sent) => {
                self.stage = Stage::Ended;
                self.ready.extend(self.last.take());
                return Poll::Ready(());
            }
            None => io::Error::new(io::ErrorKind::UnexpectedEof, "fewer bytes than declared"),
            Some(Err(error)) => error,
        };
        self.stage = Stage::Failed;
        self.progress.lock().failure = Some(failure);
        self.progress.failed.notify_one();
        Poll::Ready(())
    }
}

impl<S, M> Stream for Upload<S, M>
where
    S: Stream<Item = io::Result<Bytes>> + Send,
    M: Unpin,
{
    type Item = M;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<M>> {
        self.progress.lock().polls += 1;
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Poll::Ready(Some(message));
            }
            if !self.piece.is_empty() {
                let length = self.piece.len().min(limits::CHUNK);
                let piece = self.piece.split_to(length);
                self.progress.lock().sent += length as u64;
                return Poll::Ready(Some((self.message)(piece)));
            }
            match self.stage {
                Stage::Source => ready!(self.poll_source(context)),
                Stage::Ended => return Poll::Ready(None),
                // Ending the stream would tell the guest that all is there.
                Stage::Failed => return Poll::Pending,
            }
        }
    }
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding it")
    }

    /// Bytes of the source handed to the connection.
    pub(super) fn sent(&self) -> u64 {
        self.lock().sent
    }

    /// Runs `call` until it answers, the source fails, or, with `stall` given, the guest has taken nothing for at least
    /// so long although there was something to take.
    pub(super) async fn watch<T>(
        &self,
        name: &'static str,
        stall: Option<Duration>,
        call: BoxFuture<'_, Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            () = self.failed.notified() => {
                let failure = self.lock().failure.take();
                let source = failure.unwrap_or_else(|| io::ErrorKind::Other.into());
                Err(Error::Source { call: name, source })
            }
            result = call => result,
            () = self.stalled(stall) => Err(Error::Timeout { call: name }),
        }
    }

    async fn stalled(&self, limit: Option<Duration>) {
        let Some(limit) = limit else {
            return std::future::pending().await;
        };
        loop {
            let before = self.lock().polls;
            tokio::time::sleep(limit).await;
            let state = self.lock();
            if state.polls == before && !state.idle {
                return;
            }
        }
    }
}
