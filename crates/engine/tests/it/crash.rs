//! Engines that end at any moment and come back: machines are adopted or finished, nothing leaks, nothing foreign is
//! touched.

use std::cell::OnceCell;
use std::path::Path;
use std::time::{Duration, Instant};

use hutch_contract::id::{ImageId, MachineId, OperationId};
use hutch_contract::image::{ImageSource, ImportFormat};
use hutch_contract::lifetime::Restart;
use hutch_contract::machine::{Exit, Status};
use hutch_contract::operation::OperationState;
use hutch_contract::record::{FORMAT, ImageInput, ImageRecord, ImageWork, OperationRecord};
use hutch_engine::{Engine, Error};
use hutch_store::{Key, SqliteStore, Store, Write};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use crate::lab::{Home, LONG, Lab, body, tiny};
use crate::life::{comes_back, starts};
use crate::snapshots::{read, write};

/// Processes of a machine that runs: shim, VMM and agent.
const PROCESSES: usize = 3;

/// Opens the engine of a place as soon as what is left of the one before has let go.
pub async fn reopen(home: &Home) -> Engine {
    let began = Instant::now();
    loop {
        match Engine::open(home.config()).await {
            Err(Error::DataDirBusy { .. }) if began.elapsed() < LONG => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            opened => return opened.unwrap(),
        }
    }
}

/// A server that dies: nothing is closed, every task is gone at the await it stood at.
pub fn dies(server: Runtime, lab: Lab) -> Home {
    let Lab { engine, home, .. } = lab;
    server.shutdown_background();
    drop(engine);
    home
}

/// A server that dies a moment after `work` has begun, and the one after it.
pub fn after_a_crash<W, T>(work: W, then: T)
where
    W: AsyncFnOnce(&Lab),
    T: AsyncFnOnce(&Lab),
{
    let server = Runtime::new().unwrap();
    let Some(lab) = server.block_on(Lab::new()) else {
        return;
    };
    server.block_on(work(&lab));
    let home = dies(server, lab);
    let server = Runtime::new().unwrap();
    server.block_on(async {
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        then(&lab).await;
        lab.engine.close().await;
    });
}

#[test]
fn machines_outlive_their_server() {
    let mut vmm = None;
    after_a_crash(
        async |lab| vmm = Some(lab.pid(&lab.running("a").await, "vmm")),
        async |lab| {
            assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
            let after = lab.now("a");
            assert_eq!((after.starts, after.status), (1, Status::Running));
            lab.delete("a").await;
            assert_eq!(lab.home.left(), []);
        },
    );
    assert!(vmm.is_some());
}

#[test]
fn what_ends_while_no_server_is_there_is_known_to_the_next() {
    let (mut a, mut b) = (None, None);
    let server = Runtime::new().unwrap();
    let Some(lab) = server.block_on(Lab::new()) else {
        return;
    };
    server.block_on(async {
        a = Some(lab.pid(&lab.running("a").await, "vmm"));
        b = Some(lab.pid(&lab.running("b").await, "shim"));
    });
    let home = dies(server, lab);
    kill_process(a.unwrap(), Signal::ABORT).unwrap();
    kill_process(b.unwrap(), Signal::KILL).unwrap();
    Runtime::new().unwrap().block_on(async {
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        let a = lab.wait("a", Status::Stopped).await.unwrap();
        assert_eq!(a.exit, Some(Exit::Signal { signal: 6 }));
        let b = lab.wait("b", Status::Stopped).await.unwrap();
        assert_eq!(b.exit, Some(Exit::Lost));
        lab.start("a").await;
        lab.wait("a", Status::Running).await.unwrap();
        lab.engine.close().await;
    });
}

#[test]
fn what_ended_while_no_server_was_there_comes_back_with_the_next_where_its_policy_says_so() {
    let mut shim = None;
    let server = Runtime::new().unwrap();
    let Some(lab) = server.block_on(Lab::new()) else {
        return;
    };
    server.block_on(async {
        let machine = lab.running("a").await;
        shim = Some(lab.pid(&machine, "shim"));
        comes_back(&lab, "a", Restart::Always).await;
    });
    let home = dies(server, lab);
    kill_process(shim.unwrap(), Signal::KILL).unwrap();
    Runtime::new().unwrap().block_on(async {
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        assert_eq!(starts(&lab, "a", 2).await.exit, None);
        lab.engine.close().await;
    });
}

#[test]
fn after_a_reboot_of_the_host_disks_and_snapshots_are_there_and_memory_is_not() {
    let server = Runtime::new().unwrap();
    let Some(lab) = server.block_on(Lab::new()) else {
        return;
    };
    server.block_on(async {
        for name in ["stays", "paused", "back"] {
            let machine = lab.running(name).await;
            write(&lab.disk(&machine), "mine");
        }
        comes_back(&lab, "back", Restart::OnFailure).await;
        lab.snapshot("stays").await;
        lab.engine.pause(&lab.who, "paused").await.unwrap();
        lab.wait("paused", Status::Paused).await.unwrap();
    });
    let records =
        ["stays", "paused", "back"].map(|name| lab.dir(&lab.now(name)).join("run/shim.json"));
    let home = dies(server, lab);
    records.iter().for_each(|record| the_host_reboots(record));
    Runtime::new().unwrap().block_on(async {
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        for name in ["stays", "paused"] {
            let lost = lab.wait(name, Status::Stopped).await.unwrap();
            assert_eq!(lost.exit, Some(Exit::Lost));
            lab.start(name).await;
            lab.wait(name, Status::Running).await.unwrap();
        }
        assert_eq!(starts(&lab, "back", 2).await.exit, None);
        for name in ["stays", "paused", "back"] {
            assert_eq!(read(&lab.disk(&lab.now(name)), 4), "mine");
        }
        lab.restore("stays", "s1").await.unwrap();
        lab.engine.close().await;
    });
}

/// Ends a machine as a power cut of the host does: nobody writes anything down, and what is written is of another boot.
fn the_host_reboots(record: &Path) {
    let mut written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    for process in ["shim", "vmm"] {
        let pid = written[process]["pid"].as_i64().unwrap();
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        // The VMM dies with its shim.
        let _ = kill_process(pid, Signal::KILL);
    }
    written["boot_id"] = "5f7b5b0e-0000-4000-8000-000000000000".into();
    std::fs::write(record, written.to_string()).unwrap();
}

#[test]
fn a_crash_at_any_moment_loses_no_wish_and_leaves_nothing() {
    for ms in [0, 1, 3, 6, 10, 20, 35, 60, 100, 200] {
        after_a_crash(
            async |lab| {
                for name in ["stop", "delete", "restart", "pause"] {
                    lab.running(name).await;
                }
                lab.create("create").await.unwrap();
                lab.stop("stop").await;
                lab.restart("restart").await;
                lab.engine.pause(&lab.who, "pause").await.unwrap();
                lab.engine.delete(&lab.who, "delete").await.unwrap();
                tokio::time::sleep(Duration::from_millis(ms)).await;
            },
            async |lab| {
                for name in ["create", "restart"] {
                    lab.wait(name, Status::Running).await.unwrap();
                    assert_eq!(lab.sh(name, "echo up").await.unwrap().stdout, "up\n");
                }
                lab.wait("pause", Status::Paused).await.unwrap();
                assert_eq!(lab.sh("pause", "echo up").await.unwrap().stdout, "up\n");
                lab.wait("stop", Status::Stopped).await.unwrap();
                while lab.engine.machine(&lab.who, "delete").is_ok() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                assert_eq!(lab.home.settle(3 * PROCESSES), 3 * PROCESSES);
                for name in ["create", "restart", "stop", "pause"] {
                    lab.delete(name).await;
                }
                assert_eq!(lab.home.left(), []);
            },
        );
    }
}

/// Begins an import, after which the server dies.
async fn begin_import(lab: &Lab) -> OperationId {
    let (name, format) = ("b".parse().unwrap(), ImportFormat::Tar);
    let accepted = lab
        .engine
        .import_image(&lab.who, name, format, body(tiny()));
    accepted.await.unwrap().operation
}

#[test]
fn an_import_goes_on_after_a_crash() {
    let begun = OnceCell::new();
    after_a_crash(
        async |lab| begun.set(begin_import(lab).await).unwrap(),
        async |lab| {
            assert_eq!(
                lab.ended(begun.get().unwrap()).await,
                OperationState::Succeeded
            );
            lab.engine.delete_image(&lab.who, "b").await.unwrap();
            // The image of the lab itself.
            let left = hutch_engine::inventory(&lab.home.data()).unwrap();
            let left: Vec<_> = left
                .iter()
                .filter(|item| item.kind != "discarded directory")
                .collect();
            assert_eq!(left.len(), 1, "{left:?}");
        },
    );
}

#[test]
fn an_import_is_given_up_when_it_saw_too_many_servers_die_or_lost_its_upload() {
    let server = Runtime::new().unwrap();
    let Some(lab) = server.block_on(Lab::new()) else {
        return;
    };
    let owner = lab.who.owner.clone();
    let home = dies(server, lab);
    let server = Runtime::new().unwrap();
    server.block_on(async {
        let unfinished = |name: &str, tries| {
            let image = ImageRecord {
                format: FORMAT,
                id: ImageId::new(),
                owner: owner.clone(),
                name: name.parse().unwrap(),
                source: ImageSource::Tar,
                sha256: String::new(),
                size_bytes: 0,
                used_bytes: 0,
                created_at_ms: 0,
            };
            OperationRecord {
                format: FORMAT,
                id: OperationId::new(),
                owner: owner.clone(),
                kind: "image-import".into(),
                target: image.id.to_string(),
                state: OperationState::Running { progress: None },
                created_at_ms: 0,
                work: Some(ImageWork {
                    image,
                    input: ImageInput::Upload {
                        format: ImportFormat::Tar,
                        bytes: 6,
                    },
                    tries,
                }),
            }
        };
        let operations = [unfinished("tired", 3), unfinished("empty", 1)];
        reopen(&home).await.close().await;
        let key = |name: String| Key::new(name).unwrap();
        let store = SqliteStore::open(home.data().join("hutch.db")).unwrap();
        for operation in &operations {
            let name = &operation.work.as_ref().unwrap().image.name;
            let writes = vec![
                Write::json(key(format!("operation/{}", operation.id)), operation).unwrap(),
                Write::json(key(format!("name/{owner}/image/{name}")), &operation.target).unwrap(),
            ];
            store.commit(Vec::new(), writes).await.unwrap();
        }
        drop(store);
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        for (operation, why) in operations.iter().zip(["server", "uploads"]) {
            match lab.ended(&operation.id).await {
                OperationState::Failed { message, .. } => {
                    assert!(message.contains(why), "{message}")
                }
                other => panic!("{other:?}"),
            }
            let name = &operation.work.as_ref().unwrap().image.name;
            assert_eq!(
                lab.import(name.as_str(), tiny()).await,
                OperationState::Succeeded
            );
        }
        lab.engine.close().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn orphans_are_erased_and_what_is_foreign_stays() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.engine.close().await;
    let Lab { engine, home, .. } = lab;
    drop(engine);
    let (machines, images) = (home.data().join("machines"), home.data().join("images"));
    let orphans = [
        machines.join(MachineId::new().as_str()),
        images.join(ImageId::new().as_str()),
    ];
    let foreign = [machines.join("lost+found"), images.join("notes")];
    for dir in orphans.iter().chain(&foreign) {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("file"), "").unwrap();
    }
    std::fs::write(machines.join("README"), "").unwrap();
    let engine = reopen(&home).await;
    let lab = Lab::of(home, engine);
    assert!(orphans.iter().all(|dir| !dir.exists()));
    assert!(foreign.iter().all(|dir| dir.join("file").exists()));
    assert!(machines.join("README").exists());
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn cgroups_of_no_machine_are_removed_and_others_stay() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.engine.close().await;
    let Lab { engine, home, .. } = lab;
    drop(engine);
    let tag = std::fs::read_to_string(home.data().join("tag")).unwrap();
    let its_own = hutch_runtime::cgroup::labels(&tag);
    let Some(label) = its_own.first() else {
        println!("skipped: {:?}", hutch_runtime::cgroup::support());
        return;
    };
    let roots = std::fs::read_dir("/sys/fs/cgroup").unwrap();
    let roots = roots.map(|entry| entry.unwrap().path());
    let parents = roots.chain(["/sys/fs/cgroup".into()]);
    let parent = parents.map(|root| root.join("hutch"));
    let parent = parent.filter(|parent| parent.join(label).is_dir()).last();
    let parent = parent.unwrap();
    // Of a machine that is gone, and of a server that is not this one.
    let stray = parent.join(format!("h{tag}-60000"));
    let foreign = parent.join(format!("h{tag}x-60000"));
    for dir in [&stray, &foreign] {
        std::fs::create_dir(dir).unwrap();
    }
    assert_eq!(count(&home, "cgroup"), 2);
    let engine = reopen(&home).await;
    let lab = Lab::of(home, engine);
    assert!(!stray.exists());
    assert!(foreign.exists());
    std::fs::remove_dir(&foreign).unwrap();
    assert_eq!(count(&lab.home, "cgroup"), 1, "that of the machine");
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

fn count(home: &Home, kind: &str) -> usize {
    let items = hutch_engine::inventory(&home.data()).unwrap();
    items.iter().filter(|item| item.kind == kind).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_has_one_engine() {
    let Some(lab) = Lab::new().await else { return };
    let second = Engine::open(lab.home.config()).await;
    assert!(matches!(second.err(), Some(Error::DataDirBusy { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_waits_for_what_was_begun() {
    for ms in [0, 2, 5, 10, 20, 40] {
        let Some(lab) = Lab::new().await else { return };
        lab.create("a").await.unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        lab.engine.close().await;
        let Lab { engine, home, .. } = lab;
        drop(engine);
        // No waiting: with the end of the first the directory is free.
        let engine = Engine::open(home.config()).await.unwrap();
        let lab = Lab::of(home, engine);
        lab.wait("a", Status::Running).await.unwrap();
        lab.delete("a").await;
        assert_eq!(lab.home.left(), []);
    }
}
