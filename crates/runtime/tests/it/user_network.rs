//! Machines whose network is passt: those of a server that is not root. Each test is a host with a world behind it, in
//! which it runs once more as an ordinary user.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hutch_contract::machine::Exit;
use hutch_runtime::ring::RingReader;
use hutch_runtime::{Error, MachineDir, Nic, UserNet, user_network};
use rustix::process::{Pid, Signal};

use crate::lab::{GENEROUS, Lab, alive, descriptors, in_words, is_root, status};
use crate::world::{self, ECHO, HOST, NEIGHBOURS, PUBLIC};
use crate::{scripted, sys};

/// Set for the run as an ordinary user.
const ORDINARY: &str = "HUTCH_TEST_ORDINARY_USER";
const UID: u32 = 61_000;
const PASST: &str = "/usr/bin/passt";

/// Runs the test of this name as an ordinary user of a host with a world, or says why it does not.
fn ordinary<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if std::env::var_os(ORDINARY).is_some() {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(test());
    }
    let lacks = if !is_root() {
        "root, to begin with"
    } else if !Path::new(PASST).exists() {
        PASST
    } else if Command::new("ip").arg("-Version").output().is_err() {
        "ip"
    } else {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again
            .args(["--exact", &format!("user_network::{name}"), "--nocapture"])
            .env(ORDINARY, "1")
            .current_dir("/")
            .uid(UID)
            .gid(UID);
        // The namespace is that thread's.
        let run = std::thread::spawn(move || {
            world::make(|| Ok(sys::own_network()?));
            again.status().unwrap()
        });
        assert!(run.join().unwrap().success(), "failed as an ordinary user");
        return;
    };
    println!("skipped: a host in a network namespace, with passt, needs {lacks}");
}

fn nic() -> Nic {
    Nic::Filtered(UserNet {
        program: PASST.into(),
        mac: [2, 0x68, 0x75, 0x74, 0x63, 2],
        address: [172, 16, 0, 5].into(),
        gateway: [169, 254, 0, 1].into(),
        gateway_mac: [2, 0x68, 0x75, 0x74, 0x63, 1],
        dns: true,
        refuse: world::REFUSED.to_vec(),
    })
}

/// The children of a machine's shim but its VMM.
fn passts(process: &hutch_runtime::Process) -> Vec<u32> {
    let shim = process.shim_pid().unwrap();
    let children = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    let children = children
        .split_whitespace()
        .map(|pid| pid.parse::<u32>().unwrap());
    children.filter(|pid| *pid != process.pid()).collect()
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

async fn gone(pids: &[u32]) {
    let gone = async {
        while pids.iter().any(|pid| alive(*pid)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(GENEROUS, gone).await.expect("an end");
}

#[test]
fn a_machine_reaches_what_is_public_alone() {
    ordinary("a_machine_reaches_what_is_public_alone", async || {
        let Some(mut lab) = Lab::new("qemu").await else {
            return;
        };
        assert!(lab.runtime.has_user_network());
        lab.spec.nic = nic();
        let process = lab.start().await;
        let mut guest = lab.guest().await;
        assert!(guest.ask("card").await.contains("02:68:75:74:63:02"));
        let route = guest.ask("route 172.16.0.5 169.254.0.1").await;
        assert_eq!(route, "routed");

        let connect = |seconds: u32, to: &str| {
            // passt (2023) hands no end of a connection to a guest that has ended its own half before.
            let talk = "echo hello; read -r word; test \"$word\" = hello";
            format!("run nc -w {seconds} {to} {ECHO} -e sh -c '{talk}'")
        };
        let public = connect(30, &PUBLIC.to_string());
        assert_eq!(guest.ask(&public).await, "ended 0");
        // So that it asks its host, not itself.
        let localnet = "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet";
        let via = "ip route add 127.0.0.0/8 via 169.254.0.1 2>/dev/console";
        let answer = guest.ask(&format!("run {localnet} && {via}")).await;
        assert_eq!(answer, "ended 0", "{}", lab.last_words());
        let leaves = "run ip route get 127.0.0.1 | grep -q 'dev eth0'";
        assert_eq!(guest.ask(leaves).await, "ended 0");
        for address in ["127.0.0.1".parse().unwrap(), HOST]
            .iter()
            .chain(&NEIGHBOURS)
        {
            let answer = guest.ask(&connect(1, &address.to_string())).await;
            assert_eq!(answer, "ended 1", "{address}");
        }
        // More than what is on its way at a time, there and back again.
        let much = "(head -c 3000000 /dev/zero; echo) & test $(wc -c) = 3000001";
        let much = format!("run nc -w 30 {PUBLIC} {ECHO} -e sh -c '{much}'");
        assert_eq!(guest.ask(&much).await, "ended 0");
        assert_eq!(guest.ask(&public).await, "ended 0");

        process.kill().await.unwrap();
        lab.left_nothing().await;
    });
}

#[test]
fn nothing_outlives_a_shim() {
    ordinary("nothing_outlives_a_shim", async || {
        let Some(mut lab) = Lab::new("qemu").await else {
            return;
        };
        lab.spec.nic = nic();
        let process = lab.start().await;
        let [passt] = passts(&process)[..] else {
            panic!("{:?}", passts(&process))
        };
        assert_eq!(status(passt, "NoNewPrivs"), "1");
        assert_eq!(
            status(passt, "Uid"),
            [UID.to_string().as_str(); 4].join("\t")
        );
        kill(process.shim_pid().unwrap());
        gone(&[process.pid(), passt]).await;
        assert_eq!(process.wait().await.exit, Exit::Lost);

        // And nothing a VMM.
        let process = lab.start().await;
        let passt = passts(&process);
        kill(process.pid());
        process.wait().await;
        gone(&passt).await;
        lab.left_nothing().await;
    });
}

#[test]
fn a_machine_outlives_its_network() {
    ordinary("a_machine_outlives_its_network", async || {
        let Some(mut lab) = Lab::new("qemu").await else {
            return;
        };
        lab.spec.nic = nic();
        let process = lab.start().await;
        let mut guest = lab.guest().await;
        kill(passts(&process)[0]);
        // Not even a zombie is left.
        let gone = async {
            while !passts(&process).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(GENEROUS, gone).await.expect("an end");
        guest.ask("route 172.16.0.5 169.254.0.1").await;
        let connect = format!("run nc -w 1 {PUBLIC} {ECHO}");
        assert_eq!(guest.ask(&connect).await, "ended 1");
        guest.ping("still here").await;
        let log = RingReader::open(&lab.dir.file(MachineDir::VMM_LOG)).unwrap();
        let log = String::from_utf8_lossy(&log.tail(0, 4096).unwrap()).into_owned();
        assert!(log.contains("the network has ended: passt has"), "{log}");
        process.kill().await.unwrap();
        lab.left_nothing().await;
    });
}

#[test]
fn a_vmm_has_one_end_and_passt_the_other() {
    ordinary("a_vmm_has_one_end_and_passt_the_other", async || {
        // A VMM that holds its descriptors and does nothing.
        let body = "touch started; exec sleep 600";
        let mut lab = scripted::lab("qemu", "QEMU emulator version 7.2.22", body).await;
        lab.spec.nic = nic();
        let (runtime, dir, spec) = (lab.runtime.clone(), lab.dir.clone(), lab.spec.clone());
        let starting = tokio::spawn(async move { runtime.start(&dir, &spec).await });
        let started = async {
            while !lab.dir.file("started").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(GENEROUS, started).await.unwrap();
        let record = std::fs::read(lab.dir.file("run/shim.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        let vmm = record["vmm"]["pid"].as_u64().unwrap() as u32;
        let sockets = |pid| {
            let all = descriptors(pid);
            let sockets = all.into_iter().filter(|(_, kind)| kind == "socket");
            sockets.map(|(number, _)| number).collect::<Vec<_>>()
        };
        assert_eq!(sockets(vmm), [3, 4, 5, 7]);
        kill(vmm);
        starting.await.unwrap().unwrap_err();
        lab.left_nothing().await;
    });
}

#[test]
fn what_cannot_be_had_is_refused() {
    ordinary("what_cannot_be_had_is_refused", async || {
        let mut lab = scripted::lab("qemu", "QEMU emulator version 7.1.0", "exec sleep 600").await;
        lab.spec.nic = nic();
        let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
        assert!(matches!(error, Error::TooOld { .. }), "{error}");
        let mut lab = scripted::lab("qemu", "QEMU emulator version 7.2.0", "exec sleep 600").await;
        for (program, words) in [
            ("passt", "has no passt \"passt\""),
            ("/nonexistent/passt", "run /nonexistent/passt"),
        ] {
            let Nic::Filtered(mut network) = nic() else {
                return;
            };
            network.program = program.into();
            lab.spec.nic = Nic::Filtered(network);
            let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
            assert!(in_words(&error).contains(words), "{}", in_words(&error));
            lab.left_nothing().await;
        }
    });
}

#[tokio::test]
async fn a_runtime_without_it_says_so() {
    for name in ["stub", "docker", "virtualbox"] {
        let mut lab = Lab::bare(name);
        assert!(!lab.runtime.has_user_network());
        lab.spec.nic = nic();
        let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{name} cannot use passt"));
        assert!(!lab.dir.file("run").exists(), "nothing was started");
    }
    let versions = [
        ("firecracker", "Firecracker v1.16.1"),
        ("cloud-hypervisor", "cloud-hypervisor v53.0"),
    ];
    for (name, version) in versions {
        let mut lab = scripted::lab(name, version, "exec sleep 600").await;
        lab.spec.nic = nic();
        let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{name} cannot use passt"));
    }
}

#[tokio::test]
async fn root_does_not_start_it() {
    if !is_root() {
        println!("skipped: for root only");
        return;
    }
    let reason = user_network(None).await.unwrap_err().reason;
    assert_eq!(reason, "the server is root: its machines use taps");
    let mut lab = scripted::lab("qemu", "QEMU emulator version 7.2.0", "exec sleep 600").await;
    lab.spec.nic = nic();
    let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    assert_eq!(error.to_string(), "qemu cannot use passt as root");
}

#[test]
fn passt_is_found_and_tried() {
    ordinary("passt_is_found_and_tried", async || {
        assert_eq!(user_network(None).await.unwrap(), Path::new(PASST));
        let missing = user_network(Some(Path::new("/nonexistent/passt"))).await;
        let missing = missing.unwrap_err();
        assert!(missing.reason.contains("/nonexistent/passt"), "{missing:?}");
        assert!(missing.hint.unwrap().contains("apt-get install passt"));
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("passt");
        for (body, words) in [
            ("echo it may not >&2; exit 1", "passt: it may not"),
            (
                "echo >&2 \"Couldn't create user namespace: Operation not permitted\"; exit 1",
                "create user namespace",
            ),
            ("exit 1", "ends without a word"),
            ("exec sleep 600", "does not answer"),
        ] {
            std::fs::write(&program, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
            let error = user_network(Some(&program)).await.unwrap_err();
            assert!(error.reason.contains(words), "{error:?}");
            assert_eq!(error.hint.is_some(), words.contains("namespace"));
        }
    });
}

#[test]
fn without_a_default_route_there_is_no_network() {
    if is_root() && Path::new(PASST).exists() {
        // One test alone: `ordinary` makes a host that has a route.
        let tried = Command::new("unshare").args(["--net", "true"]).status();
        if !tried.is_ok_and(|status| status.success()) {
            println!("skipped: unshare is needed");
            return;
        }
        let status = Command::new("unshare")
            .arg("--net")
            .args([
                "setpriv",
                "--reuid=61000",
                "--regid=61000",
                "--clear-groups",
            ])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("user_network::without_a_default_route_there_is_no_network")
            .env(ORDINARY, "1")
            .current_dir("/")
            .status();
        assert!(status.unwrap().success());
    } else if std::env::var_os(ORDINARY).is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let error = runtime.block_on(user_network(None)).unwrap_err();
        let words = "No external routable interface for IPv4; External interface not usable";
        assert_eq!(error.reason, format!("{PASST}: {words}"));
    } else {
        println!("skipped: root, to begin with, and {PASST} are needed");
    }
}
