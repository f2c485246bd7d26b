//! A machine that goes on from another's memory on another tap. Where a runtime does not restore yet, its VMM is told by
//! hand what it will tell it, so that what taps, users and descriptors rest on is known to hold.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hutch_runtime::{MachineDir, Process};
use serde_json::{Value, json};

use crate::lab::{GENEROUS, Guest, Lab, in_words, runtime_with};
use crate::{network, sys};

/// Where a machine's memory and the state of its devices go.
const SNAPSHOT: &str = "snapshot";

macro_rules! clones {
    ($($runtime:ident)*) => { $(mod $runtime {
        #[test]
        fn a_clone_is_on_its_own_tap() {
            crate::network::isolated(async || {
                let name = stringify!($runtime).replace('_', "-");
                if let Some(lab) = super::Lab::new(&name).await {
                    super::a_clone_is_on_its_own_tap(lab).await;
                }
            });
        }
    })* };
}

clones! { qemu firecracker cloud_hypervisor }

async fn a_clone_is_on_its_own_tap(mut first: Lab) {
    fs::create_dir(first.dir.file(SNAPSHOT)).unwrap();
    give(&first, SNAPSHOT);
    let program = first.runtime.probe().await.path.unwrap();
    if first.runtime.name() == "cloud-hypervisor" {
        may_write_snapshots(&mut first, &program);
    }
    let (_process, mut guest) = network::on_a_tap(&mut first).await;
    network::meets_its_host(&mut guest).await;
    drop(guest);
    match first.runtime.name() {
        "qemu" => {
            first.runtime.pause(&first.dir).await.unwrap();
            let into = first.dir.file(SNAPSHOT);
            first.runtime.snapshot(&first.dir, &into).await.unwrap();
        }
        "firecracker" => save_firecracker(&first).await,
        _ => save_cloud_hypervisor(&first).await,
    }

    let mut second = clone_of(&first);
    let tap = second.spec.label.clone();
    second.spec.nic = network::tap(&first, &tap);
    // The first one still has its tap, and its guest would answer to the same address.
    network::route_to(&tap);
    let _vmm = match first.runtime.name() {
        "qemu" => {
            goes_on(&second, SNAPSHOT).await;
            None
        }
        "firecracker" => Some(load_firecracker(&second, &program)),
        _ => Some(load_cloud_hypervisor(&second, &program)),
    };
    let mut guest = answering(&second).await;
    network::meets_its_host(&mut guest).await;
}

async fn save_firecracker(lab: &Lab) {
    lab.runtime.pause(&lab.dir).await.unwrap();
    let files = json!({
        "snapshot_path": format!("{SNAPSHOT}/state"),
        "mem_file_path": format!("{SNAPSHOT}/memory"),
    });
    put(lab, "run/vmm/api.sock", "/snapshot/create", &files);
}

/// By the name of the tap, which it opens as its user.
fn load_firecracker(lab: &Lab, program: &str) -> Vmm {
    let words = [program, "--id", "clone", "--api-sock", "run/vmm/api.sock"];
    let vmm = Vmm::start(lab, None, "0</dev/null", &words.map(str::to_owned));
    let load = json!({
        "snapshot_path": format!("{SNAPSHOT}/state"),
        "mem_backend": {"backend_type": "File", "backend_path": format!("{SNAPSHOT}/memory")},
        "network_overrides": [{"iface_id": "eth0", "host_dev_name": lab.spec.label}],
        "resume_vm": true,
    });
    put(lab, "run/vmm/api.sock", "/snapshot/load", &load);
    vmm
}

/// Under Landlock it must be told at its start where it will write.
fn may_write_snapshots(lab: &mut Lab, program: &str) {
    let script = lab.dir.file("vmm.sh");
    let rule = format!("--landlock-rules path={SNAPSHOT},access=rw");
    let text = format!(
        "#!/bin/sh\ncase \" $* \" in *' --landlock '*) set -- \"$@\" {rule} ;; esac\nexec {program} \"$@\"\n"
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    lab.runtime = runtime_with("cloud-hypervisor", |config| config.program = Some(script));
}

async fn save_cloud_hypervisor(lab: &Lab) {
    lab.runtime.pause(&lab.dir).await.unwrap();
    let into = json!({"destination_url": format!("file://./{SNAPSHOT}")});
    put(lab, "run/api.sock", "/api/v1/vm.snapshot", &into);
}

/// By descriptor: its configuration is the first one's, byte by byte.
fn load_cloud_hypervisor(lab: &Lab, program: &str) -> Vmm {
    let from = format!("source_url=file://./{SNAPSHOT},net_fds=[nic@[5]],resume=on");
    let socket = "path=run/vmm/api.sock";
    let words = [program, "--api-socket", socket, "--restore", &from];
    let tap = sys::open_tap(&lab.spec.label);
    Vmm::start(
        lab,
        Some(tap),
        "5<&0 0</dev/null",
        &words.map(str::to_owned),
    )
}

/// A VMM without a shim, that ends with the test.
struct Vmm(Child);

impl Vmm {
    /// Runs a command as the machine's user in its directory, with `tap` as its standard input until the shell has done
    /// these redirections.
    fn start(lab: &Lab, tap: Option<File>, redirections: &str, words: &[String]) -> Self {
        let user = lab.spec.user.unwrap();
        let kvm = fs::metadata("/dev/kvm").map(|metadata| metadata.gid());
        let said = File::create(lab.dir.console()).unwrap();
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("exec {redirections}; exec \"$@\""), "sh"])
            .args(words)
            .current_dir(lab.dir.path())
            .env_clear()
            .uid(user.uid)
            .gid(kvm.unwrap_or(user.gid))
            .stdin(tap.map_or_else(Stdio::null, Stdio::from))
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Another machine with the first one's files, which are its user's.
pub fn clone_of(first: &Lab) -> Lab {
    let mut second = Lab::bare(first.runtime.name());
    second.runtime = first.runtime.clone();
    fs::create_dir(second.dir.file("run")).unwrap();
    fs::create_dir(second.dir.file("run/vmm")).unwrap();
    for name in [
        MachineDir::KERNEL,
        MachineDir::INITRAMFS,
        MachineDir::DISK,
        "run/launch.json",
    ] {
        fs::copy(first.dir.file(name), second.dir.file(name)).unwrap();
    }
    fs::rename(first.dir.file(SNAPSHOT), second.dir.file(SNAPSHOT)).unwrap();
    give(&second, ".");
    second
}

fn give(lab: &Lab, name: &str) {
    let user = lab.spec.user.unwrap();
    let mut command = Command::new("chown");
    command.args(["-R", &format!("{}:{}", user.uid, user.gid), name]);
    let status = command.current_dir(lab.dir.path()).status().unwrap();
    assert!(status.success());
}

/// Lets a machine go on from a directory in its own.
pub async fn goes_on(lab: &Lab, from: &str) -> Process {
    let restored = lab
        .runtime
        .restore(&lab.dir, &lab.spec, from.as_ref())
        .await;
    let process = restored.unwrap_or_else(|error| panic!("{}", in_words(&error)));
    lab.runtime.resume(&lab.dir).await.unwrap();
    process
}

/// The guest, once it answers: that it takes a connection means nothing after a restore.
pub async fn answering(lab: &Lab) -> Guest {
    let answers = async {
        loop {
            let mut guest = lab.connect().await;
            // Not too few: one that is slow would be hung up on again and again.
            for _ in 0..10 {
                guest.say("ping up").await;
                let heard = tokio::time::timeout(Duration::from_secs(1), guest.hear()).await;
                if heard.is_ok_and(|heard| heard == "pong up") {
                    guest.ping("settled").await;
                    return guest;
                }
            }
        }
    };
    match tokio::time::timeout(GENEROUS, answers).await {
        Ok(guest) => guest,
        Err(_) => panic!("no answer; {}", said(lab)),
    }
}

/// What the VMM and the console of a machine without a shim said.
fn said(lab: &Lab) -> String {
    let said = fs::read(lab.dir.console()).unwrap();
    String::from_utf8_lossy(&said).into_owned()
}

fn open(lab: &Lab) -> File {
    File::open(lab.dir.path()).unwrap()
}

/// A socket of a machine, whose path is longer than the address of a socket may be; once somebody listens there.
fn connect(lab: &Lab, socket: &str) -> UnixStream {
    let dir = open(lab);
    let path = format!("/proc/self/fd/{}/{socket}", dir.as_raw_fd());
    let end = std::time::Instant::now() + GENEROUS;
    loop {
        match UnixStream::connect(&path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(GENEROUS)).unwrap();
                return stream;
            }
            Err(error) if std::time::Instant::now() > end => panic!("{socket}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// An order to a VMM with an API, which must be followed.
fn put(lab: &Lab, socket: &str, path: &str, body: &Value) {
    let mut stream = connect(lab, socket);
    let (body, head) = (body.to_string(), "Content-Type: application/json");
    let length = body.len();
    let request = format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(answer.contains(" 204 "), "{path}: {answer}");
}
