//! What tells a machine from the image and the machine that its disk comes from.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use hutch_tests::{Lab, Runtime, lab};

const KEYGEN: &str = "/usr/bin/ssh-keygen";
const KEYS: [&str; 2] = [
    "/etc/ssh/ssh_host_ed25519_key",
    "/etc/ssh/ssh_host_ecdsa_key",
];

/// Puts a program of the host into a machine, with all that it is linked to.
async fn put_program(lab: &Lab, machine: &str, program: &str) {
    let linked = Command::new("ldd").arg(program).output().unwrap();
    let linked = String::from_utf8(linked.stdout).unwrap();
    let words = linked.split_whitespace();
    let files = words.filter(|word| word.starts_with('/')).chain([program]);
    for file in files {
        let parent = Path::new(file).parent().unwrap().display();
        let made = lab.sh(machine, &format!("mkdir -p {parent}")).await;
        assert_eq!(made.exit.exit_code, 0, "{}", made.stderr);
        let target = format!("{machine}:{file}");
        lab.hutch(&["cp", file, &target]).await.good();
    }
    let run = lab
        .sh(machine, &format!("chmod 755 {program} /lib*/ld-*"))
        .await;
    assert_eq!(run.exit.exit_code, 0, "{}", run.stderr);
}

async fn host_keys(lab: &Lab, machine: &str) -> Vec<String> {
    let public = KEYS.map(|key| format!("{key}.pub")).join(" ");
    let read = lab.sh(machine, &format!("cut -d' ' -f2 {public}")).await;
    assert_eq!(read.exit.exit_code, 0, "{}", read.stderr);
    read.stdout.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn copies_have_ssh_host_keys_of_their_own_with_qemu() {
    let lab = lab!(Runtime::Qemu).start().await;
    if !Path::new(KEYGEN).exists() {
        println!("skipped: {KEYGEN} is not installed");
        return lab.finish().await;
    }
    lab.busybox().await;
    lab.create("web").await;
    put_program(&lab, "web", KEYGEN).await;
    for key in KEYS {
        let kind = key.split('_').nth(2).unwrap();
        let make = format!("mkdir -p /etc/ssh && {KEYGEN} -q -N '' -t {kind} -f {key}");
        let made = lab.sh("web", &make).await;
        assert_eq!(made.exit.exit_code, 0, "{}", made.stderr);
    }
    let its = host_keys(&lab, "web").await;
    lab.hutch(&["fork", "web", "-n", "2", "--prefix", "copy"])
        .await
        .good();
    lab.hutch(&["restart", "web"]).await.good();
    assert_eq!(host_keys(&lab, "web").await, its, "it is still itself");
    let mut all = its;
    for copy in ["copy-1", "copy-2"] {
        let machine = lab.client().machine(copy).await.unwrap();
        assert_eq!(machine.unapplied, [""; 0]);
        all.extend(host_keys(&lab, copy).await);
    }
    let different: BTreeSet<_> = all.iter().collect();
    assert_eq!(
        (all.len(), different.len()),
        (3 * KEYS.len(), all.len()),
        "{all:?}"
    );
    lab.finish().await;
}
