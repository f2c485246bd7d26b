//! Bodies on their way: what comes from clients is not waited for without end, what comes from guests is followed until
//! the client has it. Neither is kept.

use std::error::Error as StdError;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};

use super::clients::{Busy, Watch, now_ms};
use super::pool::Lent;
use crate::limits::Place;

pub(super) type BoxError = Box<dyn StdError + Send + Sync>;

/// What became of an upload, for who waits for the answer.
pub(super) struct Progress {
    connected: AtomicBool,
    moved_ms: AtomicU64,
    stalled: AtomicBool,
}

impl Progress {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            connected: AtomicBool::new(false),
            moved_ms: AtomicU64::new(now_ms()),
            stalled: AtomicBool::new(false),
        })
    }

    /// Whether the client sent nothing for too long.
    pub(super) fn stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// There is a connection to the guest.
    pub(super) fn connected(&self) {
        self.moved_ms.store(now_ms(), Ordering::Relaxed);
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Resolves when nothing has moved for `limit`, to which `dial` is added before there is a connection.
    pub(super) async fn quiet(&self, dial: Duration, limit: Duration) {
        loop {
            let limit = match self.connected.load(Ordering::Relaxed) {
                true => limit,
                false => dial + limit,
            };
            let moved = self.moved_ms.load(Ordering::Relaxed);
            let quiet = Duration::from_millis(now_ms().saturating_sub(moved));
            if quiet >= limit {
                return;
            }
            sleep(limit - quiet).await;
        }
    }
}

/// A timer that runs only while there is something to wait for.
struct Patience {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    running: bool,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Self {
            limit,
            timer: None,
            running: false,
        }
    }

    fn rest(&mut self) {
        self.running = false;
    }

    /// Whether it has run for too long.
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.running {
            self.running = true;
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(context).is_ready()
    }
}

/// The body of a request.
pub(super) struct Upload {
    incoming: Incoming,
    patience: Patience,
    progress: Arc<Progress>,
}

impl Upload {
    /// Fails when the client sends nothing for `stall` although the guest would take it.
    pub(super) fn new(incoming: Incoming, stall: Duration, progress: Arc<Progress>) -> Self {
        Self {
            incoming,
            patience: Patience::new(stall),
            progress,
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.incoming).poll_frame(context) {
            Poll::Ready(frame) => {
                self.patience.rest();
                self.progress.moved_ms.store(now_ms(), Ordering::Relaxed);
                // Trailers could bring headers that were taken out above.
                let frame = frame.filter(|frame| frame.as_ref().map_or(true, Frame::is_data));
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending if self.patience.is_over(context) => {
                self.progress.stalled.store(true, Ordering::Relaxed);
                let error = io::Error::new(io::ErrorKind::TimedOut, "the client sends nothing");
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// The body of an answer.
pub(super) enum Answer {
    /// Of ours, until it is handed out.
    Page(Option<Bytes>),
    /// Of a guest.
    Guest(Box<Download>),
}

/// What a guest sends.
pub(super) struct Download {
    incoming: Incoming,
    patience: Patience,
    ended: bool,
    busy: Busy,
    watch: Option<Watch>,
    lent: Option<Lent>,
    _places: Places,
}

/// What a request holds until its answer has ended.
pub(super) type Places = (Option<Place<std::net::IpAddr>>, Place<String>);

impl Download {
    /// Fails when the guest sends nothing for `idle` although the client would take it.
    pub(super) fn new(
        incoming: Incoming,
        idle: Duration,
        busy: Busy,
        lent: Option<Lent>,
        places: Places,
    ) -> Self {
        Self {
            incoming,
            patience: Patience::new(idle),
            ended: false,
            watch: Some(busy.conn.watch()),
            busy,
            lent,
            _places: places,
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.busy.guests_turn();
        match Pin::new(&mut self.incoming).poll_frame(context) {
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(None)
            }
            Poll::Ready(Some(frame)) => {
                self.patience.rest();
                self.busy.clients_turn();
                Poll::Ready(Some(frame.map_err(Into::into)))
            }
            Poll::Pending if self.patience.is_over(context) => {
                let error = io::Error::new(io::ErrorKind::TimedOut, "the guest sends nothing");
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.ended || self.incoming.is_end_stream() {
            if let Some(watch) = self.watch.take() {
                watch.settle();
            }
            if let Some(lent) = self.lent.take() {
                lent.give_back();
            }
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Answer::Page(page) => Poll::Ready(page.take().map(|page| Ok(Frame::data(page)))),
            Answer::Guest(download) => download.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Answer::Page(page) => page.is_none(),
            Answer::Guest(download) => download.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Answer::Page(page) => {
                let length = page.as_ref().map_or(0, Bytes::len);
                SizeHint::with_exact(length as u64)
            }
            Answer::Guest(download) => download.incoming.size_hint(),
        }
    }
}
