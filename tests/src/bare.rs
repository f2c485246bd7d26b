//! What the benches measure ours against: the same VMM with the same arguments and files, and nothing else of ours.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use hutch_contract::exec::Exec;
use hutch_guest::session::{Configure, Output, Session, StartProcess};
use serde_json::Value;
use tokio::process::Command;

/// Cloud Hypervisor's API, which it makes itself here.
pub const API: &str = "run/api.sock";
/// The first command.
pub const BOOT_ID: [&str; 2] = ["cat", "/proc/sys/kernel/random/boot_id"];

/// The first command, as the server runs it: a guest runs none before it knows what it is.
pub async fn first_exec(session: &Session) -> String {
    let identity = Configure {
        machine_id: "bare".to_owned(),
        boot_nonce: [1; 16],
        entropy: vec![1; 64],
        grow_root: true,
        ..Configure::default()
    };
    session.configure(&identity).await.unwrap();
    let process = StartProcess {
        process_id: "first".to_owned(),
        argv: BOOT_ID.map(str::to_owned).to_vec(),
        ..StartProcess::default()
    };
    session.start(&process).await.unwrap();
    let mut output = session.attach("first", 0, true).await.unwrap();
    let mut stdout = Vec::new();
    while let Some(part) = output.next().await {
        match part.unwrap() {
            Output::Chunk(chunk) => stdout.extend_from_slice(&chunk.data),
            Output::Dropped(_) => {}
            Output::Exit(_) => break,
        }
    }
    String::from_utf8(stdout).unwrap().trim().to_owned()
}

/// Copies a file with its holes.
pub async fn copy(from: &Path, to: &Path) {
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always").args([from, to]);
    assert!(copy.status().await.unwrap().success(), "{from:?}");
}

/// The VMM's arguments with paths where the shim gives it descriptors.
pub fn with_paths(launch: &Value) -> Vec<String> {
    let mut argv: Vec<String> = serde_json::from_value(launch["argv"].clone()).unwrap();
    let sockets = launch["listen"].as_array().unwrap();
    for argument in &mut argv {
        for socket in sockets {
            let (fd, path) = (
                format!("fd={},", socket["fd"]),
                socket["path"].as_str().unwrap(),
            );
            *argument = argument.replace(&fd, &format!("path={path},"));
        }
        // Cloud Hypervisor's API and events, as whole arguments.
        if argument.starts_with("fd=") {
            *argument = format!(
                "path={}",
                if argument == "fd=3" { API } else { "/dev/null" }
            );
        }
        if let Some(fd) = launch["monitor"]["fd"].as_i64()
            && argument.ends_with(&format!("fd={fd}"))
        {
            *argument = "null,id=events".to_owned();
        }
    }
    argv
}

/// A command without anything special.
pub fn command(words: &[&str]) -> Exec {
    Exec {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        env: Default::default(),
        cwd: None,
        user: None,
        stdin_base64: None,
        timeout_ms: Some(60_000),
    }
}

/// The time in the middle.
pub fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// In milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
