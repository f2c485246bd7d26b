//! HTTP/2 over one stream as the transport of the generated client. Unlike tonic's own channel it cannot reconnect.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::body::Body;

use crate::limits;
use crate::pb::agent_client::AgentClient;

/// Streams that we cancelled are remembered so long, and this many of them, so that what the guest still sends for them
/// is dropped without fuss.
const CANCELLED_KEPT: Duration = Duration::from_secs(10);
const CANCELLED: usize = 1024;
/// Frames for streams that do not exist, after which the connection is closed: each costs us an answer in memory.
const STRAY_FRAMES: usize = 16 * 1024;

#[derive(Clone)]
pub(super) struct Wire {
    requests: SendRequest<Body>,
}

/// Starts HTTP/2 on `io`. The second value must be polled for anything to happen and ends with the connection.
pub(super) async fn connect(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> hyper::Result<(Wire, impl Future<Output = hyper::Result<()>> + Send)> {
    let (requests, driver) = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .adaptive_window(false)
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .initial_max_send_streams(limits::STREAMS as usize)
        .max_concurrent_streams(0)
        .max_frame_size(limits::HTTP2_FRAME)
        .max_send_buf_size(limits::SEND_BUFFER)
        .max_header_list_size(limits::HEADERS)
        .max_concurrent_reset_streams(CANCELLED)
        .reset_stream_duration(CANCELLED_KEPT)
        .max_local_error_reset_streams(STRAY_FRAMES)
        .keep_alive_interval(None)
        .handshake(TokioIo::new(io))
        .await?;
    Ok((Wire { requests }, driver))
}

impl Wire {
    /// A client whose replies have at most `limit` bytes per message.
    pub(super) fn client(&self, limit: usize) -> AgentClient<Wire> {
        AgentClient::with_origin(self.clone(), Uri::from_static("http://agent"))
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limits::MESSAGE)
    }
}

impl tower::Service<Request<Body>> for Wire {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    /// Always ready: the error of a closed connection comes from the call, where its type is kept.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.requests.send_request(request))
    }
}
