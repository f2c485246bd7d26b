//! JSON over HTTP/1.1 on a VMM's unix socket: Firecracker and Cloud Hypervisor are told what to do so. Which requests
//! there are is the runtimes' affair. The VMM may have been taken over by its guest: answers are bounded, waits have
//! deadlines, text is made printable.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::breaker::Breakers;
use crate::process::printable;
use crate::{Error, MachineDir};

/// Time for a whole call, connection and repetitions included, unless it is known to take longer.
const CALL: Duration = Duration::from_secs(4);
/// Attempts at a question whose connection breaks.
const TRIES: u32 = 3;
/// Before the first repetition; doubles.
const AGAIN: Duration = Duration::from_millis(20);
/// Between looks at a VMM that is starting: the first, and the longest.
const STARTING: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];
/// The longest answer that we read; those to our calls are far below.
const ANSWER: usize = 1024 * 1024;
/// The longest head of an answer, and the most fields in it.
const HEAD: (usize, usize) = (16 * 1024, 32);
/// The most of a refusal that is passed on.
const WORDS: usize = 512;

/// The API of one machine's VMM. Each call has a connection of its own.
#[derive(Clone, Copy)]
pub(crate) struct Api<'a> {
    dir: &'a MachineDir,
    own: &'a str,
    socket: &'static str,
    base: &'static str,
    breakers: &'a Breakers,
    within: Duration,
}

/// What became of one attempt.
enum Failure {
    /// Said by the VMM, or not to be had by asking again.
    Final(Error),
    /// The connection broke: whether the VMM did it is not known.
    Broken(Error),
}

impl<'a> Api<'a> {
    /// The API behind `socket` in `own`, the directory of the VMM's user. `base` comes before each path.
    pub(crate) fn new(
        dir: &'a MachineDir,
        own: &'a str,
        socket: &'static str,
        base: &'static str,
        breakers: &'a Breakers,
    ) -> Self {
        Self {
            dir,
            own,
            socket,
            base,
            breakers,
            within: CALL,
        }
    }

    /// For calls that take longer than most.
    #[cfg_attr(not(test), expect(dead_code, reason = "memory snapshots will"))]
    pub(crate) fn within(self, within: Duration) -> Self {
        Self { within, ..self }
    }

    /// Asks. Changes nothing, so it is repeated when the connection breaks.
    ///
    /// # Errors
    /// Of all calls: [`Error::NotRunning`] when nothing listens, [`Error::Timeout`], [`Error::Hung`] for a VMM that has
    /// been silent before, [`Error::Monitor`] with the VMM's words for a refusal or nonsense.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "no question outlives a start yet")
    )]
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &'static str) -> Result<T, Error> {
        let answer = self.call(Method::GET, path, None).await?;
        understand(path, &answer)
    }

    /// Puts `body` there. Never repeated.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub(crate) async fn put(&self, path: &'static str, body: &impl Serialize) -> Result<(), Error> {
        self.call(Method::PUT, path, Some(json(body)))
            .await
            .map(drop)
    }

    /// Changes what is there. Never repeated.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub(crate) async fn patch(
        &self,
        path: &'static str,
        body: &impl Serialize,
    ) -> Result<(), Error> {
        self.call(Method::PATCH, path, Some(json(body)))
            .await
            .map(drop)
    }

    /// Gives an order that needs no words. Never repeated.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub(crate) async fn order(&self, path: &'static str) -> Result<(), Error> {
        self.call(Method::PUT, path, None).await.map(drop)
    }

    /// Asks a VMM that is starting until it answers; the caller sets the deadline.
    ///
    /// # Errors
    /// [`Error::Monitor`] for a refusal or nonsense, [`Error::Io`].
    pub(crate) async fn ready<T: DeserializeOwned>(&self, path: &'static str) -> Result<T, Error> {
        let mut pause = STARTING[0];
        loop {
            match self.attempt(Method::GET, path, None).await {
                Ok(answer) => return understand(path, &answer),
                Err(Failure::Broken(_) | Failure::Final(Error::NotRunning { .. })) => {}
                Err(Failure::Final(error)) => return Err(error),
            }
            sleep(pause).await;
            pause = (pause * 2).min(STARTING[1]);
        }
    }

    async fn call(
        &self,
        method: Method,
        path: &'static str,
        body: Option<Bytes>,
    ) -> Result<Bytes, Error> {
        let tries = if method == Method::GET { TRIES } else { 1 };
        let calls = async {
            let mut pause = AGAIN;
            let mut tried = 1;
            loop {
                match self.attempt(method.clone(), path, body.clone()).await {
                    Ok(answer) => return Ok(answer),
                    Err(Failure::Broken(_)) if tried < tries => {}
                    Err(Failure::Final(error) | Failure::Broken(error)) => return Err(error),
                }
                sleep(pause).await;
                pause *= 2;
                tried += 1;
            }
        };
        let calls = async {
            let called = timeout(self.within, calls).await;
            called.unwrap_or(Err(Error::Timeout {
                what: path,
                seconds: self.within.as_secs(),
            }))
        };
        self.breakers.guard(self.dir, calls).await
    }

    async fn attempt(
        &self,
        method: Method,
        path: &'static str,
        body: Option<Bytes>,
    ) -> Result<Bytes, Failure> {
        let stream = self.dir.connect_in(self.own, self.socket).await;
        let stream = stream.map_err(Failure::Final)?;
        let nonsense = |error: &dyn std::error::Error| Error::Monitor {
            command: path,
            answer: printable(chain(error).as_bytes(), WORDS),
        };
        let broken = |error: hyper::Error| {
            let what = nonsense(&error);
            // What is no HTTP will be none the next time.
            match error.is_parse() || error.is_parse_too_large() {
                true => Failure::Final(what),
                false => Failure::Broken(what),
            }
        };
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD.0).max_headers(HEAD.1);
        let (mut sender, connection) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("host", "localhost")
            .header("accept", "application/json");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request
            .body(Full::new(body.unwrap_or_default()))
            .expect("our paths make good requests");
        let talk = async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER).collect().await;
            match body {
                Ok(body) => Ok((status, body.to_bytes())),
                Err(error) => Err(match error.downcast::<hyper::Error>() {
                    Ok(error) => broken(*error),
                    Err(error) => Failure::Final(nonsense(&*error)),
                }),
            }
        };
        let (status, body) = drive(connection, talk).await?;
        match status.is_success() {
            true => Ok(body),
            false => Err(Failure::Final(Error::Monitor {
                command: path,
                answer: refusal(status, &body),
            })),
        }
    }
}

/// The outcome of `talk`, which speaks through `connection`. The connection may end first and leave what it read.
async fn drive<T>(connection: impl Future, talk: impl Future<Output = T>) -> T {
    let (mut connection, mut talk) = (pin!(connection), pin!(talk));
    let mut open = true;
    loop {
        tokio::select! {
            done = &mut talk => return done,
            _ = &mut connection, if open => open = false,
        }
    }
}

fn json(body: &impl Serialize) -> Bytes {
    let text = serde_json::to_vec(body).expect("our requests have no maps with odd keys");
    text.into()
}

fn understand<T: DeserializeOwned>(path: &'static str, answer: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(answer).map_err(|error| Error::Monitor {
        command: path,
        answer: format!("an answer that means nothing: {error}"),
    })
}

/// What a VMM says about a call that it does not do: Firecracker an object with `fault_message`, Cloud Hypervisor a list
/// of facts, the outermost first.
fn refusal(status: StatusCode, body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let words = match &value {
        Value::Object(fields) => fields
            .get("fault_message")
            .and_then(Value::as_str)
            .map(str::to_owned),
        Value::Array(facts) => {
            let facts: Vec<_> = facts.iter().filter_map(Value::as_str).collect();
            Some(facts.join(": "))
        }
        _ => None,
    };
    let words = words.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    match shown(&words) {
        words if words.is_empty() => format!("status {}", status.as_u16()),
        words => words,
    }
}

/// The beginning, which says most.
fn shown(words: &str) -> String {
    let mut end = words.len().min(WORDS);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    printable(&words.as_bytes()[..end], WORDS)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
