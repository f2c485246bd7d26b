//! A Firecracker that resets, refuses, lies or points elsewhere: a script that this test program plays the VMM for.

use std::io::Write;
use std::os::unix::net::UnixListener;

use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error, MachineDir};
use serde_json::Value;

use crate::lab::Lab;
use crate::scripted::{self, answer, refused, request};

const VERSION: &str = "Firecracker v1.16.1";
/// How the VMM below behaves; the test that it is does nothing without it.
const PLAY: &str = "HUTCH_TEST_PLAY_FIRECRACKER";
const SOCKET: &str = "run/vmm/api.sock";

/// A machine whose VMM plays `role`, in this program.
async fn lab(role: &str) -> Lab {
    let this = std::env::current_exe().unwrap();
    let body = format!(
        "{PLAY}={role} exec {} --exact firecracker::vmm_that_plays_a_role --nocapture",
        this.display()
    );
    scripted::lab("firecracker", VERSION, &body).await
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
        let response = match (role.as_str(), request.as_str()) {
            ("lies", _) => "SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(),
            ("not_started", "GET /") => answer(200, r#"{"state":"Not started"}"#),
            (_, "GET /") => answer(200, r#"{"state":"Running"}"#),
            ("refuses", _) => {
                let words =
                    r#"{"fault_message":"The requested operation is not supported: \u001b[2J"}"#;
                answer(400, words)
            }
            _ => "HTTP/1.1 204 \r\n\r\n".to_owned(),
        };
        stream.write_all(response.as_bytes()).unwrap();
        if request == "PUT /actions" {
            // What our PID 1 says to a ctrl-alt-del.
            print!("hutch: {}\r\n", role.replace('_', " "));
            std::io::stdout().flush().unwrap();
            std::process::exit(0);
        }
    }
}

#[tokio::test]
async fn a_reset_is_what_the_guest_said_before() {
    for (role, exit) in [
        ("power_off", Exit::PowerOff),
        ("reboot", Exit::Reboot),
        ("says_nothing", Exit::Reboot),
    ] {
        let lab = lab(role).await;
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
    let lab = lab("refuses").await;
    let process = lab.start().await;
    let error = lab.runtime.pause(&lab.dir).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "/vm: The requested operation is not supported: ?[2J"
    );
    process.kill().await.unwrap();
}

#[tokio::test]
async fn a_vmm_that_lies_is_not_believed() {
    for role in ["lies", "not_started", "points_elsewhere"] {
        let lab = lab(role).await;
        let error = refused(&lab).await;
        assert!(matches!(error, Error::Monitor { .. }), "{role}: {error}");
    }
}

#[tokio::test]
async fn a_kernel_that_it_cannot_boot_is_refused() {
    let lab = scripted::lab("firecracker", VERSION, "exec sleep 600").await;
    std::fs::write(lab.dir.file(MachineDir::KERNEL), "MZ, as a bzImage begins").unwrap();
    let error = refused(&lab).await;
    assert!(error.to_string().contains("no ELF file"), "{error}");
    assert!(!lab.dir.file("run").exists(), "nothing was started");
}
