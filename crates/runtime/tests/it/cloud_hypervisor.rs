//! A Cloud Hypervisor that hangs, dies, lies or resets its guest: a script that this test program plays the VMM for.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error, RuntimeConfig, table::Runtimes};

use crate::lab::{CONSOLE_BYTES, GENEROUS, Lab, alive};

/// How the VMM below behaves; the test that it is does nothing without it.
const PLAY: &str = "HUTCH_TEST_PLAY";

/// A machine whose VMM is a script with this body. It finds the API on descriptor 3 and its event monitor on 4.
async fn lab(body: &str) -> Lab {
    let mut lab = Lab::new("stub").await.unwrap();
    let program = lab.dir.file("vmm.sh");
    let version = "#!/bin/sh\n[ \"$1\" = --version ] && echo cloud-hypervisor v53.0 && exit\n";
    std::fs::write(&program, format!("{version}{body}\n")).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    lab.runtime = runtimes(&program).get("cloud-hypervisor").unwrap().clone();
    // Another user may not be able to run this program.
    lab.spec.user = None;
    lab
}

fn runtimes(program: &Path) -> Runtimes {
    Runtimes::new(|_| RuntimeConfig {
        launcher: env!("CARGO_BIN_EXE_hutch-stub-vmm").into(),
        program: Some(program.into()),
        acceleration: Some("kvm".into()),
        console_bytes: CONSOLE_BYTES,
        ..RuntimeConfig::default()
    })
}

/// A script that plays `role`, in this program.
fn played(role: &str) -> String {
    let this = std::env::current_exe().unwrap();
    format!(
        "{PLAY}={role} exec {} --exact cloud_hypervisor::vmm_that_plays_a_role 0<&3 2>&4",
        this.display()
    )
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
        let path = request(&mut stream);
        if role == "lies" {
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n").unwrap();
            continue;
        }
        let state = if role == "created" {
            "Created"
        } else {
            "Running"
        };
        let body = match path.as_str() {
            "/api/v1/vm.info" => format!(r#"{{"config":{{}},"state":"{state}"}}"#),
            _ => String::new(),
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).unwrap();
        match path.as_str() {
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

/// The path that is asked for.
fn request(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    head.split(' ').nth(1).unwrap_or_default().to_owned()
}

/// The error of a start that must fail and leave nothing.
async fn refused(lab: &Lab) -> Error {
    let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    if let Ok(record) = std::fs::read(lab.dir.file("run/shim.json")) {
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        for who in ["shim", "vmm"] {
            assert!(!alive(record[who]["pid"].as_u64().unwrap() as u32), "{who}");
        }
    }
    error
}

#[tokio::test]
async fn a_guest_that_resets_ends_its_vmm() {
    for (role, exit) in [("resets", Exit::Reboot), ("panics", Exit::Panic)] {
        let lab = lab(&played(role)).await;
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
    let lab = lab(&played("runs")).await;
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
async fn a_vmm_that_dies_says_why() {
    let lab = lab("echo 'Error: no such thing' >&2; exit 1").await;
    match refused(&lab).await {
        Error::Exited { report, .. } => {
            assert_eq!(report.exit, Exit::Code { code: 1 });
            assert_eq!(report.stderr_tail, "Error: no such thing");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_vmm_that_hangs_is_given_up_and_ended() {
    let lab = lab("exec sleep 600").await;
    let error = refused(&lab).await;
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
}

#[tokio::test]
async fn a_vmm_that_lies_is_not_believed() {
    for role in ["lies", "created"] {
        let lab = lab(&played(role)).await;
        let error = refused(&lab).await;
        assert!(matches!(error, Error::Monitor { .. }), "{role}: {error}");
    }
}

#[tokio::test]
async fn an_old_vmm_is_refused_with_the_way_to_a_new_one() {
    let lab = lab("").await;
    let program = lab.dir.file("vmm.sh");
    std::fs::write(&program, "#!/bin/sh\necho cloud-hypervisor v52.0\n").unwrap();
    let error = refused(&lab).await;
    assert_eq!(
        error.to_string(),
        "cloud-hypervisor 52.0.0 is older than 53.0.0"
    );
    let hint = error.hint().unwrap();
    assert_eq!(hint, "hutch runtime install cloud-hypervisor");
    assert!(!lab.dir.file("run/shim.json").exists());
}

#[tokio::test]
async fn without_kvm_nothing_is_started() {
    let lab = lab("exec sleep 600").await;
    let program = lab.dir.file("vmm.sh");
    let runtimes = Runtimes::new(|_| RuntimeConfig {
        launcher: env!("CARGO_BIN_EXE_hutch-stub-vmm").into(),
        program: Some(program.clone()),
        acceleration: Some("tcg".into()),
        ..RuntimeConfig::default()
    });
    let runtime = runtimes.get("cloud-hypervisor").unwrap();
    let info = runtime.probe().await;
    assert!(!info.usable);
    assert_eq!(info.version.as_deref(), Some("53.0.0"));
    let error = runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    assert!(matches!(error, Error::Unusable { .. }), "{error}");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(!lab.dir.file("run/shim.json").exists());
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
