//! Reading a file: all of it, or the part that the query or a `Range` header names. Whole files are held nowhere.

use std::io;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_contract::file::{FileInfo, FileKind};
use hutch_engine::{FileBytes, Principal};

use super::super::{App, Failure};
use super::{MAX_MODE, ReadQuery};

/// A file that ends within so many bytes is sent with its true length: those in /proc and /sys lie about theirs.
const PEEK_BYTES: usize = 64 * 1024;

/// One range of bytes, as a client asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Range {
    /// From the first to the last one, which is included, or to the end.
    From(u64, Option<u64>),
    /// So many at the end.
    Last(u64),
}

/// A file in a machine that somebody wants to read.
pub(super) struct Reading<'a> {
    pub app: &'a App,
    pub who: &'a Principal,
    pub id: &'a str,
}

impl Reading<'_> {
    /// The answer to a request for a file's bytes.
    pub async fn answer(
        &self,
        query: &ReadQuery,
        headers: &HeaderMap,
    ) -> Result<Response, Failure> {
        let asked_for_part = query.offset.is_some() || query.length.is_some();
        match range(headers) {
            Some(_) if asked_for_part => Err(Failure::invalid(
                "a part is named by `offset` and `length` or by the header Range, not by both",
            )),
            Some(range) => self.part(&query.path, range, headers).await,
            None => self.whole(query).await,
        }
    }

    async fn open(
        &self,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<FileBytes, Failure> {
        let engine = &self.app.engine;
        let file = engine.read_file(self.who, self.id, path, offset, length);
        Ok(file.await?)
    }

    /// All that the query asks for.
    async fn whole(&self, query: &ReadQuery) -> Result<Response, Failure> {
        let offset = query.offset.unwrap_or(0);
        let FileBytes { info, mut bytes } = self.open(&query.path, offset, query.length).await?;
        let mut head = BytesMut::new();
        let mut whole = false;
        while head.len() < PEEK_BYTES && !whole {
            match bytes.try_next().await? {
                Some(chunk) => head.extend_from_slice(&chunk),
                None => whole = true,
            }
        }
        let rest = info
            .size_bytes
            .saturating_sub(offset)
            .min(query.length.unwrap_or(u64::MAX));
        let size = match whole {
            true => Some(head.len() as u64),
            false if info.kind == FileKind::File && rest >= head.len() as u64 => Some(rest),
            false => None,
        };
        let bytes = stream::iter([Ok(head.freeze())])
            .chain(bytes.map_err(io::Error::other))
            .boxed();
        let mut headers = described(&info);
        let body = match size {
            Some(size) => {
                headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
                Body::from_stream(exactly(size, bytes))
            }
            None => Body::from_stream(bytes),
        };
        Ok((headers, body).into_response())
    }

    /// The range, where the file has it and is still the one that the client means.
    async fn part(&self, path: &str, range: Range, asked: &HeaderMap) -> Result<Response, Failure> {
        let (offset, length) = match range {
            Range::From(first, last) => {
                let length = last.map(|last| (last - first).saturating_add(1));
                // No file is longer, and no guest takes a larger number.
                (first.min(i64::MAX as u64), length)
            }
            Range::Last(length) => {
                let size = self.open(path, 0, Some(1)).await?.info.size_bytes;
                (size.saturating_sub(length), Some(length.max(1)))
            }
        };
        let FileBytes { info, bytes } = self.open(path, offset, length).await?;
        let size = info.size_bytes;
        let other = asked
            .get(header::IF_RANGE)
            .is_some_and(|tag| *tag != etag(&info));
        // What says that it is empty may have content all the same, so it has no ranges.
        if size == 0 || other {
            let query = ReadQuery::whole(path);
            return self.whole(&query).await;
        }
        if offset >= size || range == Range::Last(0) {
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            let message = format!("the file has {size} bytes");
            let mut response =
                Failure::with_status(status, "no_such_range", message).into_response();
            let value = content_range(format!("bytes */{size}"));
            response.headers_mut().insert(header::CONTENT_RANGE, value);
            return Ok(response);
        }
        let length = length.unwrap_or(u64::MAX).min(size - offset);
        let last = offset + length - 1;
        let mut headers = described(&info);
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        let value = content_range(format!("bytes {offset}-{last}/{size}"));
        headers.insert(header::CONTENT_RANGE, value);
        let bytes = bytes.map_err(io::Error::other).boxed();
        let body = Body::from_stream(exactly(length, bytes));
        Ok((StatusCode::PARTIAL_CONTENT, headers, body).into_response())
    }
}

fn content_range(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("digits and words")
}

/// What the headers of every answer say of the file.
fn described(info: &FileInfo) -> HeaderMap {
    let mode = format!("{:04o}", info.mode & MAX_MODE);
    let fixed = HeaderValue::from_static;
    HeaderMap::from_iter([
        (header::CONTENT_TYPE, fixed("application/octet-stream")),
        (header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff")),
        (header::ACCEPT_RANGES, fixed("bytes")),
        (header::ETAG, etag(info)),
        (
            HeaderName::from_static("x-hutch-mode"),
            HeaderValue::try_from(mode).expect("digits"),
        ),
    ])
}

/// Changes with the file, as far as its time and size tell.
fn etag(info: &FileInfo) -> HeaderValue {
    let text = format!("\"{:x}-{:x}\"", info.modified_at_ms, info.size_bytes);
    HeaderValue::try_from(text).expect("digits")
}

/// The one range that is asked for. Several at once, other units and nonsense are as if nothing was asked, which is a
/// server's right (RFC 9110, 14.2).
fn range(headers: &HeaderMap) -> Option<Range> {
    let number = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        // One that is too large is as good as the largest.
        (digits && !text.is_empty()).then(|| text.parse().unwrap_or(u64::MAX))
    };
    let text = headers.get(header::RANGE)?.to_str().ok()?;
    let (unit, range) = text.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    match (first, last) {
        _ if !unit.trim().eq_ignore_ascii_case("bytes") => None,
        ("", last) => Some(Range::Last(number(last)?)),
        (first, "") => Some(Range::From(number(first)?, None)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Range::From(first, Some(last)))
        }
    }
}

/// The first `size` bytes; a stream that has fewer ends with an error, which ends the connection: the file shrank.
fn exactly(
    size: u64,
    bytes: BoxStream<'static, io::Result<Bytes>>,
) -> impl futures::Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some((size, bytes)), |state| async {
        let (left, mut bytes) = state?;
        if left == 0 {
            return None;
        }
        match bytes.next().await {
            Some(Ok(mut chunk)) => {
                chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - chunk.len() as u64;
                Some((Ok(chunk), Some((left, bytes))))
            }
            Some(Err(error)) => Some((Err(error), None)),
            None => Some((Err(io::ErrorKind::UnexpectedEof.into()), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(size: u64, chunks: &'static [&'static [u8]]) -> Result<Vec<u8>, io::ErrorKind> {
        let chunks = stream::iter(chunks.iter().map(|chunk| Ok(Bytes::from_static(chunk)))).boxed();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let all: io::Result<Vec<Bytes>> = runtime.block_on(exactly(size, chunks).try_collect());
        all.map(|all| all.concat()).map_err(|error| error.kind())
    }

    #[test]
    fn a_file_that_grows_or_shrinks_while_it_is_read_never_has_another_length_than_announced() {
        assert_eq!(sent(5, &[b"abc", b"de"]).unwrap(), b"abcde");
        assert_eq!(sent(4, &[b"abc", b"de"]).unwrap(), b"abcd");
        assert_eq!(sent(0, &[b"abc"]).unwrap(), b"");
        assert_eq!(sent(6, &[b"abc", b"de"]), Err(io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn one_range_of_bytes_is_understood_and_all_else_ignored() {
        let asked = |text: &'static str| {
            let headers = [(header::RANGE, HeaderValue::from_static(text))];
            range(&HeaderMap::from_iter(headers))
        };
        assert_eq!(asked("bytes=0-0"), Some(Range::From(0, Some(0))));
        assert_eq!(asked("bytes=5-"), Some(Range::From(5, None)));
        assert_eq!(asked("Bytes=-7"), Some(Range::Last(7)));
        assert_eq!(
            asked("bytes=1-99999999999999999999999"),
            Some(Range::From(1, Some(u64::MAX)))
        );
        for ignored in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-4",
            "bytes=0-1,3-4",
            "lines=1-2",
            "bytes=+1-2",
            "bytes=a-b",
            "bytes=0x1-2",
            "bytes=--1",
        ] {
            assert_eq!(asked(ignored), None, "{ignored}");
        }
    }
}
