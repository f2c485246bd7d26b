//! Pools in a tmpfs that plays the host's disk, in mounts of the test's own: with the test, mounts and loop devices go.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::{Kind, Method, clone_file};

const MIB: u64 = 1 << 20;
const CONTENTS: &[&str] = &["machines", "images"];
/// What the child of a test does, where it dies, and in which directory.
const CHILD: [&str; 3] = ["POOL_TEST_DO", "POOL_TEST_DIE_AT", "POOL_TEST_DIR"];

const SETTINGS: Settings = Settings {
    mode: Mode::Auto,
    reserve: 64 * MIB,
    contents: CONTENTS,
};
const SIZES: Sizes = Sizes {
    first: 320 * MIB,
    ahead: 64 * MIB,
    reserve: 64 * MIB,
    // btrfs resizes nothing to less.
    smallest: 256 * MIB,
};

/// A host of the test's own, with a data directory that has no reflinks.
struct Host(tempfile::TempDir);

impl Host {
    /// A disk of so many MiB, if the test may have one.
    fn new(mib: u64) -> Option<Host> {
        let skip = |why: &str| eprintln!("skipped: pools are not tried, {why}");
        if !rustix::process::geteuid().is_root() {
            skip("as only root can mount them");
            return None;
        }
        if mkfs().is_none() {
            skip("as there is no mkfs.btrfs (package btrfs-progs)");
            return None;
        }
        if !Path::new(device::CONTROL).exists() {
            skip("as there is no /dev/loop-control");
            return None;
        }
        if let Err(errno) = sys::own_mounts() {
            skip(&format!("as mounts of our own are refused: {errno}"));
            return None;
        }
        let host = Host(tempfile::tempdir().unwrap());
        mount_tmpfs(host.path(), mib);
        Some(host)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn free(&self) -> u64 {
        free_bytes(self.path()).unwrap()
    }

    fn open(&self) -> Pool {
        match open_sized(self.path(), &SETTINGS, Some(SIZES)).unwrap() {
            Storage::Pool(pool) => pool,
            other => panic!("no pool: {other:?}"),
        }
    }

    /// Does `what` in a process that is killed at `step`, as by a crash.
    fn die(&self, what: &str, step: &str) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pool::tests::what_a_child_does", "--ignored"])
            .args(["--nocapture", "--test-threads=1"])
            .envs(
                CHILD
                    .into_iter()
                    .zip([what.as_ref(), step.as_ref(), self.path().as_os_str()]),
            )
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(child.signal(), Some(9), "{what} does not come to `{step}`");
    }

    /// How many loop devices have the pool's file.
    fn devices(&self) -> usize {
        let Ok(file) = open_file(&self.path().join(BACKING)) else {
            return 0;
        };
        let numbers = fs::read_dir("/sys/block").unwrap().flatten();
        let names = numbers.map(|entry| Path::new("/dev").join(entry.file_name()));
        let loops = names.filter(|path| path.to_string_lossy().starts_with("/dev/loop"));
        let with_it = loops.filter(|path| matches!(Device::at(path, &file), Ok(Some(_))));
        with_it.count()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for dir in [&self.path().join(MOUNT), self.path()] {
            while rustix::mount::unmount(dir, UnmountFlags::DETACH).is_ok() {}
        }
    }
}

fn mount_tmpfs(dir: &Path, mib: u64) {
    let options = std::ffi::CString::new(format!("size={mib}m")).unwrap();
    rustix::mount::mount(
        "hutch-test",
        dir,
        "tmpfs",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
}

fn fill(path: &Path, bytes: u64) -> io::Result<()> {
    let file = File::create(path)?;
    let block = vec![0x5a; MIB as usize];
    for at in 0..bytes / MIB {
        file.write_all_at(&block, at * MIB)?;
    }
    file.sync_all()
}

pub(super) fn die_at(step: &str) {
    if std::env::var(CHILD[1]).is_ok_and(|wanted| wanted == step) {
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
    }
}

#[test]
#[ignore = "other tests run it in a process of its own"]
fn what_a_child_does() {
    let Ok(dir) = std::env::var(CHILD[2]) else {
        return;
    };
    let Storage::Pool(pool) = open_sized(Path::new(&dir), &SETTINGS, Some(SIZES)).unwrap() else {
        panic!("no pool");
    };
    match std::env::var(CHILD[0]).unwrap().as_str() {
        "grow" => {
            pool.grow(256 * MIB).unwrap();
        }
        "release" => {
            assert!(pool.release().unwrap());
        }
        _ => {}
    }
}

#[test]
fn a_pool_is_made_used_and_found_again() {
    let Some(host) = Host::new(896) else { return };
    let pool = host.open();
    assert_eq!(pool.size().unwrap(), SIZES.first);
    assert_eq!(place(host.path()), pool.dir());
    let (image, disk) = (pool.dir().join("image"), pool.dir().join("disk"));
    fill(&image, 8 * MIB).unwrap();
    assert_eq!(clone_file(&image, &disk).unwrap().method, Method::Reflink);

    // As after kill -9 with a machine that runs.
    let again = host.open();
    assert_eq!(host.devices(), 1);
    let machines = pool.dir().join("machines");
    fs::create_dir_all(machines.join("one")).unwrap();
    let open = File::open(&disk).unwrap();
    assert!(!again.release().unwrap(), "somebody works in it");
    assert!(is_mounted(host.path()));
    drop(open);
    assert!(pool.release().unwrap());
    assert!(!is_mounted(host.path()) && exists(host.path()));
    assert_eq!(host.devices(), 0);

    // As after a reboot.
    let pool = host.open();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 8 * MIB);
    fs::remove_dir(machines.join("one")).unwrap();
    assert!(pool.release().unwrap());
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0);
}

#[test]
fn a_crash_at_any_step_of_making_costs_nothing() {
    let Some(host) = Host::new(896) else { return };
    for step in [
        "created",
        "allocated",
        "formatted",
        "attached",
        "mounted",
        "published",
    ] {
        host.die("open", step);
        let pool = host.open();
        assert_eq!(host.devices(), 1, "{step}");
        assert!(!host.path().join(HALF_MADE).exists(), "{step}");
        fill(&pool.dir().join("file"), MIB).unwrap();
        assert!(pool.release().unwrap(), "{step}");
        assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0, "{step}");
    }
}

#[test]
fn a_crash_later_keeps_what_is_in_the_pool() {
    let Some(host) = Host::new(1024) else { return };
    let steps = [
        ("open", "attached again", 0),
        ("open", "mounted again", 0),
        ("open", "settled", 0),
        ("grow", "grown", 64),
        ("grow", "device grown", 64),
        ("release", "released", 0),
    ];
    for (what, step, grown_mib) in steps {
        let pool = host.open();
        let file = pool.dir().join("machines/one");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fill(&file, MIB).unwrap();
        let before = pool.size().unwrap();
        // Else there is nothing to attach and to mount.
        assert!(pool.release().unwrap());
        host.die(what, step);
        let pool = host.open();
        assert_eq!(fs::metadata(&file).unwrap().len(), MIB, "{step}");
        assert_eq!(host.devices(), 1, "{step}");
        assert!(pool.size().unwrap() >= before + grown_mib * MIB, "{step}");
        let total = total_bytes(pool.dir()).unwrap();
        assert_eq!(total, pool.size().unwrap(), "{step}");
        fs::remove_file(&file).unwrap();
        assert!(pool.release().unwrap());
    }
}

#[test]
fn a_device_that_has_the_file_is_used_again() {
    let Some(host) = Host::new(896) else { return };
    let pool = host.open();
    fs::create_dir_all(pool.dir().join("images/one")).unwrap();
    assert!(pool.release().unwrap());
    let file = open_file(&host.path().join(BACKING)).unwrap();
    let held = Device::of(&file).unwrap();
    let pool = host.open();
    assert_eq!((&pool.device, host.devices()), (&held.path, 1));

    // A server in another mount namespace, which does not see this mount.
    let data_dir = host.path().to_owned();
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        sys::own_mounts().unwrap();
        rustix::mount::unmount(data_dir.join(MOUNT), UnmountFlags::empty()).unwrap();
        assert!(!is_mounted(&data_dir));
        let Storage::Pool(pool) = open_sized(&data_dir, &SETTINGS, Some(SIZES)).unwrap() else {
            panic!("no pool");
        };
        fs::write(pool.dir().join("images/two"), "seen by both").unwrap();
        done.send(pool.device.clone()).unwrap();
    });
    assert_eq!(wait.recv().unwrap(), held.path);
    let text = fs::read(pool.dir().join("images/two")).unwrap();
    assert_eq!(text, b"seen by both");
}

#[test]
fn a_pool_grows_ahead_and_leaves_the_reserve_to_the_host() {
    let Some(host) = Host::new(1024) else { return };
    let pool = host.open();
    assert_eq!(pool.grow(0).unwrap(), 0, "enough is free");
    fill(&pool.dir().join("a"), 200 * MIB).unwrap();
    assert_eq!(pool.grow(0).unwrap(), 64 * MIB);
    assert!(free_bytes(pool.dir()).unwrap() >= SIZES.ahead);
    assert!(pool.grow(u64::MAX).unwrap() > 0);
    assert_eq!(pool.grow(u64::MAX).unwrap(), 0);
    assert!((SIZES.reserve..SIZES.reserve + sizes::GRAIN).contains(&host.free()));
    let room = room(host.path()).unwrap();
    assert_eq!(room.around, Some(host.free()));
    assert!(room.usable(SIZES.reserve) < room.free + sizes::GRAIN);

    // What is deleted in it stays its own: the host could not give it back for sure.
    fs::remove_file(pool.dir().join("a")).unwrap();
    rustix::fs::syncfs(File::open(pool.dir()).unwrap()).unwrap();
    let meta = fs::metadata(&pool.backing).unwrap();
    assert!(meta.blocks() * 512 >= meta.len());
}

#[test]
fn what_fills_a_pool_is_tried_again_when_it_could_grow() {
    let Some(host) = Host::new(1024) else { return };
    let pool = host.open();
    let is_full = |error: &io::Error| error.kind() == io::ErrorKind::StorageFull;
    let image = pool.dir().join("image");
    let write = || fill(&image, 256 * MIB);
    assert!(is_full(&write().unwrap_err()), "it does not fit");
    pool.with_room(256 * MIB, is_full, write).unwrap();
    let size = pool.size().unwrap();

    // Nothing is left to grow by: the first error is told.
    let more = pool.dir().join("more");
    let write = || fill(&more, 1024 * MIB);
    assert!(is_full(
        &pool.with_room(1024 * MIB, is_full, write).unwrap_err()
    ));
    assert!(host.free() >= SIZES.reserve);
    assert!(pool.size().unwrap() > size);
    fs::remove_file(&more).unwrap();
    rustix::fs::syncfs(File::open(pool.dir()).unwrap()).unwrap();
    clone_file(&image, &pool.dir().join("disk")).unwrap();
}

#[test]
fn a_full_host_has_no_pool_and_a_full_pool_is_still_mounted() {
    let Some(host) = Host::new(896) else { return };
    fill(&host.path().join("others"), 640 * MIB).unwrap();
    let found = open_sized(host.path(), &SETTINGS, Some(SIZES)).unwrap();
    let Storage::Copies(obstacle) = found else {
        panic!("{found:?}");
    };
    assert!(obstacle.reason.contains("no room"), "{obstacle:?}");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 1);

    fs::remove_file(host.path().join("others")).unwrap();
    let pool = host.open();
    fs::create_dir_all(pool.dir().join("images/one")).unwrap();
    assert!(fill(&pool.dir().join("images/one/disk"), 640 * MIB).is_err());
    assert!(pool.release().unwrap());
    assert!(fill(&host.path().join("others"), 896 * MIB).is_err());
    let pool = host.open();
    assert_eq!(pool.grow(0).unwrap(), 0);
}

#[test]
fn reflinks_of_the_host_are_found_by_trying() {
    let Some(host) = Host::new(896) else { return };
    for (program, arguments) in [
        ("mkfs.btrfs", &["-q"][..]),
        ("mkfs.xfs", &["-q", "-s", "size=4096", "-m", "reflink=1"]),
    ] {
        let (file, dir) = (host.path().join("disk"), host.path().join("mounted"));
        fs::create_dir_all(&dir).unwrap();
        create_file(&file).unwrap().set_len(400 * MIB).unwrap();
        let made = Command::new(program).args(arguments).arg(&file).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: {program} does not work here (packages btrfs-progs, xfsprogs)");
            fs::remove_file(&file).unwrap();
            continue;
        }
        let device = Device::of(&open_file(&file).unwrap()).unwrap();
        let kind = program.strip_prefix("mkfs.").unwrap();
        rustix::mount::mount(&device.path, &dir, kind, MountFlags::empty(), None).unwrap();
        let found = open(&dir, &SETTINGS).unwrap();
        assert!(matches!(found, Storage::Native), "{kind}: {found:?}");
        assert_eq!(place(&dir), dir);
        rustix::mount::unmount(&dir, UnmountFlags::empty()).unwrap();
        fs::remove_file(&file).unwrap();
    }
}

#[test]
fn no_pool_is_made_where_it_is_not_wanted_or_would_hide_something() {
    let Some(host) = Host::new(896) else { return };
    let with = |mode| open_sized(host.path(), &Settings { mode, ..SETTINGS }, Some(SIZES));
    let reason = |found: Storage| match found {
        Storage::Copies(obstacle) => obstacle.reason,
        other => panic!("{other:?}"),
    };
    assert!(reason(with(Mode::Off).unwrap()).contains("configuration"));

    fs::create_dir_all(host.path().join("machines/one")).unwrap();
    assert!(reason(with(Mode::Auto).unwrap()).contains("outside"));
    let error = with(Mode::Require).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("outside"), "{error}");
    fs::remove_dir(host.path().join("machines/one")).unwrap();

    let dir = host.path().join(MOUNT);
    fs::create_dir(&dir).unwrap();
    mount_tmpfs(&dir, 1);
    assert!(reason(with(Mode::Auto).unwrap()).contains("something else"));
    rustix::mount::unmount(&dir, UnmountFlags::empty()).unwrap();

    // One that is there is used however the setting is, and never hidden.
    let pool = host.open();
    fs::create_dir_all(pool.dir().join("images/one")).unwrap();
    assert!(pool.release().unwrap());
    mount_tmpfs(&dir, 1);
    assert!(
        with(Mode::Auto)
            .unwrap_err()
            .to_string()
            .contains("something else")
    );
    rustix::mount::unmount(&dir, UnmountFlags::empty()).unwrap();
    assert!(matches!(with(Mode::Off).unwrap(), Storage::Pool(_)));
}

#[test]
fn a_pool_that_cannot_be_mounted_is_an_error_and_stays() {
    let Some(host) = Host::new(896) else { return };
    let backing = host.path().join(BACKING);
    fs::write(&backing, vec![0; 1 << 20]).unwrap();
    let error = open_sized(host.path(), &SETTINGS, Some(SIZES)).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.hint().is_some());
    assert_eq!(fs::metadata(&backing).unwrap().len(), 1 << 20);
    // Its device goes in a moment.
    for _ in 0..100 {
        if host.devices() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("a loop device is left");
}

/// `cargo test -p hutch-disk --release -- --ignored --nocapture snapshots_cost`, with TMPDIR where a server's data is.
#[test]
#[ignore = "prints what a snapshot costs; takes 4 GiB of the disk"]
fn snapshots_cost() {
    let Some(_mounts) = Host::new(1) else { return };
    let disk = tempfile::tempdir_in(std::env::temp_dir()).unwrap();
    let settings = Settings {
        mode: Mode::Require,
        ..SETTINGS
    };
    let sizes = Sizes {
        first: 4096 * MIB,
        ..SIZES
    };
    let began = std::time::Instant::now();
    let Storage::Pool(pool) = open_sized(disk.path(), &settings, Some(sizes)).unwrap() else {
        println!("skipped: {} has reflinks by itself", disk.path().display());
        return;
    };
    println!("pool of 4 GiB made in {:?}", began.elapsed());
    let file = open_file(&pool.backing).unwrap();
    let direct = Device::at(&pool.device, &file)
        .unwrap()
        .unwrap()
        .is_direct();
    println!("direct I/O: {direct}");
    let image = pool.dir().join("image");
    fill(&image, 2048 * MIB).unwrap();
    let sync = || rustix::fs::syncfs(File::open(pool.dir()).unwrap()).unwrap();
    sync();
    let before = free_bytes(pool.dir()).unwrap();
    let mut times: Vec<_> = (0..20)
        .map(|number| {
            let began = std::time::Instant::now();
            let cloned = clone_file(&image, &pool.dir().join(format!("{number}"))).unwrap();
            assert_eq!(cloned.method, Method::Reflink);
            began.elapsed()
        })
        .collect();
    times.sort();
    let began = std::time::Instant::now();
    sync();
    println!(
        "20 clones of 2 GiB: median {:?}, worst {:?}; sync {:?}",
        times[10],
        times[19],
        began.elapsed()
    );
    let used = before.saturating_sub(free_bytes(pool.dir()).unwrap());
    drop(
        Command::new("btrfs")
            .args(["filesystem", "df"])
            .arg(pool.dir())
            .status(),
    );
    println!("new space for each: {} KiB", used / 20 / 1024);
    let began = std::time::Instant::now();
    println!(
        "grew by {} MiB in {:?}",
        pool.grow(3072 * MIB).unwrap() >> 20,
        began.elapsed()
    );
    for name in fs::read_dir(pool.dir()).unwrap().flatten() {
        fs::remove_file(name.path()).unwrap();
    }
    let began = std::time::Instant::now();
    assert!(pool.release().unwrap());
    println!("unmounted and erased in {:?}", began.elapsed());
}
