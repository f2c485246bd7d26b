//! The same promises of every runtime.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use hutch_contract::machine::Exit;
use hutch_runtime::ring::RingReader;
use hutch_runtime::{Adopted, Error, MachineDir};
use rustix::process::{Pid, Signal};

use crate::lab::{self, CONSOLE_BYTES, GENEROUS, Lab, alive};

/// One test for each promise and runtime.
macro_rules! promises {
    ($($name:ident)*) => {
        mod stub { $(#[tokio::test] async fn $name() {
            super::$name(super::Lab::new("stub").await.unwrap()).await;
        })* }
        mod qemu { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("qemu").await { super::$name(lab).await; }
        })* }
        mod firecracker { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("firecracker").await { super::$name(lab).await; }
        })* }
        mod cloud_hypervisor { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("cloud-hypervisor").await { super::$name(lab).await; }
        })* }
        mod virtualbox { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("virtualbox").await { super::$name(lab).await; }
        })* }
    };
}

promises! {
    a_machine_runs_and_is_found_again
    a_second_start_is_refused_and_harmless
    a_machine_outlives_its_server
    ends_are_told_apart
    a_vmm_that_is_killed_by_others_is_noticed
    a_killed_shim_takes_its_vmm_along
    a_vmm_that_hangs_is_given_up_and_can_be_killed
    pause_stops_the_guest_and_resume_goes_on
    the_console_is_bounded_and_blocks_nobody
}

/// What a jail may change.
macro_rules! promises_of_the_jail {
    ($($name:ident)*) => {
        mod jailed { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::jailed().await { super::$name(lab).await; }
        })* }
    };
}

promises_of_the_jail! {
    a_machine_runs_and_is_found_again
    a_machine_outlives_its_server
    a_vmm_that_is_killed_by_others_is_noticed
    a_killed_shim_takes_its_vmm_along
}

/// A container has neither a VMM nor a shim; what it has instead is in `docker.rs`.
macro_rules! promises_of_containers {
    ($($name:ident)*) => {
        mod docker { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("docker").await { super::$name(lab).await; }
        })* }
    };
}

promises_of_containers! {
    a_machine_runs_and_is_found_again
    a_second_start_is_refused_and_harmless
    a_machine_outlives_its_server
    ends_are_told_apart
    a_vmm_that_is_killed_by_others_is_noticed
    pause_stops_the_guest_and_resume_goes_on
    the_console_is_bounded_and_blocks_nobody
}

pub fn running(adopted: Adopted) -> hutch_runtime::Process {
    match adopted {
        Adopted::Running(process) => process,
        other => panic!("{other:?}"),
    }
}

fn exited(adopted: Adopted) -> Exit {
    match adopted {
        Adopted::Exited(report) => report.exit,
        other => panic!("{other:?}"),
    }
}

async fn end(lab: &Lab, process: &hutch_runtime::Process) -> Exit {
    match tokio::time::timeout(GENEROUS, process.wait()).await {
        Ok(report) => report.exit,
        Err(_) => panic!("no end; {}", lab.last_words()),
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

async fn a_machine_runs_and_is_found_again(lab: Lab) {
    assert!(matches!(lab.adopt().await, Adopted::Absent));
    let process = lab.start().await;
    let found = running(lab.adopt().await);
    assert_eq!(
        (found.pid(), found.shim_pid()),
        (process.pid(), process.shim_pid())
    );
    lab.guest().await.ping("hello").await;
    // A host that goes and comes again finds the guest.
    lab.guest().await.ping("again").await;

    lab.runtime.kill(&lab.dir).await.unwrap();
    assert_eq!(end(&lab, &process).await, Exit::Killed);
    assert_eq!(end(&lab, &found).await, Exit::Killed);
    assert_eq!(exited(lab.adopt().await), Exit::Killed);
    // Nor is a zombie left.
    for pid in [Some(process.pid()), process.shim_pid()]
        .into_iter()
        .flatten()
    {
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
    lab.runtime.kill(&lab.dir).await.unwrap();

    // Nothing of the last run is taken for this one's.
    let again = lab.start().await;
    assert_ne!(again.pid(), process.pid());
    assert_eq!(running(lab.adopt().await).pid(), again.pid());
}

async fn a_second_start_is_refused_and_harmless(lab: Lab) {
    let process = lab.start().await;
    let second = lab::runtime(lab.runtime.name(), &lab.dir)
        .start(&lab.dir, &lab.spec)
        .await;
    assert!(matches!(second, Err(Error::Locked { .. })), "{second:?}");
    lab.guest().await.ping("unharmed").await;
    assert_eq!(running(lab.adopt().await).pid(), process.pid());
}

/// Where the helper process below finds its machine; the test does nothing without it.
const HELD: &str = "HUTCH_TEST_HELD";

/// A server that starts a machine and then does nothing until it is killed.
#[tokio::test]
async fn server_that_is_killed() {
    let Ok(held) = std::env::var(HELD) else {
        return;
    };
    let [runtime, label, dir] = *held.split(' ').collect::<Vec<_>>() else {
        panic!("{held}");
    };
    let dir = MachineDir::new(dir);
    let started = lab::runtime(runtime, &dir)
        .start(&dir, &lab::spec(label))
        .await;
    let process = started.unwrap();
    std::fs::write(dir.file("started"), process.pid().to_string()).unwrap();
    std::future::pending::<()>().await;
}

/// What listens on the host's loopback is out of a guest's reach in every network mode.
#[tokio::test]
async fn a_restricted_guest_does_not_reach_its_host() {
    let Some(lab) = Lab::new("qemu").await else {
        return;
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    lab.start().await;
    let mut guest = lab.guest().await;
    for host in ["10.0.2.2", "127.0.0.1"] {
        guest.say(&format!("reach {host} {port}")).await;
        let answer = tokio::time::timeout(GENEROUS, guest.hear()).await.unwrap();
        assert_eq!(answer, "unreachable", "{host}");
    }
    let accepted = tokio::time::timeout(std::time::Duration::ZERO, listener.accept()).await;
    assert!(accepted.is_err(), "{accepted:?}");
}

async fn a_machine_outlives_its_server(lab: Lab) {
    let held = format!(
        "{} {} {}",
        lab.runtime.name(),
        lab.spec.label,
        lab.dir.path().display()
    );
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "conformance::server_that_is_killed"])
        .env(HELD, held)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = async {
        loop {
            assert_eq!(
                server.try_wait().unwrap(),
                None,
                "the server ended by itself"
            );
            match std::fs::read_to_string(lab.dir.file("started")) {
                Ok(pid) if !pid.is_empty() => return pid.parse::<u32>().unwrap(),
                _ => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        }
    };
    let pid = tokio::time::timeout(GENEROUS, started).await.unwrap();
    server.kill().unwrap();
    assert_eq!(server.wait().unwrap().signal(), Some(9));

    let process = running(lab.adopt().await);
    assert_eq!(process.pid(), pid);
    let mut guest = lab.guest().await;
    guest.ping("alive").await;
    // The end of what is no child of ours is noticed as well, with its reason.
    guest.say("reboot").await;
    assert_eq!(end(&lab, &process).await, Exit::Reboot);
}

async fn ends_are_told_apart(lab: Lab) {
    for (words, exit) in [
        ("poweroff", Exit::PowerOff),
        ("reboot", Exit::Reboot),
        // Behind PID 1's back.
        ("reset", Exit::Reboot),
        ("panic", Exit::Panic),
    ] {
        if words == "panic" && lab.runtime.name() == "docker" {
            // Its kernel is the host's.
            continue;
        }
        let process = lab.start().await;
        // Held until the end: QEMU may drop what was sent just before a connection is closed.
        let mut guest = lab.guest().await;
        guest.say(words).await;
        assert_eq!(end(&lab, &process).await, exit);
        assert_eq!(exited(lab.adopt().await), exit);
    }
    let process = lab.start().await;
    assert_eq!(process.kill().await.unwrap().exit, Exit::Killed);
    lab.left_nothing().await;
}

async fn a_vmm_that_is_killed_by_others_is_noticed(lab: Lab) {
    let process = lab.start().await;
    kill(process.pid());
    assert_eq!(end(&lab, &process).await, Exit::Signal { signal: 9 });
    assert_eq!(exited(lab.adopt().await), Exit::Signal { signal: 9 });
}

async fn a_killed_shim_takes_its_vmm_along(lab: Lab) {
    let process = lab.start().await;
    kill(process.shim_pid().unwrap());
    assert_eq!(end(&lab, &process).await, Exit::Lost);
    let launch = std::fs::read_to_string(lab.dir.file("run/launch.json")).unwrap();
    if launch.contains(r#""changes_user":true"#) {
        // The kernel forgot the bond when a jailer changed the user: nothing else starts, and a kill ends it.
        assert!(matches!(lab.adopt().await, Adopted::Unknown { .. }));
        lab.runtime.kill(&lab.dir).await.unwrap();
    }
    assert_eq!(exited(lab.adopt().await), Exit::Lost);
    assert!(!alive(process.pid()));
    lab.start().await;
}

async fn a_vmm_that_hangs_is_given_up_and_can_be_killed(lab: Lab) {
    let process = lab.start().await;
    let stop = |pid: u32| {
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        // It is told at once, and stops a little later.
        let stopped = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_pid())).unwrap();
            let mut tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
            tasks.all(|task| lab::status(task.parse().unwrap(), "State").starts_with('T'))
        };
        while !stopped() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    };
    stop(process.pid());
    let paused = lab.runtime.pause(&lab.dir).await;
    assert!(matches!(paused, Err(Error::Timeout { .. })), "{paused:?}");
    // Its shim may hang too.
    stop(process.shim_pid().unwrap());
    lab.runtime.kill(&lab.dir).await.unwrap();
    assert_eq!(end(&lab, &process).await, Exit::Killed);
    assert!(!alive(process.pid()));
}

async fn pause_stops_the_guest_and_resume_goes_on(lab: Lab) {
    let process = lab.start().await;
    let mut guest = lab.guest().await;
    lab.runtime.pause(&lab.dir).await.unwrap();
    // Whoever crashed between the order and its record gives it again.
    lab.runtime.pause(&lab.dir).await.unwrap();
    guest.say("ping later").await;
    // Silence cannot be waited for; what a paused guest is asked to do must not have been done by now.
    let heard = tokio::time::timeout(std::time::Duration::from_millis(300), guest.hear()).await;
    assert!(heard.is_err(), "{heard:?}");
    lab.runtime.resume(&lab.dir).await.unwrap();
    lab.runtime.resume(&lab.dir).await.unwrap();
    // The connection from before may be lost.
    drop(guest);
    lab.guest().await.ping("awake").await;
    process.kill().await.unwrap();
    let dead = lab.runtime.pause(&lab.dir).await;
    assert!(matches!(dead, Err(Error::NotRunning { .. })), "{dead:?}");
}

async fn the_console_is_bounded_and_blocks_nobody(lab: Lab) {
    let process = lab.start().await;
    let mut guest = lab.guest().await;
    let before = lab.console_end();
    let kib = 4 * CONSOLE_BYTES / 1024;
    guest.say(&format!("flood {kib}")).await;
    // Each byte is an exit of the guest, and exits are slow where virtualization is emulated.
    tokio::time::timeout(6 * GENEROUS, async {
        while guest.hear().await != "done" {}
    })
    .await
    .unwrap();
    guest.say("print the-last-words").await;
    lab.console_with(before, "the-last-words").await;

    let ring = RingReader::open(&lab.dir.console()).unwrap();
    let all = ring.read_from(0, usize::MAX).unwrap();
    assert_eq!(all.bytes.len() as u64, CONSOLE_BYTES);
    assert_eq!(all.dropped, ring.end().unwrap() - CONSOLE_BYTES);
    assert!(ring.end().unwrap() - before > 4 * CONSOLE_BYTES);
    process.kill().await.unwrap();

    let again = lab.start().await;
    assert!(
        again.console_from() > before + kib * 1024,
        "the count goes on"
    );
}
