//! What every call has in common: a slot, a deadline, and errors told apart.

use std::future::Future;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Response, Status, Streaming};

use super::{Session, wire::Wire};
use crate::error::{Error, Result};
use crate::limits;
use crate::pb::agent_client::AgentClient;

type Client = AgentClient<Wire>;

type Reply<T> = std::result::Result<Response<T>, Status>;

/// A stream of messages from the guest. It holds its slot and the connection.
pub(super) struct Incoming<T> {
    call: &'static str,
    messages: Streaming<T>,
    _slot: OwnedSemaphorePermit,
    _session: Session,
}

impl Session {
    /// One request, one reply, all within `deadline`, the wait for a free slot included.
    pub(super) async fn unary<T, F>(
        &self,
        call: &'static str,
        deadline: Duration,
        ask: impl FnOnce(Client) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Reply<T>>,
    {
        let asked = async {
            let _slot = self.slot().await;
            ask(self.inner.wire.client(limits::MESSAGE)).await
        };
        match tokio::time::timeout(deadline, asked).await {
            Ok(reply) => reply
                .map(Response::into_inner)
                .map_err(|status| Error::from_status(call, status)),
            Err(_) => Err(Error::Timeout { call }),
        }
    }

    /// A request whose reply is a stream; `deadline` holds until the stream begins.
    pub(super) async fn streaming<T, F>(
        &self,
        call: &'static str,
        deadline: Duration,
        ask: impl FnOnce(Client) -> F,
    ) -> Result<Incoming<T>>
    where
        F: Future<Output = Reply<Streaming<T>>>,
    {
        let asked = async {
            let slot = self.slot().await;
            let reply = ask(self.inner.wire.client(limits::STREAM_MESSAGE)).await;
            reply.map(|reply| (reply.into_inner(), slot))
        };
        let (messages, slot) = tokio::time::timeout(deadline, asked)
            .await
            .map_err(|_| Error::Timeout { call })?
            .map_err(|status| Error::from_status(call, status))?;
        Ok(Incoming {
            call,
            messages,
            _slot: slot,
            _session: self.clone(),
        })
    }

    /// Refuses what this agent does not know; it would misunderstand some of it.
    pub(super) fn needs(&self, call: &'static str, needs: u32) -> Result<()> {
        match self.hello().generation {
            has if has < needs => Err(Error::TooOld { call, has, needs }),
            _ => Ok(()),
        }
    }

    pub(super) async fn slot(&self) -> OwnedSemaphorePermit {
        let slots = self.inner.slots.clone();
        slots
            .acquire_owned()
            .await
            .expect("the semaphore is never closed")
    }

    pub(super) fn client(&self) -> Client {
        self.inner.wire.client(limits::MESSAGE)
    }
}

impl<T> Incoming<T> {
    /// The next message; `None` when the guest has ended the stream well.
    pub(super) fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        let message = ready!(self.messages.poll_next_unpin(context));
        let call = self.call;
        Poll::Ready(
            message.map(|message| message.map_err(|status| Error::from_status(call, status))),
        )
    }
}
