//! One life of a machine, over every runtime: each way to begin and to end, and what is shown of it.

use std::time::Duration;

use hutch_contract::client::Until;
use hutch_contract::machine::{Exit, Machine, Status};
use hutch_guest::session::{Session, ShutdownMode};
use hutch_tests::{Lab, Runtime, lab, wait_until};
use tokio::net::UnixStream;

const LONG: Duration = Duration::from_secs(180);

#[tokio::test]
async fn a_life_with_the_stub() {
    a_life(lab!(Runtime::Stub)).await;
}

#[tokio::test]
async fn a_life_with_qemu() {
    a_life(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn a_life_with_firecracker() {
    a_life(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn a_life_with_cloud_hypervisor() {
    a_life(lab!(Runtime::CloudHypervisor)).await;
}

#[tokio::test]
async fn a_life_with_docker() {
    a_life(lab!(Runtime::Docker)).await;
}

async fn a_life(lab: Lab) {
    let lab = lab.start().await;
    lab.busybox().await;
    let client = lab.client();

    let machine = lab.create("life").await;
    assert_eq!((machine.status, machine.starts), (Status::Running, 1));
    assert_eq!(machine.runtime, lab.runtime.name());
    let said = lab.sh("life", "echo out; echo err >&2; exit 3").await;
    assert_eq!(
        (said.stdout.as_str(), said.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(said.exit.exit_code, 3);

    let stopped = client.stop("life", Some(LONG)).await.unwrap();
    assert_eq!(
        (stopped.status, stopped.exit),
        (Status::Stopped, Some(Exit::PowerOff))
    );
    let started = client.start("life", Some(LONG)).await.unwrap();
    assert_eq!((started.status, started.starts), (Status::Running, 2));

    let before = lab.boot_id("life").await;
    let restarted = client.restart("life", Some(LONG)).await.unwrap();
    assert_eq!((restarted.status, restarted.starts), (Status::Running, 3));
    another_boot(&lab, &before).await;

    by_itself(&lab, &machine, ShutdownMode::PowerOff).await;
    let off = lab.wait("life", Status::Stopped).await;
    assert_eq!(off.exit, Some(Exit::PowerOff));

    client.start("life", Some(LONG)).await.unwrap();
    let before = lab.boot_id("life").await;
    by_itself(&lab, &machine, ShutdownMode::Reboot).await;
    wait_until("it was started again", LONG, async || {
        client.machine("life").await.unwrap().starts == 5
    })
    .await;
    lab.wait("life", Status::Running).await;
    another_boot(&lab, &before).await;

    lab.kill_vmm(&machine);
    let killed = lab.wait("life", Status::Stopped).await;
    assert_eq!(killed.exit, Some(Exit::Signal { signal: 9 }));

    client.start("life", Some(LONG)).await.unwrap();
    client.delete("life", None).await.unwrap();
    assert_eq!(
        client
            .wait(machine.id.as_str(), Until::Gone, LONG)
            .await
            .unwrap(),
        None
    );
    assert!(client.machine("life").await.is_err());
    lab.finish().await;
}

/// Machines of the stub and containers share the host's kernel, and so its boot id.
async fn another_boot(lab: &Lab, before: &str) {
    let now = lab.boot_id("life").await;
    let shares = matches!(lab.runtime, Runtime::Stub | Runtime::Docker);
    assert_eq!(now == before, shares);
}

/// Ends the guest from within, without asking the server.
async fn by_itself(lab: &Lab, machine: &Machine, mode: ShutdownMode) {
    match lab.runtime {
        Runtime::Qemu | Runtime::Firecracker | Runtime::CloudHypervisor => {
            let command = match mode {
                ShutdownMode::PowerOff => "poweroff -f",
                ShutdownMode::Reboot => "reboot -f",
            };
            // Its answer does not come: the guest is gone.
            let exec = hutch_contract::exec::Exec {
                command: command.split(' ').map(str::to_owned).collect(),
                env: Default::default(),
                cwd: None,
                user: None,
                stdin_base64: None,
                timeout_ms: None,
            };
            assert!(lab.client().exec("life", &exec).await.is_err());
        }
        // No process of these may power anything off; the agent may.
        Runtime::Stub | Runtime::Docker => {
            let socket = match lab.runtime {
                Runtime::Docker => "run/vmm/agent.sock",
                _ => "run/agent.sock",
            };
            let socket = lab.machine_dir(machine).join(socket);
            // The server would take the connection back at once.
            lab.freeze(true);
            let stream = UnixStream::connect(socket).await.unwrap();
            let session = Session::open(stream, LONG).await.unwrap();
            // The agent may be gone before its answer is.
            let told = session.shutdown(mode, Duration::from_secs(1)).await;
            eprintln!("{mode:?}: {told:?}");
            lab.freeze(false);
        }
    }
}
