//! Files of this side as streams, in and out, with progress. A file that comes in is written beside its target under
//! another name and renamed when it is whole; nothing but the target is ever touched.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use futures::{StreamExt, TryStreamExt};
use hutch_contract::client::{Body, ByteStream, Download};
use indicatif::ProgressBar;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::error::Error;
use crate::progress;
use crate::ui::Ui;

/// How much is read from a file at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// A file, or what is piped in, on its way to a server.
pub struct Source {
    /// How many bytes it has; unknown for a pipe.
    pub size_bytes: Option<u64>,
    /// Permission bits; none for what is piped in.
    pub mode: Option<u32>,
    /// The bytes.
    pub body: Body,
    /// How far it is; to be cleared at the end.
    pub bar: ProgressBar,
}

/// Opens a file to be sent, `-` for what is piped in.
pub async fn open(path: &Path, ui: Ui) -> Result<Source, Error> {
    if path == Path::new("-") {
        let bar = progress::bytes(ui, "standard input", None);
        let body = counted(tokio::io::stdin(), &bar);
        return Ok(Source {
            size_bytes: None,
            mode: None,
            body,
            bar,
        });
    }
    let failed = |source| Error::File {
        action: "open",
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).await.map_err(failed)?;
    let metadata = file.metadata().await.map_err(failed)?;
    if metadata.is_dir() {
        return Err(Error::IsDirectory {
            path: path.display().to_string(),
        });
    }
    let size_bytes = metadata.is_file().then_some(metadata.len());
    let bar = progress::bytes(ui, &path.display().to_string(), size_bytes);
    // A file that grows meanwhile is sent as long as it was: the length has been promised.
    let body = counted(file.take(size_bytes.unwrap_or(u64::MAX)), &bar);
    Ok(Source {
        size_bytes,
        mode: Some(metadata.permissions().mode() & 0o7777),
        body,
        bar,
    })
}

fn counted(from: impl AsyncRead + Send + 'static, bar: &ProgressBar) -> Body {
    let bar = bar.clone();
    let chunks = ReaderStream::with_capacity(from, CHUNK_BYTES);
    chunks
        .inspect_ok(move |chunk| bar.inc(chunk.len() as u64))
        .boxed()
}

/// Where a file that comes in is put: the target itself, or `name` in the target when that is a directory.
pub fn destination(target: &Path, name: Option<&str>) -> Result<PathBuf, Error> {
    let text = target.display().to_string();
    match std::fs::metadata(target) {
        Ok(metadata) if metadata.is_dir() => match name {
            Some(name) => Ok(target.join(name)),
            None => Err(Error::NoFileName { path: text }),
        },
        _ if text.ends_with('/') => Err(Error::NotDirectory { path: text }),
        _ => Ok(target.to_owned()),
    }
}

/// Writes what comes in. A pipe or a device is written to; a file, or nothing so far, is replaced in one step.
pub async fn save(download: Download, path: &Path, ui: Ui) -> Result<(), Error> {
    let failed = |action| {
        move |source| Error::File {
            action,
            path: path.to_owned(),
            source,
        }
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            return Err(Error::IsDirectory {
                path: path.display().to_string(),
            });
        }
        // Renaming would replace the link, and writing through it would change a file that was not named.
        Ok(found) if found.is_symlink() => {
            return Err(Error::IsLink {
                path: path.to_owned(),
            });
        }
        Ok(found) if !found.is_file() => {
            let is_socket = found.file_type().is_socket();
            let refused = || io::Error::from(io::ErrorKind::Unsupported);
            let file = if is_socket {
                Err(refused())
            } else {
                File::options().write(true).open(path).await
            };
            let mut file = file.map_err(failed("open"))?;
            return pour(download.bytes, &mut file, path, &ProgressBar::hidden()).await;
        }
        _ => {}
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // By its kind alone: tempfile's own sentence names a file that nobody asked for.
    let unfinished = tempfile::Builder::new()
        .prefix(".hutch-cp-")
        .tempfile_in(parent)
        .map_err(|error| Error::File {
            action: "write into",
            path: parent.to_owned(),
            source: error.kind().into(),
        })?;
    let (file, unfinished) = unfinished.into_parts();
    let mut file = File::from_std(file);
    let bar = progress::bytes(ui, &path.display().to_string(), download.size_bytes);
    let poured = pour(download.bytes, &mut file, path, &bar).await;
    bar.finish_and_clear();
    poured?;
    // A guest must not hand out set-user-ID programs on this side: those bits stay behind.
    let mode = download.mode.unwrap_or(0o644) & 0o777;
    file.set_permissions(Permissions::from_mode(mode))
        .await
        .map_err(failed("set the mode of"))?;
    unfinished
        .persist(path)
        .map_err(|error| failed("replace")(error.error))
}

async fn pour(
    mut bytes: ByteStream,
    file: &mut File,
    path: &Path,
    bar: &ProgressBar,
) -> Result<(), Error> {
    let failed = |source| Error::File {
        action: "write",
        path: path.to_owned(),
        source,
    };
    while let Some(chunk) = bytes.try_next().await? {
        file.write_all(&chunk).await.map_err(failed)?;
        bar.inc(chunk.len() as u64);
    }
    file.flush().await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn download(content: &'static [u8], mode: u32) -> Download {
        let chunk = Ok(bytes::Bytes::from_static(content));
        Download {
            size_bytes: Some(content.len() as u64),
            mode: Some(mode),
            bytes: futures::stream::iter([chunk]).boxed(),
        }
    }

    const UI: Ui = Ui { json: false };

    #[tokio::test]
    async fn a_file_is_replaced_whole_with_the_guests_mode_but_without_set_user_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        std::fs::write(&path, "old").unwrap();
        save(download(b"new", 0o104755), &path, UI).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o755
        );
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no unfinished file is left"
        );
    }

    #[tokio::test]
    async fn a_transfer_that_breaks_off_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, "old").unwrap();
        let broken = hutch_contract::client::Error::Timeout {
            target: "x".to_owned(),
        };
        let chunks = [Ok(bytes::Bytes::from_static(b"half")), Err(broken)];
        let half = Download {
            bytes: futures::stream::iter(chunks).boxed(),
            ..download(b"", 0o644)
        };
        assert!(save(half, &path, UI).await.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_link_at_the_target_is_neither_followed_nor_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (elsewhere, link) = (dir.path().join("elsewhere"), dir.path().join("link"));
        std::fs::write(&elsewhere, "precious").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        let refused = save(download(b"new", 0o644), &link, UI).await;
        assert!(matches!(refused, Err(Error::IsLink { .. })));
        assert_eq!(std::fs::read(&elsewhere).unwrap(), b"precious");
        assert!(link.is_symlink());
    }

    #[test]
    fn a_directory_takes_the_file_under_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            destination(dir.path(), Some("f")).unwrap(),
            dir.path().join("f")
        );
        assert!(matches!(
            destination(dir.path(), None),
            Err(Error::NoFileName { .. })
        ));
        assert_eq!(
            destination(&dir.path().join("new"), Some("f")).unwrap(),
            dir.path().join("new")
        );
        assert!(matches!(
            destination(&dir.path().join("no/"), Some("f")),
            Err(Error::NotDirectory { .. })
        ));
    }
}
