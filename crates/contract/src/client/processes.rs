//! The routes of processes, and the WebSocket that attaches to one.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use reqwest::header::{ACCEPT, CONNECTION, HeaderValue, UPGRADE};
use reqwest::{Method, RequestBuilder, StatusCode};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};
use ulid::Ulid;

use super::routes::{optional, raw};
use super::{Body, Client, Error, sse, stream};
use crate::exec::{ExecEvent, ExecExit};
use crate::process::{
    AttachError, ClientMessage, InputTaken, MAX_FRAME_BYTES, MAX_FRAME_DATA_BYTES, OutputChannel,
    Process, Processes, PtySize, SendSignal, ServerMessage, Signal, StartProcess, StartedProcess,
    read_output_frame, stdin_frame,
};

/// How long an attachment may take to come about: its machine may be starting.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(180);

/// What an attachment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachEvent {
    /// The process has written something.
    Output {
        /// Where to.
        channel: OutputChannel,
        /// Count of output bytes before these, over both streams.
        sequence: u64,
        /// The bytes.
        data: Bytes,
    },
    /// So many bytes of output are gone.
    Dropped(u64),
    /// Something that was asked for was not done; all else goes on.
    Refused(AttachError),
    /// The server cannot go on; nothing follows. The process does.
    Error(AttachError),
    /// It has ended; nothing follows.
    Exit(ExecExit),
}

type Socket = WebSocketStream<reqwest::Upgraded>;

/// What is said to an attached process.
pub struct AttachInput(SplitSink<Socket, Message>);

/// What an attached process says.
pub struct AttachOutput {
    socket: SplitStream<Socket>,
    over: bool,
}

/// Processes.
impl Client {
    /// `POST /v1/machines/{id}/processes`: starts one.
    pub async fn start_process(
        &self,
        reference: &str,
        process: &StartProcess,
    ) -> Result<StartedProcess, Error> {
        let request = self.of(Method::POST, reference, &["processes"])?;
        // Its machine may be starting.
        self.json(request.json(process), ATTACH_TIMEOUT).await
    }

    /// `GET /v1/machines/{id}/processes`: all of them, oldest first.
    pub async fn processes(&self, reference: &str) -> Result<Vec<Process>, Error> {
        let request = self.of(Method::GET, reference, &["processes"])?;
        let processes: Processes = self.json(request, ATTACH_TIMEOUT).await?;
        Ok(processes.items)
    }

    /// `GET /v1/machines/{id}/processes/{process}`.
    pub async fn process(&self, reference: &str, process: &str) -> Result<Process, Error> {
        let request = self.of(Method::GET, reference, &["processes", process])?;
        self.json(request, ATTACH_TIMEOUT).await
    }

    /// `DELETE /v1/machines/{id}/processes/{process}`: kills it and drops its output.
    pub async fn delete_process(&self, reference: &str, process: &str) -> Result<(), Error> {
        self.nothing(self.of(Method::DELETE, reference, &["processes", process])?)
            .await
    }

    /// `POST /v1/machines/{id}/processes/{process}/wait`: how it ended, or an error of kind `Timeout` after so long.
    pub async fn wait_process(
        &self,
        reference: &str,
        process: &str,
        limit: Duration,
    ) -> Result<ExecExit, Error> {
        let request = self.of(Method::POST, reference, &["processes", process, "wait"])?;
        let request = request.query(&[("timeout_ms", limit.as_millis().to_string())]);
        self.json(request, ATTACH_TIMEOUT + limit).await
    }

    /// `POST /v1/machines/{id}/processes/{process}/signal`.
    pub async fn signal_process(
        &self,
        reference: &str,
        process: &str,
        signal: &SendSignal,
    ) -> Result<(), Error> {
        let request = self.of(Method::POST, reference, &["processes", process, "signal"])?;
        self.nothing(request.json(signal)).await
    }

    /// `POST /v1/machines/{id}/processes/{process}/resize`.
    pub async fn resize_process(
        &self,
        reference: &str,
        process: &str,
        size: PtySize,
    ) -> Result<(), Error> {
        let request = self.of(Method::POST, reference, &["processes", process, "resize"])?;
        self.nothing(request.json(&size)).await
    }

    /// `POST /v1/machines/{id}/processes/{process}/stdin`: answers when the process has taken all, or has closed its end.
    /// With `eof` it reads an end of file after that.
    pub async fn feed_process(
        &self,
        reference: &str,
        process: &str,
        input: Body,
        eof: bool,
    ) -> Result<InputTaken, Error> {
        let request = self.of(Method::POST, reference, &["processes", process, "stdin"])?;
        let request = request.query(&[("eof", eof.to_string())]);
        super::decode(self.send(raw(request, None, input)).await?).await
    }

    /// `GET /v1/machines/{id}/processes/{process}/output`: what it writes, from byte `from` on.
    pub async fn process_output(
        &self,
        reference: &str,
        process: &str,
        from: u64,
    ) -> Result<BoxStream<'static, Result<ExecEvent, Error>>, Error> {
        let request = self.of(Method::GET, reference, &["processes", process, "output"])?;
        let mut request = request
            .query(&[("from", from.to_string())])
            .build()
            .map_err(Error::reading)?;
        request
            .headers_mut()
            .insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let request = RequestBuilder::from_parts(self.http.clone(), request);
        Ok(sse::events(stream(self.send(request).await?)))
    }

    /// `GET /v1/machines/{id}/processes/{process}/attach`: a WebSocket.
    pub async fn attach(
        &self,
        reference: &str,
        process: &str,
        from: u64,
        stdin: bool,
    ) -> Result<(AttachInput, AttachOutput), Error> {
        let request = self.of(Method::GET, reference, &["processes", process, "attach"])?;
        let request = optional(request, "from", (from > 0).then_some(from));
        let request = optional(request, "stdin", stdin.then_some(true))
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", nonce(Ulid::generate().0))
            .timeout(ATTACH_TIMEOUT);
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Error::Protocol {
                what: "attach to the process",
                source: "the answer is no WebSocket: is a proxy in between that knows none?".into(),
            });
        }
        let upgraded = response.upgrade().await.map_err(Error::reading)?;
        let limits = WebSocketConfig::default()
            .max_frame_size(Some(MAX_FRAME_BYTES))
            .max_message_size(Some(MAX_FRAME_BYTES))
            .write_buffer_size(0);
        let socket = WebSocketStream::from_raw_socket(upgraded, Role::Client, Some(limits)).await;
        let (sink, stream) = socket.split();
        let output = AttachOutput {
            socket: stream,
            over: false,
        };
        Ok((AttachInput(sink), output))
    }
}

impl AttachInput {
    /// Writes to standard input; waits as long as the process takes no more.
    ///
    /// # Errors
    /// That the connection is lost: it is not known then how much of it arrived.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        for part in data.chunks(MAX_FRAME_DATA_BYTES) {
            self.send(Message::Binary(stdin_frame(part).into())).await?;
        }
        Ok(())
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// That the connection is lost.
    pub async fn end(&mut self) -> Result<(), Error> {
        self.say(&ClientMessage::Eof(true)).await
    }

    /// Tells the terminal its size.
    ///
    /// # Errors
    /// That the connection is lost.
    pub async fn resize(&mut self, size: PtySize) -> Result<(), Error> {
        self.say(&ClientMessage::Resize(size)).await
    }

    /// Sends a signal to the process group.
    ///
    /// # Errors
    /// That the connection is lost.
    pub async fn signal(&mut self, signal: Signal) -> Result<(), Error> {
        self.say(&ClientMessage::Signal(signal)).await
    }

    /// Shows that somebody is here, also while nobody reads the output and so answers pings: to be done every 20 s.
    ///
    /// # Errors
    /// That the connection is lost.
    pub async fn sign_of_life(&mut self) -> Result<(), Error> {
        self.send(Message::Pong(Bytes::new())).await
    }

    async fn say(&mut self, message: &ClientMessage) -> Result<(), Error> {
        let json = serde_json::to_string(message).expect("texts and numbers are JSON");
        self.send(Message::Text(json.into())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Error> {
        self.0.send(message).await.map_err(broken)
    }
}

impl AttachOutput {
    /// The next event; none after `Exit` and `Error`. A connection that breaks off before is an error.
    pub async fn next(&mut self) -> Option<Result<AttachEvent, Error>> {
        if self.over {
            return None;
        }
        let event = self.read().await;
        self.over = matches!(
            event,
            Err(_) | Ok(AttachEvent::Exit(_) | AttachEvent::Error(_))
        );
        Some(event)
    }

    async fn read(&mut self) -> Result<AttachEvent, Error> {
        let nonsense = |source: &str| Error::Protocol {
            what: "read what the process says",
            source: source.into(),
        };
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Binary(frame))) => {
                    let (channel, sequence, data) = read_output_frame(&frame)
                        .ok_or_else(|| nonsense("a frame is no output"))?;
                    let data = frame.slice_ref(data);
                    return Ok(AttachEvent::Output {
                        channel,
                        sequence,
                        data,
                    });
                }
                Some(Ok(Message::Text(text))) => {
                    let message = serde_json::from_str(&text)
                        .map_err(|error| nonsense(&error.to_string()))?;
                    return Ok(match message {
                        ServerMessage::Exit(exit) => AttachEvent::Exit(exit),
                        ServerMessage::Dropped(bytes) => AttachEvent::Dropped(bytes),
                        ServerMessage::Refused(why) => AttachEvent::Refused(why),
                        ServerMessage::Error(why) => AttachEvent::Error(why),
                    });
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => {
                    return Err(nonsense("the connection ended before the process did"));
                }
                Some(Err(error)) => return Err(broken(error)),
            }
        }
    }
}

fn broken(error: tungstenite::Error) -> Error {
    Error::Protocol {
        what: "talk to the process",
        source: error.into(),
    }
}

/// What a WebSocket's handshake wants: 16 bytes in base64.
fn nonce(bytes: u128) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let letter = |index: u128| char::from(ALPHABET[(index & 63) as usize]);
    let whole = (0..21).map(|at| letter(bytes >> (122 - 6 * at)));
    whole.chain([letter(bytes << 4), '=', '=']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_base64_of_its_bytes() {
        assert_eq!(
            nonce(u128::from_be_bytes(*b"the sample nonce")),
            "dGhlIHNhbXBsZSBub25jZQ=="
        );
    }
}
