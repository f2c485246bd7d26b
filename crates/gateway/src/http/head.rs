//! Whether the head of an HTTP/1 request means one thing only, and where its body ends. Stricter than RFC 9112 has to
//! be: what some server somewhere might read otherwise is refused, so that nobody behind us reads another request.

use std::iter::Peekable;

use super::pages::Code;

/// Most bytes of a method.
const METHOD: usize = 32;
/// Most digits of a length; no body is that large.
const DIGITS: usize = 18;

/// Where a request's body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// There is none.
    None,
    /// After so many bytes.
    Length(u64),
    /// With the last chunk.
    Chunked,
}

/// What a good head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) framing: Framing,
    /// It asks for a WebSocket: what follows it may be no HTTP.
    pub(super) websocket: bool,
}

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: Code,
    pub(super) what: &'static str,
}

fn bad(what: &'static str) -> Refusal {
    Refusal {
        code: Code::BadRequest,
        what,
    }
}

/// Looks at a head: all bytes up to and with the empty line.
pub(super) fn check(head: &[u8], most_headers: usize) -> Result<Head, Refusal> {
    let text = head
        .strip_suffix(b"\r\n\r\n")
        .ok_or(bad("a head without an end"))?;
    let mut lines = text.split(|byte| *byte == b'\n').peekable();
    let first = line(&mut lines)?;
    let (get, old) = request_line(first)?;
    let mut seen = Seen::default();
    let mut count = 0;
    while lines.peek().is_some() {
        let line = line(&mut lines)?;
        count += 1;
        if count > most_headers {
            return Err(Refusal {
                code: Code::HeadTooLarge,
                what: "too many headers",
            });
        }
        let (name, value) = field(line)?;
        seen.note(name, value)?;
    }
    if seen.hosts > 1 || seen.hosts == 0 && !old {
        return Err(bad("a request has exactly one Host"));
    }
    let framing = seen.framing(old)?;
    Ok(Head {
        framing,
        websocket: get && !old && seen.upgrade && seen.websocket && framing == Framing::None,
    })
}

/// The next line without its end, which the last one has lost already.
fn line<'a>(lines: &mut Peekable<impl Iterator<Item = &'a [u8]>>) -> Result<&'a [u8], Refusal> {
    let line = lines.next().unwrap_or_default();
    match lines.peek() {
        None => Ok(line),
        Some(_) => line
            .strip_suffix(b"\r")
            .ok_or(bad("a line feed without a carriage return")),
    }
}

/// `(it is a GET, it is HTTP/1.0)`
fn request_line(line: &[u8]) -> Result<(bool, bool), Refusal> {
    let mut words = line.split(|byte| *byte == b' ');
    let words = [words.next(), words.next(), words.next(), words.next()];
    let [Some(method), Some(target), Some(version), None] = words else {
        return Err(bad("a request line has three words"));
    };
    if method.len() > METHOD || !is_token(method) {
        return Err(bad("no method"));
    }
    if target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
        return Err(bad("a target has visible ASCII characters only"));
    }
    match version {
        b"HTTP/1.1" => Ok((method == b"GET", false)),
        b"HTTP/1.0" => Ok((method == b"GET", true)),
        _ => Err(bad("no version of HTTP that is spoken here")),
    }
}

/// Name and value of a header or trailer line.
pub(super) fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = line.iter().position(|byte| *byte == b':');
    let (name, value) = line.split_at(colon.ok_or(bad("a header has a colon"))?);
    // A space before the colon, or a line that goes on the one before, has no token here.
    if !is_token(name) {
        return Err(bad("a header's name is a token"));
    }
    let value = value[1..].trim_ascii();
    let text = |byte: &u8| *byte == b'\t' || *byte >= b' ' && *byte != 0x7f;
    if !value.iter().all(text) {
        return Err(bad("a header's value has no control characters"));
    }
    Ok((name, value))
}

/// RFC 9110, 5.6.2.
fn is_token(word: &[u8]) -> bool {
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !word.is_empty() && word.iter().all(token)
}

/// The headers that decide what a request is.
#[derive(Default)]
struct Seen {
    hosts: usize,
    length: Option<u64>,
    encodings: usize,
    chunked: bool,
    upgrade: bool,
    websocket: bool,
    upgrades: usize,
}

impl Seen {
    fn note(&mut self, name: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        if is("host") {
            self.hosts += 1;
        } else if is("content-length") {
            if self.length.is_some() {
                return Err(bad("one Content-Length is enough"));
            }
            self.length = Some(length(value).ok_or(bad("no length"))?);
        } else if is("transfer-encoding") {
            self.encodings += 1;
            self.chunked = value.eq_ignore_ascii_case(b"chunked");
        } else if is("connection") {
            let mut words = value.split(|byte| *byte == b',');
            self.upgrade |= words.any(|word| word.trim_ascii().eq_ignore_ascii_case(b"upgrade"));
        } else if is("upgrade") {
            self.upgrades += 1;
            self.websocket = self.upgrades == 1 && value.eq_ignore_ascii_case(b"websocket");
        }
        Ok(())
    }

    fn framing(&self, old: bool) -> Result<Framing, Refusal> {
        match (self.encodings, self.length) {
            (0, None | Some(0)) => Ok(Framing::None),
            (0, Some(length)) => Ok(Framing::Length(length)),
            (_, Some(_)) => Err(bad("a body has a length or an encoding, not both")),
            (1, None) if old => Err(bad("HTTP/1.0 has no Transfer-Encoding")),
            (1, None) if self.chunked => Ok(Framing::Chunked),
            (1, None) => Err(Refusal {
                code: Code::NotImplemented,
                what: "no Transfer-Encoding but chunked",
            }),
            _ => Err(bad("one Transfer-Encoding is enough")),
        }
    }
}

fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > DIGITS || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(number(value, 10))
}

fn number(digits: &[u8], base: u64) -> u64 {
    let digit = |byte: &u8| u64::from((*byte as char).to_digit(base as u32).unwrap_or_default());
    digits
        .iter()
        .fold(0, |number, byte| number * base + digit(byte))
}

/// The size in a chunk's first line (RFC 9112, 7.1), without its line end. Extensions mean nothing to anybody, and are
/// the one place where servers have disagreed on what ends a line: they are refused.
pub(super) fn chunk_size(line: &[u8]) -> Option<u64> {
    let good = (1..=15).contains(&line.len()) && line.iter().all(u8::is_ascii_hexdigit);
    good.then(|| number(line, 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Head, Refusal> {
        check(format!("{text}\r\n\r\n").as_bytes(), 10)
    }

    fn framing(headers: &str) -> Result<Framing, Code> {
        of(&format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}"))
            .map(|head| head.framing)
            .map_err(|refusal| refusal.code)
    }

    #[test]
    fn ordinary_heads_are_good() {
        let none = Framing::None;
        let head = of("GET /a?b=%20 HTTP/1.1\r\nHost: x.y:80\r\nAccept:*/*\r\nX: \t é \r\nEmpty:");
        assert_eq!(
            head,
            Ok(Head {
                framing: none,
                websocket: false
            })
        );
        assert!(of("GET http://x.y/ HTTP/1.1\r\nhost: x.y").is_ok());
        assert!(of("GET / HTTP/1.0").is_ok());
        assert_eq!(framing("Content-Length: 0"), Ok(none));
        assert_eq!(framing("content-length:  17"), Ok(Framing::Length(17)));
        assert_eq!(framing("Transfer-Encoding: Chunked"), Ok(Framing::Chunked));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for lines in [
            "",
            "GET / HTTP/1.1",
            "GET /\r\nHost: a",
            "GET  / HTTP/1.1\r\nHost: a",
            "GET / HTTP/1.1 \r\nHost: a",
            "GET\t/ HTTP/1.1\r\nHost: a",
            "GET /é HTTP/1.1\r\nHost: a",
            "GET / HTTP/1.2\r\nHost: a",
            "GET / HTTP/2.0\r\nHost: a",
            "GET / http/1.1\r\nHost: a",
            "G(T / HTTP/1.1\r\nHost: a",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a",
            "GET / HTTP/1.0\r\nHost: a\r\nhost: b",
            "GET / HTTP/1.1\r\nHost : a",
            "GET / HTTP/1.1\r\n Host: a",
            "GET / HTTP/1.1\r\nHost: a\r\n more: x",
            "GET / HTTP/1.1\r\nHost: a\r\n\tmore",
            "GET / HTTP/1.1\r\nHost: a\r\nno colon",
            "GET / HTTP/1.1\r\nHost: a\r\n: x",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b",
            "GET / HTTP/1.1\rHost: a",
        ] {
            assert_eq!(of(lines).unwrap_err().code, Code::BadRequest, "{lines:?}");
        }
        for headers in [
            "Content-Length: 1\r\nContent-Length: 1",
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length: 1, 1",
            "Content-Length: +1",
            "Content-Length: -1",
            "Content-Length: 0x1",
            "Content-Length: 1 1",
            "Content-Length:",
            "Content-Length: 9999999999999999999",
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 5",
            "Transfer-Encoding: chunked\r\nContent-Length: 0",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        ] {
            assert_eq!(framing(headers), Err(Code::BadRequest), "{headers:?}");
        }
        let old = of("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked");
        assert_eq!(old.unwrap_err().code, Code::BadRequest);
        for encoding in [
            "gzip, chunked",
            "identity",
            "chunked, chunked",
            "\"chunked\"",
            "xchunked",
            "",
        ] {
            let header = format!("Transfer-Encoding: {encoding}");
            assert_eq!(framing(&header), Err(Code::NotImplemented), "{header}");
        }
        let many = "X: y\r\n".repeat(11);
        assert_eq!(framing(many.trim_end()), Err(Code::HeadTooLarge));
    }

    #[test]
    fn a_websocket_is_asked_for_without_a_body() {
        let websocket = |lines: &str| of(lines).unwrap().websocket;
        let get =
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket";
        assert!(websocket(get));
        assert!(!websocket(&format!("{get}\r\nUpgrade: h2c")));
        assert!(!websocket(&format!("{get}\r\nContent-Length: 3")));
        assert!(!websocket(&get.replace("GET", "POST")));
        assert!(!websocket(&get.replace("keep-alive, Upgrade", "close")));
        assert!(!websocket(&get.replace("WebSocket", "websocket, h2c")));
    }

    #[test]
    fn chunk_sizes_are_plain_numbers() {
        assert_eq!(chunk_size(b"0"), Some(0));
        assert_eq!(chunk_size(b"1fF"), Some(0x1ff));
        for line in [
            "",
            " 1",
            "1 ",
            "1;a=b",
            "0x1",
            "-1",
            "g",
            "1234567890123456",
            "1\r",
        ] {
            assert_eq!(chunk_size(line.as_bytes()), None, "{line:?}");
        }
    }
}
