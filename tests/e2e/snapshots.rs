//! Snapshots of machines with real disks: what was on them is back, copies are somebody else, and nothing is left behind.

use std::collections::BTreeSet;
use std::time::Duration;

use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::snapshot::{
    Copied, CreateSnapshot, ForkMachine, RestoreMachine, Snapshot, SnapshotState,
};
use hutch_tests::{Lab, Runtime, lab};

const LONG: Duration = Duration::from_secs(300);

#[tokio::test]
async fn a_disk_goes_back_to_what_it_was_with_qemu() {
    back(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn a_disk_goes_back_to_what_it_was_with_firecracker() {
    back(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn a_disk_goes_back_to_what_it_was_with_cloud_hypervisor() {
    back(lab!(Runtime::CloudHypervisor)).await;
}

#[tokio::test]
async fn copies_are_somebody_else_with_qemu() {
    copies(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn copies_are_somebody_else_with_firecracker() {
    copies(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn copies_are_somebody_else_with_cloud_hypervisor() {
    copies(lab!(Runtime::CloudHypervisor)).await;
}

async fn snapshot(lab: &Lab, machine: &str, name: &str) -> Snapshot {
    let request = CreateSnapshot {
        name: Some(name.parse().unwrap()),
        memory: false,
    };
    let taken = lab
        .client()
        .take_snapshot(machine, &request, Some(LONG))
        .await;
    taken.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()))
}

async fn restore(lab: &Lab, machine: &str, snapshot: &str) -> Machine {
    let request = RestoreMachine {
        snapshot: snapshot.to_owned(),
        disk_only: false,
    };
    let restored = lab.client().restore(machine, &request, Some(LONG)).await;
    restored.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()))
}

async fn said(lab: &Lab, machine: &str, script: &str) -> String {
    let result = lab.sh(machine, script).await;
    assert_eq!(result.exit.exit_code, 0, "{script}: {}", result.stderr);
    result.stdout.trim().to_owned()
}

async fn back(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    lab.create("web").await;
    // Not synced by us: the freeze does that.
    said(
        &lab,
        "web",
        "echo first > /file; sleep 1000 >/dev/null 2>&1 & echo $! > /sleeper",
    )
    .await;
    let first = snapshot(&lab, "web", "first").await;
    assert!(first.frozen, "its guest stood still by itself");
    assert_eq!(first.state, SnapshotState::Ready);
    println!(
        "stood still for {:?} µs, {:?}",
        first.pause_us,
        first
            .timings
            .iter()
            .map(|step| (&step.phase, step.took_us))
            .collect::<Vec<_>>()
    );
    // What ran goes on.
    said(&lab, "web", "kill -0 $(cat /sleeper)").await;
    assert_eq!(lab.client().machine("web").await.unwrap().starts, 1);

    said(&lab, "web", "echo other > /file; echo more > /more").await;
    snapshot(&lab, "web", "second").await;
    let restored = restore(&lab, "web", "first").await;
    assert_eq!((restored.status, restored.starts), (Status::Running, 2));
    assert_eq!(
        said(&lab, "web", "cat /file; ls /more 2>/dev/null || true").await,
        "first"
    );

    // A crash of the server loses no snapshot.
    lab.kill().await;
    lab.restart().await;
    assert_eq!(
        lab.client().all_snapshots(Some("web")).await.unwrap().len(),
        2
    );
    lab.hutch(&["restore", "web", "second"]).await.good();
    assert_eq!(said(&lab, "web", "cat /file /more").await, "other\nmore");

    // The same by hand.
    let named = lab.hutch(&["snapshot", "create", "web"]).await.good();
    assert_eq!(named.trim(), "s3");
    let tree = lab.hutch(&["snapshot", "ls", "web", "--tree"]).await.good();
    let lines: Vec<_> = tree
        .lines()
        .map(|line| line.split("  (").next().unwrap())
        .collect();
    assert_eq!(
        lines,
        ["web:first", "└─ web:second", "   └─ web:s3"],
        "{tree}"
    );
    // A machine of an image of one.
    let image = ["snapshot", "create", "web", "kept", "--as-image", "mine"];
    lab.hutch(&image).await.good();
    let request = CreateMachine {
        image: "mine".into(),
        ..lab.request("new")
    };
    lab.client()
        .create(&request, None, Some(LONG))
        .await
        .unwrap();
    assert_eq!(said(&lab, "new", "cat /file /more").await, "other\nmore");
    lab.client().delete("new", Some(LONG)).await.unwrap();
    lab.client().delete_image("mine").await.unwrap();
    lab.hutch(&["snapshot", "rm", "web:second"]).await.good();
    let listed = lab.hutch(&["snapshot", "ls", "-q"]).await.good();
    assert_eq!(listed, "web:first\nweb:s3\nweb:kept\n");
    lab.client().delete("web", Some(LONG)).await.unwrap();
    assert_eq!(lab.client().all_snapshots(None).await.unwrap(), []);
    lab.finish().await;
}

async fn copies(lab: Lab) {
    let lab = lab.start().await;
    lab.busybox().await;
    lab.create("web").await;
    said(&lab, "web", "echo first > /file").await;
    let request = ForkMachine {
        count: Some(3),
        name_prefix: Some("copy".parse().unwrap()),
        ..ForkMachine::default()
    };
    let forked = lab.client().fork("web", &request, Some(LONG), None).await;
    let forked = forked.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    println!("stood still for {:?} µs", forked.pause_us);
    said(&lab, "web", "echo other > /file").await;
    let mut all = vec![lab.client().machine("web").await.unwrap()];
    for copy in forked.copies {
        match copy {
            Copied::Machine(machine) => all.push(*machine),
            Copied::Error { message, .. } => panic!("{message}\n{}", lab.log()),
        }
    }
    let mut ids = Vec::new();
    for machine in &all {
        let name = machine.name.as_str();
        assert_eq!(machine.status, Status::Running);
        let expected = if name == "web" { "other" } else { "first" };
        assert_eq!(said(&lab, name, "cat /file").await, expected);
        assert_eq!(said(&lab, name, "hostname").await, name);
        ids.push(said(&lab, name, "cat /etc/machine-id").await);
        ids.push(said(&lab, name, "head -c 32 /dev/urandom | md5sum").await);
        ids.push(said(&lab, name, "cat /proc/sys/kernel/random/boot_id").await);
        let network = machine.network.as_ref().unwrap();
        ids.extend(network.ipv4.map(|address| address.to_string()));
    }
    let different: BTreeSet<_> = ids.iter().collect();
    assert_eq!(different.len(), ids.len(), "{ids:?}");
    assert!(ids.len() >= 3 * all.len());
    let listed = lab.client().all_snapshots(None).await.unwrap();
    assert_eq!(listed, [], "what they were made from is not shown");
    // A copy of a copy, by hand.
    let again = lab
        .hutch(&["fork", "copy-2", "--name", "again"])
        .await
        .good();
    assert_eq!(again.trim(), "again");
    assert_eq!(said(&lab, "again", "cat /file").await, "first");
    lab.finish().await;
}

/// Whatever moment the server dies at, between the freeze of a guest and its going on: the guest goes on, no later than
/// by itself.
#[tokio::test]
async fn a_guest_is_not_left_frozen_with_qemu() {
    let mut lab = lab!(Runtime::Qemu).start().await;
    lab.busybox().await;
    lab.create("web").await;
    let boot = lab.boot_id("web").await;
    for ms in [0, 10, 25, 50, 80, 120] {
        let request = CreateSnapshot::default();
        let begun = lab.client().take_snapshot("web", &request, None).await;
        let begun = begun.unwrap();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        lab.kill().await;
        lab.restart().await;
        // Writes to the disk, which a frozen file system does not let happen.
        said(&lab, "web", "echo on > /file && sync").await;
        let kept = lab.client().all_snapshots(Some("web")).await.unwrap();
        assert!(kept.iter().all(|one| one.state == SnapshotState::Ready));
        println!("{ms} ms: {}", kept.iter().any(|one| one.id == begun.id));
    }
    assert_eq!(lab.boot_id("web").await, boot, "it never booted again");
    lab.finish().await;
}

#[tokio::test]
async fn a_command_does_not_notice_with_qemu() {
    let lab = lab!(Runtime::Qemu).start().await;
    lab.busybox().await;
    lab.create("web").await;
    let counting = async {
        let count = "for i in $(seq 1 40); do echo $i; sleep 0.1; done; exit 7";
        lab.sh("web", count).await
    };
    let snapshots = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        for name in ["a", "b"] {
            snapshot(&lab, "web", name).await;
        }
    };
    let (counted, ()) = futures::future::join(counting, snapshots).await;
    let expected: String = (1..=40).map(|number| format!("{number}\n")).collect();
    assert_eq!((counted.exit.exit_code, counted.stdout), (7, expected));
    lab.finish().await;
}
