//! What is peculiar to containers: their images, what they may do, and an engine that is not there or is others' too.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use hutch_contract::error::Kind;
use hutch_runtime::table::Runtimes;
use hutch_runtime::{Adopted, Error, ImageLayer, MachineDir, Runtime, RuntimeConfig};

use crate::conformance::running;
use crate::lab::{self, Lab, runtime, status};

/// An image with what the stub's program, which is the agent here, is linked with.
pub fn layer(into: &Path) -> ImageLayer {
    let program = env!("CARGO_BIN_EXE_hutch-stub-vmm");
    let linked = Command::new("ldd").arg(program).output().unwrap().stdout;
    let linked = String::from_utf8(linked).unwrap();
    let libraries = linked
        .split_whitespace()
        .filter_map(|word| word.strip_prefix('/'));
    let tar = Command::new("tar")
        .args(["-C", "/", "--dereference", "-c"])
        .args(libraries)
        .output()
        .unwrap();
    assert!(tar.status.success(), "{tar:?}");
    let path = into.join("layer.tar.zst");
    std::fs::write(&path, zstd::encode_all(tar.stdout.as_slice(), 1).unwrap()).unwrap();
    let id = "img-test".into();
    ImageLayer { id, path }
}

/// Removes all that a test has made in the engine, which is in use by others.
pub fn remove_all(lab: &Lab) {
    let (name, dir, tag) = (lab.runtime.name(), lab.dir.clone(), lab.tag().to_owned());
    let removed = std::thread::spawn(move || {
        let tokio = tokio::runtime::Runtime::new().unwrap();
        tokio.block_on(async {
            let docker = runtime(name, &dir);
            for what in docker.outside(&tag).await.unwrap() {
                docker.remove_outside(&what).await.unwrap();
            }
            assert_eq!(docker.outside(&tag).await.unwrap(), []);
        });
    });
    let removed = removed.join();
    assert!(removed.is_ok() || std::thread::panicking());
}

fn docker(socket: &Path) -> std::sync::Arc<dyn Runtime> {
    let runtimes = Runtimes::new(|_| RuntimeConfig {
        docker_socket: Some(socket.to_owned()),
        ..RuntimeConfig::default()
    });
    runtimes.get("docker").unwrap().clone()
}

#[tokio::test]
async fn the_container_has_only_what_it_needs() {
    let Some(lab) = Lab::new("docker").await else {
        return;
    };
    let process = lab.start().await;
    lab.guest().await.ping("up").await;
    let pid = process.pid();
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, KILL 5, SETGID 6, SETUID 7: see capabilities(7).
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(pid, set), "00000000000000eb", "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        // Docker before 20.10.14 lets them be inherited too.
        assert!(["00000000000000eb", "0000000000000000"].contains(&status(pid, set).as_str()));
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "NSpid").split_whitespace().last(), Some("1"));
    let interfaces = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let interfaces = interfaces
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'));
    assert_eq!(
        interfaces.map(|(name, _)| name.trim()).collect::<Vec<_>>(),
        ["lo"]
    );
    for namespace in ["mnt", "net", "pid", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    let agent = mounts
        .lines()
        .find(|line| line.contains(" /.hutch/agent "))
        .unwrap();
    assert!(agent.contains(" ro,"), "{agent}");
    let limits = limits(pid);
    assert_eq!(
        limits,
        ["134217728", "134217728", "4096"],
        "memory, with swap, processes"
    );
}

/// Memory, memory and swap, processes: of the control group of a process, in bytes.
fn limits(pid: u32) -> [String; 3] {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let read = |controller: &str, file: &str| {
        let group = groups.lines().find_map(|line| {
            let [_, controllers, path] = *line.splitn(3, ':').collect::<Vec<_>>() else {
                return None;
            };
            let its = controllers.split(',').any(|name| name == controller);
            its.then(|| path.trim_start_matches('/').to_owned())
        });
        let path = Path::new("/sys/fs/cgroup")
            .join(controller)
            .join(group.unwrap());
        std::fs::read_to_string(path.join(file))
            .unwrap()
            .trim()
            .to_owned()
    };
    if groups.lines().any(|line| line.contains(":memory:")) {
        return [
            read("memory", "memory.limit_in_bytes"),
            read("memory", "memory.memsw.limit_in_bytes"),
            read("pids", "pids.max"),
        ];
    }
    let group = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap();
    let read = |file: &str| {
        let path = Path::new("/sys/fs/cgroup").join(group).join(file);
        std::fs::read_to_string(path).unwrap().trim().to_owned()
    };
    // There swap is counted by itself.
    assert_eq!(read("memory.swap.max"), "0");
    [read("memory.max"), read("memory.max"), read("pids.max")]
}

#[tokio::test]
async fn what_is_said_while_no_server_is_there_is_kept() {
    let Some(lab) = Lab::new("docker").await else {
        return;
    };
    // A server that ends: its tasks are dropped.
    let server = tokio::runtime::Runtime::new().unwrap();
    let (docker, dir, spec) = (lab.runtime.clone(), lab.dir.clone(), lab.spec.clone());
    let start = async move { docker.start(&dir, &spec).await.unwrap().pid() };
    server.spawn(start).await.unwrap();
    lab.guest().await.say("print before").await;
    lab.console_with(0, "before").await;
    server.shutdown_background();
    let mut guest = lab.guest().await;
    guest.say("print meanwhile").await;
    guest.ping("said").await;
    let process = running(lab.adopt().await);
    let text = lab.console_with(0, "meanwhile").await;
    assert_eq!(text.matches("before").count(), 1, "{text}");
    // Neither is what it says in the end lost, nor the files that it has written.
    guest.say("print at-last").await;
    guest.say("poweroff").await;
    process.wait().await;
    let text = lab.console_with(0, "at-last").await;
    assert_eq!(text.matches("meanwhile").count(), 1, "{text}");
    let again = lab.start().await;
    assert_eq!(again.console_from(), text.len() as u64);
    assert!(matches!(lab.runtime.kill(&lab.dir).await, Ok(())));
}

#[tokio::test]
async fn a_paused_container_can_be_ended() {
    let Some(lab) = Lab::new("docker").await else {
        return;
    };
    let process = lab.start().await;
    lab.guest().await.ping("up").await;
    lab.runtime.pause(&lab.dir).await.unwrap();
    running(lab.adopt().await);
    lab.runtime.kill(&lab.dir).await.unwrap();
    assert_eq!(
        process.wait().await.exit,
        hutch_contract::machine::Exit::Killed
    );
}

#[tokio::test]
async fn only_what_carries_our_tag_is_ours() {
    let Some(lab) = Lab::new("docker").await else {
        return;
    };
    let tag = lab.tag();
    let all = lab.runtime.outside(tag).await.unwrap();
    let of = |kind: &str| {
        all.iter()
            .find(|what| what.kind == kind)
            .unwrap()
            .of
            .clone()
    };
    assert_eq!(of("container"), lab.spec.id);
    assert_eq!(of("container image"), "img-test");
    assert_eq!(all.len(), 2, "{all:?}");
    assert_eq!(lab.runtime.outside("othr").await.unwrap(), []);

    // Another's container under a name that we need: nothing is done to it.
    let mut other = lab.spec.clone();
    other.id = "mch-other".into();
    let image = layer(lab.dir.path());
    let prepared = lab.runtime.prepare(&lab.dir, &other, &image).await;
    assert!(
        matches!(prepared, Err(Error::Monitor { .. })),
        "{prepared:?}"
    );
    let started = lab.runtime.start(&lab.dir, &other).await;
    assert!(matches!(started, Err(Error::Monitor { .. })), "{started:?}");
    lab.runtime.remove(&other).await.unwrap();
    assert_eq!(lab.runtime.outside(tag).await.unwrap(), all);

    // An image of which there is a container stays.
    let image = all
        .iter()
        .find(|what| what.kind == "container image")
        .unwrap();
    lab.runtime.remove_outside(image).await.unwrap();
    assert_eq!(lab.runtime.outside(tag).await.unwrap(), all);
    lab.runtime.remove(&lab.spec).await.unwrap();
    lab.runtime.remove(&lab.spec).await.unwrap();
    lab.runtime.remove_outside(image).await.unwrap();
    assert_eq!(lab.runtime.outside(tag).await.unwrap(), []);
}

#[tokio::test]
async fn an_image_without_a_layer_is_refused_with_the_way_out() {
    let Some(lab) = Lab::new("docker").await else {
        return;
    };
    let image = ImageLayer {
        id: "img-disk".into(),
        path: lab.dir.file("no-layer"),
    };
    let error = lab
        .runtime
        .prepare(&lab.dir, &lab.spec, &image)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::WrongImage { .. }), "{error}");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.hint().unwrap().contains("qemu"));
    let broken = lab.dir.file("broken");
    std::fs::write(&broken, "no zstd").unwrap();
    let image = ImageLayer {
        id: "img-broken".into(),
        path: broken,
    };
    lab.runtime
        .prepare(&lab.dir, &lab.spec, &image)
        .await
        .unwrap_err();
}

#[tokio::test]
async fn an_engine_out_of_reach_is_told_apart_and_nothing_is_done() {
    let files = tempfile::tempdir().unwrap();
    let dir = MachineDir::new(files.path().join("machine"));
    std::fs::create_dir_all(dir.file("run")).unwrap();
    let run = r#"{"container": "c0ffee", "machine": "mch-t", "before": "", "console_from": 0}"#;
    std::fs::write(dir.file("run/container.json"), run).unwrap();
    let socket = files.path().join("docker.sock");
    let check = async |reason: &str| {
        let docker = docker(&socket);
        let info = docker.probe().await;
        assert!(!info.usable);
        let told = info.reason.unwrap();
        assert!(told.contains(reason), "{told}");
        assert!(info.hint.is_some());
        let adopted = docker.adopt(&dir).await.unwrap();
        assert!(matches!(adopted, Adopted::Unknown { .. }), "{adopted:?}");
        let killed = docker.kill(&dir).await;
        assert!(matches!(killed, Err(Error::Unproved { .. })), "{killed:?}");
        let started = docker.start(&dir, &lab::spec("t")).await;
        assert_eq!(started.unwrap_err().kind(), Kind::Unavailable);
    };
    check("its socket is not there").await;
    let listener = UnixListener::bind(&socket).unwrap();
    check("it does not answer").await;
    drop(listener);
    check("nothing listens on its socket").await;
    // One that lies.
    std::fs::remove_file(&socket).unwrap();
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let lies = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            use tokio::io::AsyncWriteExt;
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await;
        }
    });
    check("cannot be reached").await;
    lies.abort();
}
