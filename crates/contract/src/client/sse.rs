//! Server-sent events as a running command sends them: the JSON of each `data:` field, in order.
//!
//! Written after the HTML standard, §9.2.6, of which it keeps what our server uses: `data` lines, comments as signs of
//! life, a blank line as the end of an event. A line has a bounded length.

use std::collections::VecDeque;

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};

use super::Error;
use crate::exec::ExecEvent;

/// The longest line: an event carries at most a few hundred KiB of output.
const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;

/// Takes bytes, gives the data of whole events.
#[derive(Default)]
struct Parser {
    line: Vec<u8>,
    data: Vec<u8>,
    ready: VecDeque<Vec<u8>>,
}

impl Parser {
    /// Takes more bytes; false when a line or an event is too long.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + self.data.len() + part.len() > MAX_LINE_BYTES {
                return false;
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.end_of_line();
            }
        }
        true
    }

    fn end_of_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if !self.data.is_empty() {
                self.ready.push_back(std::mem::take(&mut self.data));
            }
        } else if let Some(value) = line.strip_prefix(b"data:") {
            if !self.data.is_empty() {
                self.data.push(b'\n');
            }
            self.data
                .extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
    }
}

/// State of [`events`]: where bytes come from, and whether the last event has been seen.
struct Reading<S> {
    bytes: S,
    parser: Parser,
    ended: bool,
}

/// The events in a byte stream. After `exit` or `error` it ends; a stream that breaks off before gives an error last.
pub(super) fn events<S>(bytes: S) -> BoxStream<'static, Result<ExecEvent, Error>>
where
    S: Stream<Item = Result<Bytes, Error>> + Send + Unpin + 'static,
{
    let reading = Reading {
        bytes,
        parser: Parser::default(),
        ended: false,
    };
    stream::unfold(reading, |mut reading| async move {
        let event = reading.next().await?;
        reading.ended = matches!(
            event,
            Err(_) | Ok(ExecEvent::Exit(_) | ExecEvent::Error { .. })
        );
        Some((event, reading))
    })
    .boxed()
}

impl<S: Stream<Item = Result<Bytes, Error>> + Unpin> Reading<S> {
    async fn next(&mut self) -> Option<Result<ExecEvent, Error>> {
        let what = "read the command's events";
        loop {
            if self.ended {
                return None;
            }
            if let Some(data) = self.parser.ready.pop_front() {
                let event = serde_json::from_slice(&data);
                return Some(event.map_err(|source| Error::Protocol {
                    what,
                    source: source.into(),
                }));
            }
            match self.bytes.next().await {
                Some(Ok(bytes)) if self.parser.feed(&bytes) => {}
                Some(Ok(_)) => {
                    return Some(Err(Error::Protocol {
                        what,
                        source: "a line is too long".into(),
                    }));
                }
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    let source = "the connection ended before the command did".into();
                    return Some(Err(Error::Protocol { what, source }));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chunks: &[&[u8]]) -> Vec<Result<ExecEvent, String>> {
        let chunks: Vec<_> = chunks
            .iter()
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        let events =
            events(stream::iter(chunks)).map(|event| event.map_err(|error| format!("{error:?}")));
        futures::executor::block_on(events.collect())
    }

    const STREAM: &[u8] = b": alive\n\ndata: {\"event\":\"stdout\",\"sequence\":0,\"data_base64\":\"aGk=\"}\r\n\r\n\
        event: x\nid: 3\ndata:{\"event\":\"exit\",\ndata: \"exit_code\":3}\n\ndata: {\"event\":\"dropped\",\"bytes\":1}\n\n";

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let whole = read(&[STREAM]);
        assert_eq!(whole.len(), 2, "nothing follows the exit: {whole:?}");
        assert!(
            matches!(&whole[0], Ok(ExecEvent::Stdout { data_base64, .. }) if data_base64 == "aGk=")
        );
        assert!(matches!(&whole[1], Ok(ExecEvent::Exit(exit)) if exit.exit_code == 3));
        for at in 0..STREAM.len() {
            assert_eq!(read(&[&STREAM[..at], &STREAM[at..]]), whole, "cut at {at}");
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(read(&bytes), whole);
    }

    #[test]
    fn a_stream_that_breaks_off_is_an_error_and_not_an_end() {
        let events = read(&[b"data: {\"event\":\"dropped\",\"bytes\":1}\n\ndata: {\"event\":"]);
        assert_eq!(events.len(), 2);
        assert!(
            events[1]
                .as_ref()
                .is_err_and(|error| error.contains("before the command did")),
            "{events:?}"
        );
    }

    #[test]
    fn neither_an_endless_line_nor_an_endless_event_fills_the_memory() {
        let line = vec![b'a'; 1024 * 1024];
        let endless = read(&[&line, &line, &line, &line, &line]);
        assert!(
            endless[0]
                .as_ref()
                .is_err_and(|error| error.contains("too long"))
        );
        let mut data = b"data: ".to_vec();
        data.extend_from_slice(&line);
        data.push(b'\n');
        let endless = read(&[&data, &data, &data, &data, &data]);
        assert!(
            endless[0]
                .as_ref()
                .is_err_and(|error| error.contains("too long"))
        );
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        let events = read(&[b"data: {\"event\":\"party\"}\n\n"]);
        assert!(events[0].is_err() && events.len() == 1);
    }
}
