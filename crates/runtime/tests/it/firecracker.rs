//! A Firecracker that hangs, dies, lies or points elsewhere: a script that this test program plays the VMM for.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error, MachineDir, Runtime, RuntimeConfig, table::Runtimes};
use serde_json::Value;

use crate::lab::{CONSOLE_BYTES, Lab, alive};

/// How the VMM below behaves; the test that it is does nothing without it.
const PLAY: &str = "HUTCH_TEST_PLAY_FIRECRACKER";
const SOCKET: &str = "run/vmm/api.sock";

/// A machine whose VMM is a script with this body.
async fn lab(body: &str) -> Lab {
    let mut lab = Lab::new("stub").await.unwrap();
    let program = lab.dir.file("vmm.sh");
    let version = "#!/bin/sh\n[ \"$1\" = --version ] && echo Firecracker v1.16.1 && exit\n";
    std::fs::write(&program, format!("{version}{body}\n")).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(lab.dir.file(MachineDir::KERNEL), b"\x7fELF").unwrap();
    lab.runtime = runtime(&program, "kvm");
    // Another user may not be able to run this program.
    lab.spec.user = None;
    lab
}

fn runtime(program: &Path, acceleration: &str) -> std::sync::Arc<dyn Runtime> {
    let runtimes = Runtimes::new(|_| RuntimeConfig {
        launcher: env!("CARGO_BIN_EXE_hutch-stub-vmm").into(),
        program: Some(program.into()),
        acceleration: Some(acceleration.into()),
        console_bytes: CONSOLE_BYTES,
        ..RuntimeConfig::default()
    });
    runtimes.get("firecracker").unwrap().clone()
}

/// A script that plays `role`, in this program.
fn played(role: &str) -> String {
    let this = std::env::current_exe().unwrap();
    format!(
        "{PLAY}={role} exec {} --exact firecracker::vmm_that_plays_a_role --nocapture",
        this.display()
    )
}

#[test]
fn vmm_that_plays_a_role() {
    let Ok(role) = std::env::var(PLAY) else {
        return;
    };
    let config = std::fs::read("run/vmm/config.json").unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["drives"][0]["path_on_host"], "disk.raw");
    let api = match role.as_str() {
        "points_elsewhere" => {
            let elsewhere = UnixListener::bind("elsewhere.sock").unwrap();
            std::os::unix::fs::symlink("../../elsewhere.sock", SOCKET).unwrap();
            elsewhere
        }
        _ => UnixListener::bind(SOCKET).unwrap(),
    };
    for stream in api.incoming() {
        let mut stream = stream.unwrap();
        let request = request(&mut stream);
        let answer = match (role.as_str(), request.as_str()) {
            ("lies", _) => "SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(),
            ("not_started", "GET /") => good(r#"{"state":"Not started"}"#),
            (_, "GET /") => good(r#"{"state":"Running"}"#),
            ("refuses", _) => {
                let words =
                    r#"{"fault_message":"The requested operation is not supported: \u001b[2J"}"#;
                format!(
                    "HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{words}",
                    words.len()
                )
            }
            _ => "HTTP/1.1 204 \r\n\r\n".to_owned(),
        };
        stream.write_all(answer.as_bytes()).unwrap();
        if request == "PUT /actions" {
            // What our PID 1 says to a ctrl-alt-del.
            print!("hutch: {}\r\n", role.replace('_', " "));
            std::io::stdout().flush().unwrap();
            std::process::exit(0);
        }
    }
}

fn good(body: &str) -> String {
    format!(
        "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Method and path, once all of the head has come.
fn request(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    head.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// The error of a start that must fail and leave nothing.
async fn refused(lab: &Lab) -> Error {
    let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    if let Ok(record) = std::fs::read(lab.dir.file("run/shim.json")) {
        let record: Value = serde_json::from_slice(&record).unwrap();
        for who in ["shim", "vmm"] {
            assert!(!alive(record[who]["pid"].as_u64().unwrap() as u32), "{who}");
        }
    }
    error
}

#[tokio::test]
async fn a_reset_is_what_the_guest_said_before() {
    for (role, exit) in [
        ("power_off", Exit::PowerOff),
        ("reboot", Exit::Reboot),
        ("says_nothing", Exit::Reboot),
    ] {
        let lab = lab(&played(role)).await;
        let process = lab.start().await;
        lab.runtime.pause(&lab.dir).await.unwrap();
        lab.runtime.resume(&lab.dir).await.unwrap();
        lab.runtime.stop(&lab.dir).await.unwrap();
        assert_eq!(process.wait().await.exit, exit, "{role}");
        match lab.runtime.adopt(&lab.dir).await.unwrap() {
            Adopted::Exited(report) => assert_eq!(report.exit, exit),
            other => panic!("{other:?}"),
        }
        let gone = lab.runtime.pause(&lab.dir).await;
        assert!(matches!(gone, Err(Error::NotRunning { .. })), "{gone:?}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_its_words() {
    let lab = lab(&played("refuses")).await;
    let process = lab.start().await;
    let error = lab.runtime.pause(&lab.dir).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "/vm: The requested operation is not supported: ?[2J"
    );
    process.kill().await.unwrap();
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
    for role in ["lies", "not_started", "points_elsewhere"] {
        let lab = lab(&played(role)).await;
        let error = refused(&lab).await;
        assert!(matches!(error, Error::Monitor { .. }), "{role}: {error}");
    }
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_a_way_out() {
    let lab = lab("exec sleep 600").await;
    let program = lab.dir.file("vmm.sh");

    std::fs::write(lab.dir.file(MachineDir::KERNEL), "MZ, as a bzImage begins").unwrap();
    let error = refused(&lab).await;
    assert!(error.to_string().contains("no ELF file"), "{error}");

    let without = runtime(&program, "tcg");
    let info = without.probe().await;
    assert!(!info.usable);
    assert_eq!(info.version.as_deref(), Some("1.16.1"));
    let error = without.start(&lab.dir, &lab.spec).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");

    std::fs::write(&program, "#!/bin/sh\necho Firecracker v1.10.1\n").unwrap();
    for program in [program.as_path(), Path::new("/nonexistent/firecracker")] {
        let error = runtime(program, "kvm").start(&lab.dir, &lab.spec).await;
        let hint = error.unwrap_err().hint();
        assert_eq!(hint.as_deref(), Some("hutch runtime install firecracker"));
    }
    assert!(!lab.dir.file("run").exists(), "nothing was started");
}
