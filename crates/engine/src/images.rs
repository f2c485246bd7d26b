//! Images: made by operations in directories that appear when they are complete, found by name, deleted when unused.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use hutch_contract::id::ImageId;
use hutch_contract::image::{Accepted, BootstrapImage, Image, ImageSource, ImportFormat};
use hutch_contract::machine::Status;
use hutch_contract::name::Name;
use hutch_contract::operation::Progress;
use hutch_contract::page::Page;
use hutch_contract::record::{FORMAT, ImageInput, ImageRecord, ImageWork, Observed};
use hutch_image::{Bootstrap, Built, Job, Limits, Purpose};
use hutch_store::{Check, Write};
use tokio::io::AsyncWriteExt;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::access::{self, Access};
use crate::drive::{blocking, retry_delay};
use crate::engine::{Shared, spool_dir, uploads_dir};
use crate::operations::Running;
use crate::prepare::{erase_dir, io_error};
use crate::{Engine, Error, Principal, admission, machines, plan, rows};

/// In an image's directory: its disk.
pub(crate) const DISK: &str = "disk.raw";
/// In an image's directory, when it was made from an archive: that archive, packed with zstd.
pub(crate) const LAYER: &str = "layer.tar.zst";

/// Counts a create that needs an image's disk, so that the image is not deleted meanwhile.
pub(crate) struct InUse {
    shared: Arc<Shared>,
    id: ImageId,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut fleet = self.shared.fleet();
        if let Some(count) = fleet.images_in_use.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                fleet.images_in_use.remove(&self.id);
            }
        }
    }
}

impl Engine {
    /// One image, by id or name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn image(&self, who: &Principal, reference: &str) -> Result<Image, Error> {
        access::check(who, Access::Read)?;
        self.find_image(who, reference).map(Image::from)
    }

    /// Images in pages, oldest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a cursor that no page gave.
    pub fn images(
        &self,
        who: &Principal,
        cursor: Option<&str>,
        limit: u32,
    ) -> Result<Page<Image>, Error> {
        access::check(who, Access::Read)?;
        let limit = machines::page_limit(limit)?;
        let after: Option<ImageId> = cursor
            .map(|cursor| {
                cursor
                    .parse()
                    .map_err(|_| Error::invalid("cursor", "is not of a list"))
            })
            .transpose()?;
        let fleet = self.shared.fleet();
        let mut found = fleet
            .images
            .values()
            .filter(|record| after.as_ref().is_none_or(|after| record.id > *after))
            .filter(|record| access::sees(who, &record.owner))
            .cloned()
            .map(Image::from);
        let items: Vec<_> = found.by_ref().take(limit).collect();
        let more = found.next().is_some();
        let next = more
            .then(|| items.last().map(|image| image.id.to_string()))
            .flatten();
        Ok(Page { items, next })
    }

    /// Deletes an image. Machines made from it have disks of their own and go on.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::ImageBusy`] while a machine is being made from it.
    pub async fn delete_image(&self, who: &Principal, reference: &str) -> Result<(), Error> {
        let (engine, who, reference) = (self.clone(), who.clone(), reference.to_owned());
        self.unbroken("delete an image", async move {
            engine.delete_image_now(&who, &reference).await
        })
        .await
    }

    async fn delete_image_now(&self, who: &Principal, reference: &str) -> Result<(), Error> {
        access::check(who, Access::Write)?;
        let shared = &self.shared;
        let found = self.find_image(who, reference)?;
        {
            let mut fleet = shared.fleet();
            let waiting = fleet
                .machines
                .values()
                .filter_map(|machine| machine.cell.get())
                .any(|current| {
                    let record = &current.record;
                    record.image == found.id
                        && record.observed == Observed::Absent
                        && plan::status(record) == Status::Starting
                });
            if waiting || fleet.images_in_use.contains_key(&found.id) {
                return Err(Error::ImageBusy {
                    name: found.name.to_string(),
                });
            }
            // From here on no create and no other delete finds it; a failed commit puts it back.
            if fleet.images.remove(&found.id).is_none() {
                return Err(Error::not_found("image", reference));
            }
            fleet
                .image_names
                .remove(&(found.owner.clone(), found.name.clone()));
        }
        let writes = vec![
            Write::Delete(rows::image(&found.id)),
            Write::Delete(rows::image_name(&found.owner, &found.name)),
        ];
        if let Err(error) = shared.store.commit(Vec::new(), writes).await {
            shared.show_image(found);
            return Err(error.into());
        }
        let dir = shared.image_dir(&found.id);
        blocking("erase the image", move || erase_dir(&dir)).await?;
        shared.remove_outside_of(found.id.as_str()).await;
        shared.drop_templates_of(&found.id).await;
        Ok(())
    }

    /// Makes an image of an uploaded tar or ext4 disk. Returns once the body is in and the operation is durable.
    ///
    /// # Errors
    /// [`Error::NameTaken`], a broken or too large upload, a full disk.
    pub async fn import_image(
        &self,
        who: &Principal,
        name: Name,
        format: ImportFormat,
        body: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<Accepted, Error> {
        access::check(who, Access::Write)?;
        // Looked at before the upload, decided after it: nobody should wait for gigabytes to hear of a taken name.
        if self
            .shared
            .fleet()
            .image_names
            .contains_key(&(who.owner.clone(), name.clone()))
        {
            return Err(Error::NameTaken {
                what: "image",
                name: name.to_string(),
            });
        }
        let id = ImageId::new();
        let path = spool_dir(&self.shared.config.data_dir).join(format!("{id}.upload"));
        let spooled = Spooled::new(path.clone());
        let bytes = self.spool(&path, body).await?;
        let source = match format {
            ImportFormat::Tar => ImageSource::Tar,
            ImportFormat::Ext4 => ImageSource::Ext4,
        };
        let (engine, who) = (self.clone(), who.clone());
        // All is here: from now on it does not matter whether the client is.
        self.unbroken("keep an upload", async move {
            let upload = engine.shared.upload(&id);
            let kept = Spooled::new(upload.clone());
            blocking("keep the upload", move || {
                Ok(hutch_disk::publish_file(&path, &upload)?)
            })
            .await?;
            drop(spooled);
            let input = ImageInput::Upload { format, bytes };
            engine.make(&who, id, name, source, input, kept).await
        })
        .await
    }

    async fn spool(
        &self,
        path: &Path,
        mut body: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<u64, Error> {
        let config = &self.shared.config;
        let write_error = |source| io_error("write", path, source);
        let mut file = tokio::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .await
            .map_err(write_error)?;
        let (mut total, mut looked_at) = (0u64, 0u64);
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(|source| Error::Upload { source })?;
            total += bytes.len() as u64;
            if total > config.image_max_bytes {
                return Err(Error::UploadTooLarge {
                    limit: config.image_max_bytes,
                });
            }
            if total - looked_at > 64 << 20 || looked_at == 0 {
                looked_at = total;
                admission::disk_room(config, hutch_disk::pool::room(&config.data_dir)?)?;
            }
            file.write_all(&bytes).await.map_err(write_error)?;
        }
        file.flush().await.map_err(write_error)?;
        Ok(total)
    }

    /// Makes an image from what the host has: packages of a distribution, or its static busybox.
    ///
    /// # Errors
    /// [`Error::NameTaken`]; a distribution that we do not know.
    pub async fn bootstrap_image(
        &self,
        who: &Principal,
        request: BootstrapImage,
    ) -> Result<Accepted, Error> {
        access::check(who, Access::Write)?;
        let named = |default: &str| {
            request
                .name
                .clone()
                .unwrap_or_else(|| default.parse().expect("a name of ours"))
        };
        let (name, source, input) = match request.distribution.as_str() {
            "debian" => {
                let suite = request.suite.clone();
                if suite
                    .as_ref()
                    .is_some_and(|suite| suite.parse::<Name>().is_err())
                {
                    return Err(Error::invalid("suite", "is no release, such as `bookworm`"));
                }
                let shown = suite.clone().unwrap_or_else(hutch_image::host_suite);
                let source = ImageSource::Bootstrap {
                    distribution: "debian".into(),
                    suite: shown,
                };
                (named("debian-base"), source, ImageInput::Debian { suite })
            }
            "busybox" => (named("busybox"), ImageSource::Busybox, ImageInput::Busybox),
            _ => {
                return Err(Error::invalid(
                    "distribution",
                    "must be `debian` or `busybox`",
                ));
            }
        };
        let id = ImageId::new();
        let nothing = Spooled::new(self.shared.upload(&id));
        self.make(who, id, name, source, input, nothing).await
    }

    /// Reserves the name and begins the operation, in one commit, then works in the background.
    pub(crate) async fn make(
        &self,
        who: &Principal,
        id: ImageId,
        name: Name,
        source: ImageSource,
        input: ImageInput,
        upload: Spooled,
    ) -> Result<Accepted, Error> {
        let shared = self.shared.clone();
        let kind = match input {
            ImageInput::Upload { .. } => "image-import",
            ImageInput::Snapshot { .. } => "image-snapshot",
            ImageInput::Debian { .. } | ImageInput::Busybox => "image-bootstrap",
        };
        admission::disk_room(
            &shared.config,
            hutch_disk::pool::room(&shared.config.data_dir)?,
        )?;
        let name_key = rows::image_name(&who.owner, &name);
        let name_write = Write::json(name_key.clone(), &id)?;
        let record = ImageRecord {
            format: FORMAT,
            id,
            owner: who.owner.clone(),
            name,
            source,
            sha256: String::new(),
            size_bytes: 0,
            used_bytes: 0,
            created_at_ms: shared.now_ms(),
        };
        let work = ImageWork {
            image: record.clone(),
            input,
            tries: 1,
        };
        let target = record.id.to_string();
        let (operation, write) = shared.new_operation(who, kind, target, Some(work.clone()))?;
        let writes = vec![write, name_write];
        self.unbroken("begin an image", async move {
            match shared
                .store
                .commit(vec![Check::Absent(name_key)], writes)
                .await
            {
                Ok(_) => {}
                Err(hutch_store::Error::Conflict { .. }) => {
                    return Err(Error::NameTaken {
                        what: "image",
                        name: record.name.to_string(),
                    });
                }
                Err(error) => return Err(error.into()),
            }
            // It goes with the operation now.
            upload.keep();
            let running = shared.show_operation(operation);
            let accepted = Accepted {
                operation: running.record.id.clone(),
            };
            let tasks = shared.tasks.clone();
            tasks.spawn(make(shared, running, work));
            Ok(accepted)
        })
        .await
    }

    /// Makes an image that the last server began with.
    pub(crate) fn go_on_with_image(&self, running: Arc<Running>) {
        let Some(work) = running.record.work.clone() else {
            return;
        };
        info!(operation = %running.record.id, image = %work.image.name, "making the image from the beginning");
        let making = make(self.shared.clone(), running, work);
        self.shared.tasks.spawn(making);
    }

    pub(crate) fn find_image(
        &self,
        who: &Principal,
        reference: &str,
    ) -> Result<ImageRecord, Error> {
        let fleet = self.shared.fleet();
        let id = match reference.parse::<ImageId>() {
            Ok(id) => Some(id),
            Err(_) => {
                let name = reference.parse::<Name>().ok();
                name.and_then(|name| fleet.image_names.get(&(who.owner.clone(), name)).cloned())
            }
        };
        id.and_then(|id| fleet.images.get(&id))
            .filter(|record| access::sees(who, &record.owner))
            .cloned()
            .ok_or_else(|| Error::not_found("image", reference))
    }

    /// Finds an image for a create and keeps it from being deleted until the returned value is dropped.
    pub(crate) fn use_image(
        &self,
        who: &Principal,
        reference: &str,
    ) -> Result<(ImageRecord, InUse), Error> {
        let record = self.find_image(who, reference)?;
        let mut fleet = self.shared.fleet();
        if !fleet.images.contains_key(&record.id) {
            return Err(Error::not_found("image", reference));
        }
        *fleet.images_in_use.entry(record.id.clone()).or_default() += 1;
        drop(fleet);
        let in_use = InUse {
            shared: self.shared.clone(),
            id: record.id.clone(),
        };
        Ok((record, in_use))
    }

    pub(crate) async fn load_images(&self) -> Result<(), Error> {
        for row in rows::all::<ImageRecord>(self.shared.store.as_ref(), "image/").await? {
            rows::known_format(&row.key, row.value.format)?;
            self.shared.show_image(row.value);
        }
        Ok(())
    }

    /// The writes that free the names which an interrupted operation had reserved for `target`.
    pub(crate) async fn names_reserved_for(&self, target: &str) -> Result<Vec<Write>, Error> {
        let rows = rows::all::<String>(self.shared.store.as_ref(), "name/").await?;
        Ok(rows
            .into_iter()
            .filter(|row| row.value == target)
            .map(|row| Write::Delete(row.key))
            .collect())
    }
}

impl Shared {
    /// Where the upload lies that an image is made from.
    pub(crate) fn upload(&self, id: &ImageId) -> PathBuf {
        uploads_dir(&self.config.data_dir).join(id.as_str())
    }

    fn show_image(&self, record: ImageRecord) {
        let mut fleet = self.fleet();
        fleet.image_names.insert(
            (record.owner.clone(), record.name.clone()),
            record.id.clone(),
        );
        fleet.images.insert(record.id.clone(), record);
    }
}

/// A file that goes with the value, unless it was kept.
pub(crate) struct Spooled(Option<PathBuf>);

impl Spooled {
    pub fn new(path: PathBuf) -> Self {
        Self(Some(path))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Absent when there was nothing to put there.
            drop(fs::remove_file(path));
        }
    }
}

/// Tells file work in a thread that its operation is not wanted any more.
pub(crate) struct CancelOnDrop(pub Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The operation: builds in the spool, publishes by rename, then the record and the end of the operation in one commit.
async fn make(shared: Arc<Shared>, running: Arc<Running>, work: ImageWork) {
    let ImageWork {
        image: record,
        input,
        ..
    } = work;
    let stage = spool_dir(&shared.config.data_dir).join(record.id.as_str());
    // What a bootstrap packs and unpacks again.
    let packed = Spooled::new(stage.with_extension("tar"));
    let target = shared.image_dir(&record.id);
    let cancel = Arc::new(AtomicBool::new(false));
    let build = {
        let (shared, running, stage, target) = (
            shared.clone(),
            running.clone(),
            stage.clone(),
            target.clone(),
        );
        let cancel = cancel.clone();
        let tar = match input {
            ImageInput::Upload { .. } => shared.upload(&record.id),
            ImageInput::Snapshot { .. } => PathBuf::new(),
            ImageInput::Debian { .. } | ImageInput::Busybox => stage.with_extension("tar"),
        };
        let in_use = match &input {
            ImageInput::Snapshot { snapshot } => Some(shared.use_snapshot(snapshot)),
            _ => None,
        };
        // The end of the engine waits for it: nothing may write here once another server has the directory.
        let counted = shared.tasks.token();
        blocking("make the image", move || {
            let _counted = counted;
            let _in_use = in_use.transpose()?;
            shared.with_room(|| {
                erase_dir(&stage)?;
                let built = build(&shared, &running, &input, &tar, &stage, &cancel)?;
                hutch_disk::publish_dir(&stage, &target)?;
                Ok(built)
            })
        })
    };
    let _cancel = CancelOnDrop(cancel);
    let built = tokio::select! {
        built = build => built,
        // The next server begins again.
        () = shared.stop.cancelled() => return,
    };
    drop(packed);
    let outcome = built.map(|built| ImageRecord {
        sha256: built.sha256,
        size_bytes: built.size_bytes,
        used_bytes: built.used_bytes,
        ..record.clone()
    });
    if let Err(error) = &outcome {
        warn!(operation = %running.record.id, error = %error.chain(), "the image cannot be made");
        for dir in [stage, target] {
            if let Err(error) = erase_dir(&dir) {
                warn!(error = %error.chain(), "what a failed image left cannot be erased; the next start does it");
            }
        }
    }
    let mut attempt = 0;
    while let Err(error) = record_end(&shared, &running, &record, &outcome).await {
        // A store that is full has room again some day; until then the operation goes on for all to see.
        warn!(operation = %running.record.id, error = %error.chain(), "its end cannot be recorded yet");
        attempt += 1;
        tokio::select! {
            () = sleep(retry_delay(attempt)) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

/// Records the image or frees its name, together with the end of the operation.
async fn record_end(
    shared: &Shared,
    running: &Running,
    begun: &ImageRecord,
    outcome: &Result<ImageRecord, Error>,
) -> Result<(), Error> {
    // Not before the end is durable: until then a next server may have to begin again.
    let drop_upload = || drop(Spooled::new(shared.upload(&begun.id)));
    match outcome {
        Ok(record) => {
            let write = Write::json(rows::image(&record.id), record)?;
            // The image is there before anybody hears that it is.
            let show = || {
                drop_upload();
                shared.show_image(record.clone());
            };
            shared
                .end_operation(running, Ok(()), vec![write], show)
                .await?;
            info!(image = %record.id, name = %record.name, "made");
            Ok(())
        }
        Err(error) => {
            let free = Write::Delete(rows::image_name(&begun.owner, &begun.name));
            shared
                .end_operation(running, Err(error), vec![free], drop_upload)
                .await
        }
    }
}

fn build(
    shared: &Shared,
    running: &Running,
    input: &ImageInput,
    tar: &Path,
    stage: &Path,
    cancel: &AtomicBool,
) -> Result<Built, Error> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(stage)
        .map_err(|source| io_error("create", stage, source))?;
    let mut progress = |report: hutch_image::Progress| {
        let unit = match report.unit {
            hutch_image::Unit::Bytes => "bytes",
            hutch_image::Unit::Steps => "steps",
        };
        running.progress(Progress {
            phase: report.phase,
            done: report.done,
            total: report.total,
            unit: unit.into(),
        });
    };
    let limits = Limits {
        max_content_bytes: shared.config.image_max_bytes,
        ..Limits::default()
    };
    let disk = stage.join(DISK);
    let built = match input {
        ImageInput::Upload { format, bytes } => {
            let upload = open(tar)?;
            let there = upload.metadata().map(|metadata| metadata.len());
            if there.map_err(|source| io_error("look at", tar, source))? != *bytes {
                return Err(Error::Upload {
                    source: std::io::Error::other("it is not whole any more"),
                });
            }
            match format {
                ImportFormat::Ext4 => {
                    hutch_image::import_ext4(&upload, &disk, &limits, &mut progress)?
                }
                ImportFormat::Tar => from_tar(shared, tar, stage, limits, &mut progress)?,
            }
        }
        ImageInput::Snapshot { snapshot } => {
            let from = open(&shared.snapshot_disk(snapshot))?;
            // It was made here, and is not larger than machines may be.
            let limits = Limits {
                max_content_bytes: u64::MAX,
                ..limits
            };
            hutch_image::import_ext4(&from, &disk, &limits, &mut progress)?
        }
        ImageInput::Busybox => {
            hutch_image::busybox(&mut create(tar)?)?;
            from_tar(shared, tar, stage, limits, &mut progress)?
        }
        ImageInput::Debian { suite } => {
            let what = Bootstrap {
                suite: suite.clone(),
                ..Bootstrap::default()
            };
            hutch_image::bootstrap(&what, tar, cancel, &mut progress)?;
            from_tar(shared, tar, stage, limits, &mut progress)?
        }
    };
    // Clones are taken by reading; nothing may change it.
    for file in [disk, stage.join(LAYER)] {
        match fs::set_permissions(&file, fs::Permissions::from_mode(0o400)) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("protect", &file, source));
            }
            _ => {}
        }
    }
    Ok(built)
}

fn from_tar(
    shared: &Shared,
    tar: &Path,
    stage: &Path,
    limits: Limits,
    progress: &mut dyn FnMut(hutch_image::Progress),
) -> Result<Built, Error> {
    let job = Job {
        purpose: Purpose::Root,
        limits,
    };
    let disk = stage.join(DISK);
    let (output, layer) = (create(&disk)?, create(&stage.join(LAYER))?);
    let built = hutch_image::build_in_child(
        &shared.config.launcher,
        &job,
        vec![open(tar)?],
        output,
        Some(layer),
        progress,
    )?;
    hutch_image::check_ext4(&disk)?;
    Ok(built)
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| io_error("open", path, source))
}

fn create(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .map_err(|source| io_error("create", path, source))
}
