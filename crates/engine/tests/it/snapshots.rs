//! Snapshots, restores and forks: what is on the disks, what is refused, and what a crash leaves. The stub's guests do not
//! look at their disks, so the tests write to them from outside.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hutch_contract::machine::{Machine, Status};
use hutch_contract::snapshot::{
    CreateSnapshot, ForkMachine, MAX_SNAPSHOTS, RestoreMachine, Snapshot, SnapshotState,
};
use hutch_engine::{Error, ListSnapshots, inventory};

use crate::crash::after_a_crash;
use crate::lab::{LONG, Lab};

/// Where the tests write: far from everything of the file system's.
const AT: u64 = 700 << 20;

impl Lab {
    async fn begin(&self, name: &str, memory: bool) -> Result<Snapshot, Error> {
        let request = CreateSnapshot { name: None, memory };
        self.engine.take_snapshot(&self.who, name, request).await
    }

    pub async fn snapshot(&self, name: &str) -> Snapshot {
        let begun = self.begin(name, false).await.unwrap();
        self.ready(&begun).await
    }

    async fn ready(&self, begun: &Snapshot) -> Snapshot {
        let operation = begun.operation.as_ref().unwrap();
        let finished = self.engine.finish(&self.who, operation, LONG).await;
        finished.unwrap();
        let ready = self.engine.snapshot(&self.who, begun.id.as_str()).unwrap();
        assert_eq!(ready.state, SnapshotState::Ready);
        ready
    }

    async fn begin_restore(&self, name: &str, snapshot: &str) -> Result<Machine, Error> {
        let request = RestoreMachine {
            snapshot: snapshot.to_owned(),
            disk_only: false,
        };
        self.engine.restore(&self.who, name, request).await
    }

    pub async fn restore(&self, name: &str, snapshot: &str) -> Result<Machine, Error> {
        let begun = self.begin_restore(name, snapshot).await?;
        self.engine.restored(&self.who, &begun, LONG).await
    }

    pub async fn fork(&self, name: &str, request: ForkMachine) -> Vec<Machine> {
        let forked = self
            .engine
            .fork(&self.who, name, request, None)
            .await
            .unwrap();
        let copies = forked.copies.into_iter();
        copies.map(|copy| copy.unwrap()).collect()
    }

    pub fn disk(&self, machine: &Machine) -> PathBuf {
        self.dir(machine).join("disk.raw")
    }

    fn snapshot_dir(&self, snapshot: &Snapshot) -> PathBuf {
        self.home
            .data()
            .join("snapshots")
            .join(snapshot.id.as_str())
    }

    pub fn all(&self, machine: Option<&str>) -> Vec<Snapshot> {
        let list = ListSnapshots {
            machine: machine.map(str::to_owned),
            cursor: None,
            limit: 1000,
        };
        self.engine.snapshots(&self.who, &list).unwrap().items
    }

    /// What there is of snapshots on the host.
    fn kept(&self) -> Vec<String> {
        let items = inventory(&self.home.data()).unwrap().into_iter();
        let kinds = ["snapshot directory", "spooled file"];
        let kept = items.filter(|item| kinds.contains(&item.kind));
        kept.map(|item| item.name).collect()
    }

    async fn no_snapshot_is_kept(&self) {
        for _ in 0..200 {
            if self.kept().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{:?}", self.kept());
    }
}

pub fn write(disk: &Path, text: &str) {
    let file = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(text.as_bytes(), AT).unwrap();
}

pub fn read(disk: &Path, length: usize) -> String {
    let mut text = vec![0; length];
    let file = std::fs::File::open(disk).unwrap();
    file.read_exact_at(&mut text, AT).unwrap();
    String::from_utf8(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_back_to_what_it_was() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    write(&lab.disk(&machine), "first");
    let first = lab.snapshot("a").await;
    assert_eq!(
        (first.name.as_str(), first.sequence, &first.parent),
        ("s1", 1, &None)
    );
    assert!(first.pause_us.is_some(), "it stood still");
    assert_eq!(lab.now("a").starts, 1, "and went on");
    assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");

    write(&lab.disk(&machine), "other");
    let second = lab.snapshot("a").await;
    assert_eq!(second.parent.as_ref(), Some(&first.id));
    let restored = lab.restore("a", "s1").await.unwrap();
    assert_eq!((restored.status, restored.starts), (Status::Running, 2));
    assert_eq!(read(&lab.disk(&machine), 5), "first");
    assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");
    // The next comes after the one that it went back to.
    let third = lab.snapshot("a").await;
    assert_eq!(third.parent.as_ref(), Some(&first.id));
    assert_eq!(third.sequence, 3);

    // One that is stopped stays so.
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(
        lab.restore("a", second.id.as_str()).await.unwrap().status,
        Status::Stopped
    );
    assert_eq!(read(&lab.disk(&machine), 5), "other");
    let stopped = lab.snapshot("a").await;
    assert_eq!(stopped.pause_us, None);

    let dir = lab.snapshot_dir(&first);
    for entry in std::fs::read_dir(&dir).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400);
    }
    assert_eq!(lab.all(Some("a")).len(), 4);
    lab.delete("a").await;
    assert_eq!(lab.all(None).len(), 0);
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_machine_is_paused_again() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.engine.pause(&lab.who, "a").await.unwrap();
    lab.wait("a", Status::Paused).await.unwrap();
    lab.snapshot("a").await;
    lab.wait("a", Status::Paused).await.unwrap();
    assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_changed_byte_is_found_before_anything_is_replaced() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    write(&lab.disk(&machine), "first");
    let snapshot = lab.snapshot("a").await;
    write(&lab.disk(&machine), "other");
    let vmm = lab.pid(&machine, "vmm");
    let dir = lab.snapshot_dir(&snapshot);
    let size = std::fs::metadata(dir.join("disk.raw")).unwrap().len();
    let manifest = std::fs::metadata(dir.join("manifest.json")).unwrap().len();
    for (name, at) in [
        ("disk.raw", AT),
        ("disk.raw", 0),
        ("disk.raw", size - 1),
        ("disk.raw", 1 << 20),
        ("manifest.json", 3),
        ("manifest.json", manifest - 1),
    ] {
        let path = dir.join(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let refused = lab.restore("a", "s1").await.unwrap_err();
        assert_eq!(
            refused.code(),
            "snapshot_broken",
            "{name} at {at}: {refused}"
        );
        file.write_all_at(&byte, at).unwrap();
    }
    std::fs::rename(dir.join("disk.raw"), dir.join("elsewhere")).unwrap();
    let refused = lab.restore("a", "s1").await.unwrap_err();
    assert_eq!(refused.code(), "snapshot_broken");
    let fork = ForkMachine {
        snapshot: Some("s1".into()),
        ..ForkMachine::default()
    };
    let refused = lab
        .engine
        .fork(&lab.who, "a", fork, None)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), "snapshot_broken");
    std::fs::rename(dir.join("elsewhere"), dir.join("disk.raw")).unwrap();
    assert_eq!(lab.pid(&machine, "vmm"), vmm, "the machine did not notice");
    assert_eq!(read(&lab.disk(&machine), 5), "other");
    lab.restore("a", "s1").await.unwrap();
    assert_eq!(read(&lab.disk(&machine), 5), "first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_boot_any_more_is_brought_back() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    lab.snapshot("a").await;
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    std::fs::write(
        lab.dir(&machine).join("stub.json"),
        r#"{"start": {"exit_code": 3}}"#,
    )
    .unwrap();
    lab.start("a").await;
    assert!(lab.wait("a", Status::Running).await.is_err());
    std::fs::remove_file(lab.dir(&machine).join("stub.json")).unwrap();
    assert_eq!(
        lab.restore("a", "s1").await.unwrap().status,
        Status::Running
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_have_their_own_disks_and_outlive_what_they_come_from() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    write(&lab.disk(&machine), "first");
    let prefixed = ForkMachine {
        count: Some(3),
        name_prefix: Some("copy".parse().unwrap()),
        ..ForkMachine::default()
    };
    let copies = lab.fork("a", prefixed).await;
    write(&lab.disk(&machine), "other");
    for (copy, name) in copies.iter().zip(["copy-1", "copy-2", "copy-3"]) {
        assert_eq!(copy.name.as_str(), name);
        lab.wait(name, Status::Running).await.unwrap();
        assert_eq!(read(&lab.disk(copy), 5), "first");
        assert_eq!(lab.sh(name, "echo on").await.unwrap().stdout, "on\n");
    }
    // What they were made from is gone, was never shown, and is nobody's parent.
    assert_eq!(lab.all(None), []);
    assert_eq!(lab.snapshot("a").await.parent, None);
    lab.engine.delete_snapshot(&lab.who, "a:s2").await.unwrap();
    lab.no_snapshot_is_kept().await;
    lab.delete("a").await;
    write(&lab.disk(&copies[0]), "mine!");
    assert_eq!(read(&lab.disk(&copies[1]), 5), "first");

    // Of a snapshot, with names; one of which somebody has.
    lab.snapshot("copy-1").await;
    write(&lab.disk(&copies[0]), "later");
    let named = ForkMachine {
        snapshot: Some("s1".into()),
        names: vec!["copy-2".parse().unwrap(), "new".parse().unwrap()],
        ..ForkMachine::default()
    };
    let forked = lab
        .engine
        .fork(&lab.who, "copy-1", named, None)
        .await
        .unwrap();
    let [taken, new] = &forked.copies[..] else {
        panic!("{forked:?}")
    };
    assert_eq!(taken.as_ref().unwrap_err().code(), "name_taken");
    let new = new.as_ref().unwrap();
    // Deleted at once: the snapshot stays as long as the copy needs it.
    lab.delete("copy-1").await;
    lab.wait("new", Status::Running).await.unwrap();
    assert_eq!(read(&lab.disk(new), 5), "mine!");
    lab.no_snapshot_is_kept().await;
    for name in ["copy-2", "copy-3", "new"] {
        lab.delete(name).await;
    }
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.running("b").await;
    let memory = lab.begin("a", true).await.unwrap_err();
    assert_eq!(memory.code(), "unsupported");
    let first = lab.snapshot("a").await;
    let code =
        async |name: &str, snapshot: &str| lab.restore(name, snapshot).await.unwrap_err().code();
    assert_eq!(code("b", "s1").await, "snapshot_not_found");
    assert_eq!(code("b", "a:s1").await, "invalid", "of another machine");
    assert_eq!(code("b", first.id.as_str()).await, "invalid");
    let named = CreateSnapshot {
        name: Some("s1".parse().unwrap()),
        memory: false,
    };
    let taken = lab.engine.take_snapshot(&lab.who, "a", named.clone()).await;
    assert_eq!(taken.unwrap_err().code(), "name_taken");
    // Another machine's are others.
    let other = lab
        .engine
        .take_snapshot(&lab.who, "b", named)
        .await
        .unwrap();
    lab.ready(&other).await;
    for (count, names) in [(Some(0), 0), (Some(101), 0), (Some(2), 1)] {
        let request = ForkMachine {
            count,
            names: vec!["x".parse().unwrap(); names],
            ..ForkMachine::default()
        };
        let refused = lab
            .engine
            .fork(&lab.who, "a", request, None)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), "invalid", "{count:?}");
    }
    let two = futures::future::join(lab.begin("a", false), lab.begin("a", false)).await;
    let codes = [two.0, two.1].map(|begun| begun.err().map(|error| error.code()));
    assert!(
        codes.contains(&None) && codes.contains(&Some("machine_busy")),
        "{codes:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_so_many_snapshots_and_no_more() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    for _ in 0..MAX_SNAPSHOTS {
        lab.snapshot("a").await;
    }
    let refused = lab.begin("a", false).await.unwrap_err();
    assert_eq!(refused.code(), "quota_exceeded");
    let copies = lab.fork("a", ForkMachine::default()).await;
    lab.wait(copies[0].name.as_str(), Status::Running)
        .await
        .unwrap();
    lab.delete(copies[0].name.as_str()).await;
    lab.engine.delete_snapshot(&lab.who, "a:s7").await.unwrap();
    let next = lab.snapshot("a").await;
    assert_eq!(next.name.as_str(), "s102");
    let sequences: Vec<_> = lab.all(Some("a")).iter().map(|one| one.sequence).collect();
    assert!(sequences.is_sorted());
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_before_anything_begins() {
    let Some(lab) = Lab::with(|config| config.disk_reserve_mib = 0).await else {
        return;
    };
    let machine = lab.running("a").await;
    lab.snapshot("a").await;
    lab.engine.close().await;
    let Lab { engine, home, .. } = lab;
    drop(engine);
    let mut config = home.config();
    config.disk_reserve_mib = 1 << 40;
    let engine = hutch_engine::Engine::open(config).await.unwrap();
    let lab = Lab::of(home, engine);
    assert_eq!(
        lab.begin("a", false)
            .await
            .unwrap_err()
            .kind()
            .http_status(),
        507
    );
    let restore = lab.begin_restore("a", "s1").await.unwrap_err();
    assert_eq!(restore.kind().http_status(), 507);
    let fork = lab
        .engine
        .fork(&lab.who, "a", ForkMachine::default(), None)
        .await;
    assert_eq!(fork.unwrap_err().kind().http_status(), 507);
    assert_eq!(lab.now("a").id, machine.id);
    assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_deleted_meanwhile_leaves_nothing() {
    for ms in [0, 1, 3, 10, 30, 60] {
        let Some(lab) = Lab::new().await else { return };
        lab.running("a").await;
        lab.snapshot("a").await;
        lab.begin("a", false).await.unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        lab.delete("a").await;
        lab.running("b").await;
        lab.snapshot("b").await;
        lab.begin_restore("b", "s1").await.unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        lab.delete("b").await;
        lab.no_snapshot_is_kept().await;
        assert_eq!(lab.home.left(), []);
    }
}

#[test]
fn a_crash_at_any_moment_leaves_a_snapshot_whole_or_not_at_all() {
    for ms in [0, 1, 3, 6, 10, 20, 35, 60, 100, 200] {
        after_a_crash(
            async |lab| {
                lab.running("a").await;
                lab.running("stopped").await;
                lab.stop("stopped").await;
                lab.wait("stopped", Status::Stopped).await.unwrap();
                lab.begin("a", false).await.unwrap();
                lab.begin("stopped", false).await.unwrap();
                tokio::time::sleep(Duration::from_millis(ms)).await;
            },
            async |lab| {
                let kept = lab.all(None);
                assert!(kept.iter().all(|one| one.state == SnapshotState::Ready));
                assert_eq!(lab.kept().len(), kept.len());
                // The machine goes on, and nothing is in the way of the next.
                assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");
                assert_eq!(lab.now("a").starts, 1);
                lab.snapshot("a").await;
                for one in &kept {
                    let name = one.machine_name.as_str();
                    lab.restore(name, one.id.as_str()).await.unwrap();
                }
                lab.delete("a").await;
                lab.delete("stopped").await;
                assert_eq!(lab.home.left(), []);
            },
        );
    }
}

#[test]
fn a_crash_at_any_moment_of_a_restore_ends_in_what_was_wanted() {
    for ms in [0, 1, 3, 6, 10, 20, 35, 60, 100, 200] {
        after_a_crash(
            async |lab| {
                let machine = lab.running("a").await;
                write(&lab.disk(&machine), "first");
                lab.snapshot("a").await;
                write(&lab.disk(&machine), "other");
                lab.begin_restore("a", "s1").await.unwrap();
                tokio::time::sleep(Duration::from_millis(ms)).await;
            },
            async |lab| {
                let now = lab.now("a");
                let restored = lab.engine.restored(&lab.who, &now, LONG).await.unwrap();
                assert_eq!(restored.status, Status::Running);
                assert_eq!(restored.operation, None);
                assert_eq!(read(&lab.disk(&restored), 5), "first", "after {ms} ms");
                assert_eq!(lab.sh("a", "echo on").await.unwrap().stdout, "on\n");
                assert!(!lab.dir(&restored).join("disk.new").exists());
                lab.delete("a").await;
                assert_eq!(lab.home.left(), []);
            },
        );
    }
}

#[test]
fn a_crash_at_any_moment_of_a_fork_leaves_copies_that_run_and_no_snapshot() {
    for ms in [0, 3, 10, 20, 35, 60, 100, 200, 300] {
        after_a_crash(
            async |lab| {
                let machine = lab.running("a").await;
                write(&lab.disk(&machine), "first");
                let (engine, who) = (lab.engine.clone(), lab.who.clone());
                tokio::spawn(async move {
                    let request = ForkMachine {
                        count: Some(3),
                        ..ForkMachine::default()
                    };
                    drop(engine.fork(&who, "a", request, None).await);
                });
                tokio::time::sleep(Duration::from_millis(ms)).await;
            },
            async |lab| {
                let list = hutch_engine::ListMachines {
                    limit: 100,
                    ..Default::default()
                };
                for machine in lab.engine.machines(&lab.who, &list).unwrap().items {
                    let name = machine.name.as_str();
                    lab.wait(name, Status::Running).await.unwrap();
                    assert_eq!(read(&lab.disk(&machine), 5), "first");
                    lab.delete(name).await;
                }
                lab.no_snapshot_is_kept().await;
                assert_eq!(lab.home.left(), []);
            },
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_takes_the_room_of_what_is_in_it() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let snapshot = lab.snapshot("a").await;
    let disk = lab.snapshot_dir(&snapshot).join("disk.raw");
    let metadata = std::fs::metadata(disk).unwrap();
    assert_eq!(metadata.len(), snapshot.size_bytes);
    assert!(
        metadata.blocks() * 512 < snapshot.size_bytes / 10,
        "it is sparse"
    );
}
