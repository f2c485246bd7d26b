//! `/v1/machines/{id}/files`: bytes in and out, and what there is.

mod read;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use hutch_contract::error::ErrorBody;
use hutch_contract::file::{FileInfo, Written};
use hutch_contract::page::{DEFAULT_LIMIT, Page};
use hutch_engine::{ChangeFile, ListFiles, WriteFile};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Caller, Path, Query, Raw};
use super::{App, Failure};
use read::Reading;

const MAX_MODE: u32 = 0o7777;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(read, write, remove))
        .routes(routes!(stat))
        .routes(routes!(list))
        .routes(routes!(glob))
        .routes(routes!(mkdir))
        .routes(routes!(rename))
        .routes(routes!(chmod))
        .routes(routes!(chown))
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

impl ReadQuery {
    fn whole(path: &str) -> Self {
        let path = path.to_owned();
        Self {
            path,
            offset: None,
            length: None,
        }
    }
}

/// Read a file
///
/// HEAD answers with the headers alone. A part of it is named by `offset` and `length`, or by the header `Range` with one
/// range of bytes.
#[utoipa::path(get, path = "/v1/machines/{id}/files", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ReadQuery,
        ("range" = Option<String>, Header, description = "One range, such as `bytes=0-499`."),
        ("if-range" = Option<String>, Header,
            description = "The `etag` that the file must still have for a range of it to be sent instead of all.")),
    responses(
        (status = 200, description = "Its bytes.", body = Vec<u8>, content_type = "application/octet-stream",
            headers(("x-hutch-mode" = String, description = "Permission bits, octal."),
                ("etag" = String, description = "Changes with the file."))),
        (status = 206, description = "The range.", body = Vec<u8>, content_type = "application/octet-stream",
            headers(("content-range" = String, description = "Which bytes, and of how many."))),
        (status = 416, description = "The file ends before the range begins.", body = ErrorBody,
            headers(("content-range" = String, description = "How many bytes there are.")))))]
async fn read(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ReadQuery>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let (app, who, id) = (&app, &who, &id[..]);
    Reading { app, who, id }.answer(&query, &headers).await
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
    /// Add to the file that is there. What has arrived is in it, also when the rest does not come; up to 256 KiB arrive
    /// whole or not at all. Mode and owner are then for a file that is made by this.
    append: Option<bool>,
}

/// Write a file
///
/// It appears in its place when all of its bytes have arrived, and a file that it replaces is whole until then.
#[utoipa::path(put, path = "/v1/machines/{id}/files", tag = "files",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    params(("id" = String, Path, description = "Id or name."), WriteQuery),
    responses((status = 200, description = "It is there.", body = Written)))]
async fn write(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<WriteQuery>,
    headers: HeaderMap,
    body: Raw,
) -> Result<axum::Json<Written>, Failure> {
    if headers.contains_key(header::CONTENT_RANGE) {
        return Err(Failure::invalid(
            "a part of a file cannot be written: send all of it, or add to it with `append`",
        ));
    }
    let mode = query.mode.as_deref().map(octal).transpose()?;
    let make_parents = query.parents.unwrap_or(false);
    let WriteQuery { path, owner, .. } = query;
    let file = WriteFile {
        path,
        mode,
        owner,
        make_parents,
        size: body.size_bytes,
        append: query.append.unwrap_or(false),
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
    /// What is in the directories below too, each row with its `path`.
    recursive: Option<bool>,
    /// How many directories down: 1 is the directory alone, which is the default unless `recursive`.
    #[param(minimum = 1)]
    depth: Option<u32>,
    /// `next` of the page before.
    cursor: Option<String>,
    /// Rows in the page.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// List a directory
///
/// By name; with what is below it, each directory before what is in it. Links are not followed.
#[utoipa::path(get, path = "/v1/machines/{id}/files/list", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ListQuery),
    responses((status = 200, description = "A page. One of a directory with others may be short or empty and still have a next.",
        body = Page<FileInfo>)))]
async fn list(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<FileInfo>>, Failure> {
    let depth = match (query.depth, query.recursive) {
        (Some(0), _) => return Err(Failure::invalid("`depth` is at least 1")),
        (None, Some(true)) => None,
        (depth, _) => Some(depth.unwrap_or(1)),
    };
    let list = ListFiles {
        path: query.path,
        depth,
        pattern: None,
        cursor: query.cursor,
        limit: query.limit.unwrap_or(DEFAULT_LIMIT),
    };
    Ok(axum::Json(app.engine.list_files(&who, &id, list).await?))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct GlobQuery {
    /// Directory in the machine.
    path: String,
    /// Relative to it: `*`, `?` and `[a-z]` within a name, `**` for any number of directories. A name that begins with a
    /// dot is matched by a dot alone.
    pattern: String,
    /// `next` of the page before.
    cursor: Option<String>,
    /// Rows in the page.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// Find files by a pattern
///
/// Each directory before what is in it. Links are not followed.
#[utoipa::path(get, path = "/v1/machines/{id}/files/glob", tag = "files",
    params(("id" = String, Path, description = "Id or name."), GlobQuery),
    responses((status = 200, description = "A page; it may be short or empty and still have a next.",
        body = Page<FileInfo>)))]
async fn glob(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<GlobQuery>,
) -> Result<axum::Json<Page<FileInfo>>, Failure> {
    let list = ListFiles {
        path: query.path,
        depth: None,
        pattern: Some(query.pattern),
        cursor: query.cursor,
        limit: query.limit.unwrap_or(DEFAULT_LIMIT),
    };
    Ok(axum::Json(app.engine.list_files(&who, &id, list).await?))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct MkdirQuery {
    /// Path in the machine.
    path: String,
    /// Make the directories above it too, and accept that it is there.
    parents: Option<bool>,
    /// Permission bits of a new one, octal; 0755 when left out.
    #[param(pattern = "^[0-7]{1,4}$")]
    mode: Option<String>,
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
    let mode = query.mode.as_deref().map(octal).transpose()?;
    let parents = query.parents.unwrap_or(false);
    app.engine
        .make_dir(&who, &id, &query.path, mode, parents)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct MoveQuery {
    /// Path in the machine.
    path: String,
    /// Its new path.
    to: String,
    /// Whether a file that is there may be replaced; it may when left out.
    replace: Option<bool>,
}

/// Move a file
///
/// In one step, and within one file system only.
#[utoipa::path(post, path = "/v1/machines/{id}/files/move", tag = "files",
    params(("id" = String, Path, description = "Id or name."), MoveQuery),
    responses((status = 204, description = "It is there.")))]
async fn rename(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<MoveQuery>,
) -> Result<StatusCode, Failure> {
    let replace = query.replace.unwrap_or(true);
    app.engine
        .move_file(&who, &id, &query.path, &query.to, replace)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ChmodQuery {
    /// Path in the machine.
    path: String,
    /// Permission bits, octal.
    #[param(pattern = "^[0-7]{1,4}$")]
    mode: String,
    /// All that is below a directory too.
    recursive: Option<bool>,
}

/// Change the mode of a file
///
/// A link is followed, but none that is below the directory.
#[utoipa::path(post, path = "/v1/machines/{id}/files/chmod", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ChmodQuery),
    responses((status = 204, description = "It is changed.")))]
async fn chmod(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ChmodQuery>,
) -> Result<StatusCode, Failure> {
    let change = ChangeFile {
        mode: Some(octal(&query.mode)?),
        path: query.path,
        owner: None,
        recursive: query.recursive.unwrap_or(false),
    };
    app.engine.change_file(&who, &id, change).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ChownQuery {
    /// Path in the machine.
    path: String,
    /// `user`, with its group, or `user:group`; names or numbers.
    owner: String,
    /// All that is below a directory too.
    recursive: Option<bool>,
}

/// Change the owner of a file
///
/// A link is followed, but none that is below the directory: those change their own owner.
#[utoipa::path(post, path = "/v1/machines/{id}/files/chown", tag = "files",
    params(("id" = String, Path, description = "Id or name."), ChownQuery),
    responses((status = 204, description = "It is changed.")))]
async fn chown(
    State(app): State<App>,
    Caller(who): Caller,
    Path(id): Path<String>,
    Query(query): Query<ChownQuery>,
) -> Result<StatusCode, Failure> {
    let change = ChangeFile {
        path: query.path,
        mode: None,
        owner: Some(query.owner),
        recursive: query.recursive.unwrap_or(false),
    };
    app.engine.change_file(&who, &id, change).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal_and_nothing_else() {
        assert_eq!(octal("0644").unwrap(), 0o644);
        assert_eq!(octal("7777").unwrap(), 0o7777);
        for bad in ["", "+644", "0o644", "888", "17777", "-1", "rw-r--r--"] {
            assert!(octal(bad).is_err(), "{bad}");
        }
    }
}
