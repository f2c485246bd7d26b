//! `cargo xtask bench boot`: create to first exec through the server, against the same QEMU started bare, in turn.
//!
//! Bare means: the arguments that the server gave to QEMU, the same files, and nothing else of ours. The clock of the
//! bare side ends with the agent's first answer; that of the server with the answer to a first exec.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use hutch_contract::exec::Exec;
use hutch_guest::session::Session;
use hutch_tests::{Lab, Runtime, lab};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(120);
const EXECS: usize = 200;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = || arguments.next().and_then(|text| text.parse::<u32>().ok());
    let (rounds, machines) = (number().unwrap_or(10), number().unwrap_or(20));
    let lab = lab!(Runtime::Qemu).env("HUTCH_LOG", "warn").start().await;
    lab.busybox().await;
    let bare = Bare::of(&lab).await;

    let (mut alone, mut served) = (Vec::new(), Vec::new());
    let mut boots = std::collections::BTreeSet::new();
    for round in 0..rounds {
        let (took, boot_id) = bare.boot().await;
        alone.push(took);
        boots.insert(boot_id);
        let (took, boot_id) = through(&lab, &format!("bench-{round}")).await;
        served.push(took);
        boots.insert(boot_id);
    }
    assert_eq!(
        boots.len(),
        2 * rounds as usize,
        "each was a boot of its own"
    );
    let (alone, served) = (median(&mut alone), median(&mut served));
    let ratio = served.as_secs_f64() / alone.as_secs_f64();
    println!(
        "bare boot to first answer    p50 {:>9.1} ms over {rounds}",
        ms(alone)
    );
    println!(
        "create --cold to first exec  p50 {:>9.1} ms ratio {ratio:.2}",
        ms(served)
    );

    lab.create("exec").await;
    let mut execs = Vec::new();
    for _ in 0..EXECS {
        let start = Instant::now();
        lab.client()
            .exec("exec", &command(&["true"]))
            .await
            .unwrap();
        execs.push(start.elapsed());
    }
    println!(
        "exec of true over HTTP       p50 {:>9.1} ms over {EXECS}",
        ms(median(&mut execs))
    );
    memory(&lab, machines).await;
    lab.finish().await;
}

/// What the server itself takes with so many machines, or with as many as the host has room for.
async fn memory(lab: &Lab, machines: u32) {
    let empty = resident_kib(lab.server_pid());
    let mut running = 1;
    while running < machines {
        let request = lab.request(&format!("memory-{running}"));
        match lab.client().create(&request, None, Some(LIMIT)).await {
            Ok(_) => running += 1,
            Err(error) => {
                println!("no more than {running} machines here: {error}");
                break;
            }
        }
    }
    let full = resident_kib(lab.server_pid());
    let (empty, full) = (empty / 1024, full / 1024);
    println!("server's memory              with 1 machine {empty} MiB, with {running} {full} MiB");
}

/// Create, wait for nothing, exec: what a user does who wants an answer from a new machine.
async fn through(lab: &Lab, name: &str) -> (Duration, String) {
    let client = lab.client();
    let start = Instant::now();
    client.create(&lab.request(name), None, None).await.unwrap();
    let read = client
        .exec(name, &command(&["cat", "/proc/sys/kernel/random/boot_id"]))
        .await;
    let took = start.elapsed();
    client.delete(name, Some(LIMIT)).await.unwrap();
    (took, read.unwrap().stdout.trim().to_owned())
}

/// A machine's files and QEMU's arguments, without a server.
struct Bare {
    dir: PathBuf,
    argv: Vec<String>,
}

impl Bare {
    /// Takes those of a machine that the server has booted.
    async fn of(lab: &Lab) -> Bare {
        let machine = lab.create("bare").await;
        let theirs = lab.machine_dir(&machine);
        let launch = fs::read(theirs.join("run/launch.json")).unwrap();
        lab.client().stop("bare", Some(LIMIT)).await.unwrap();
        let dir = lab.dir.join("bare");
        fs::create_dir_all(dir.join("run")).unwrap();
        for file in ["disk.raw", "kernel", "initramfs", "modules.img"] {
            let mut copy = Command::new("cp");
            copy.arg("--sparse=always")
                .arg(theirs.join(file))
                .arg(dir.join(file));
            assert!(copy.status().await.unwrap().success(), "{file}");
        }
        lab.client().delete("bare", Some(LIMIT)).await.unwrap();
        Bare {
            argv: with_paths(&serde_json::from_slice(&launch).unwrap()),
            dir,
        }
    }

    /// Boots it once.
    async fn boot(&self) -> (Duration, String) {
        let socket = self.dir.join("run/agent.sock");
        drop(fs::remove_file(&socket));
        let mut qemu = Command::new(&self.argv[0]);
        qemu.args(&self.argv[1..])
            .current_dir(&self.dir)
            .kill_on_drop(true);
        qemu.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let start = Instant::now();
        let mut qemu = qemu.spawn().unwrap();
        let session = tokio::time::timeout(LIMIT, answer(&mut qemu, &socket))
            .await
            .unwrap();
        let took = start.elapsed();
        let boot_id = session.hello().boot_id.clone();
        qemu.kill().await.unwrap();
        (took, boot_id)
    }
}

/// The agent's first answer.
async fn answer(qemu: &mut Child, socket: &Path) -> Session {
    loop {
        assert!(qemu.try_wait().unwrap().is_none(), "qemu ended");
        if let Ok(stream) = UnixStream::connect(socket).await {
            let link = hutch_guest::link::connect(stream, LIMIT).await.unwrap();
            return Session::open(link, LIMIT).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// QEMU's arguments with paths where the shim gives it descriptors.
fn with_paths(launch: &Value) -> Vec<String> {
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
        if let Some(fd) = launch["monitor"]["fd"].as_i64()
            && argument.ends_with(&format!("fd={fd}"))
        {
            *argument = "null,id=events".to_owned();
        }
    }
    argv
}

fn command(words: &[&str]) -> Exec {
    Exec {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        env: Default::default(),
        cwd: None,
        user: None,
        stdin_base64: None,
        timeout_ms: Some(60_000),
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
