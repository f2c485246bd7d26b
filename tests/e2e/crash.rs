//! The server dies at the worst moments; machines and promises do not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hutch_contract::client::{Client, Error};
use hutch_contract::error::Kind;
use hutch_contract::machine::{CreateMachine, Status};
use hutch_tests::{Lab, Random, Runtime, lab, wait_until};

const LONG: Duration = Duration::from_secs(180);

#[tokio::test]
async fn machines_outlive_their_server_with_qemu() {
    outlive(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn machines_outlive_their_server_with_firecracker() {
    outlive(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn machines_outlive_their_server_with_cloud_hypervisor() {
    outlive(lab!(Runtime::CloudHypervisor)).await;
}

#[tokio::test]
async fn machines_outlive_their_server_with_the_stub() {
    outlive(lab!(Runtime::Stub)).await;
}

async fn outlive(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    let names = ["one", "two", "three"];
    let machines = futures::future::join_all(names.map(|name| lab.create(name))).await;
    let mut before = Vec::new();
    for (name, machine) in names.iter().zip(&machines) {
        before.push((lab.boot_id(name).await, lab.vmm_pid(machine)));
    }

    lab.kill().await;
    lab.restart().await;

    for ((name, machine), (boot_id, vmm)) in names.iter().zip(&machines).zip(before) {
        let found = lab.wait(name, Status::Running).await;
        assert_eq!((&found.id, found.starts), (&machine.id, 1));
        assert_eq!(lab.boot_id(name).await, boot_id);
        assert_eq!(lab.vmm_pid(machine), vmm);
    }
    let listed = lab.hutch(&["list", "-q"]).await.good();
    let listed: BTreeSet<_> = listed.lines().collect();
    assert_eq!(listed, BTreeSet::from(names));
    lab.finish().await;
}

#[tokio::test]
async fn a_machine_that_ended_while_nobody_looked_is_seen_to_have_ended() {
    let mut lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let machine = lab.create("short").await;
    lab.kill().await;
    lab.kill_vmm(&machine);
    lab.restart().await;
    let found = lab.wait("short", Status::Stopped).await;
    assert_eq!(
        found.exit,
        Some(hutch_contract::machine::Exit::Signal { signal: 9 })
    );
    lab.finish().await;
}

/// What the server has promised to the client.
#[derive(Default, Clone)]
struct Promised {
    /// Acknowledged creates.
    created: BTreeMap<String, String>,
    /// Deletes that were asked for, whatever came of the request.
    deleting: BTreeSet<String>,
    /// Acknowledged deletes.
    deleted: BTreeSet<String>,
}

#[tokio::test]
async fn fifty_crashes_lose_and_leave_nothing() {
    let mut random = Random::new();
    let mut lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let promised = Arc::new(Mutex::new(Promised::default()));
    for round in 0..50 {
        let work = tokio::spawn(work(
            lab.client(),
            lab.request("x"),
            round,
            promised.clone(),
        ));
        tokio::time::sleep(Duration::from_millis(random.below(500))).await;
        lab.kill().await;
        work.await.unwrap();
        lab.restart().await;
        let promised = promised.lock().unwrap().clone();
        kept(&lab, &promised, round).await;
    }
    lab.finish().await;
}

/// Creates and deletes until the server is gone. At most six machines are there at a time.
async fn work(client: Client, template: CreateMachine, round: u32, promised: Arc<Mutex<Promised>>) {
    for n in 0.. {
        let name = format!("r{round}-{n}");
        let request = CreateMachine {
            name: Some(name.parse().unwrap()),
            ..template.clone()
        };
        match client.create(&request, Some(&name), None).await {
            Ok(machine) => {
                let id = machine.id.to_string();
                promised.lock().unwrap().created.insert(id, name);
            }
            Err(error) => return must_be_the_crash(&error),
        }
        let oldest = {
            let mut promised = promised.lock().unwrap();
            let alive = promised
                .created
                .keys()
                .filter(|id| !promised.deleting.contains(*id));
            let alive: Vec<_> = alive.cloned().collect();
            let oldest = (alive.len() > 6).then(|| alive[0].clone());
            promised.deleting.extend(oldest.clone());
            oldest
        };
        if let Some(id) = oldest {
            match client.delete(&id, None).await {
                Ok(_) => drop(promised.lock().unwrap().deleted.insert(id)),
                Err(error) => return must_be_the_crash(&error),
            }
        }
    }
}

#[track_caller]
fn must_be_the_crash(error: &Error) {
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
}

/// Every acknowledged machine is there once, under its name; every acknowledged delete comes to its end.
async fn kept(lab: &Lab, promised: &Promised, round: u32) {
    let client = lab.client();
    let listed = client.all_machines(None).await.unwrap();
    let ids: BTreeSet<_> = listed
        .iter()
        .map(|machine| machine.id.to_string())
        .collect();
    let names: BTreeSet<_> = listed
        .iter()
        .map(|machine| machine.name.to_string())
        .collect();
    assert_eq!(
        (ids.len(), names.len()),
        (listed.len(), listed.len()),
        "round {round}: {listed:?}"
    );
    for (id, name) in promised
        .created
        .iter()
        .filter(|(id, _)| !promised.deleting.contains(*id))
    {
        let found = listed.iter().find(|machine| machine.id.as_str() == id);
        let found = found.unwrap_or_else(|| panic!("round {round}: {name} is lost"));
        assert_eq!(found.name.as_str(), name);
        assert_ne!(found.status, Status::Deleting);
    }
    wait_until("acknowledged deletes are done", LONG, async || {
        let listed = client.all_machines(None).await.unwrap();
        !listed
            .iter()
            .any(|machine| promised.deleted.contains(machine.id.as_str()))
    })
    .await;
    if round % 10 != 9 {
        return;
    }
    // Now and then everything may settle: all that is wanted comes to run, and nothing else is there.
    wait_until("every machine runs", LONG, async || {
        let listed = client.all_machines(None).await.unwrap();
        let failed = listed
            .iter()
            .find(|machine| machine.status == Status::Failed);
        assert!(failed.is_none(), "{failed:?}");
        listed
            .iter()
            .all(|machine| machine.status == Status::Running)
    })
    .await;
    let listed = client.all_machines(None).await.unwrap();
    let inventory = lab.inventory();
    let directories = inventory
        .iter()
        .filter(|item| item.starts_with("machine directory"));
    assert_eq!(directories.count(), listed.len(), "{inventory:?}");
}
