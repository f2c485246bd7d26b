//! Images of ours in the engine: imported from their layer when a first container needs them, one import at a time for
//! each, and found again by their labels.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::query_parameters::{CreateImageOptions, ListImagesOptions, RemoveImageOptions};
use bytes::Bytes;
use futures::TryStreamExt;
use tokio::sync::mpsc;

use super::client::{self, Client, said};
use super::{IMAGE_LABEL, TAG_LABEL, labelled};
use crate::{Error, ImageLayer, Outside};

/// Time for an engine to take an image: a few seconds for each GiB on a disk that deserves the name.
const IMPORT: Duration = Duration::from_secs(900);
/// Bytes of a layer that are under way at once, in pieces.
const PIECE: usize = 256 * 1024;
const PIECES: usize = 8;
pub(super) const KIND: &str = "container image";

/// Which imports are going on.
#[derive(Default)]
pub(super) struct Imports(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Imports {
    fn turn(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody has in hand.
        all.retain(|_, turn| Arc::strong_count(turn) > 1);
        all.entry(name.to_owned()).or_default().clone()
    }

    /// Sees to it that the engine has an image, and returns its name there.
    pub(super) async fn import(
        &self,
        client: &Client,
        tag: &str,
        image: &ImageLayer,
    ) -> Result<String, Error> {
        let repository = format!("hutch/{tag}");
        let name = format!("{repository}:{}", image.id);
        let turn = self.turn(&name);
        let _turn = turn.lock().await;
        let engine = client.engine().await?;
        let there = client::found("inspect image", engine.inspect_image(&name)).await?;
        if there.is_some() {
            return Ok(name);
        }
        let layer = File::open(&image.path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::WrongImage {
                runtime: super::NAME,
                image: image.id.clone(),
                lacks: "layer",
                hint: "an image that came as an ext4 disk runs with qemu and the other runtimes that boot disks; import it as a tar for docker",
            },
            _ => Error::io("open", &image.path)(source),
        })?;
        let options = CreateImageOptions {
            from_src: Some("-".to_owned()),
            repo: Some(repository),
            tag: Some(image.id.clone()),
            changes: vec![
                format!("LABEL {TAG_LABEL}={tag}"),
                format!("LABEL {IMAGE_LABEL}={}", image.id),
            ],
            ..CreateImageOptions::default()
        };
        let body = bollard::body_try_stream(unpacked(layer));
        let import = engine.create_image(Some(options), Some(body), None);
        match tokio::time::timeout(IMPORT, import.try_collect::<Vec<_>>()).await {
            Ok(Ok(_)) => Ok(name),
            Ok(Err(error)) => Err(said("import", error)),
            Err(_) => Err(Error::Timeout {
                what: "import of the image",
                seconds: IMPORT.as_secs(),
            }),
        }
    }
}

/// The tar, unpacked in a thread of its own: not every engine understands zstd.
fn unpacked(layer: File) -> impl futures::Stream<Item = std::io::Result<Bytes>> {
    let (send, receive) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let read = || -> std::io::Result<()> {
            let mut tar = zstd::Decoder::new(layer)?;
            loop {
                let mut piece = Vec::with_capacity(PIECE);
                tar.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
                // An end, or nobody who listens any more.
                if piece.is_empty() || send.blocking_send(Ok(piece.into())).is_err() {
                    return Ok(());
                }
            }
        };
        if let Err(error) = read() {
            let _ = send.blocking_send(Err(error));
        }
    });
    futures::stream::unfold(receive, |mut receive| async {
        receive.recv().await.map(|piece| (piece, receive))
    })
}

/// All images of a tag.
pub(super) async fn list(client: &Client, tag: &str) -> Result<Vec<Outside>, Error> {
    let options = ListImagesOptions {
        filters: Some(labelled(tag)),
        ..ListImagesOptions::default()
    };
    let engine = client.engine().await?;
    let images = client::asked("list images", engine.list_images(Some(options))).await?;
    let ours = images.into_iter().filter_map(|image| {
        let of = image.labels.get(IMAGE_LABEL)?.clone();
        (image.labels.get(TAG_LABEL)? == tag).then_some(Outside {
            kind: KIND,
            name: image.id,
            of,
        })
    });
    Ok(ours.collect())
}

/// Removes an image. One of which there are containers stays.
pub(super) async fn remove(client: &Client, name: &str) -> Result<(), Error> {
    let engine = client.engine().await?;
    let removed = async {
        let options = RemoveImageOptions::default();
        match engine.remove_image(name, Some(options), None).await {
            Err(error) if client::is_status(&error, 409) => Ok(()),
            other => other.map(drop),
        }
    };
    client::found("remove image", removed).await.map(drop)
}
