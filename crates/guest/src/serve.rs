//! Serves the agent's calls over one established byte stream, with the limits that the host expects.
//! Listening, the link layer and what the calls do are elsewhere.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::limits;
use crate::pb::agent_server::{Agent, AgentServer};

/// Time for calls in flight to end once a connection is being closed.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Answers calls on `io` with `agent` until the host goes away or `close` resolves.
///
/// After `close`, no further call is accepted and those in flight have one second to end; pass
/// [`std::future::pending`] to serve for as long as the host stays.
///
/// # Errors
/// A broken stream, or a peer that does not speak HTTP/2.
pub async fn serve<A: Agent>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    agent: Arc<A>,
    close: impl Future<Output = ()>,
) -> Result<(), hyper::Error> {
    let agent = AgentServer::from_arc(agent)
        .max_decoding_message_size(limits::MESSAGE)
        .max_encoding_message_size(limits::MESSAGE);
    serve_any(io, agent, close).await
}

/// As [`serve`], for a server with limits of its own.
pub(crate) async fn serve_any<A: Agent>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    agent: AgentServer<A>,
    close: impl Future<Output = ()>,
) -> Result<(), hyper::Error> {
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .adaptive_window(false)
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_concurrent_streams(limits::STREAMS)
        .max_frame_size(limits::HTTP2_FRAME)
        .max_send_buf_size(limits::SEND_BUFFER)
        .max_header_list_size(limits::HEADERS)
        .max_pending_accept_reset_streams(limits::PENDING_RESETS)
        .max_local_error_reset_streams(None)
        .keep_alive_interval(None)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(agent));
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = close => connection.as_mut().graceful_shutdown(),
    }
    // How the host takes its leave is no error any more.
    let _closed = tokio::time::timeout(CLOSE_GRACE, connection).await;
    Ok(())
}
