//! Machines that rest or end by themselves, and how it is known that somebody uses one.

use std::io;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hutch_contract::lifetime::{Lifetime, TtlAction};
use hutch_contract::machine::Status;
use hutch_contract::record::{MachineRecord, Wanted};
use hutch_guest::session::Session;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::{Error, plan};

/// How many use a machine, and since when nobody does.
#[derive(Debug, Clone, Copy)]
struct Usage {
    users: usize,
    since: Instant,
}

/// Who uses a machine.
pub(crate) struct Uses(watch::Sender<Usage>);

impl Uses {
    pub fn new() -> Arc<Uses> {
        let since = Instant::now();
        Arc::new(Uses(watch::Sender::new(Usage { users: 0, since })))
    }

    /// Uses the machine until the result is dropped.
    pub fn hold(self: &Arc<Uses>) -> Use {
        self.0.send_modify(|usage| usage.users += 1);
        Use(self.clone())
    }

    /// As if somebody had used it for a moment.
    pub fn touch(&self) {
        self.0.send_modify(|usage| usage.since = Instant::now());
    }

    /// Ends once nobody has used it for so long.
    async fn unused_for(&self, idle: Duration) {
        let mut usage = self.0.subscribe();
        loop {
            let now = *usage.borrow_and_update();
            if now.users == 0 {
                let until = now.since + idle;
                if until <= Instant::now() {
                    return;
                }
                tokio::time::sleep_until(until).await;
            } else if usage.wait_for(|usage| usage.users == 0).await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Does `last` unless somebody uses it, or did within `idle`. Whoever begins to does so before `last` or after it, not
    /// meanwhile.
    pub fn unless_used(&self, idle: Duration, last: impl FnOnce()) -> bool {
        let mut unused = false;
        self.0.send_if_modified(|usage| {
            unused = usage.users == 0 && usage.since.elapsed() >= idle;
            if unused {
                last();
            }
            false
        });
        unused
    }
}

/// One use of a machine, for as long as it is there.
pub(crate) struct Use(Arc<Uses>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.0.send_modify(|usage| {
            usage.users -= 1;
            usage.since = Instant::now();
        });
    }
}

/// A session with a machine's agent, a stream or a connection, which is a use of the machine.
pub(crate) struct Used<T> {
    inner: T,
    held: Use,
}

impl<T> Used<T> {
    pub fn new(inner: T, held: Use) -> Used<T> {
        Used { inner, held }
    }

    /// Something else that goes on as the same use.
    pub fn with<U>(self, inner: U) -> Used<U> {
        Used::new(inner, self.held)
    }
}

impl Deref for Used<Session> {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.inner
    }
}

impl<S: futures::Stream + Unpin> futures::Stream for Used<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        Pin::new(&mut self.inner).poll_next(context)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Used<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, into)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Used<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// What has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nobody has used it for as long as it was to wait.
    Idle(Duration),
    /// Its time is over.
    Ttl,
}

/// Ends when the machine of this record, which rests at its level, is to do something by itself.
pub(crate) async fn due(record: &MachineRecord, uses: &Uses, now_ms: u64) -> Due {
    let idle = async {
        match (record.lifetime.idle_pause_s, plan::status(record)) {
            (Some(idle), Status::Running) => {
                let idle = Duration::from_secs(idle.into());
                uses.unused_for(idle).await;
                Due::Idle(idle)
            }
            _ => std::future::pending().await,
        }
    };
    let over = async {
        match record.expires_at_ms {
            Some(end) => {
                tokio::time::sleep(Duration::from_millis(end.saturating_sub(now_ms))).await
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = over => Due::Ttl,
        idle = idle => idle,
    }
}

/// What is wanted of a machine once nobody uses it.
pub(crate) fn pause_idle(record: &mut MachineRecord) {
    if record.lifetime.idle_pause_s.is_some() && plan::status(record) == Status::Running {
        record.wanted = Wanted::Paused;
        record.generation += 1;
    }
}

/// What is wanted of a machine whose time is over. The time may have been set anew, or the clock back.
pub(crate) fn expire(record: &mut MachineRecord, now_ms: u64) {
    if record.expires_at_ms.is_none_or(|end| end > now_ms) {
        return;
    }
    record.expires_at_ms = None;
    let up = matches!(
        plan::status(record),
        Status::Running | Status::Starting | Status::Pausing | Status::Paused
    );
    let wanted = match record.lifetime.ttl_action.unwrap_or_default() {
        TtlAction::Delete => Wanted::Deleted,
        TtlAction::Stop if up => Wanted::Stopped,
        TtlAction::Pause if up => Wanted::Paused,
        TtlAction::Stop | TtlAction::Pause => return,
    };
    if record.wanted != wanted {
        record.wanted = wanted;
        record.restart = false;
        record.generation += 1;
    }
}

/// Gives a machine that is started, or goes on, its time again if that was over.
pub(crate) fn renew(record: &mut MachineRecord, now_ms: u64) {
    if record.expires_at_ms.is_none() {
        record.expires_at_ms = end_of(&record.lifetime, now_ms);
    }
}

/// When a time that begins now is over, UTC, in milliseconds since 1970.
pub(crate) fn end_of(lifetime: &Lifetime, now_ms: u64) -> Option<u64> {
    let seconds = lifetime.ttl_s?;
    Some(now_ms.saturating_add(u64::from(seconds) * 1000))
}

/// How a machine lives once this is asked of it. `pauses`: whether its runtime can pause it.
pub(crate) fn changed(
    lifetime: &Lifetime,
    asked: &Lifetime,
    pauses: bool,
) -> Result<Lifetime, Error> {
    let unless_never = |asked: Option<u32>, now| asked.or(now).filter(|seconds| *seconds != 0);
    let changed = Lifetime {
        idle_pause_s: unless_never(asked.idle_pause_s, lifetime.idle_pause_s),
        ttl_s: unless_never(asked.ttl_s, lifetime.ttl_s),
        ttl_action: asked.ttl_action.or(lifetime.ttl_action),
        restart: asked.restart.or(lifetime.restart),
    };
    if asked.ttl_action.is_some() && changed.ttl_s.is_none() {
        let problem = "needs `ttl_s`, the time after which it is done";
        return Err(Error::invalid("lifetime.ttl_action", problem));
    }
    if !pauses && changed.idle_pause_s.is_some() {
        let problem = "is not possible with this runtime, which cannot pause machines";
        return Err(Error::invalid("lifetime.idle_pause_s", problem));
    }
    let action = changed.ttl_action.unwrap_or_default();
    if !pauses && changed.ttl_s.is_some() && action == TtlAction::Pause {
        let problem = "must be `stop` or `delete` with this runtime, which cannot pause machines";
        return Err(Error::invalid("lifetime.ttl_action", problem));
    }
    Ok(changed)
}

#[cfg(test)]
mod tests;
