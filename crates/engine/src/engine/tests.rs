//! Engines over a store that fails, at every commit in turn and for good.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::error::Kind;
use hutch_contract::image::ImageSource;
use hutch_contract::machine::{CreateMachine, Status};
use hutch_store::{Change, Entry, Key, MemoryStore, Revision};

use super::*;
use crate::{Target, admission, inventory};

const LONG: Duration = Duration::from_secs(60);

/// A store whose commits can be made to fail.
struct Sick {
    store: MemoryStore,
    state: Mutex<State>,
}

struct State {
    /// Commits until one finds no room.
    full_in: Option<u32>,
    /// `None`: it has failed for good.
    news: Option<watch::Sender<Revision>>,
}

impl Sick {
    fn new() -> Arc<Sick> {
        let state = State {
            full_in: None,
            news: Some(watch::Sender::default()),
        };
        Arc::new(Sick {
            store: MemoryStore::new(),
            state: Mutex::new(state),
        })
    }

    fn full_in(&self, commits: u32) {
        self.state.lock().unwrap().full_in = Some(commits);
    }

    fn fail(&self) {
        self.state.lock().unwrap().news = None;
    }
}

#[async_trait]
impl Store for Sick {
    async fn commit(
        &self,
        checks: Vec<Check>,
        writes: Vec<Write>,
    ) -> Result<Revision, hutch_store::Error> {
        {
            let mut state = self.state.lock().unwrap();
            if state.news.is_none() {
                return Err(hutch_store::Error::Stopped { cause: None });
            }
            state.full_in = match state.full_in {
                Some(0) => {
                    state.full_in = None;
                    return Err(hutch_store::Error::TooLarge {
                        unit: "bytes",
                        size: 2,
                        limit: 1,
                    });
                }
                left => left.map(|left| left - 1),
            };
        }
        self.store.commit(checks, writes).await
    }

    async fn get(&self, key: &Key) -> Result<Option<Entry>, hutch_store::Error> {
        self.store.get(key).await
    }

    async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, hutch_store::Error> {
        self.store.get_many(keys).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<Entry>, hutch_store::Error> {
        self.store.list(prefix, after, limit).await
    }

    async fn changes(
        &self,
        after: Revision,
        prefix: &str,
        limit: usize,
    ) -> Result<Vec<Change>, hutch_store::Error> {
        self.store.changes(after, prefix, limit).await
    }

    async fn compact(&self, keep_revisions: u64) -> Result<Revision, hutch_store::Error> {
        self.store.compact(keep_revisions).await
    }

    async fn revision(&self) -> Result<Revision, hutch_store::Error> {
        self.store.revision().await
    }

    fn subscribe(&self) -> watch::Receiver<Revision> {
        match &self.state.lock().unwrap().news {
            Some(news) => news.subscribe(),
            None => watch::channel(Revision(0)).1,
        }
    }
}

/// An engine whose machines are prepared and then fail to start, with an image `tiny`.
async fn engine(dir: &Path, store: Arc<Sick>) -> Engine {
    let mut config = crate::config::tests::config(dir);
    config.launcher = "/bin/false".into();
    config.runtime = Some("stub".into());
    config
        .runtime_programs
        .insert("stub".into(), "/bin/true".into());
    config.kernel = Some("/nowhere/kernel.deb".into());
    (config.disk_reserve_mib, config.memory_floor_mib) = (0, 0);
    for dir in [
        machines_dir(&config.data_dir),
        images_dir(&config.data_dir),
        snapshots_dir(&config.data_dir),
        uploads_dir(&config.data_dir),
        spool_dir(&config.data_dir),
    ] {
        fs::create_dir_all(dir).unwrap();
    }
    let lock = lock(&config.data_dir).await.unwrap();
    let engine = Engine::over(config, lock, None, store).await.unwrap();
    let image = ImageRecord {
        format: FORMAT,
        id: ImageId::new(),
        owner: engine.local_admin().owner,
        name: "tiny".parse().unwrap(),
        source: ImageSource::Ext4,
        sha256: String::new(),
        size_bytes: 5,
        used_bytes: 5,
        created_at_ms: 0,
    };
    let disk = engine.shared.image_disk(&image.id);
    fs::create_dir(disk.parent().unwrap()).unwrap();
    fs::write(&disk, "a disk").unwrap();
    fs::set_permissions(disk, fs::Permissions::from_mode(0o400)).unwrap();
    let mut fleet = engine.shared.fleet();
    let name = (image.owner.clone(), image.name.clone());
    fleet.image_names.insert(name, image.id.clone());
    fleet.images.insert(image.id.clone(), image);
    drop(fleet);
    engine
}

fn spec() -> CreateMachine {
    let ports = serde_json::json!([{ "guest_port": 80 }]);
    let spec = serde_json::json!({ "image": "tiny", "name": "a", "disk_gib": 1, "ports": ports });
    serde_json::from_value(spec).unwrap()
}

#[tokio::test]
async fn a_commit_that_fails_loses_no_wish_and_leaks_nothing() {
    for nth in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let store = Sick::new();
        let engine = engine(dir.path(), store.clone()).await;
        let who = engine.local_admin();
        let taken = |engine: &Engine| {
            let fleet = engine.shared.fleet();
            let rows = fleet.slots.values();
            let taken = rows.filter(|row| matches!(row, SlotRow::Taken { .. }));
            (taken.count(), fleet.admitting_mib)
        };
        let ways = |engine: &Engine| {
            let label = engine.shared.doors.host("a");
            (engine.published().len(), usize::from(label.is_some()))
        };
        store.full_in(nth);
        if engine.create(&who, spec(), None).await.is_err() {
            assert_eq!((nth, taken(&engine)), (0, (0, 0)));
            assert_eq!(ways(&engine), (0, 0));
            engine.create(&who, spec(), None).await.unwrap();
        }
        assert_eq!((taken(&engine), ways(&engine)), ((1, 0), (1, 1)));
        let failed = Target::Status(Status::Failed);
        engine.wait(&who, "a", failed, LONG).await.unwrap();
        while engine.delete(&who, "a").await.is_err() {}
        let gone = engine.wait(&who, "a", Target::Gone, LONG).await;
        // It may have gone before it was looked for.
        assert!(matches!(gone, Ok(None) | Err(Error::NotFound { .. })));
        while !engine.shared.fleet().machines.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!((taken(&engine), ways(&engine)), ((0, 0), (0, 0)));
        for prefix in ["machine/", "name/", "port/", "host/"] {
            assert!(store.list(prefix, None, 9).await.unwrap().is_empty());
        }
        let left = inventory(&engine.shared.config.data_dir).unwrap();
        assert_eq!(left.len(), 1, "the image: {left:?}");
        engine.close().await;
    }
}

#[tokio::test]
async fn two_starts_do_not_both_get_the_last_memory() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path(), Sick::new()).await;
    let who = engine.local_admin();
    let overcommit = u64::from(engine.shared.config.memory_overcommit);
    let promisable = admission::host_memory().0 * overcommit;
    for name in ["a", "b"] {
        let request = CreateMachine {
            name: Some(name.parse().unwrap()),
            memory_mib: Some(u32::try_from(promisable / 2 + 1).unwrap()),
            ..spec()
        };
        engine.create(&who, request, None).await.unwrap();
        let failed = Target::Status(Status::Failed);
        engine.wait(&who, name, failed, LONG).await.unwrap();
    }
    for verb in ["start", "restart"] {
        let second = async {
            match verb {
                "start" => engine.start(&who, "b").await,
                _ => engine.restart(&who, "b").await,
            }
        };
        let (first, second) = tokio::join!(engine.start(&who, "a"), second);
        first.unwrap();
        assert_eq!(second.unwrap_err().kind(), Kind::Exhausted, "{verb}");
        let failed = Target::Status(Status::Failed);
        engine.wait(&who, "a", failed, LONG).await.unwrap();
    }
    engine.close().await;
}

#[tokio::test]
async fn ways_to_a_machine_are_the_same_for_the_next_engine() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sick::new();
    let first = engine(dir.path(), store.clone()).await;
    let who = first.local_admin();
    let made = first.create(&who, spec(), None).await.unwrap().machine;
    let failed = Target::Status(Status::Failed);
    first.wait(&who, "a", failed, LONG).await.unwrap();
    first.revoke_tokens(&who, "a").await.unwrap();
    let (secret, published) = (first.gateway_secret(), first.published());
    let reached = first.reached("a").unwrap();
    assert_eq!((published.len(), &reached.id), (1, &made.id));
    first.close().await;
    drop(first);

    let next = engine(dir.path(), store.clone()).await;
    assert_eq!(next.gateway_secret(), secret);
    assert_eq!(next.published(), published);
    assert_eq!(next.reached("a"), Some(reached.clone()));
    assert!(next.take_listener(&published[0]).is_none(), "it binds anew");
    next.close().await;
    drop(next);

    // A record of a version that gave no labels gets one.
    let (machine, host) = (rows::machine(&made.id), rows::host("a"));
    let whole: &dyn Store = store.as_ref();
    let row = whole.get_json::<MachineRecord>(&machine).await.unwrap();
    let mut record = row.unwrap().value;
    record.exposure.host = None;
    let writes = vec![Write::json(machine, &record).unwrap(), Write::Delete(host)];
    store.commit(Vec::new(), writes).await.unwrap();
    let last = engine(dir.path(), store).await;
    assert_eq!(last.reached("a"), Some(reached));
    last.close().await;
}

#[tokio::test]
async fn two_owners_of_one_name_have_two_labels_and_numbers_before_a_dash_are_ports() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path(), Sick::new()).await;
    let who = engine.local_admin();
    let other = Principal {
        owner: OwnerId::new(),
        ..who.clone()
    };
    let image = engine
        .shared
        .fleet()
        .images
        .keys()
        .next()
        .unwrap()
        .to_string();
    let mut urls = Vec::new();
    for (who, name) in [(&who, "web"), (&other, "web"), (&who, "3000-web")] {
        let request = CreateMachine {
            image: image.clone(),
            name: Some(name.parse().unwrap()),
            ..spec()
        };
        let made = engine.create(who, request, None).await.unwrap().machine;
        urls.push((made.url.unwrap(), made.id.to_string()));
    }
    let url = |label: &str| format!("http://{label}.vms.localhost:8081");
    let mark = urls[1].1[urls[1].1.len() - 4..].to_owned();
    let urls: Vec<_> = urls.into_iter().map(|(url, _)| url).collect();
    let expected = [url("web"), url(&format!("web-{mark}")), url("m-3000-web")];
    assert_eq!(urls, expected);
    engine.close().await;
}

#[tokio::test]
async fn a_store_that_fails_for_good_ends_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sick::new();
    let engine = engine(dir.path(), store.clone()).await;
    let failed = engine.failed();
    tokio::pin!(failed);
    let soon = tokio::time::timeout(Duration::from_millis(20), &mut failed).await;
    assert!(soon.is_err(), "it is well");
    store.fail();
    let reason = tokio::time::timeout(LONG, failed).await.unwrap();
    assert!(reason.chain().contains("no more commits"), "{reason}");
    // Its tasks end too: what nobody can record is not done.
    let stopped = engine.shared.stop.cancelled();
    tokio::time::timeout(LONG, stopped).await.unwrap();
    let who = engine.local_admin();
    assert!(engine.create(&who, spec(), None).await.is_err());
}

#[tokio::test]
async fn what_ended_with_its_runtime_has_not_failed() {
    let ending = tokio::runtime::Builder::new_current_thread();
    let ending = { ending }.build().unwrap();
    let task = ending.spawn(std::future::pending::<()>());
    ending.shutdown_background();
    let joined = crate::drive::joined("a test", task);
    let soon = tokio::time::timeout(Duration::from_millis(50), joined).await;
    assert!(soon.is_err(), "nothing is known of it: {soon:?}");
}
