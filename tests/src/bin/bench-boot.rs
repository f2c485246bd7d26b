//! `cargo xtask bench boot` and `lab bench`: create to first exec through the server, against the same VMM started bare,
//! in turn. Arguments: rounds, machines (0: only boots are measured), runtime.
//!
//! Bare means: the arguments that the server gave to the VMM, the same files, and nothing else of ours. Both sides boot a
//! disk that nothing has booted, and run the same first command. The bare side's clock is read at the agent's first
//! answer, too: what comes after that is the guest's own work, which is much where everything is emulated.
//!
//! Beside the median stands the best of all rounds: on a machine with neighbours the same boot can take half as long
//! again, and the best is the least disturbed.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hutch_guest::session::Session;
use hutch_tests::bare::{API, BOOT_ID, command, copy, first_exec, median, ms, with_paths};
use hutch_tests::{Lab, Runtime, lab, resident_kib};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(120);
/// Tries over vsock at the same time, and the pauses between them: as the server has them. A guest that has not set it up
/// loses what was sent, and one that is asked too often boots slowly.
const OPEN: usize = 4;
const BESIDE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));
const AGAIN: Duration = Duration::from_millis(5);
const EXECS: usize = 200;
/// The root disk, of a machine and of an image.
const DISK: &str = "disk.raw";
/// The way to the agent, below a machine's directory: of QEMU, and of those with vsock.
const AGENT: &str = "run/agent.sock";
const VSOCK: &str = "run/vmm/vsock.sock";
/// What VMMs make and leave.
const SOCKETS: [&str; 4] = [AGENT, VSOCK, API, "run/vmm/api.sock"];

#[tokio::main]
async fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at)?.parse::<u32>().ok();
    let (rounds, machines) = (number(0).unwrap_or(10), number(1).unwrap_or(20));
    let name = arguments.get(2).map_or("qemu", String::as_str);
    let runtime = Runtime::named(name).unwrap_or_else(|| panic!("there is no runtime {name}"));
    let lab = lab!(runtime).env("HUTCH_LOG", "warn").start().await;
    lab.busybox().await;
    let bare = Bare::of(&lab).await;

    let (mut answered, mut alone, mut served) = (Vec::new(), Vec::new(), Vec::new());
    let mut phases = Phases::default();
    let mut boots = std::collections::BTreeSet::new();
    for round in 0..rounds {
        let (first, took, boot_id) = bare.boot().await;
        answered.push(first);
        alone.push(took);
        boots.insert(boot_id);
        let (took, boot_id) = through(&lab, &format!("bench-{round}"), &mut phases).await;
        served.push(took);
        boots.insert(boot_id);
    }
    assert_eq!(
        boots.len(),
        2 * rounds as usize,
        "each was a boot of its own"
    );
    println!("{name}: {rounds} rounds in turn, in ms");
    for (what, times) in [
        ("bare boot to first answer", &mut answered),
        ("bare boot to first exec", &mut alone),
        ("create --cold to first exec", &mut served),
    ] {
        println!(
            "{name}: {what:<28} p50 {:>9.1}  best {:>9.1}",
            ms(median(times)),
            ms(times[0])
        );
    }
    let ratio = |bare: &[Duration], at: usize| served[at].as_secs_f64() / bare[at].as_secs_f64();
    for (what, bare) in [("exec", &alone), ("answer", &answered)] {
        println!(
            "{name}: ratio to bare {what:<14} p50 {:>9.2}  best {:>9.2}",
            ratio(bare, bare.len() / 2),
            ratio(bare, 0)
        );
    }
    phases.print(name);
    if machines == 0 {
        lab.finish().await;
        return;
    }

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
async fn through(lab: &Lab, name: &str, phases: &mut Phases) -> (Duration, String) {
    let client = lab.client();
    let start = Instant::now();
    client.create(&lab.request(name), None, None).await.unwrap();
    let created = start.elapsed();
    let read = client.exec(name, &command(&BOOT_ID)).await;
    let took = start.elapsed();
    let machine = client.machine(name).await.unwrap();
    phases.add("create", created);
    for timing in &machine.timings {
        phases.add(&timing.phase, Duration::from_micros(timing.took_us));
    }
    client.delete(name, Some(LIMIT)).await.unwrap();
    (took, read.unwrap().stdout.trim().to_owned())
}

/// What the server says of where its time went.
#[derive(Default)]
struct Phases(Vec<(String, Vec<Duration>)>);

impl Phases {
    fn add(&mut self, phase: &str, took: Duration) {
        match self.0.iter_mut().find(|(name, _)| name == phase) {
            Some((_, all)) => all.push(took),
            None => self.0.push((phase.to_owned(), vec![took])),
        }
    }

    fn print(mut self, name: &str) {
        let each = self.0.iter_mut();
        let each = each.map(|(phase, took)| format!("{phase} {:.1}", ms(median(took))));
        let each: Vec<_> = each.collect();
        println!("{name}: the server's part, p50: {}", each.join(", "));
    }
}

/// A machine's files and its VMM's arguments, without a server.
struct Bare {
    runtime: Runtime,
    dir: PathBuf,
    /// The image's disk, and the size of a machine's.
    disk: (PathBuf, u64),
    argv: Vec<String>,
}

impl Bare {
    /// Takes those of a machine that the server has booted.
    async fn of(lab: &Lab) -> Bare {
        let machine = lab.create("bare").await;
        let theirs = lab.machine_dir(&machine);
        let launch = fs::read(theirs.join("run/launch.json")).unwrap();
        let launch: Value = serde_json::from_slice(&launch).unwrap();
        lab.client().stop("bare", Some(LIMIT)).await.unwrap();
        let dir = lab.dir.join("bare");
        fs::create_dir_all(dir.join("run/vmm")).unwrap();
        for (file, text) in launch["files"].as_object().into_iter().flatten() {
            fs::write(dir.join(file), text.as_str().unwrap()).unwrap();
        }
        for file in ["kernel", "initramfs", "modules.img"] {
            copy(&theirs.join(file), &dir.join(file)).await;
        }
        let size = fs::metadata(theirs.join(DISK)).unwrap().len();
        let image = lab.data_dir().join("images").join(machine.image.as_str());
        lab.client().delete("bare", Some(LIMIT)).await.unwrap();
        Bare {
            runtime: lab.runtime,
            disk: (image.join(DISK), size),
            argv: with_paths(&launch),
            dir,
        }
    }

    /// Boots it once: the time to its first answer, to that of its first command, and what that said.
    async fn boot(&self) -> (Duration, Duration, String) {
        for socket in SOCKETS {
            drop(fs::remove_file(self.dir.join(socket)));
        }
        let disk = self.dir.join(DISK);
        copy(&self.disk.0, &disk).await;
        let made = fs::File::options().write(true).open(&disk).unwrap();
        made.set_len(self.disk.1).unwrap();
        made.sync_all().unwrap();
        let mut vmm = Command::new(&self.argv[0]);
        vmm.args(&self.argv[1..])
            .current_dir(&self.dir)
            .kill_on_drop(true);
        vmm.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let start = Instant::now();
        let mut vmm = vmm.spawn().unwrap();
        let session = tokio::time::timeout(LIMIT, self.answer(&mut vmm))
            .await
            .unwrap();
        let first = start.elapsed();
        let boot_id = first_exec(&session).await;
        let took = start.elapsed();
        assert_eq!(boot_id, session.hello().boot_id);
        vmm.kill().await.unwrap();
        (first, took, boot_id)
    }

    /// The first of many tries that is answered.
    async fn through_vsock(&self, vmm: &mut Child) -> Option<Session> {
        let mut tries = tokio::task::JoinSet::new();
        let mut open = std::collections::VecDeque::new();
        let mut beside = BESIDE.0;
        loop {
            assert!(vmm.try_wait().unwrap().is_none(), "the VMM ended");
            open.push_back(tries.spawn(through_vsock(self.dir.join(VSOCK))));
            if open.len() > OPEN {
                open.pop_front().inspect(tokio::task::AbortHandle::abort);
            }
            let mut next = tokio::time::Instant::now() + beside;
            beside = (beside * 5 / 4).min(BESIDE.1);
            loop {
                tokio::select! {
                    biased;
                    Some(ended) = tries.join_next() => match ended {
                        Ok(Some(stream)) => return Session::open(stream, LIMIT).await.ok(),
                        Ok(None) => {
                            next = next.min(tokio::time::Instant::now() + AGAIN);
                            beside = BESIDE.0;
                        }
                        Err(_) => {}
                    },
                    () = tokio::time::sleep_until(next) => break,
                }
            }
        }
    }

    /// The agent's first answer.
    async fn answer(&self, vmm: &mut Child) -> Session {
        loop {
            assert!(vmm.try_wait().unwrap().is_none(), "the VMM ended");
            let session = match self.runtime {
                Runtime::Firecracker | Runtime::CloudHypervisor => self.through_vsock(vmm).await,
                _ => match UnixStream::connect(self.dir.join(AGENT)).await {
                    Ok(stream) => {
                        let link = hutch_guest::link::connect(stream, LIMIT).await.unwrap();
                        Some(Session::open(link, LIMIT).await.unwrap())
                    }
                    Err(_) => None,
                },
            };
            if let Some(session) = session {
                return session;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// The agent's port, if it listens. See `crates/runtime/src/vsock.rs`.
async fn through_vsock(socket: PathBuf) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(&socket).await.ok()?;
    stream.write_all(b"CONNECT 1003\n").await.ok()?;
    while stream.read_u8().await.ok()? != b'\n' {}
    Some(stream)
}
