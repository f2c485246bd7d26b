//! A pool under an engine, in mounts of the test's own and on a tmpfs that plays the host's disk.

use std::path::Path;
use std::process::Command;

use hutch_contract::machine::Status;
use hutch_contract::operation::OperationState;
use hutch_engine::{Engine, PoolMode, inventory};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::runtime::Runtime;

use crate::crash::{dies, reopen};
use crate::lab::{Home, Lab, tiny};
use crate::sys;

/// A place with a disk that has no reflinks, for who may mount one.
fn home_without_reflinks() -> Option<Home> {
    let home = Home::new()?;
    let mkfs = Command::new("mkfs.btrfs").arg("--version").output();
    if mkfs.is_err() || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: no pool can be made without mkfs.btrfs and /dev/loop-control");
        return None;
    }
    if let Err(errno) = sys::own_mounts() {
        eprintln!("skipped: no pool can be made without mounts of our own: {errno}");
        return None;
    }
    std::fs::create_dir(home.data()).unwrap();
    let flags = MountFlags::empty();
    let options = c"size=1400m,mode=711";
    mount("hutch-test", home.data(), "tmpfs", flags, options).unwrap();
    Some(home)
}

fn is_mounted(home: &Home) -> bool {
    hutch_disk::pool::is_mounted(&home.data())
}

#[test]
fn machines_live_in_a_pool_through_crashes_and_ends_of_the_server() {
    let Some(home) = home_without_reflinks() else {
        return;
    };
    let server = Runtime::new().unwrap();
    let lab = server.block_on(async {
        let mut config = home.config();
        config.pool = PoolMode::Require;
        let engine = Engine::open(config).await.unwrap();
        let lab = Lab::of(home, engine);
        assert_eq!(lab.import("tiny", tiny()).await, OperationState::Succeeded);
        let machine = lab.running("a").await;
        let disk = Path::new("pool/machines").join(machine.id.as_str());
        assert!(lab.home.data().join(disk).join("disk.raw").is_file());
        assert!(!lab.home.data().join("images").exists());
        lab
    });

    let home = dies(server, lab);
    assert!(is_mounted(&home));
    let server = Runtime::new().unwrap();
    let home = server.block_on(async {
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        lab.wait("a", Status::Running).await.unwrap();
        lab.sh("a", "true").await.unwrap();
        lab.engine.close().await;
        let Lab { engine, home, .. } = lab;
        drop(engine);
        assert!(is_mounted(&home), "its machine works in it");

        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        lab.delete("a").await;
        lab.engine.close().await;
        let Lab { engine, home, .. } = lab;
        drop(engine);
        assert!(!is_mounted(&home), "nothing works in it");

        // As after a reboot: the image is there.
        let engine = reopen(&home).await;
        let lab = Lab::of(home, engine);
        lab.running("b").await;
        lab.delete("b").await;
        lab.engine.delete_image(&lab.who, "tiny").await.unwrap();
        lab.engine.close().await;
        lab.home
    });
    assert_eq!(inventory(&home.data()).unwrap(), []);
    assert!(!home.data().join("pool.btrfs").exists());
    unmount(home.data(), UnmountFlags::DETACH).unwrap();
}
