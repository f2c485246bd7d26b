//! Warm starts: a machine that goes on from the memory of one that had just booted is as good as one that boots, and where that
//! cannot be, it boots.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_tests::{Lab, Runtime, lab, wait_until};

const LONG: Duration = Duration::from_secs(300);

#[tokio::test]
async fn machines_start_warm_with_qemu() {
    warm(lab!(Runtime::Qemu)).await;
}

async fn create(lab: &Lab, name: &str, cold: bool) -> Machine {
    let request = CreateMachine {
        cold,
        ..lab.request(name)
    };
    let made = lab.client().create(&request, None, Some(LONG)).await;
    let made = made.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    println!("{name}: warm {}, {:?}", made.warm, made.timings);
    made
}

async fn said(lab: &Lab, machine: &str, script: &str) -> String {
    let result = lab.sh(machine, script).await;
    assert_eq!(result.exit.exit_code, 0, "{script}: {}", result.stderr);
    result.stdout.trim().to_owned()
}

fn templates(lab: &Lab) -> Vec<PathBuf> {
    let places = ["pool/templates", "templates"].map(|place| lab.data_dir().join(place));
    let dir = places.iter().find(|place| place.exists()).unwrap();
    let entries = std::fs::read_dir(dir).unwrap();
    let whole = entries.map(|entry| entry.unwrap().path());
    whole
        .filter(|dir| dir.join("manifest.json").exists())
        .collect()
}

async fn template(lab: &Lab) -> PathBuf {
    wait_until("there is a template", LONG, async || {
        templates(lab).len() == 1
    })
    .await;
    templates(lab).remove(0)
}

async fn warm(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    assert!(!create(&lab, "cold", true).await.warm);
    assert!(templates(&lab).is_empty(), "who wants none makes none");
    let first = create(&lab, "first", false).await;
    assert!(!first.warm);
    assert_eq!(first.unapplied, [""; 0]);
    template(&lab).await;
    // Another one, with an identity and a disk of its own.
    said(&lab, "first", "echo first > /file && sync").await;
    for name in ["one", "two"] {
        let machine = create(&lab, name, false).await;
        assert!(machine.warm);
        assert_eq!(machine.unapplied, [""; 0]);
        said(&lab, name, "test ! -e /file && echo mine > /file && sync").await;
    }
    let mut ids = Vec::new();
    for name in ["cold", "first", "one", "two"] {
        assert_eq!(said(&lab, name, "hostname").await, name);
        ids.push(said(&lab, name, "cat /etc/machine-id").await);
        ids.push(said(&lab, name, "head -c 32 /dev/urandom | md5sum").await);
        let machine = lab.client().machine(name).await.unwrap();
        let network = machine.network.unwrap();
        ids.extend(network.ipv4.map(|address| address.to_string()));
    }
    let different: BTreeSet<_> = ids.iter().collect();
    assert_eq!(different.len(), ids.len(), "{ids:?}");
    // It is a machine like any other: it boots when it is started again, and outlives its server.
    lab.kill().await;
    lab.restart().await;
    assert_eq!(said(&lab, "one", "cat /file").await, "mine");
    lab.hutch(&["restart", "one"]).await.good();
    assert_eq!(said(&lab, "one", "cat /file").await, "mine");
    assert!(!lab.client().machine("one").await.unwrap().warm);
    // What an earlier server kept is used, once it was looked at.
    wait_until("machines start warm", LONG, async || {
        let name = format!("later-{}", templates(&lab).len());
        let machine = create(&lab, &name, false).await;
        lab.client().delete(&name, Some(LONG)).await.unwrap();
        machine.warm
    })
    .await;
    // A template goes with its image.
    for name in ["cold", "first", "one", "two"] {
        lab.client().delete(name, Some(LONG)).await.unwrap();
    }
    lab.client().delete_image("busybox").await.unwrap();
    assert!(templates(&lab).is_empty());
    lab.finish().await;
}

#[tokio::test]
async fn a_machine_boots_where_its_template_is_of_no_use_with_qemu() {
    let mut lab = lab!(Runtime::Qemu).start().await;
    lab.busybox().await;
    create(&lab, "first", false).await;
    let dir = template(&lab).await;
    // A state that no VMM takes.
    let state = dir.join("state");
    std::fs::remove_file(&state).unwrap();
    std::fs::write(&state, "this is no state").unwrap();
    let machine = create(&lab, "web", false).await;
    assert_eq!((machine.status, machine.warm), (Status::Running, false));
    assert_eq!(said(&lab, "web", "hostname").await, "web");
    assert!(templates(&lab).is_empty(), "it is not tried again");
    // The next server makes a new one, and drops one in which a byte is not what was written.
    lab.kill().await;
    lab.restart().await;
    create(&lab, "second", false).await;
    let dir = template(&lab).await;
    let memory = std::fs::read(dir.join("memory")).unwrap();
    let mut changed = memory.clone();
    changed[memory.len() / 2] ^= 1;
    std::fs::remove_file(dir.join("memory")).unwrap();
    std::fs::write(dir.join("memory"), changed).unwrap();
    lab.kill().await;
    lab.restart().await;
    wait_until("it is dropped", LONG, async || templates(&lab).is_empty()).await;
    assert!(!create(&lab, "third", false).await.warm);
    lab.finish().await;
}
