//! Follows the bytes of an HTTP/1 connection from request to request, beside the parser that serves it, and lets nothing
//! through that could be read in two ways. A bad head is replaced by one that asks for its refusal; a bad body breaks the
//! connection.
//!
//! The parser behind it accepts some of what is refused here (bare line feeds, a length beside an encoding), and never
//! less: so both always agree on where a request ends.

use bytes::{Buf, BytesMut};

use super::head::{self, Framing, Refusal};
use super::pages::Code;

/// Stands in for a refused request. A client that sends it by itself gets nothing but what it deserves.
pub(super) const REFUSED: &str = "HUTCH-REFUSED";
const STAND_IN: &[u8] = b"HUTCH-REFUSED / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
/// Most bytes of a line of a chunked body, and of all lines after its last chunk.
const CHUNK_LINE: usize = 64;
const TRAILERS: usize = 8 * 1024;
/// Empty lines before a request that are overlooked (RFC 9112, 2.2).
const EMPTY_LINES: usize = 2;

/// Where in the connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before or in a head.
    Head { empty_lines: usize },
    /// So many bytes of a body are left.
    Body(u64),
    /// Before or in the line that begins a chunk.
    ChunkSize,
    /// So many bytes of a chunk are left.
    Chunk(u64),
    /// Before the line end after a chunk.
    ChunkEnd,
    /// After the last chunk; so many bytes of lines may still come.
    Trailers(usize),
    /// No HTTP/1 any more.
    Raw,
    /// Nothing more is let through.
    Shut,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Guard {
    state: State,
    /// Bytes of the current line or head that were looked at already.
    looked: usize,
    head_bytes: usize,
    headers: usize,
}

/// What is wrong with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadBody(&'static str);

impl Guard {
    /// At the beginning of a connection, for heads of so many bytes and header lines.
    pub(super) fn new(head_bytes: usize, headers: usize) -> Self {
        Self {
            state: State::Head { empty_lines: 0 },
            looked: 0,
            head_bytes,
            headers,
        }
    }

    /// One that lets everything through.
    pub(super) fn none() -> Self {
        Self {
            state: State::Raw,
            ..Self::new(0, 0)
        }
    }

    /// Whether what follows may be something else than HTTP/1.
    pub(super) fn is_raw(&self) -> bool {
        self.state == State::Raw
    }

    /// Whether nothing more is let through.
    pub(super) fn is_shut(&self) -> bool {
        self.state == State::Shut
    }

    /// Looks at `input` from `good` on, which were found good before, and answers how many are good now. A refused head is
    /// replaced in `input`.
    pub(super) fn advance(
        &mut self,
        input: &mut BytesMut,
        mut good: usize,
    ) -> Result<(usize, Option<Refusal>), BadBody> {
        loop {
            let rest = input.len() - good;
            match self.state {
                State::Raw => return Ok((input.len(), None)),
                State::Shut => {
                    input.truncate(good);
                    return Ok((good, None));
                }
                _ if rest == 0 => return Ok((good, None)),
                State::Head { empty_lines } => {
                    if input[good..].starts_with(b"\r\n") && empty_lines < EMPTY_LINES {
                        // Ours to swallow: the parser would, too.
                        let tail = input.split_off(good);
                        input.extend_from_slice(&tail[2..]);
                        self.state = State::Head {
                            empty_lines: empty_lines + 1,
                        };
                        continue;
                    }
                    match self.head(&input[good..]) {
                        Ok(None) => return Ok((good, None)),
                        Ok(Some(length)) => good += length,
                        Err(refusal) => {
                            self.state = State::Shut;
                            input.truncate(good);
                            input.extend_from_slice(STAND_IN);
                            return Ok((input.len(), Some(refusal)));
                        }
                    }
                }
                State::Body(left) | State::Chunk(left) => {
                    let taken = left.min(rest as u64);
                    good += taken as usize;
                    let (left, chunk) = (left - taken, matches!(self.state, State::Chunk(_)));
                    self.state = match (left, chunk) {
                        (0, true) => State::ChunkEnd,
                        (0, false) => State::Head { empty_lines: 0 },
                        (left, true) => State::Chunk(left),
                        (left, false) => State::Body(left),
                    };
                }
                State::ChunkSize | State::ChunkEnd | State::Trailers(_) => {
                    match self.line(&input[good..])? {
                        None => return Ok((good, None)),
                        Some(length) => good += length,
                    }
                }
            }
        }
    }

    /// The length of the head that `rest` begins with, once all of it is there.
    fn head(&mut self, rest: &[u8]) -> Result<Option<usize>, Refusal> {
        let mut end = None;
        for at in self.looked..rest.len() {
            if rest[at] != b'\n' {
                continue;
            }
            if at == 0 || rest[at - 1] != b'\r' {
                return Err(Refusal {
                    code: Code::BadRequest,
                    what: "a line feed without a carriage return",
                });
            }
            if at >= 3 && &rest[at - 3..at] == b"\r\n\r" {
                end = Some(at + 1);
                break;
            }
        }
        self.looked = rest.len();
        if end.unwrap_or(rest.len()) > self.head_bytes {
            return Err(Refusal {
                code: Code::HeadTooLarge,
                what: "the head is too large",
            });
        }
        let Some(length) = end else {
            return Ok(None);
        };
        self.looked = 0;
        let head = head::check(&rest[..length], self.headers)?;
        self.state = match head.framing {
            _ if head.websocket => State::Raw,
            Framing::None => State::Head { empty_lines: 0 },
            Framing::Length(length) => State::Body(length),
            Framing::Chunked => State::ChunkSize,
        };
        Ok(Some(length))
    }

    /// The length of the line of a chunked body that `rest` begins with, once all of it is there.
    fn line(&mut self, rest: &[u8]) -> Result<Option<usize>, BadBody> {
        let most = match self.state {
            State::Trailers(left) => left,
            State::ChunkEnd => 2,
            _ => CHUNK_LINE,
        };
        let end = rest[self.looked..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end.map(|end| self.looked + end + 1) else {
            self.looked = rest.len();
            if rest.len() >= most {
                return Err(BadBody("a line of a chunked body that is too long"));
            }
            return Ok(None);
        };
        self.looked = 0;
        let line = rest[..end]
            .strip_suffix(b"\r\n")
            .ok_or(BadBody("a line feed without a carriage return"))?;
        if end > most {
            return Err(BadBody("a line of a chunked body that is too long"));
        }
        self.state = match self.state {
            State::ChunkSize => match head::chunk_size(line) {
                Some(0) => State::Trailers(TRAILERS),
                Some(size) => State::Chunk(size),
                None => return Err(BadBody("a chunk without a size")),
            },
            State::Trailers(_) if line.is_empty() => State::Head { empty_lines: 0 },
            State::Trailers(left) => {
                head::field(line).map_err(|refusal| BadBody(refusal.what))?;
                State::Trailers(left - end)
            }
            _ if line.is_empty() => State::ChunkSize,
            _ => return Err(BadBody("a chunk that is longer than it says")),
        };
        Ok(Some(end))
    }
}

/// Hands out what is good.
pub(super) fn take(input: &mut BytesMut, good: &mut usize, buffer: &mut tokio::io::ReadBuf<'_>) {
    let length = (*good).min(buffer.remaining());
    buffer.put_slice(&input[..length]);
    input.advance(length);
    *good -= length;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All that gets through, however the bytes are cut.
    fn through(bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, Option<Refusal>, Result<(), BadBody>) {
        let mut guard = Guard::new(1024, 10);
        let (mut input, mut good, mut all) = (BytesMut::new(), 0, Vec::new());
        let (mut rest, mut cuts) = (bytes, cuts.iter().cycle());
        let mut refused = None;
        while !rest.is_empty() {
            let piece = cuts
                .next()
                .map_or(rest.len(), |cut| (*cut).clamp(1, rest.len()));
            input.extend_from_slice(&rest[..piece]);
            rest = &rest[piece..];
            match guard.advance(&mut input, good) {
                Ok((now, refusal)) => {
                    good = now;
                    refused = refused.or(refusal);
                }
                Err(bad) => return (all, refused, Err(bad)),
            }
            all.extend_from_slice(&input.split_to(good));
            good = 0;
        }
        (all, refused, Ok(()))
    }

    const GOOD: &str = "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc\
        GET /b HTTP/1.1\r\nHost: x\r\n\r\n\
        POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\
        3\r\nGET\r\nA\r\n / HTTP/1.\r\n0\r\nTrailer: x\r\n\r\n\
        GET /d HTTP/1.0\r\n\r\n";

    #[test]
    fn good_requests_go_through_as_they_are() {
        for cut in 1..40 {
            let (all, refused, end) = through(GOOD.as_bytes(), &[cut]);
            assert_eq!(String::from_utf8(all).unwrap(), GOOD);
            assert_eq!((refused, end), (None, Ok(())));
        }
        let padded = format!("\r\n\r\n{GOOD}");
        assert_eq!(through(padded.as_bytes(), &[1]).0, GOOD.as_bytes());
    }

    #[test]
    fn after_a_bad_head_nothing_goes_through() {
        for bad in [
            "GET / HTTP/1.1\nHost: x\n\n",
            "GET / HTTP/1.1\r\nHost: x\n\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
            "\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
        ] {
            let bytes = format!("{GOOD}{bad}GET /secret HTTP/1.1\r\nHost: x\r\n\r\n");
            for cut in [1, 7, 10_000] {
                let (all, refused, end) = through(bytes.as_bytes(), &[cut]);
                let expected = [GOOD.as_bytes(), STAND_IN].concat();
                assert_eq!(all, expected, "{bad:?}");
                assert_eq!(refused.map(|refusal| refusal.code), Some(Code::BadRequest));
                assert_eq!(end, Ok(()));
            }
        }
        let endless = format!("GET /{} HTTP/1.1\r\n", "a".repeat(2000));
        let (_, refused, _) = through(endless.as_bytes(), &[100]);
        assert_eq!(refused.unwrap().code, Code::HeadTooLarge);
    }

    #[test]
    fn a_bad_body_breaks_the_connection() {
        let head = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bad in [
            "3\nabc\n0\r\n\r\n",
            "3;x=y\r\nabc\r\n0\r\n\r\n",
            "3\r\nabcd\r\n0\r\n\r\n",
            "-3\r\n",
            "g\r\n",
            "fffffffffffffffff\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\n\n",
            &"0".repeat(100),
        ] {
            for cut in [1, 3, 1000] {
                let (all, _, end) = through(format!("{head}{bad}").as_bytes(), &[cut]);
                assert!(end.is_err(), "{bad:?}");
                assert!(all.starts_with(head.as_bytes()) || cut == 1000);
            }
        }
    }

    #[test]
    fn after_a_websocket_it_is_no_http() {
        let head = "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        let bytes = [head.as_bytes(), b"\x00\n\n\xff"].concat();
        assert_eq!(through(&bytes, &[5]), (bytes.clone(), None, Ok(())));
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_changes_nothing(
            bytes in proptest::collection::vec(prop_oneof![
                3 => Just(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
                2 => Just(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n".to_vec()),
                2 => Just(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec()),
                2 => Just(b"2\r\nab\r\n".to_vec()),
                2 => Just(b"0\r\n\r\n".to_vec()),
                1 => proptest::collection::vec(any::<u8>(), 0..6),
            ], 0..8).prop_map(|parts| parts.concat()),
            cuts in proptest::collection::vec(1_usize..20, 1..10),
        ) {
            let (whole, refused, end) = through(&bytes, &[bytes.len()]);
            let (all, refused_too, end_too) = through(&bytes, &cuts);
            prop_assert_eq!(refused, refused_too);
            prop_assert_eq!(end, end_too);
            // What was good before a bad body is handed out by then or not.
            prop_assert!(all == whole || end.is_err());
        }
    }
}
