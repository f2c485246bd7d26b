//! A VMM with an API that is a script, and what this test program plays for it. What any VMM may do wrong is in
//! `faults.rs`; what is each one's own is in the runtimes' files.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use hutch_contract::error::Kind;
use hutch_runtime::{Error, MachineDir};
use serde_json::Value;

use crate::lab::{Lab, alive, runtime_with};

/// A machine whose VMM tells its version and then does this, where KVM is said to be.
pub async fn lab(runtime: &str, version: &str, body: &str) -> Lab {
    let mut lab = Lab::new("stub").await.unwrap();
    let program = lab.dir.file("vmm.sh");
    let text = format!("#!/bin/sh\n[ \"$1\" = --version ] && echo {version} && exit\n{body}\n");
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(lab.dir.file(MachineDir::KERNEL), b"\x7fELF").unwrap();
    accelerated_by(&mut lab, runtime, "kvm");
    // Another user may not be able to run this program.
    lab.spec.user = None;
    lab
}

fn accelerated_by(lab: &mut Lab, runtime: &str, acceleration: &str) {
    let program = lab.dir.file("vmm.sh");
    lab.runtime = runtime_with(runtime, |config| {
        config.program = Some(program);
        config.acceleration = Some(acceleration.into());
    });
}

/// The error of a start that must fail and leave nothing.
pub async fn refused(lab: &Lab) -> Error {
    let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    if let Ok(record) = std::fs::read(lab.dir.file("run/shim.json")) {
        let record: Value = serde_json::from_slice(&record).unwrap();
        for who in ["shim", "vmm"] {
            assert!(!alive(record[who]["pid"].as_u64().unwrap() as u32), "{who}");
        }
    }
    error
}

/// Method and path of a request, once all of its head has come.
pub fn request(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    head.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// An answer with a body.
pub fn answer(status: u16, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{body}")
}

#[tokio::test]
async fn without_kvm_nothing_is_started() {
    for (name, version) in [("firecracker", "1.16.1"), ("cloud-hypervisor", "53.0.0")] {
        let mut lab = lab(name, &format!("{name} v{version}"), "exec sleep 600").await;
        accelerated_by(&mut lab, name, "tcg");
        let info = lab.runtime.probe().await;
        assert!(!info.usable);
        assert_eq!(info.version.as_deref(), Some(version));
        let error = refused(&lab).await;
        assert!(matches!(error, Error::Unusable { .. }), "{error}");
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(!lab.dir.file("run").exists(), "nothing was started");
    }
}
