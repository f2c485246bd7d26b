//! Snapshots with memory: what ran goes on where it was, in the machine itself and in copies that are somebody else.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use hutch_contract::machine::{Machine, Status};
use hutch_contract::snapshot::{Copied, CreateSnapshot, ForkMachine, RestoreMachine, Snapshot};
use hutch_tests::world::{PUBLIC, World};
use hutch_tests::{Lab, Runtime, lab};

use crate::egress::{PORT, reaches};

const LONG: Duration = Duration::from_secs(300);

#[tokio::test]
async fn a_machine_goes_on_where_it_was_with_qemu() {
    goes_on(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn copies_go_on_as_somebody_else_with_qemu() {
    copies(lab!(Runtime::Qemu)).await;
}

async fn snapshot(lab: &Lab, machine: &str, name: &str) -> Snapshot {
    let request = CreateSnapshot {
        name: Some(name.parse().unwrap()),
        memory: true,
    };
    let taken = lab
        .client()
        .take_snapshot(machine, &request, Some(LONG))
        .await;
    let taken = taken.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    assert!(taken.memory && taken.frozen, "{taken:?}");
    told(&taken);
    taken
}

/// For whoever reads the log of a test.
fn told(taken: &Snapshot) {
    let steps = taken.timings.iter();
    let steps: Vec<_> = steps
        .map(|step| format!("{} {}", step.phase, step.took_us))
        .collect();
    println!(
        "stood still for {:?} µs: {}",
        taken.pause_us,
        steps.join(", ")
    );
}

async fn restore(lab: &Lab, machine: &str, snapshot: &str) -> Machine {
    let request = RestoreMachine {
        snapshot: snapshot.to_owned(),
        disk_only: false,
    };
    let restored = lab.client().restore(machine, &request, Some(LONG)).await;
    restored.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()))
}

async fn fork(lab: &Lab, machine: &str, names: &[&str]) -> Vec<Machine> {
    let request = ForkMachine {
        names: names.iter().map(|name| name.parse().unwrap()).collect(),
        memory: true,
        ..ForkMachine::default()
    };
    let forked = lab.client().fork(machine, &request, Some(LONG), None).await;
    let forked = forked.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    println!("stood still for {:?} µs", forked.pause_us);
    let copies = forked.copies.into_iter().map(|copy| match copy {
        Copied::Machine(machine) => *machine,
        Copied::Error { message, .. } => panic!("{message}\n{}", lab.log()),
    });
    copies.collect()
}

async fn said(lab: &Lab, machine: &str, script: &str) -> String {
    let result = lab.sh(machine, script).await;
    assert_eq!(result.exit.exit_code, 0, "{script}: {}", result.stderr);
    result.stdout.trim().to_owned()
}

/// A process that knows in its memory alone how far it has counted, and that says so when it is asked.
async fn count(lab: &Lab, machine: &str) {
    let counts =
        "i=0; trap 'echo $i > /run/answer' USR1; while true; do i=$((i+1)); sleep 0.1; done";
    let begin = format!(
        "mkdir -p /run; sh -c \"{}\" >/dev/null 2>&1 & echo $! > /run/counter",
        counts.replace('$', "\\$")
    );
    said(lab, machine, &begin).await;
}

async fn counted(lab: &Lab, machine: &str) -> u64 {
    let ask = "rm -f /run/answer; kill -USR1 $(cat /run/counter); \
        for i in $(seq 100); do [ -s /run/answer ] && break; sleep 0.1; done; cat /run/answer";
    said(lab, machine, ask).await.parse().unwrap()
}

async fn goes_on(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    lab.create("web").await;
    count(&lab, "web").await;
    said(&lab, "web", "echo first > /file").await;
    let boot = lab.boot_id("web").await;
    let before = counted(&lab, "web").await;
    snapshot(&lab, "web", "first").await;
    let first = counted(&lab, "web").await;
    assert!(first >= before, "it went on");
    assert_eq!(lab.client().machine("web").await.unwrap().starts, 1);

    said(&lab, "web", "echo other > /file; rm /run/counter; sleep 3").await;
    let restored = restore(&lab, "web", "first").await;
    assert_eq!((restored.status, restored.starts), (Status::Running, 2));
    assert_eq!(lab.boot_id("web").await, boot, "it did not boot");
    assert_eq!(said(&lab, "web", "cat /file").await, "first");
    let again = counted(&lab, "web").await;
    assert!(again >= before, "{again} after {before}");
    // Its clock did not stay behind.
    let clock: u64 = said(&lab, "web", "date +%s").await.parse().unwrap();
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(now.abs_diff(clock) <= 2, "{clock} and not {now}");

    // One of a machine that went on from one, after a crash of the server.
    said(&lab, "web", "echo second > /file").await;
    let second = snapshot(&lab, "web", "second").await;
    lab.kill().await;
    lab.restart().await;
    let before = counted(&lab, "web").await;
    said(&lab, "web", "echo third > /file; kill $(cat /run/counter)").await;
    let restored = lab.hutch(&["restore", "web", second.name.as_str()]).await;
    restored.good();
    assert_eq!(said(&lab, "web", "cat /file").await, "second");
    assert!(counted(&lab, "web").await < before + 10_000);
    assert_eq!(lab.boot_id("web").await, boot);
    // Without its memory it boots.
    let disk = ["restore", "web", "first", "--disk-only"];
    lab.hutch(&disk).await.good();
    assert_eq!(said(&lab, "web", "cat /file").await, "first");
    assert_ne!(lab.boot_id("web").await, boot);
    // And goes on from memory again, when it has been stopped, too.
    lab.client().stop("web", Some(LONG)).await.unwrap();
    restore(&lab, "web", "second").await;
    assert_eq!(lab.boot_id("web").await, boot);
    counted(&lab, "web").await;
    lab.client().delete("web", Some(LONG)).await.unwrap();
    lab.finish().await;
}

async fn copies(lab: Lab) {
    let Some(world) = World::new() else { return };
    world.serve(PUBLIC, PORT);
    let lab = lab.inside(&world).start().await;
    lab.busybox().await;
    lab.create("web").await;
    count(&lab, "web").await;
    said(&lab, "web", "echo first > /file").await;
    let boot = lab.boot_id("web").await;
    let mut all = fork(&lab, "web", &["one", "two", "three"]).await;
    said(&lab, "web", "echo other > /file").await;
    // Of a copy, and of a copy of that.
    said(&lab, "two", "echo second > /file").await;
    all.extend(fork(&lab, "two", &["four"]).await);
    said(&lab, "four", "echo fourth > /file").await;
    all.extend(fork(&lab, "four", &["five"]).await);
    all.push(lab.client().machine("web").await.unwrap());

    let mut ids = Vec::new();
    let mut addresses: BTreeSet<Ipv4Addr> = BTreeSet::new();
    for machine in &all {
        let name = machine.name.as_str();
        assert_eq!(machine.status, Status::Running);
        assert_eq!(machine.unapplied, [""; 0], "{}", lab.log());
        let file = match name {
            "web" => "other",
            "one" | "three" => "first",
            "two" => "second",
            _ => "fourth",
        };
        assert_eq!(said(&lab, name, "cat /file").await, file, "{name}");
        assert_eq!(lab.boot_id(name).await, boot, "{name} did not boot");
        counted(&lab, name).await;
        assert_eq!(said(&lab, name, "hostname").await, name);
        ids.push(said(&lab, name, "cat /etc/machine-id").await);
        ids.push(said(&lab, name, "head -c 32 /dev/urandom | md5sum").await);
        let its = machine.network.as_ref().unwrap().ipv4.unwrap();
        addresses.insert(its);
        let seen = said(&lab, name, "ip -4 -o address show dev eth0").await;
        assert_eq!(seen.lines().count(), 1, "{seen}");
        assert!(seen.contains(&format!(" {its}/32 ")), "{name}: {seen}");
        reaches(&lab, name, PUBLIC, PORT).await;
    }
    let different: BTreeSet<_> = ids.iter().collect();
    assert_eq!(different.len(), ids.len(), "{ids:?}");
    assert_eq!(addresses.len(), all.len());
    assert_eq!(lab.client().all_snapshots(None).await.unwrap(), []);
    // The one that it all came from may go.
    lab.client().delete("web", Some(LONG)).await.unwrap();
    counted(&lab, "five").await;
    lab.finish().await;
}
