//! Machines are paused and go on as soon as something uses them: over every runtime, and after a crash of the server.

use std::time::{Duration, SystemTime};

use hutch_contract::expose::Access;
use hutch_contract::machine::{CreateMachine, Exit, Machine, Status};
use hutch_tests::{Lab, Runtime, lab, wait_until};

use crate::reach::{LONG, create, end, get, start};

#[tokio::test]
async fn a_paused_machine_goes_on_with_the_stub() {
    paused(lab!(Runtime::Stub)).await;
}

#[tokio::test]
async fn a_paused_machine_goes_on_with_qemu() {
    paused(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn a_paused_machine_goes_on_with_firecracker() {
    paused(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn a_paused_machine_goes_on_with_cloud_hypervisor() {
    paused(lab!(Runtime::CloudHypervisor)).await;
}

#[tokio::test]
async fn a_paused_machine_goes_on_with_docker() {
    paused(lab!(Runtime::Docker)).await;
}

async fn pause(lab: &Lab, name: &str) -> Machine {
    let paused = lab.client().pause(name, Some(LONG)).await;
    paused.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()))
}

async fn paused(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    let port = lab.port(0);
    let request = CreateMachine {
        http_port: Some(port),
        access: Access::Public,
        ..lab.request("web")
    };
    let machine = create(&lab, request).await;
    let page = "mkdir -p /tmp/page && echo page > /tmp/page/index.html";
    assert_eq!(lab.sh("web", page).await.exit.exit_code, 0);
    let httpd = format!("busybox httpd -f -p 127.0.0.1:{port} -h /tmp/page");
    let server = start(&lab, "web", &httpd).await;
    wait_until("the page is there", LONG, async || {
        get(&lab, "web", "/", "").await.status == 200
    })
    .await;

    // A request by name is held until the machine executes again.
    assert_eq!(pause(&lab, "web").await.status, Status::Paused);
    assert_eq!(get(&lab, "web", "/", "").await.status, 200);
    let woken = lab.client().machine("web").await.unwrap();
    assert_eq!(woken.status, Status::Running);

    // A crash of the server changes nothing: what runs in the machine is still there.
    pause(&lab, "web").await;
    lab.kill().await;
    lab.restart().await;
    let found = lab.client().machine("web").await.unwrap();
    assert_eq!(
        (found.status, found.starts),
        (Status::Paused, machine.starts)
    );
    assert_eq!(get(&lab, "web", "/", "").await.status, 200);

    // Its clock does not stay behind.
    pause(&lab, "web").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let clock = lab.sh("web", "date +%s").await.stdout;
    let host = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let apart = host.abs_diff(clock.trim().parse().unwrap());
    assert!(apart < 4, "{clock} in the guest, {host} on the host");

    end(&lab, "web", &[server]).await;
    pause(&lab, "web").await;
    let stopped = lab.client().stop("web", Some(LONG)).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::PowerOff), "its guest was asked");
    lab.client().start("web", Some(LONG)).await.unwrap();
    lab.hutch(&["pause", "web"]).await.good();
    let listed = lab.hutch(&["list"]).await.good();
    assert!(listed.contains("paused"), "{listed}");
    lab.client().delete("web", Some(LONG)).await.unwrap();
    lab.finish().await;
}

#[tokio::test]
async fn a_machine_that_nobody_uses_is_paused_with_the_stub() {
    idle(lab!(Runtime::Stub)).await;
}

#[tokio::test]
async fn a_machine_that_nobody_uses_is_paused_with_qemu() {
    idle(lab!(Runtime::Qemu)).await;
}

async fn is(lab: &Lab, name: &str, status: Status) {
    wait_until(
        &format!("{name} is {}", status.as_str()),
        LONG,
        async || lab.client().machine(name).await.unwrap().status == status,
    )
    .await;
}

async fn idle(lab: Lab) {
    let mut lab = lab.start().await;
    lab.busybox().await;
    let created = lab.hutch(&["create", "busybox", "--name", "web", "--idle-pause", "2s"]);
    created.await.good();
    is(&lab, "web", Status::Paused).await;

    // A command whose output somebody follows is a use, however long it says nothing.
    let said = lab.sh("web", "sleep 5; echo awake").await;
    assert_eq!(said.stdout, "awake\n");
    is(&lab, "web", Status::Paused).await;

    // Also for a server that has just found it, and after a change.
    lab.sh("web", "true").await;
    lab.kill().await;
    lab.restart().await;
    is(&lab, "web", Status::Paused).await;
    lab.hutch(&["update", "web", "--idle-pause", "never", "--ttl", "3s"])
        .await
        .good();
    lab.client().resume("web", Some(LONG)).await.unwrap();
    let shown = lab.hutch(&["get", "web"]).await.good();
    assert!(shown.contains("lives      paused in"), "{shown}");
    is(&lab, "web", Status::Paused).await;

    // What goes on after its time gets as much again, and a deletion waits for no use.
    lab.sh("web", "true").await;
    is(&lab, "web", Status::Paused).await;
    let ends = ["update", "web", "--ttl", "2s", "--ttl-action", "delete"];
    lab.hutch(&ends).await.good();
    wait_until("it is gone", LONG, async || {
        lab.client().machine("web").await.is_err()
    })
    .await;
    lab.finish().await;
}
