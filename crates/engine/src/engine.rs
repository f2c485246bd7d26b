//! What the engine consists of, and how it starts and ends: locks, the store, and every machine adopted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use hutch_contract::id::{ImageId, MachineId, OperationId, OwnerId, SnapshotId};
use hutch_contract::key::Scope;
use hutch_contract::name::Name;
use hutch_contract::record::{FORMAT, ImageRecord, MachineRecord, Observed, SnapshotRecord, Work};
use hutch_disk::pool::{Pool, place};
use hutch_guest::session::Session;
use hutch_runtime::table::Runtimes;
use hutch_runtime::{Adopted, ImageLayer, MachineDir, Runtime};
use hutch_store::{Check, SqliteStore, Store, Write};
use rustix::fs::{FlockOperation, flock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::drive::{Driver, blocking, joined, retry_delay};
use crate::kernel::Kernel;
use crate::lifetime::Uses;
use crate::network::Network;
use crate::operations::Running;
use crate::ports::Doors;
use crate::prepare::{erase_dir, io_error, sweep_shared};
use crate::rows::{self, Cell, Current, Instance, SlotRow};
use crate::warm::Templates;
use crate::{EngineConfig, Error, Principal, deadline, expose, images, inventory, keys, pool};

/// Characters of an instance's tag.
const TAG_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// Directories that lie where disks do, by reflinks and renames between them.
pub(crate) const MACHINES: &str = "machines";
pub(crate) const IMAGES: &str = "images";
pub(crate) const TEMPLATES: &str = "templates";
pub(crate) const SNAPSHOTS: &str = "snapshots";
pub(crate) const UPLOADS: &str = "uploads";
/// Attempts at the lock of a data directory after the first.
const LOCK_TRIES: u32 = 50;
/// Revisions of the change log that are kept.
const KEEP_REVISIONS: u64 = 100_000;

/// Everything that machines can be asked of. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
}

/// A machine in memory: its record, and the session with its agent while there is one.
pub(crate) struct Machine {
    pub cell: Cell,
    pub uses: Arc<Uses>,
    pub session: watch::Sender<Option<Session>>,
    name: Name,
}

impl Machine {
    pub fn new(store: Arc<dyn Store>, current: Current) -> Machine {
        let name = current.record.name.clone();
        Machine {
            cell: Cell::new(store, current),
            uses: Uses::new(),
            session: watch::Sender::new(None),
            name,
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> String {
        self.name.to_string()
    }
}

/// The time, UTC, in milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// What is looked up by id or name. Held for a look or an insertion, never over an await.
#[derive(Default)]
pub(crate) struct Fleet {
    pub machines: BTreeMap<MachineId, Arc<Machine>>,
    pub machine_names: HashMap<(OwnerId, Name), MachineId>,
    pub images: BTreeMap<ImageId, ImageRecord>,
    pub image_names: HashMap<(OwnerId, Name), ImageId>,
    pub snapshots: BTreeMap<SnapshotId, SnapshotRecord>,
    /// Snapshots that something is being made of, and that therefore stay.
    pub snapshots_in_use: HashMap<SnapshotId, usize>,
    pub slots: BTreeMap<u16, SlotRow>,
    pub operations: BTreeMap<OperationId, Arc<Running>>,
    /// Machines that are being made from an image, and the image's disk therefore needed.
    pub images_in_use: HashMap<ImageId, usize>,
    /// Memory promised to creates whose machines are not yet seen above, in MiB.
    pub admitting_mib: u64,
}

pub(crate) struct Shared {
    pub config: EngineConfig,
    pub store: Arc<dyn Store>,
    pub instance: Instance,
    pub runtimes: Runtimes,
    pub kernel: Kernel,
    network: OnceLock<Network>,
    pub doors: Doors,
    pub gateway_secret: [u8; 32],
    pub tasks: TaskTracker,
    pub stop: CancellationToken,
    fleet: Mutex<Fleet>,
    /// What machines can start warm from.
    pub templates: Templates,
    /// Where disks lie, if that is not the data directory itself.
    pub pool: Option<Pool>,
    /// Held as long as the engine lives: one server per data directory.
    _lock: File,
}

impl Shared {
    pub fn fleet(&self) -> MutexGuard<'_, Fleet> {
        // Every change of the fleet is a single insertion or removal: a panic elsewhere leaves it whole.
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn now_ms(&self) -> u64 {
        now_ms()
    }

    /// The network of machines. It is there before the first machine is seen.
    pub fn network(&self) -> &Network {
        static UNKNOWN: OnceLock<Network> = OnceLock::new();
        let unknown = || Network::None {
            reason: "the server has not come up yet".into(),
        };
        self.network
            .get()
            .unwrap_or_else(|| UNKNOWN.get_or_init(unknown))
    }

    pub fn machine_dir(&self, id: &MachineId) -> PathBuf {
        machines_dir(&self.config.data_dir).join(id.as_str())
    }

    pub fn image_dir(&self, id: &ImageId) -> PathBuf {
        images_dir(&self.config.data_dir).join(id.as_str())
    }

    pub fn image_disk(&self, id: &ImageId) -> PathBuf {
        self.image_dir(id).join(images::DISK)
    }

    /// An image for runtimes that take layers; the file is not there when the image came as a disk.
    pub fn image_layer(&self, id: &ImageId) -> ImageLayer {
        ImageLayer {
            id: id.to_string(),
            path: self.image_dir(id).join(images::LAYER),
        }
    }

    /// The name that everything of a slot carries outside of its directory.
    pub fn label(&self, slot: u16) -> String {
        hutch_net::label(&self.instance.tag, slot)
    }

    pub fn runtime(&self, name: &str) -> Result<Arc<dyn Runtime>, Error> {
        self.runtimes
            .get(name)
            .cloned()
            .ok_or_else(|| Error::NoSuchRuntime {
                name: name.chars().take(64).collect(),
            })
    }

    /// Drops a machine that is gone from memory.
    pub fn forget(&self, machine: &Machine) {
        let mut fleet = self.fleet();
        if let Some(machine) = fleet.machines.remove(&machine.cell.id) {
            fleet.machine_names.retain(|_, id| *id != machine.cell.id);
            self.doors.forget(&machine.cell.id);
            let now = self.now_ms();
            let id = &machine.cell.id;
            for row in fleet.slots.values_mut() {
                if matches!(row, SlotRow::Taken { machine } if machine == id) {
                    *row = SlotRow::Resting { since_ms: now };
                }
            }
        }
    }

    /// Gives a machine its task.
    pub fn drive(
        self: &Arc<Self>,
        machine: Arc<Machine>,
        record: &MachineRecord,
        fresh: bool,
    ) -> Result<(), Error> {
        let runtime = self.runtime(&record.runtime)?;
        let driver = Driver::new(self.clone(), machine, runtime);
        self.tasks.spawn(driver.run(fresh));
        Ok(())
    }
}

pub(crate) fn machines_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join(MACHINES)
}

pub(crate) fn images_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join(IMAGES)
}

pub(crate) fn snapshots_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join(SNAPSHOTS)
}

/// What machines start warm from: a cache.
pub(crate) fn templates_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join(TEMPLATES)
}

/// Uploads, half-made images and snapshots: everything in it is dropped at start.
pub(crate) fn spool_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join("tmp")
}

/// Uploads that imports are made from, whole and on disk: they stay until the import has ended.
pub(crate) fn uploads_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join(UPLOADS)
}

impl Engine {
    /// Takes the data directory, opens the store, finishes or undoes what a crash interrupted, and adopts every
    /// machine that runs.
    ///
    /// # Errors
    /// [`Error::DataDirBusy`] when another server has the directory; what the store or the file system says.
    pub async fn open(config: EngineConfig) -> Result<Engine, Error> {
        public_dir(&config.data_dir)?;
        let lock = lock(&config.data_dir).await?;
        let pool = pool::open(&config).await?;
        for dir in [
            &machines_dir(&config.data_dir),
            &images_dir(&config.data_dir),
            &snapshots_dir(&config.data_dir),
            &templates_dir(&config.data_dir),
            &uploads_dir(&config.data_dir),
            &config.cache_dir,
        ] {
            public_dir(dir)?;
        }
        sweep_shared(&config.data_dir)?;
        let spool = spool_dir(&config.data_dir);
        discard(&config.data_dir, &spool)?;
        public_dir(&spool)?;

        let database = config.data_dir.join("hutch.db");
        private_file(&database)?;
        let store =
            crate::drive::blocking("open the store", move || Ok(SqliteStore::open(&database)?))
                .await?;
        Engine::over(config, lock, pool, Arc::new(store)).await
    }

    async fn over(
        config: EngineConfig,
        lock: File,
        pool: Option<Pool>,
        store: Arc<dyn Store>,
    ) -> Result<Engine, Error> {
        let instance = instance(store.as_ref()).await?;
        inventory::note_tag(&config.data_dir, &instance.tag)?;
        let runtimes = crate::doctor::runtimes(&config);
        let gateway_secret = expose::secret(store.as_ref()).await?;
        let shared = Arc::new(Shared {
            kernel: Kernel::new(&config),
            network: OnceLock::new(),
            doors: Doors::default(),
            gateway_secret,
            config,
            store,
            instance,
            runtimes,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            fleet: Mutex::default(),
            templates: Templates::new(),
            pool,
            _lock: lock,
        });
        let engine = Engine { shared };
        engine.recover().await?;
        Ok(engine)
    }

    /// Ends all tasks. Machines go on and are adopted by the next engine.
    pub async fn close(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        if let Some(network) = self.shared.network.get() {
            network.end().await;
        }
        self.release_pool().await;
    }

    /// Whether there are machines, of whomever and in whichever state.
    #[must_use]
    pub fn has_machines(&self) -> bool {
        !self.shared.fleet().machines.is_empty()
    }

    /// The principal of someone who is let in by the host itself: the peer on the unix socket.
    pub fn local_admin(&self) -> Principal {
        Principal {
            owner: self.shared.instance.owner.clone(),
            scope: Scope::Admin,
            key: None,
        }
    }

    /// Finds out whose secret was shown.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`], whatever is wrong with it.
    pub async fn authenticate(&self, secret: &str) -> Result<Principal, Error> {
        keys::authenticate(self.shared.store.as_ref(), secret, self.shared.now_ms()).await
    }

    /// Resolves with the reason when nothing can be recorded any more: the server should then end, for the next one to
    /// find out what is true. Machines go on. Pending as long as all is well.
    pub async fn failed(&self) -> Error {
        let store = &self.shared.store;
        let mut news = store.subscribe();
        while news.changed().await.is_ok() {}
        let reason = store.commit(Vec::new(), Vec::new()).await.err();
        reason
            .unwrap_or(hutch_store::Error::Stopped { cause: None })
            .into()
    }

    /// Runs a change to its end, whoever waits for it; [`Engine::close`] does.
    pub(crate) async fn unbroken<T: Send + 'static>(
        &self,
        what: &'static str,
        change: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        joined(what, self.shared.tasks.spawn(change)).await?
    }

    async fn recover(&self) -> Result<(), Error> {
        let shared = &self.shared;
        let store = shared.store.as_ref();
        keys::ensure_admin(
            store,
            &shared.config.data_dir,
            &shared.instance.owner,
            shared.now_ms(),
        )
        .await?;
        self.load_slots().await?;
        self.load_images().await?;
        let machines = self.load_machines().await?;
        let restoring = machines
            .iter()
            .filter_map(|(_, record)| match &record.work {
                Some(work @ Work::Restore { .. }) => Some(work.operation().clone()),
                _ => None,
            });
        let unfinished = self.load_operations(&restoring.collect()).await?;
        self.load_snapshots().await?;
        self.sweep_idempotency().await?;
        store.compact(KEEP_REVISIONS).await?;
        self.open_network(&machines).await?;
        self.load_ways().await?;
        self.remove_orphans(&unfinished).await?;
        let slots: BTreeSet<u16> = machines.iter().map(|(_, record)| record.slot).collect();
        let tag = shared.instance.tag.clone();
        blocking("look for cgroups", move || {
            inventory::remove_stray_cgroups(&tag, |slot| slots.contains(&slot));
            Ok(())
        })
        .await?;
        for running in unfinished {
            self.go_on_with_image(running);
        }
        self.spawn(self.clone().remove_outside_orphans());
        for (machine, record) in machines {
            // A runtime that this build does not have: the record stays, visible, and nothing is done to it.
            if let Err(error) = shared.drive(machine.clone(), &record, false) {
                warn!(machine = %record.id, error = %error.chain(), "cannot be driven");
                let observed = Observed::Unknown {
                    reason: error.chain(),
                };
                let note = |record: &mut MachineRecord| {
                    record.observed = observed;
                    Ok(())
                };
                machine.cell.update(note).await?;
            }
        }
        let engine = self.clone();
        self.spawn(async move {
            let reason = engine.failed().await;
            error!(reason = %reason.chain(), "nothing can be recorded any more: the engine does nothing more");
            engine.shared.stop.cancel();
        });
        self.spawn(shared.kernel.clone().warm());
        self.spawn(self.clone().empty_trash());
        self.spawn(self.clone().load_templates());
        self.spawn(self.clone().keep_house());
        self.spawn(self.clone().keep_pool());
        info!(
            tag = shared.instance.tag,
            machines = shared.fleet().machines.len(),
            "engine is up"
        );
        Ok(())
    }

    /// Runs `task` until it ends or the engine does.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.shared.stop.clone();
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Erases what was put aside, again and again while somebody still writes to it.
    async fn empty_trash(self) {
        let trash = trash_dir(&self.shared.config.data_dir);
        let mut attempt = 0;
        loop {
            let dir = trash.clone();
            match blocking("empty the trash", move || erase_dir(&dir)).await {
                Ok(()) => return,
                Err(error) => {
                    attempt += 1;
                    warn!(error = %error.chain(), attempt, "the trash cannot be emptied yet");
                    tokio::time::sleep(retry_delay(attempt)).await;
                }
            }
        }
    }

    /// Drops what is too old to be asked for.
    async fn keep_house(self) {
        loop {
            tokio::time::sleep(deadline::HOUSEKEEPING).await;
            let swept = self.sweep_idempotency().await;
            let compacted = self.shared.store.compact(KEEP_REVISIONS).await;
            if let Err(error) = swept.and(compacted.map_err(Error::from)) {
                warn!(error = %error.chain(), "housekeeping goes wrong");
            }
        }
    }

    async fn load_slots(&self) -> Result<(), Error> {
        for row in rows::all::<SlotRow>(self.shared.store.as_ref(), "slot/").await? {
            if let Some(slot) = row
                .key
                .as_str()
                .strip_prefix("slot/")
                .and_then(|text| text.parse().ok())
            {
                self.shared.fleet().slots.insert(slot, row.value);
            }
        }
        Ok(())
    }

    async fn load_machines(&self) -> Result<Vec<(Arc<Machine>, MachineRecord)>, Error> {
        let mut found = Vec::new();
        for row in rows::all::<MachineRecord>(self.shared.store.as_ref(), "machine/").await? {
            let record = row.value;
            rows::known_format(&row.key, record.format)?;
            let current = Current::new(record.clone(), row.version);
            let machine = Arc::new(Machine::new(self.shared.store.clone(), current));
            let mut fleet = self.shared.fleet();
            fleet.machine_names.insert(
                (record.owner.clone(), record.name.clone()),
                record.id.clone(),
            );
            fleet.machines.insert(record.id.clone(), machine.clone());
            found.push((machine, record));
        }
        Ok(found)
    }

    /// Before any machine is looked at: what is there of their networks stays as it is, or is put right.
    async fn open_network(&self, machines: &[(Arc<Machine>, MachineRecord)]) -> Result<(), Error> {
        let shared = &self.shared;
        let able = |record: &MachineRecord| {
            let runtime = shared.runtimes.get(&record.runtime);
            runtime.is_some_and(|runtime| runtime.capabilities().network)
        };
        let records = machines.iter().map(|(_, record)| record);
        let records = records.filter(|record| able(record)).cloned().collect();
        let (config, store) = (&shared.config, shared.store.as_ref());
        let network = Network::open(
            &config.network,
            store,
            &shared.instance,
            &config.data_dir,
            records,
        );
        let network = network.await?;
        network.start(shared);
        drop(shared.network.set(network));
        Ok(())
    }

    /// Erases directories whose records are gone: what an interrupted delete or import left. What has not the name of
    /// one of ours is not ours.
    async fn remove_orphans(&self, unfinished: &[Arc<Running>]) -> Result<(), Error> {
        let shared = &self.shared;
        let machines = machines_dir(&shared.config.data_dir);
        for id in ids_in::<MachineId>(&machines)? {
            let known = shared.fleet().machines.contains_key(&id);
            if !known && self.is_lifeless(&shared.machine_dir(&id)).await {
                erase_orphan(&shared.machine_dir(&id))?;
            }
        }
        for id in ids_in::<ImageId>(&images_dir(&shared.config.data_dir))? {
            if !shared.fleet().images.contains_key(&id) {
                erase_orphan(&shared.image_dir(&id))?;
            }
        }
        for id in ids_in::<SnapshotId>(&snapshots_dir(&shared.config.data_dir))? {
            if !shared.fleet().snapshots.contains_key(&id) {
                erase_orphan(&shared.snapshot_dir(&id))?;
            }
        }
        for id in ids_in::<ImageId>(&uploads_dir(&shared.config.data_dir))? {
            if !unfinished
                .iter()
                .any(|running| running.record.target == id.as_str())
            {
                let upload = shared.upload(&id);
                warn!(path = %upload.display(), "erasing what an interrupted change left");
                fs::remove_file(&upload).map_err(|source| io_error("erase", &upload, source))?;
            }
        }
        Ok(())
    }

    /// Whether nothing runs in a machine's directory. A record is dropped only after its process was ended, so
    /// nothing should; in doubt the directory is left alone.
    async fn is_lifeless(&self, path: &Path) -> bool {
        let dir = MachineDir::new(path);
        for runtime in self.shared.runtimes.iter() {
            match runtime.adopt(&dir).await {
                Ok(Adopted::Absent | Adopted::Exited(_)) => {}
                Ok(Adopted::Running(_) | Adopted::Unknown { .. }) | Err(_) => return false,
            }
        }
        true
    }
}

fn erase_orphan(path: &Path) -> Result<(), Error> {
    warn!(path = %path.display(), "erasing what an interrupted change left");
    erase_dir(path)
}

/// The ids that are names of something in `dir`.
fn ids_in<Id: std::str::FromStr>(dir: &Path) -> Result<Vec<Id>, Error> {
    let list = |source| io_error("list", dir, source);
    let mut ids = Vec::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        ids.extend(name.to_str().and_then(|name| name.parse::<Id>().ok()));
    }
    Ok(ids)
}

/// What is to be erased, where nothing else looks: whoever still writes to it when its server was killed goes on there.
pub(crate) fn trash_dir(data_dir: &Path) -> PathBuf {
    place(data_dir).join("trash")
}

/// Takes a directory out of the way at once. [`Engine::empty_trash`] erases it.
fn discard(data_dir: &Path, path: &Path) -> Result<(), Error> {
    let trash = trash_dir(data_dir);
    public_dir(&trash)?;
    let target = trash.join(ImageId::new().as_str());
    match fs::rename(path, &target) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("put aside", path, error))
        }
        _ => Ok(()),
    }
}

/// Makes a directory that others may pass through (VMMs and image builders are users of their own) and not list.
fn public_dir(path: &Path) -> Result<(), Error> {
    let create = |source| io_error("create", path, source);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(create)?;
    }
    match fs::DirBuilder::new().mode(0o711).create(path) {
        Err(error) if !path.is_dir() => Err(create(error)),
        _ => Ok(()),
    }
}

/// Opens a file that nobody else may read; makes it when it is not there. SQLite gives its side files the same mode.
fn private_file(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options
        .open(path)
        .map_err(|source| io_error("open", path, source))
}

/// Takes the lock of the data directory. A server that has just ended may still seem to hold it: a program that it was
/// starting has a copy until it is itself.
async fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join("lock");
    let file = private_file(&path)?;
    let mut tries = LOCK_TRIES;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if tries == 0 => {
                return Err(Error::DataDirBusy {
                    path: data_dir.to_owned(),
                });
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                tries -= 1;
                tokio::time::sleep(deadline::LOCK_AGAIN).await;
            }
            Err(errno) => return Err(io_error("lock", &path, errno.into())),
        }
    }
}

/// The directory's own row, made at first start.
async fn instance(store: &dyn Store) -> Result<Instance, Error> {
    let key = rows::instance();
    if let Some(row) = store.get_json::<Instance>(&key).await? {
        rows::known_format(&key, row.value.format)?;
        return Ok(row.value);
    }
    let tag = keys::random_bytes::<4>()
        .iter()
        .map(|byte| char::from(TAG_ALPHABET[usize::from(byte % 32)]))
        .collect();
    let made = Instance {
        format: FORMAT,
        tag,
        owner: OwnerId::new(),
    };
    store
        .commit(
            vec![Check::Absent(key.clone())],
            vec![Write::json(key, &made)?],
        )
        .await?;
    Ok(made)
}

#[cfg(all(test, feature = "stub"))]
mod tests;
