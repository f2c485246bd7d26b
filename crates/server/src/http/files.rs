//! `/v1/machines/{id}/files`: bytes in and out, and what there is. Whole files are held nowhere.

use std::io;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use hutch_contract::file::{FileInfo, FileKind, Written};
use hutch_contract::page::{DEFAULT_LIMIT, Page};
use hutch_engine::{FileBytes, WriteFile};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Path, Query, Raw};
use super::{App, Failure};

/// A file that ends within so many bytes is sent with its true length: those in /proc and /sys lie about theirs.
const PEEK_BYTES: usize = 64 * 1024;
const MAX_MODE: u32 = 0o7777;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(read, write, remove))
        .routes(routes!(stat))
        .routes(routes!(list))
        .routes(routes!(mkdir))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ReadQuery {
    /// Path in the machine.
    path: String,
    /// First byte.
    offset: Option<u64>,
    /// Most bytes.
    length: Option<u64>,
}

/// Read a file
#[utoipa::path(get, path = "/v1/machines/{id}/files", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ReadQuery),
    responses((status = 200, description = "Its bytes.", body = Vec<u8>, content_type = "application/octet-stream",
        headers(("x-hutch-mode" = String, description = "Permission bits, octal.")))))]
async fn read(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ReadQuery>,
) -> Result<(HeaderMap, Body), Failure> {
    let offset = query.offset.unwrap_or(0);
    let file = app
        .engine
        .read_file(&who, &id, &query.path, offset, query.length)
        .await?;
    let FileBytes { info, mut bytes } = file;
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
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    let mode = format!("{:04o}", info.mode & MAX_MODE);
    headers.insert("x-hutch-mode", HeaderValue::try_from(mode).expect("digits"));
    let body = match size {
        Some(size) => {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
            Body::from_stream(exactly(size, bytes))
        }
        None => Body::from_stream(bytes),
    };
    Ok((headers, body))
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

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WriteQuery {
    /// Path in the machine.
    path: String,
    /// Permission bits, octal; those of the file it replaces, else 0644.
    #[param(pattern = "^[0-7]{1,4}$")]
    mode: Option<String>,
    /// `user` or `user:group`; root when left out.
    owner: Option<String>,
    /// Make the directories that are missing.
    parents: Option<bool>,
}

/// Write a file
///
/// It appears in its place when all of its bytes have arrived.
#[utoipa::path(put, path = "/v1/machines/{id}/files", tag = "files",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    params(("id" = String, Path, description = "Id or name."), WriteQuery),
    responses((status = 200, description = "It is there.", body = Written)))]
async fn write(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WriteQuery>,
    body: Raw,
) -> Result<axum::Json<Written>, Failure> {
    let mode = query.mode.as_deref().map(octal).transpose()?;
    let make_parents = query.parents.unwrap_or(false);
    let WriteQuery { path, owner, .. } = query;
    let file = WriteFile {
        path,
        mode,
        owner,
        make_parents,
        size: body.size_bytes,
    };
    // To its end also without the client: then the body ends with an error, and the guest tidies up.
    let engine = app.engine.clone();
    let written =
        app.to_its_end(async move { engine.write_file(&who, &id, file, body.bytes).await });
    Ok(axum::Json(written.await?))
}

fn octal(text: &str) -> Result<u32, Failure> {
    let digits =
        (1..=4).contains(&text.len()) && text.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits => Ok(mode),
        _ => Err(Failure::invalid(
            "`mode` is one to four octal digits, such as 0644",
        )),
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RemoveQuery {
    /// Path in the machine.
    path: String,
    /// A directory with all that is in it.
    recursive: Option<bool>,
}

/// Remove a file
#[utoipa::path(delete, path = "/v1/machines/{id}/files", tag = "files",
    params(("id" = String, Path, description = "Id or name."), RemoveQuery),
    responses((status = 204, description = "It is gone.")))]
async fn remove(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, Failure> {
    let recursive = query.recursive.unwrap_or(false);
    app.engine
        .remove_file(&who, &id, &query.path, recursive)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PathQuery {
    /// Path in the machine.
    path: String,
}

/// Describe a file
///
/// A link itself, not what it points to.
#[utoipa::path(get, path = "/v1/machines/{id}/files/stat", tag = "files",
    params(("id" = String, Path, description = "Id or name."), PathQuery),
    responses((status = 200, description = "What it is.", body = FileInfo)))]
async fn stat(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<PathQuery>,
) -> Result<axum::Json<FileInfo>, Failure> {
    Ok(axum::Json(
        app.engine.stat_file(&who, &id, &query.path).await?,
    ))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Path in the machine.
    path: String,
    /// `next` of the page before.
    cursor: Option<String>,
    /// Rows in the page.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// List a directory
#[utoipa::path(get, path = "/v1/machines/{id}/files/list", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ListQuery),
    responses((status = 200, description = "A page, by name.", body = Page<FileInfo>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<FileInfo>>, Failure> {
    let ListQuery {
        path,
        cursor,
        limit,
    } = query;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    Ok(axum::Json(
        app.engine
            .list_files(&who, &id, &path, cursor.as_deref(), limit)
            .await?,
    ))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct MkdirQuery {
    /// Path in the machine.
    path: String,
    /// Make the directories above it too, and accept that it is there.
    parents: Option<bool>,
}

/// Make a directory
#[utoipa::path(post, path = "/v1/machines/{id}/files/mkdir", tag = "files",
    params(("id" = String, Path, description = "Id or name."), MkdirQuery),
    responses((status = 204, description = "It is there.")))]
async fn mkdir(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<MkdirQuery>,
) -> Result<StatusCode, Failure> {
    app.engine
        .make_dir(&who, &id, &query.path, query.parents.unwrap_or(false))
        .await?;
    Ok(StatusCode::NO_CONTENT)
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
    fn a_mode_is_octal_and_nothing_else() {
        assert_eq!(octal("0644").unwrap(), 0o644);
        assert_eq!(octal("7777").unwrap(), 0o7777);
        for bad in ["", "+644", "0o644", "888", "17777", "-1", "rw-r--r--"] {
            assert!(octal(bad).is_err(), "{bad}");
        }
    }
}
