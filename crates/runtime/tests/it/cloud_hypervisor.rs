//! A Cloud Hypervisor that lies or resets its guest: a script that this test program plays the VMM for.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error};

use crate::lab::{GENEROUS, Lab};
use crate::scripted::{self, answer, refused, request};

const VERSION: &str = "cloud-hypervisor v53.0";
/// How the VMM below behaves; the test that it is does nothing without it.
const PLAY: &str = "HUTCH_TEST_PLAY";

/// A machine whose VMM plays `role`, in this program. It finds the API on descriptor 3 and its event monitor on 4.
async fn lab(role: &str) -> Lab {
    let this = std::env::current_exe().unwrap();
    let body = format!(
        "{PLAY}={role} exec {} --exact cloud_hypervisor::vmm_that_plays_a_role 0<&3 2>&4",
        this.display()
    );
    scripted::lab("cloud-hypervisor", VERSION, &body).await
}

/// The VMM: the API's socket is its standard input, the event monitor its standard error.
#[test]
fn vmm_that_plays_a_role() {
    let Ok(role) = std::env::var(PLAY) else {
        return;
    };
    let api = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let console = |text: &str| std::io::stdout().write_all(text.as_bytes()).unwrap();
    event("vm", "booting");
    event("vm", "booted");
    for stream in api.incoming() {
        let mut stream = stream.unwrap();
        let request = request(&mut stream);
        let (_, path) = request.split_once(' ').unwrap_or_default();
        if role == "lies" {
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n").unwrap();
            continue;
        }
        let state = if role == "created" {
            "Created"
        } else {
            "Running"
        };
        let body = match path {
            "/api/v1/vm.info" => format!(r#"{{"config":{{}},"state":"{state}"}}"#),
            _ => String::new(),
        };
        stream.write_all(answer(200, &body).as_bytes()).unwrap();
        match path {
            "/api/v1/vm.power-button" => {
                event("vm", "shutdown");
                event("vm", "deleted");
                event("vmm", "shutdown");
                std::process::exit(0);
            }
            // A guest that resets boots again, and again.
            "/api/v1/vm.resume" => {
                if role == "panics" {
                    console("[    3.1] Kernel panic - not syncing: test\r\n");
                }
                event("vm", "rebooting");
                event("vm", "rebooted");
            }
            _ => {}
        }
    }
}

fn event(source: &str, event: &str) {
    let text = format!(
        "{{\n  \"timestamp\": {{\n    \"secs\": 0,\n    \"nanos\": 1\n  }},\n  \"source\": \"{source}\",\n  \
         \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
    );
    std::io::stderr().write_all(text.as_bytes()).unwrap();
}

#[tokio::test]
async fn a_guest_that_resets_ends_its_vmm() {
    for (role, exit) in [("resets", Exit::Reboot), ("panics", Exit::Panic)] {
        let lab = lab(role).await;
        let process = lab.start().await;
        lab.runtime.pause(&lab.dir).await.unwrap();
        lab.runtime.resume(&lab.dir).await.unwrap();
        assert_eq!(process.wait().await.exit, exit);
        match lab.runtime.adopt(&lab.dir).await.unwrap() {
            Adopted::Exited(report) => assert_eq!(report.exit, exit),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_guest_that_powers_off_and_a_kill_are_told_apart() {
    let lab = lab("runs").await;
    let process = lab.start().await;
    lab.runtime.stop(&lab.dir).await.unwrap();
    assert_eq!(process.wait().await.exit, Exit::PowerOff);
    let process = lab.start().await;
    lab.runtime.kill(&lab.dir).await.unwrap();
    assert_eq!(process.wait().await.exit, Exit::Killed);
    let paused = lab.runtime.pause(&lab.dir).await;
    assert!(
        matches!(paused, Err(Error::NotRunning { .. })),
        "{paused:?}"
    );
}

#[tokio::test]
async fn a_vmm_that_lies_is_not_believed() {
    for role in ["lies", "created"] {
        let lab = lab(role).await;
        let error = refused(&lab).await;
        assert!(matches!(error, Error::Monitor { .. }), "{role}: {error}");
    }
}

/// With `reboot=t` the kernel faults in handling a fault in handling a fault.
#[tokio::test]
async fn a_triple_fault_ends_the_real_vmm() {
    let Some(mut lab) = Lab::new("cloud-hypervisor").await else {
        return;
    };
    lab.spec.kernel_args.push("reboot=t".into());
    let process = lab.start().await;
    lab.guest().await.say("reboot").await;
    let report = tokio::time::timeout(GENEROUS, process.wait())
        .await
        .unwrap();
    assert_eq!(report.exit, Exit::Reboot);
}

/// What confines the files that it can reach is in no file of `/proc`: it is seen by asking for another one.
#[tokio::test]
async fn the_real_vmm_reaches_only_its_own_files() {
    let Some(lab) = Lab::new("cloud-hypervisor").await else {
        return;
    };
    if let Some(hint) = lab.runtime.probe().await.hint {
        println!("skipped: {hint}");
        return;
    }
    lab.start().await;
    let foreign = lab.dir.file("foreign.img");
    std::fs::write(&foreign, [0; 4096]).unwrap();
    std::fs::set_permissions(&foreign, PermissionsExt::from_mode(0o666)).unwrap();
    let body = r#"{"path":"foreign.img","readonly":true,"image_type":"Raw"}"#;
    // Shorter than the address of a socket may be.
    let dir = std::fs::File::open(lab.dir.file("run")).unwrap();
    let api = format!("/proc/self/fd/{}/api.sock", dir.as_fd().as_raw_fd());
    let mut api = UnixStream::connect(api).unwrap();
    let head = format!(
        "PUT /api/v1/vm.add-disk HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    api.write_all(head.as_bytes()).unwrap();
    api.write_all(body.as_bytes()).unwrap();
    let mut answer = vec![0; 4096];
    let length = api.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(
        answer.contains("foreign.img") && answer.contains("Permission denied"),
        "{answer}"
    );
}
