//! `cargo xtask bench snapshot`: what warm starts, snapshots and forks of QEMU's machines cost, and how many machines there can
//! be. Arguments: rounds, machines (0: they are not counted).
//!
//! A warm start is held against the same VMM going on from the same files, started bare, in turn, and against a boot through
//! the server.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use hutch_contract::machine::{CreateMachine, Machine};
use hutch_contract::snapshot::{Copied, CreateSnapshot, ForkMachine, Snapshot};
use hutch_guest::session::Session;
use hutch_tests::bare::{BOOT_ID, command, copy, first_exec, median, ms, with_paths};
use hutch_tests::{Lab, Runtime, lab, resident_kib, wait_until};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(300);
/// Below a machine's directory.
const AGENT: &str = "run/agent.sock";
const MONITOR: &str = "run/qmp.sock";
const DISK: &str = "disk.raw";
/// Of the machines whose memory is looked at.
const MEMORY_MIB: u32 = 256;
const DIRTIED_MIB: u32 = 32;
const FORKS: u32 = 20;

#[tokio::main]
async fn main() {
    let number = |at: usize| std::env::args().nth(at)?.parse::<u32>().ok();
    let (rounds, machines) = (number(1).unwrap_or(10), number(2).unwrap_or(100));
    let lab = lab!(Runtime::Qemu).env("HUTCH_LOG", "warn").start().await;
    lab.busybox().await;
    starts(&lab, rounds).await;
    snapshots(&lab, rounds).await;
    forks(&lab).await;
    if machines > 0 {
        many(&lab, machines).await;
    }
    lab.finish().await;
}

/// Creates a machine and waits until it runs.
async fn create(lab: &Lab, name: &str, cold: bool) -> Machine {
    let request = CreateMachine {
        cold,
        memory_mib: Some(MEMORY_MIB),
        ..lab.request(name)
    };
    lab.client()
        .create(&request, None, Some(LIMIT))
        .await
        .unwrap()
}

/// Create, wait for nothing, exec: what a user does who wants an answer from a new machine.
async fn through(lab: &Lab, name: &str, cold: bool) -> Duration {
    let request = CreateMachine {
        cold,
        memory_mib: Some(MEMORY_MIB),
        ..lab.request(name)
    };
    let client = lab.client();
    let start = Instant::now();
    client.create(&request, None, None).await.unwrap();
    client.exec(name, &command(&BOOT_ID)).await.unwrap();
    let took = start.elapsed();
    assert_eq!(client.machine(name).await.unwrap().warm, !cold);
    client.delete(name, Some(LIMIT)).await.unwrap();
    took
}

async fn starts(lab: &Lab, rounds: u32) {
    create(lab, "first", false).await;
    let templates = ["pool/templates", "templates"].map(|dir| lab.data_dir().join(dir));
    let templates = templates.iter().find(|dir| dir.exists()).unwrap();
    let whole = || {
        let dirs = fs::read_dir(templates)
            .unwrap()
            .map(|dir| dir.unwrap().path());
        dirs.into_iter()
            .find(|dir| dir.join("manifest.json").exists())
    };
    wait_until("there is a template", LIMIT, async || whole().is_some()).await;
    let bare = Bare::of(lab, &whole().unwrap()).await;
    let (mut alone, mut warm, mut cold) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        alone.push(bare.go_on().await);
        warm.push(through(lab, &format!("warm-{round}"), false).await);
        cold.push(through(lab, &format!("cold-{round}"), true).await);
    }
    println!("{rounds} rounds in turn, in ms");
    for (what, times) in [
        ("bare restore to first exec", &mut alone),
        ("create to first exec, warm", &mut warm),
        ("create to first exec, cold", &mut cold),
    ] {
        let middle = median(times);
        println!(
            "{what:<34} p50 {:>9.1}  best {:>9.1}",
            ms(middle),
            ms(times[0])
        );
    }
    let ratio =
        |a: &mut [Duration], b: &mut [Duration]| median(a).as_secs_f64() / median(b).as_secs_f64();
    println!(
        "warm start over bare restore       ratio {:.2}",
        ratio(&mut warm, &mut alone)
    );
    println!(
        "cold start over warm start         ratio {:.2}",
        ratio(&mut cold, &mut warm)
    );
}

/// A machine that goes on from a template, without a server.
struct Bare {
    dir: PathBuf,
    template: PathBuf,
    size: u64,
    argv: Vec<String>,
}

impl Bare {
    /// Takes the arguments of a machine that the server let go on.
    async fn of(lab: &Lab, template: &Path) -> Bare {
        let machine = create(lab, "bare", false).await;
        assert!(machine.warm);
        let theirs = lab.machine_dir(&machine);
        let launch = fs::read(theirs.join("run/launch.json")).unwrap();
        let launch: Value = serde_json::from_slice(&launch).unwrap();
        let size = fs::metadata(theirs.join(DISK)).unwrap().len();
        let dir = lab.dir.join("bare");
        fs::create_dir_all(dir.join("run")).unwrap();
        for file in ["kernel", "initramfs", "modules.img"] {
            copy(&theirs.join(file), &dir.join(file)).await;
        }
        lab.client().delete("bare", Some(LIMIT)).await.unwrap();
        // Its descriptors are what a shell opens, so it may not be kept from having any.
        let sandbox = |argv: Vec<String>| {
            let at = argv.iter().position(|word| word == "-sandbox");
            match at {
                Some(at) => [&argv[..at], &argv[at + 2..]].concat(),
                None => argv,
            }
        };
        Bare {
            argv: sandbox(with_paths(&launch)),
            template: template.to_owned(),
            dir,
            size,
        }
    }

    /// The time to the answer of its first command.
    async fn go_on(&self) -> Duration {
        for socket in [AGENT, MONITOR] {
            drop(fs::remove_file(self.dir.join(socket)));
        }
        let memory = self.dir.join("memory");
        if !memory.exists() {
            copy(&self.template.join("memory"), &memory).await;
        }
        let disk = self.dir.join(DISK);
        let start = Instant::now();
        copy(&self.template.join(DISK), &disk).await;
        let made = fs::File::options().write(true).open(&disk).unwrap();
        made.set_len(self.size).unwrap();
        let state = self.template.join("state");
        let opened = format!("exec 8<>memory 9<{} \"$@\"", state.display());
        let mut vmm = Command::new("sh");
        vmm.args(["-c", &opened, "sh"])
            .args(&self.argv)
            .current_dir(&self.dir)
            .kill_on_drop(true);
        vmm.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut vmm = vmm.spawn().unwrap();
        let answered = async {
            self.execute().await;
            let stream = connect(&self.dir.join(AGENT)).await;
            let link = hutch_guest::link::connect(stream, LIMIT).await.unwrap();
            let session = Session::open(link, LIMIT).await.unwrap();
            first_exec(&session).await
        };
        tokio::time::timeout(LIMIT, answered).await.unwrap();
        let took = start.elapsed();
        vmm.kill().await.unwrap();
        took
    }

    /// Lets its guest execute.
    async fn execute(&self) {
        let (from, mut to) = connect(&self.dir.join(MONITOR)).await.into_split();
        let mut lines = BufReader::new(from).lines();
        for command in ["qmp_capabilities", "cont"] {
            let order = format!("{{\"execute\": \"{command}\"}}\n");
            to.write_all(order.as_bytes()).await.unwrap();
            loop {
                let line = lines.next_line().await.unwrap().unwrap();
                let line: Value = serde_json::from_str(&line).unwrap();
                assert!(line["error"].is_null(), "{line}");
                if !line["return"].is_null() {
                    break;
                }
            }
        }
    }
}

async fn connect(socket: &Path) -> UnixStream {
    loop {
        if let Ok(stream) = UnixStream::connect(socket).await {
            return stream;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bytes of the file system that the disks are on that are taken.
fn taken(lab: &Lab) -> u64 {
    let pool = lab.data_dir().join("pool");
    let place = if pool.exists() { pool } else { lab.data_dir() };
    let dir = fs::File::open(&place).unwrap();
    rustix::fs::syncfs(&dir).unwrap();
    let stat = rustix::fs::fstatvfs(&dir).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

async fn take(lab: &Lab, machine: &str, memory: bool) -> (Snapshot, u64) {
    let before = taken(lab);
    let request = CreateSnapshot { name: None, memory };
    let client = lab.client();
    let taking = client.take_snapshot(machine, &request, Some(LIMIT));
    let snapshot = taking.await.unwrap();
    (snapshot, taken(lab).saturating_sub(before))
}

async fn snapshots(lab: &Lab, rounds: u32) {
    assert!(create(lab, "web", false).await.warm);
    let write = "mkdir -p /dirty && mount -t tmpfs none /dirty && dd if=/dev/urandom of=/dirty/file bs=1M count=";
    let wrote = lab.sh("web", &format!("{write}{DIRTIED_MIB}")).await;
    assert_eq!(wrote.exit.exit_code, 0, "{}", wrote.stderr);
    for memory in [false, true] {
        let (mut stood, mut new) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (snapshot, bytes) = take(lab, "web", memory).await;
            stood.push(Duration::from_micros(snapshot.pause_us.unwrap()));
            new.push(bytes);
            let timings = snapshot.timings.iter();
            let steps: Vec<_> = timings
                .map(|step| format!("{} {}", step.phase, step.took_us))
                .collect();
            println!("  µs: {}", steps.join(", "));
            lab.client()
                .delete_snapshot(snapshot.id.as_str())
                .await
                .unwrap();
        }
        new.sort();
        let what = if memory {
            "with memory, 32 MiB dirtied"
        } else {
            "of the disk"
        };
        println!(
            "snapshot {what:<27} stood still p50 {:.1} ms, best {:.1} ms; new space p50 {:.1} MiB",
            ms(median(&mut stood)),
            ms(stood[0]),
            new[new.len() / 2] as f64 / f64::from(1 << 20)
        );
    }
    lab.client().delete("web", Some(LIMIT)).await.unwrap();
}

async fn forks(lab: &Lab) {
    create(lab, "parent", false).await;
    let request = ForkMachine {
        count: Some(FORKS),
        memory: true,
        name_prefix: Some("copy".parse().unwrap()),
        ..ForkMachine::default()
    };
    let start = Instant::now();
    let client = lab.client();
    let forked = client.fork("parent", &request, Some(LIMIT), None);
    let forked = forked.await.unwrap();
    let running = start.elapsed();
    let (mut own, mut shares) = (Vec::new(), Vec::new());
    for copy in &forked.copies {
        let Copied::Machine(machine) = copy else {
            panic!("{copy:?}")
        };
        let name = machine.name.as_str();
        let said = lab.client().exec(name, &command(&["hostname"])).await;
        assert_eq!(said.unwrap().stdout.trim(), name);
        let (private_kib, pss_kib) = memory_of(lab, machine);
        own.push(private_kib);
        shares.push(pss_kib);
    }
    own.sort();
    shares.sort();
    let middle = |all: &[u64]| all[all.len() / 2] as f64 / 1024.0;
    println!(
        "fork x{FORKS}: all run after {:.0} ms; own memory of the guest's p50 {:.1} MiB, ratio {:.3} of {MEMORY_MIB} MiB; the whole process' share (PSS) p50 {:.1} MiB",
        ms(running),
        middle(&own),
        middle(&own) / f64::from(MEMORY_MIB),
        middle(&shares)
    );
    for machine in lab.client().all_machines(None).await.unwrap() {
        lab.client()
            .delete(machine.name.as_str(), Some(LIMIT))
            .await
            .unwrap();
    }
}

/// KiB of the guest's memory that are its VMM's own, and what the VMM takes in all, shared pages counted in part.
fn memory_of(lab: &Lab, machine: &Machine) -> (u64, u64) {
    let record = fs::read(lab.machine_dir(machine).join("run/shim.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let pid = &record["vmm"]["pid"];
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut own, mut pss, mut guest) = (0, 0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let kib = || {
            line.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap()
        };
        match first {
            "Pss:" => pss += kib(),
            "Private_Clean:" | "Private_Dirty:" if guest => own += kib(),
            _ if !first.ends_with(':') => guest = line.contains("memfd:hutch-memory"),
            _ => {}
        }
    }
    (own, pss)
}

/// As many machines as are wanted, all of which answer.
async fn many(lab: &Lab, machines: u32) {
    let start = Instant::now();
    let mut running = 0;
    while running < machines {
        let request = CreateMachine {
            memory_mib: Some(128),
            ..lab.request(&format!("many-{running}"))
        };
        let request = CreateMachine {
            cold: false,
            ..request
        };
        match lab.client().create(&request, None, Some(LIMIT)).await {
            Ok(_) => running += 1,
            Err(error) => {
                println!("no more than {running} machines here: {error}");
                break;
            }
        }
    }
    let made = start.elapsed();
    let mut answers = Vec::new();
    for number in 0..running {
        let start = Instant::now();
        let name = format!("many-{number}");
        let said = lab.client().exec(&name, &command(&["hostname"])).await;
        assert_eq!(said.unwrap().stdout.trim(), name);
        answers.push(start.elapsed());
    }
    println!(
        "{running} machines of 128 MiB in {:.0} s; exec p50 {:.0} ms; the server's memory {} MiB",
        made.as_secs_f64(),
        ms(median(&mut answers)),
        resident_kib(lab.server_pid()) / 1024
    );
}
