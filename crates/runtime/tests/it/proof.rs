//! Starts that go wrong, and records that lie: nothing is left running, and nobody innocent is signalled.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Channel, Error, RuntimeConfig, cgroup, table::Runtimes};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab::{GENEROUS, Lab, alive, cgroups_named};

async fn stub() -> Lab {
    Lab::new("stub").await.unwrap()
}

fn record(lab: &Lab) -> Value {
    serde_json::from_slice(&std::fs::read(lab.dir.file("run/shim.json")).unwrap()).unwrap()
}

fn set_record(lab: &Lab, record: &Value) {
    std::fs::write(lab.dir.file("run/shim.json"), record.to_string()).unwrap();
}

fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap();
    fields.split_whitespace().nth(19).unwrap().parse().unwrap()
}

/// A process that has nothing to do with any machine.
struct Innocent(Child);

impl Innocent {
    fn new(input: Stdio) -> Self {
        Self(
            Command::new("sleep")
                .arg("600")
                .stdin(input)
                .spawn()
                .unwrap(),
        )
    }

    /// Of an earlier process with the same number.
    fn predecessor(&self) -> Value {
        json!({"pid": self.0.id(), "start_time": start_time(self.0.id()) - 1})
    }

    fn identity(&self) -> Value {
        json!({"pid": self.0.id(), "start_time": start_time(self.0.id())})
    }
}

impl Drop for Innocent {
    fn drop(&mut self) {
        assert!(alive(self.0.id()), "an innocent process was killed");
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

async fn doubted(lab: &Lab) -> String {
    let killed = lab.runtime.kill(&lab.dir).await;
    assert!(matches!(killed, Err(Error::Unproved { .. })), "{killed:?}");
    match lab.adopt().await {
        Adopted::Unknown { reason } => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_vmm_that_ends_at_once_says_why() {
    let lab = stub().await;
    lab.behave(r#"{"start": {"exit_code": 7}}"#);
    match lab.runtime.start(&lab.dir, &lab.spec).await {
        Err(Error::Exited { report, .. }) => {
            assert_eq!(report.exit, Exit::Code { code: 7 });
            assert_eq!(report.stderr_tail, "stub: told to end at once");
        }
        other => panic!("{other:?}"),
    }
    lab.behave(r#"{"start": "crash"}"#);
    match lab.runtime.start(&lab.dir, &lab.spec).await {
        Err(Error::Exited { report, .. }) => assert_eq!(report.exit, Exit::Signal { signal: 6 }),
        other => panic!("{other:?}"),
    }
    lab.behave(r#"{"agent": "lines"}"#);
    lab.start().await;
}

#[tokio::test]
async fn a_vmm_that_hangs_is_given_up_and_ended() {
    let lab = stub().await;
    lab.behave(r#"{"start": "hang"}"#);
    let started = lab.runtime.start(&lab.dir, &lab.spec).await;
    let error = started.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
    let record = record(&lab);
    for who in ["shim", "vmm"] {
        assert!(!alive(record[who]["pid"].as_u64().unwrap() as u32), "{who}");
    }
}

#[tokio::test]
async fn a_vmm_that_is_killed_for_memory_is_told_apart() {
    let lab = stub().await;
    let support = cgroup::support();
    if !support.limited.contains(&"memory") {
        println!("skipped: no limit of memory: {:?}", support.reason);
        return;
    }
    lab.behave(r#"{"start": "devour"}"#);
    match lab.runtime.start(&lab.dir, &lab.spec).await {
        Err(Error::Exited { report, .. }) => {
            assert_eq!(report.exit, Exit::Signal { signal: 9 });
            let words = report.stderr_tail;
            assert!(words.starts_with("killed for memory"), "{words}");
            assert!(words.contains("MiB"), "{words}");
        }
        other => panic!("{other:?}"),
    }
    lab.left_nothing().await;
    // The next run has a count of its own.
    lab.behave(r#"{"agent": "lines"}"#);
    let process = lab.start().await;
    let vmm = Pid::from_raw(process.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(vmm, Signal::KILL).unwrap();
    assert_eq!(process.wait().await.stderr_tail, "");
}

#[tokio::test]
async fn a_vmm_that_outlives_its_shim_is_ended_by_its_cgroup() {
    let lab = stub().await;
    lab.behave(r#"{"start": "stray", "agent": "lines"}"#);
    if !cgroup::support().unlimited.is_empty() {
        println!("skipped: no cgroups: {:?}", cgroup::support().reason);
        return;
    }
    for next in ["kill", "start"] {
        let process = lab.start().await;
        lab.guest().await.ping("up").await;
        let shim = Pid::from_raw(process.shim_pid().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(shim, Signal::KILL).unwrap();
        assert_eq!(process.wait().await.exit, Exit::Lost);
        assert!(alive(process.pid()));
        if next == "kill" {
            assert!(matches!(lab.adopt().await, Adopted::Unknown { .. }));
            assert!(alive(process.pid()), "a look ends nothing");
            // A record that names somebody else proves nothing.
            let truth = record(&lab);
            let innocent = Innocent::new(Stdio::null());
            let mut forged = truth.clone();
            forged["vmm"] = innocent.identity();
            set_record(&lab, &forged);
            assert!(doubted(&lab).await.contains("its VMM is not"));
            set_record(&lab, &truth);
            lab.runtime.kill(&lab.dir).await.unwrap();
            assert!(matches!(lab.adopt().await, Adopted::Exited(_)));
            assert_eq!(cgroups_named(&lab.spec.label), Vec::<PathBuf>::new());
        }
        if next == "start" {
            let again = lab.start().await;
            again.kill().await.unwrap();
            lab.left_nothing().await;
        }
        assert!(!alive(process.pid()));
    }
}

#[tokio::test]
async fn a_start_that_nobody_waits_for_goes_on() {
    let lab = stub().await;
    let taken = async {
        while !lab.dir.file("run/lock").exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = taken => {}
        started = lab.runtime.start(&lab.dir, &lab.spec) => panic!("{started:?}"),
    }
    let found = async {
        loop {
            match lab.adopt().await {
                // The lock is there and not yet taken.
                Adopted::Absent => tokio::task::yield_now().await,
                Adopted::Running(process) => return process,
                other => panic!("{other:?}"),
            }
        }
    };
    let process = tokio::time::timeout(GENEROUS, found).await.unwrap();
    lab.guest().await.ping("up").await;
    process.kill().await.unwrap();
}

#[tokio::test]
async fn a_power_button_ends_the_stub() {
    let lab = stub().await;
    let process = lab.start().await;
    lab.runtime.stop(&lab.dir).await.unwrap();
    assert_eq!(process.wait().await.exit, Exit::PowerOff);
    let stopped = lab.runtime.stop(&lab.dir).await;
    assert!(
        matches!(stopped, Err(Error::NotRunning { .. })),
        "{stopped:?}"
    );
}

#[tokio::test]
async fn a_program_that_is_not_there_leaves_nothing() {
    let lab = stub().await;
    let broken = |launcher: &str, program: &str| {
        let config = RuntimeConfig {
            launcher: launcher.into(),
            program: Some(program.into()),
            agent: "/nonexistent".into(),
            console_bytes: 1 << 16,
            ..RuntimeConfig::default()
        };
        let runtimes = Runtimes::new(|_| config.clone());
        runtimes.get("stub").unwrap().clone()
    };
    let launcher = env!("CARGO_BIN_EXE_hutch-stub-vmm");
    for (launcher, program) in [
        (launcher, "/nonexistent/vmm"),
        ("/nonexistent/launcher", launcher),
        // Runs, and is no launcher.
        ("/bin/true", launcher),
        ("/bin/echo", launcher),
    ] {
        let started = broken(launcher, program).start(&lab.dir, &lab.spec).await;
        let error = started.unwrap_err();
        assert!(
            matches!(error, Error::Io { .. } | Error::Launch { .. }),
            "{error}"
        );
        assert!(matches!(lab.adopt().await, Adopted::Absent));
    }
    lab.start().await;
}

#[tokio::test]
async fn a_shim_started_by_hand_does_nothing() {
    let lab = stub().await;
    lab.start().await.kill().await.unwrap();
    let before = record(&lab);
    let run = |input: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hutch-stub-vmm"));
        command
            .arg("shim")
            .current_dir(lab.dir.path())
            .stdin(input)
            .output()
            .unwrap()
    };
    assert!(!run(Stdio::null()).status.success());
    let _locked = lock(&lab);
    let second = File::open(lab.dir.file("run/lock")).unwrap();
    assert!(!run(second.into()).status.success());
    assert_eq!(record(&lab), before);
}

fn lock(lab: &Lab) -> File {
    let path = lab.dir.file("run/lock");
    let file = File::options().read(true).write(true).open(path).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    file
}

#[tokio::test]
async fn a_lock_without_a_proof_is_unknown() {
    let lab = stub().await;
    lab.start().await.kill().await.unwrap();
    let _locked = lock(&lab);
    // Held by somebody who is not the recorded shim, which has ended.
    assert!(doubted(&lab).await.contains("not by the recorded shim"));
    std::fs::remove_file(lab.dir.file("run/shim.json")).unwrap();
    assert!(doubted(&lab).await.contains("no record"));
}

#[tokio::test]
async fn forged_records_are_not_believed() {
    let lab = stub().await;
    let process = lab.start().await;
    let truth = record(&lab);
    let innocent = Innocent::new(Stdio::null());

    let mut reused = truth.clone();
    reused["shim"] = innocent.predecessor();
    set_record(&lab, &reused);
    assert!(doubted(&lab).await.contains("not by the recorded shim"));

    // A forger who knows start times, yet does not hold the lock.
    let mut forged = truth.clone();
    forged["shim"] = innocent.identity();
    set_record(&lab, &forged);
    assert!(doubted(&lab).await.contains("does not hold the lock"));

    // The right shim, and somebody else for the VMM.
    let mut forged = truth.clone();
    forged["vmm"] = innocent.identity();
    set_record(&lab, &forged);
    assert!(doubted(&lab).await.contains("not a child"));

    let mut elsewhere = truth.clone();
    elsewhere["boot_id"] = json!("another");
    set_record(&lab, &elsewhere);
    assert!(doubted(&lab).await.contains("another boot"));

    assert!(alive(process.pid()));
    set_record(&lab, &truth);
    assert!(matches!(lab.adopt().await, Adopted::Running(_)));
    lab.runtime.kill(&lab.dir).await.unwrap();
}

#[tokio::test]
async fn a_number_given_out_again_is_no_orphan() {
    let lab = stub().await;
    lab.start().await.kill().await.unwrap();
    let innocent = Innocent::new(Stdio::null());
    // As after a crash of the shim: no exit, and the VMM's number is somebody else's by now.
    std::fs::remove_file(lab.dir.file("run/exit.json")).unwrap();
    std::fs::remove_file(lab.dir.file("run/killed")).unwrap();
    let mut reused = record(&lab);
    reused["vmm"] = innocent.predecessor();
    set_record(&lab, &reused);
    match lab.adopt().await {
        Adopted::Exited(report) => assert_eq!(report.exit, Exit::Lost),
        other => panic!("{other:?}"),
    }
    lab.start().await;
}

#[tokio::test]
async fn a_crashed_agent_is_started_again_and_its_reboot_is_seen() {
    use std::os::unix::fs::PermissionsExt;
    // The agent may be any program: this one crashes at first, and then wants a reboot.
    let mut lab = stub().await;
    let agent = lab.dir.file("agent");
    let script =
        "#!/bin/sh\n[ -e crashed ] && echo \"again: $*\" && exit 64\n: > crashed\nkill -9 $$\n";
    std::fs::write(&agent, script).unwrap();
    std::fs::set_permissions(&agent, PermissionsExt::from_mode(0o755)).unwrap();
    let program = env!("CARGO_BIN_EXE_hutch-stub-vmm");
    let runtimes = Runtimes::new(|_| RuntimeConfig {
        launcher: program.into(),
        program: Some(program.into()),
        agent: agent.clone(),
        console_bytes: 1 << 16,
        ..RuntimeConfig::default()
    });
    lab.runtime = runtimes.get("stub").unwrap().clone();
    // Another user could not write beside the program.
    lab.spec.user = None;
    lab.behave("{}");
    let process = lab.start().await;
    assert_eq!(process.wait().await.exit, Exit::Reboot);
    lab.console_with(0, "again: serve --fd 3 --root guest")
        .await;
}

#[tokio::test]
async fn the_real_agent_is_the_stubs_guest() {
    let mut lab = stub().await;
    let program = Path::new(env!("CARGO_BIN_EXE_hutch-stub-vmm"));
    let agent = program.with_file_name("hutch-agent");
    if !agent.is_file() {
        println!("skipped: {} is not built", agent.display());
        return;
    }
    let runtimes = Runtimes::new(|_| RuntimeConfig {
        launcher: program.into(),
        program: Some(program.into()),
        agent: agent.clone(),
        console_bytes: 1 << 16,
        ..RuntimeConfig::default()
    });
    lab.runtime = runtimes.get("stub").unwrap().clone();
    lab.behave("{}");
    let process = lab.start().await;
    let Channel::Connection(mut stream) = lab.runtime.channel(&lab.dir).await.unwrap() else {
        panic!("the stub's channel is a connection");
    };
    // An HTTP/2 client begins with these words and a SETTINGS frame (type 4), and so does the answer.
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    stream.write_all(hello).await.unwrap();
    let mut frame = [0; 9];
    let answered = tokio::time::timeout(GENEROUS, stream.read_exact(&mut frame)).await;
    answered.unwrap().unwrap();
    assert_eq!(frame[3], 4);

    let agents = || children(process.pid(), "serve --fd 3 --root guest");
    let [agent] = agents()[..] else {
        panic!("{:?}", agents())
    };
    lab.runtime.kill(&lab.dir).await.unwrap();
    let gone = async {
        while alive(agent) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(GENEROUS, gone)
        .await
        .expect("the agent dies with its VMM");
}

/// Children of a process whose arguments are these.
fn children(pid: u32, arguments: &str) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let is_it = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        String::from_utf8_lossy(&line)
            .replace('\0', " ")
            .contains(arguments)
    };
    children.filter(is_it).collect()
}
