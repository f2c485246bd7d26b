//! Every wrong request and every sick host: the right status, a stable word, a hint, and nothing left behind.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hutch_contract::machine::Status;
use hutch_tests::{Lab, Runtime, is_root, lab, wait_until};

const RUNNING: &str = "/v1/machines?wait=running&timeout_ms=60000";

#[tokio::test]
async fn requests_that_cannot_be_meant_so() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let create = async |body: &str| lab.raw("POST", "/v1/machines", body).await;

    create(r#"{"image": "nowhere"}"#)
        .await
        .must_be(404, "image_not_found")
        .with_hint();
    let bad_names = [
        "",
        "A",
        "-a",
        "a-",
        "a_b",
        "a/b",
        "..",
        "a b",
        &"x".repeat(64),
    ];
    for name in bad_names {
        let body = serde_json::json!({"image": "busybox", "name": name}).to_string();
        create(&body).await.must_be(400, "invalid");
    }
    for size in [
        r#""vcpu": 0"#,
        r#""vcpu": 4294967295"#,
        r#""vcpu": -1"#,
        r#""vcpu": 1.5"#,
        r#""memory_mib": 0"#,
        r#""memory_mib": 1"#,
        r#""memory_mib": 4294967295"#,
        r#""memory_mib": 99999999999999999999"#,
        r#""memory_mib": "512""#,
        r#""disk_gib": 0"#,
        r#""disk_gib": 4294967295"#,
        r#""nonsense": 1"#,
        r#""env": {"": "x"}"#,
    ] {
        create(&format!(r#"{{"image": "busybox", {size}}}"#))
            .await
            .must_be(400, "invalid");
    }
    create(r#"{"image": "busybox", "runtime": "abacus"}"#)
        .await
        .must_be(400, "no_such_runtime")
        .with_hint();
    for broken in ["", "{", "[]", "null", "\u{0}"] {
        create(broken).await.must_be(400, "invalid");
    }
    lab.raw("GET", "/v1/machines/nobody", "")
        .await
        .must_be(404, "machine_not_found")
        .with_hint();
    lab.raw("GET", "/v1/nothing", "")
        .await
        .must_be(404, "no_such_route");
    assert_eq!(lab.raw("PATCH", "/v1/machines", "{}").await.status, 405);

    lab.create("a").await;
    create(r#"{"image": "busybox", "name": "a"}"#)
        .await
        .must_be(409, "name_taken")
        .with_hint();

    let cli = lab
        .hutch(&["create", "busybox", "--name", "Bad_Name"])
        .await;
    assert_eq!(cli.code, 2, "{cli}");
    assert!(cli.stderr.contains("Bad_Name"), "{cli}");
    let cli = lab.hutch(&["create", "nowhere"]).await;
    assert_eq!(cli.code, 4, "{cli}");
    assert!(
        cli.stderr.contains("nowhere") && cli.stderr.contains("hutch image ls"),
        "{cli}"
    );

    let machines = lab.client().all_machines(None).await.unwrap();
    assert_eq!(machines.len(), 1, "{machines:?}");
    lab.finish().await;
}

#[tokio::test]
async fn a_kernel_that_is_not_there() {
    let lab = lab!(Runtime::Qemu);
    let cache = lab.dir.join("cache");
    let lab = lab
        .env("HUTCH_KERNEL", "/nowhere/kernel.deb")
        .env("HUTCH_CACHE_DIR", cache.to_str().unwrap())
        .start()
        .await;
    lab.busybox().await;
    let answer = lab
        .raw("POST", RUNNING, r#"{"image": "busybox", "name": "a"}"#)
        .await;
    // Known before the machine is made, or, when it comes first, the reason of its failure.
    match answer.status {
        503 => drop(answer.must_be(503, "no_kernel").with_hint()),
        _ => {
            answer.must_be(409, "machine_failed").with_hint();
            assert!(
                answer.body["message"]
                    .as_str()
                    .unwrap()
                    .contains("/nowhere/kernel.deb")
            );
        }
    }
    lab.finish().await;
}

#[tokio::test]
async fn a_disk_below_its_reserve() {
    let mut lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    lab.stop().await;
    let mut lab = lab.env("HUTCH_LIMITS_DISK_RESERVE_MIB", "1000000000");
    lab.restart().await;
    let answer = lab
        .raw("POST", "/v1/machines", r#"{"image": "busybox"}"#)
        .await;
    answer.must_be(507, "exhausted").with_hint();
    let answer = lab
        .raw(
            "POST",
            "/v1/images/bootstrap",
            r#"{"distribution": "busybox", "name": "b"}"#,
        )
        .await;
    answer.must_be(507, "exhausted").with_hint();
    assert!(lab.client().all_machines(None).await.unwrap().is_empty());
    lab.finish().await;
}

/// A small file system over a lab's data directory.
struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: PathBuf, size: &str) -> Option<Mounted> {
        fs::create_dir(&dir).unwrap();
        let options = format!("size={size},mode=0711");
        let mut mount = Command::new("mount");
        let mounted = mount
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(&dir)
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Mounted(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[tokio::test]
async fn a_disk_that_is_full() {
    if !is_root() {
        hutch_tests::skip!("only root can mount a small file system");
    }
    let lab = lab!(Runtime::Stub).env("HUTCH_LIMITS_DISK_RESERVE_MIB", "0");
    let Some(_mounted) = Mounted::new(lab.data_dir(), "256m") else {
        hutch_tests::skip!("mount is refused");
    };
    let lab = lab.start().await;
    lab.busybox().await;
    lab.create("before").await;
    let filler = lab.dir.join("data/filler");
    fill(&filler);

    let answer = lab
        .raw(
            "POST",
            RUNNING,
            r#"{"image": "busybox", "name": "a", "disk_gib": 1}"#,
        )
        .await;
    match answer.status {
        507 => drop(answer.must_be(507, "exhausted").with_hint()),
        _ => drop(answer.must_be(409, "machine_failed").with_hint()),
    }
    assert_eq!(
        lab.client().machine("before").await.unwrap().status,
        Status::Running
    );
    // A full disk must not keep anybody from deleting.
    fs::remove_file(&filler).unwrap();
    lab.create("after").await;
    lab.finish().await;
}

fn fill(file: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(file).unwrap();
    let mut size = 1 << 20;
    while size > 0 {
        if file.write_all(&vec![1; size]).is_err() {
            size /= 2;
        }
    }
}

#[tokio::test]
async fn a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let lab = lab!(Runtime::Stub);
    let ran = lab.hutch(&["serve", "--listen", &address]).await;
    assert_eq!(ran.code, 6, "{ran}");
    assert!(
        ran.stderr.contains(&address) && ran.stderr.contains("--listen"),
        "{ran}"
    );
    lab.finish().await;
}

#[tokio::test]
async fn a_second_server_on_the_same_data() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    lab.create("a").await;
    let free = "127.0.0.1:0";
    let ran = lab
        .hutch(&["serve", "--listen", free, "--http-listen", free])
        .await;
    assert_eq!(ran.code, 6, "{ran}");
    assert!(
        ran.stderr.contains("another server") && ran.stderr.contains("--data-dir"),
        "{ran}"
    );
    // The first has noticed nothing.
    assert_eq!(lab.sh("a", "echo still").await.stdout, "still\n");
    lab.finish().await;
}

#[tokio::test]
async fn a_guest_that_never_answers() {
    sick(lab!(Runtime::Stub), r#"{"agent": "silent"}"#).await;
}

#[tokio::test]
async fn a_guest_that_answers_garbage() {
    sick(lab!(Runtime::Stub), r#"{"agent": "garbage"}"#).await;
}

#[tokio::test]
async fn a_vmm_that_ends_at_once() {
    sick(lab!(Runtime::Stub), r#"{"start": {"exit_code": 7}}"#).await;
}

#[tokio::test]
async fn a_vmm_that_hangs() {
    sick(lab!(Runtime::Stub), r#"{"start": "hang"}"#).await;
}

/// The machine fails for all to see, can be asked again, and goes when it is told to.
async fn sick(lab: Lab, behaviour: &str) {
    let lab = lab
        .misbehaving(behaviour)
        .env("HUTCH_LIMITS_BOOT_TIMEOUT_MS", "3000")
        .start()
        .await;
    lab.busybox().await;
    let answer = lab
        .raw("POST", RUNNING, r#"{"image": "busybox", "name": "sick"}"#)
        .await;
    answer.must_be(409, "machine_failed").with_hint();
    let machine = lab.client().machine("sick").await.unwrap();
    assert_eq!(machine.status, Status::Failed);
    assert!(machine.reason.is_some_and(|reason| !reason.is_empty()));
    wait_until(
        "no process of it is left",
        Duration::from_secs(60),
        async || {
            !lab.inventory()
                .iter()
                .any(|item| item.starts_with("process"))
        },
    )
    .await;
    let exec = lab
        .raw("POST", "/v1/machines/sick/exec", r#"{"command": ["true"]}"#)
        .await;
    assert!((400..=599).contains(&exec.status), "{exec:?}");
    let gone = lab
        .client()
        .delete("sick", Some(Duration::from_secs(60)))
        .await
        .unwrap();
    assert_eq!(gone, None);
    lab.finish().await;
}
