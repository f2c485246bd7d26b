//! One WebSocket attached to one process: output, standard input and messages, each at its own pace.
//!
//! ```text
//!   guest ── output ──► speaking ──► socket      no faster than the socket takes it
//!                         ▲ refusals
//!   guest ◄── feeding ◄── listening ◄── socket   no faster than the process reads
//! ```
//! The three go on at once: a process that echoes what it reads must not wait for a client that first writes everything.

use std::time::Duration;

use axum::extract::WebSocketUpgrade;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{BoxStream, SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use hutch_contract::process::{
    AttachError, ClientMessage, MAX_FRAME_BYTES, MAX_FRAME_DATA_BYTES, OutputChannel, SendSignal,
    ServerMessage, output_frame, read_stdin_frame,
};
use hutch_engine::{Error, ExecOutput, Principal, ProcessInput};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::{App, Failure, error};
use crate::serve::Place;

/// Between two pings.
const PING: Duration = Duration::from_secs(20);
/// A peer of which nothing is heard for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a peer may go on sending after our last word. Closing at once would reset the connection, and the peer would
/// lose that word.
const LINGER: Duration = Duration::from_secs(2);
/// Frames of standard input that wait for the process.
const WAITING_INPUT: usize = 8;
/// Refusals that wait for the socket; more are left out.
const WAITING_REFUSALS: usize = 16;
/// Bytes of frames that may wait in memory for the socket: one frame, in effect, as each is flushed.
const MAX_UNSENT_BYTES: usize = 4 * MAX_FRAME_BYTES;

/// Who is attached to what.
pub(super) struct Attachment {
    pub app: App,
    pub who: Principal,
    pub machine: String,
    pub process: String,
}

type Output = BoxStream<'static, Result<ExecOutput, Error>>;

/// What goes to standard input.
enum Fed {
    Bytes(Bytes),
    End,
}

/// Why one of the three ended.
enum Ended {
    /// The last word was said.
    Said,
    /// The peer has closed, or its connection broke.
    Gone,
    /// The peer broke the rules.
    Against(AttachError),
}

impl Attachment {
    /// Answers with the upgrade, and attaches once it has come about.
    pub fn upgrade(
        self,
        upgrade: WebSocketUpgrade,
        place: Option<Place>,
        output: Output,
        input: Option<ProcessInput>,
    ) -> Response {
        upgrade
            .max_frame_size(MAX_FRAME_BYTES)
            .max_message_size(MAX_FRAME_BYTES)
            .write_buffer_size(0)
            .max_write_buffer_size(MAX_UNSENT_BYTES)
            .on_upgrade(async move |socket| {
                let _place = place;
                self.run(socket, output, input).await;
            })
    }

    async fn run(self, socket: WebSocket, output: Output, input: Option<ProcessInput>) {
        let (mut sink, mut stream) = socket.split();
        let (refuse, refusals) = mpsc::channel(WAITING_REFUSALS);
        let (feed, fed) = mpsc::channel(WAITING_INPUT);
        let (heard, listened) = watch::channel(Some(Instant::now()));
        let listener = Listener {
            attachment: &self,
            feed: input.is_some().then_some(feed),
            refuse: refuse.clone(),
            heard,
        };
        let feeding = async {
            if let Some(input) = input {
                feed_all(input, fed, refuse).await;
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = speak(&mut sink, output, refusals) => ended,
            ended = listener.listen(&mut stream) => ended,
            () = silent(listened) => Ended::Gone,
            () = feeding => Ended::Gone,
            () = self.app.closing.cancelled() => Ended::Against(told(Failure::stopping())),
        };
        // A socket that takes nothing must not keep us.
        let _ = timeout(LINGER, part(sink, stream, ended)).await;
    }
}

/// Says what there is to say to the end, and closes.
async fn part(
    mut sink: SplitSink<WebSocket, Message>,
    mut stream: SplitStream<WebSocket>,
    ended: Ended,
) -> Result<(), axum::Error> {
    match ended {
        Ended::Gone => return Ok(()),
        Ended::Said => {}
        Ended::Against(error) => sink.send(text(&ServerMessage::Error(error))).await?,
    }
    sink.close().await?;
    while let Some(Ok(_)) = stream.next().await {}
    Ok(())
}

/// Sends output, refusals and pings until the process has ended.
async fn speak(
    sink: &mut SplitSink<WebSocket, Message>,
    mut output: Output,
    mut refusals: mpsc::Receiver<AttachError>,
) -> Ended {
    let mut pings = interval(PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = tokio::select! {
            next = output.next() => next,
            Some(refusal) = refusals.recv() => {
                if sink.send(text(&ServerMessage::Refused(refusal))).await.is_err() {
                    return Ended::Gone;
                }
                continue;
            }
            _ = pings.tick() => {
                if sink.send(Message::Ping(Bytes::new())).await.is_err() {
                    return Ended::Gone;
                }
                continue;
            }
        };
        let (message, last) = match next {
            Some(Ok(ExecOutput::Stdout { sequence, data })) => {
                if say(sink, OutputChannel::Stdout, sequence, data)
                    .await
                    .is_err()
                {
                    return Ended::Gone;
                }
                continue;
            }
            Some(Ok(ExecOutput::Stderr { sequence, data })) => {
                if say(sink, OutputChannel::Stderr, sequence, data)
                    .await
                    .is_err()
                {
                    return Ended::Gone;
                }
                continue;
            }
            Some(Ok(ExecOutput::Dropped(bytes))) => (ServerMessage::Dropped(bytes), false),
            Some(Ok(ExecOutput::Exit(exit))) => (ServerMessage::Exit(exit), true),
            Some(Err(error)) => (ServerMessage::Error(told(error.into())), true),
            None => {
                let failure = Failure::bug("a process' output ended without its exit");
                (ServerMessage::Error(told(failure)), true)
            }
        };
        match sink.send(text(&message)).await {
            Ok(()) if last => return Ended::Said,
            Ok(()) => {}
            Err(_) => return Ended::Gone,
        }
    }
}

/// Sends output in frames of bounded size.
async fn say(
    sink: &mut SplitSink<WebSocket, Message>,
    channel: OutputChannel,
    mut sequence: u64,
    mut data: Bytes,
) -> Result<(), axum::Error> {
    while !data.is_empty() {
        let part = data.split_to(data.len().min(MAX_FRAME_DATA_BYTES));
        let frame = output_frame(channel, sequence, &part);
        sequence += part.len() as u64;
        sink.send(Message::Binary(frame.into())).await?;
    }
    Ok(())
}

/// Takes what the peer says.
struct Listener<'a> {
    attachment: &'a Attachment,
    /// Where standard input goes; none when the peer did not ask for it.
    feed: Option<mpsc::Sender<Fed>>,
    refuse: mpsc::Sender<AttachError>,
    /// When something was last heard; none while nothing can be, as we do not listen.
    heard: watch::Sender<Option<Instant>>,
}

impl Listener<'_> {
    async fn listen(self, stream: &mut SplitStream<WebSocket>) -> Ended {
        loop {
            self.heard.send_replace(Some(Instant::now()));
            let message = match stream.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    tracing::debug!(%error, "a WebSocket broke");
                    return match error.to_string().contains("too long") {
                        true => against("too_large", "a frame has at most 64 KiB of data"),
                        false => Ended::Gone,
                    };
                }
                None => return Ended::Gone,
            };
            self.heard.send_replace(None);
            match message {
                Message::Binary(frame) => match read_stdin_frame(&frame) {
                    Some(_) => self.feed(Fed::Bytes(frame.slice(1..))).await,
                    None => return against("invalid", "a binary frame begins with a byte 0"),
                },
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(message) => self.take(message).await,
                    Err(error) => {
                        return against("invalid", &format!("a text frame is wrong: {error}"));
                    }
                },
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Close(_) => return Ended::Gone,
            }
        }
    }

    async fn take(&self, message: ClientMessage) {
        let Attachment {
            app,
            who,
            machine,
            process,
        } = self.attachment;
        let done = match message {
            ClientMessage::Resize(size) => {
                app.engine.resize_process(who, machine, process, size).await
            }
            ClientMessage::Signal(signal) => {
                let signal = SendSignal { signal, all: false };
                let sent = app.engine.signal_process(who, machine, process, &signal);
                sent.await
            }
            ClientMessage::Eof(true) => return self.feed(Fed::End).await,
            ClientMessage::Eof(false) => return,
        };
        if let Err(error) = done {
            refuse(&self.refuse, told(error.into()));
        }
    }

    /// Waits until there is room for it.
    async fn feed(&self, fed: Fed) {
        match &self.feed {
            // Without anybody there who takes it, all of this is about to end.
            Some(feed) => drop(feed.send(fed).await),
            None => refuse(
                &self.refuse,
                AttachError {
                    code: "no_stdin".to_owned(),
                    message: "this attachment writes to no standard input".to_owned(),
                    hint: Some("attach with `stdin=true`".to_owned()),
                },
            ),
        }
    }
}

/// Gives standard input to the process. Once it takes no more, the rest is dropped, as a broken pipe would.
async fn feed_all(
    mut input: ProcessInput,
    mut fed: mpsc::Receiver<Fed>,
    refuse_to: mpsc::Sender<AttachError>,
) {
    let mut closed = false;
    while let Some(next) = fed.recv().await {
        if closed {
            continue;
        }
        let refusal = match next {
            Fed::Bytes(bytes) => {
                let sent = bytes.len() as u64;
                match input.write(bytes).await {
                    Ok(taken) if taken == sent => continue,
                    Ok(_) => AttachError {
                        code: "stdin_closed".to_owned(),
                        message: "the process has closed its standard input".to_owned(),
                        hint: None,
                    },
                    Err(error) => told(error.into()),
                }
            }
            Fed::End => match input.end().await {
                Ok(()) => continue,
                Err(error) => told(error.into()),
            },
        };
        closed = true;
        refuse(&refuse_to, refusal);
    }
}

/// Ends when nothing has been heard for too long while somebody listened.
async fn silent(mut heard: watch::Receiver<Option<Instant>>) {
    loop {
        let last = *heard.borrow_and_update();
        match last.map(|last| last + SILENCE) {
            Some(until) if until <= Instant::now() => return,
            Some(until) => sleep_until(until).await,
            None => {
                if heard.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

fn refuse(refusals: &mpsc::Sender<AttachError>, refusal: AttachError) {
    // A peer that reads no refusals needs no more of them.
    let _ = refusals.try_send(refusal);
}

fn against(code: &str, message: &str) -> Ended {
    Ended::Against(AttachError {
        code: code.to_owned(),
        message: message.to_owned(),
        hint: None,
    })
}

fn told(failure: Failure) -> AttachError {
    if let Some(cause) = &failure.cause {
        tracing::debug!(cause, "an attachment has a problem");
    }
    AttachError {
        code: failure.code.into(),
        message: error::plain(&failure.message),
        hint: failure.hint.as_deref().map(error::plain),
    }
}

fn text(message: &ServerMessage) -> Message {
    let json = serde_json::to_string(message).expect("texts and numbers are JSON");
    Message::Text(json.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_gone_after_a_minute_of_silence_but_not_while_nobody_listens() {
        let began = Instant::now();
        let (heard, listened) = watch::channel(Some(began));
        let gone = tokio::spawn(silent(listened));
        let second = Duration::from_secs(1);
        tokio::time::sleep(59 * second).await;
        heard.send_replace(Some(Instant::now()));
        tokio::time::sleep(59 * second).await;
        heard.send_replace(None);
        tokio::time::sleep(1000 * second).await;
        assert!(!gone.is_finished());
        heard.send_replace(Some(Instant::now()));
        gone.await.unwrap();
        assert_eq!(began.elapsed(), (59 + 59 + 1000 + 60) * second);
    }
}
