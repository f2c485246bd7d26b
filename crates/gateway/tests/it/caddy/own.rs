//! A Caddy of our own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hutch_gateway::caddy::{Caddy, Mode, OwnCaddy, Status};

use super::kit::{Running, Stage, Theirs, down, have, status, until, up};

/// The process that listens at a socket; none when there is none.
fn holder(dir: &Path) -> Option<i32> {
    let stream = std::os::unix::net::UnixStream::connect(dir.join("own/admin.sock")).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(stream).unwrap();
    Some(peer.pid.as_raw_nonzero().get())
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn it_serves_comes_back_when_it_dies_and_goes_with_us() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let caddy = Caddy::start(stage.config(Mode::Own(stage.own()))).unwrap();
    up(&caddy).await;
    let root = stage.root(&caddy).await;
    assert!(stage.works(&root).await);
    let first = holder(stage.dir.path()).unwrap();
    let mode = std::fs::metadata(stage.path("own")).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o700
    );

    kill(first);
    until("another one serves", async || stage.works(&root).await).await;
    let second = holder(stage.dir.path()).unwrap();
    assert_ne!(second, first);
    // Its certificate authority is the same one as before.
    assert_eq!(stage.root(&caddy).await, root);
    assert!(stage.works(&root).await);
    caddy.close().await;
    assert!(!is_alive(second));
    assert_eq!(holder(stage.dir.path()), None);
}

#[tokio::test]
async fn a_program_that_is_missing_or_fails_is_told() {
    if !have(&["caddy"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let missing = OwnCaddy {
        program: stage.path("no-such-caddy"),
        ..stage.own()
    };
    let caddy = Caddy::start(stage.config(Mode::Own(missing))).unwrap();
    status(&caddy, |status| *status == Status::Absent).await;
    caddy.close().await;
    let failing = OwnCaddy {
        program: "false".into(),
        ..stage.own()
    };
    let caddy = Caddy::start(stage.config(Mode::Own(failing))).unwrap();
    let (reason, _) = down(&caddy).await;
    assert!(reason.contains("exit status: 1"), "{reason}");
    caddy.close().await;
}

/// What the crash below happens to: a process that has a Caddy, until it is killed.
#[tokio::test]
#[ignore = "a part of another test"]
async fn victim() {
    let Some(dir) = std::env::var_os("HUTCH_TEST_VICTIM").map(PathBuf::from) else {
        return;
    };
    let stage = Stage::new("vms.test").await;
    let own = OwnCaddy {
        dir: dir.join("own"),
        ..stage.own()
    };
    let caddy = Caddy::start(stage.config(Mode::Own(own))).unwrap();
    up(&caddy).await;
    std::fs::write(dir.join("up"), "").unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_crash_of_ours_leaves_none() {
    if !have(&["caddy"]) {
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    let victim = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "caddy::own::victim"])
        .env("HUTCH_TEST_VICTIM", dir.path())
        // What it cannot clear away.
        .env("TMPDIR", dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut victim = Running(victim);
    until("the victim has a Caddy", async || {
        dir.path().join("up").exists()
    })
    .await;
    let pid = holder(dir.path()).unwrap();
    assert!(is_alive(pid));
    victim.kill();
    until("the kernel ended it", async || !is_alive(pid)).await;
}

#[tokio::test]
async fn one_that_a_crash_left_all_the_same_is_replaced() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let dir = stage.path("own");
    std::fs::create_dir(&dir).unwrap();
    let mut config = Theirs::base(&stage);
    config["admin"]["listen"] = format!("unix/{}/admin.sock", dir.display()).into();
    let file = stage.path("left.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let mut left = Theirs::spawn(stage.dir.path(), Some(&file));
    until("the old one is there", async || {
        holder(stage.dir.path()).is_some()
    })
    .await;
    let caddy = Caddy::start(stage.config(Mode::Own(stage.own()))).unwrap();
    up(&caddy).await;
    assert!(left.0.try_wait().unwrap().is_some(), "the old one is gone");
    let root = stage.root(&caddy).await;
    assert!(stage.works(&root).await);
    caddy.close().await;
}
