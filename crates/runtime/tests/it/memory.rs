//! Machines that go on from saved memory: the same promises of every runtime that saves it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error, MachineDir, Process};
use rustix::process::{Pid, Signal};

use crate::clones::{answering, goes_on};
use crate::conformance::running;
use crate::lab::{self, Guest, Lab, in_words};

/// The directory that a machine goes on from, in its own.
const FROM: &str = "from";
/// What the guests have.
const MIB: u64 = 128;

macro_rules! promises {
    ($($name:ident)*) => {
        mod qemu { $(#[tokio::test] async fn $name() {
            if let Some(lab) = super::Lab::new("qemu").await { super::$name(lab).await; }
        })* }
    };
}

promises! {
    a_machine_goes_on_where_it_was
    what_is_new_is_what_was_written
    copies_share_what_they_have_not_written
    one_that_was_not_told_to_go_on_waits
    what_runs_cannot_be_saved_and_goes_on
    what_cannot_be_gone_on_with_is_refused
    a_full_disk_is_told_and_harms_nobody
    a_vmm_that_hangs_is_not_waited_for
    what_it_began_with_must_be_there
}

/// What a guest has nowhere but in its memory.
async fn remember(guest: &mut Guest, word: &str) {
    let written = guest.ask(&format!("run echo {word} > /word")).await;
    assert_eq!(written, "ended 0");
}

async fn remembers(guest: &mut Guest, word: &str) {
    let same = guest
        .ask(&format!("run test \"$(cat /word)\" = {word}"))
        .await;
    assert_eq!(same, "ended 0", "{word}");
}

/// Saves a machine in a directory of this name in its own, and lets it go on.
async fn save(lab: &Lab, name: &str) {
    lab.runtime.pause(&lab.dir).await.unwrap();
    save_paused(lab, name).await.unwrap();
    lab.runtime.resume(&lab.dir).await.unwrap();
}

async fn save_paused(lab: &Lab, name: &str) -> Result<(), Error> {
    let into = lab.dir.file(name);
    fs::create_dir(&into).unwrap();
    lab.runtime.snapshot(&lab.dir, &into).await
}

/// Ends a machine and lets it go on from what was saved.
async fn back(lab: &Lab, name: &str) -> Process {
    lab.runtime.kill(&lab.dir).await.unwrap();
    drop(fs::remove_dir_all(lab.dir.file(FROM)));
    links(&lab.dir.file(name), &lab.dir.file(FROM));
    goes_on(lab, FROM).await
}

fn links(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::hard_link(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Another machine of the same server, with what the first one has saved.
fn beside(first: &Lab, name: &str) -> Lab {
    let mut other = Lab::bare(first.runtime.name());
    other.runtime = first.runtime.clone();
    for file in [MachineDir::KERNEL, MachineDir::INITRAMFS, MachineDir::DISK] {
        fs::copy(first.dir.file(file), other.dir.file(file)).unwrap();
    }
    links(&first.dir.file(name), &other.dir.file(FROM));
    other
}

async fn a_machine_goes_on_where_it_was(lab: Lab) {
    let process = lab.start().await;
    let mut guest = lab.guest().await;
    remember(&mut guest, "first").await;
    drop(guest);
    save(&lab, "one").await;
    // The one that was saved goes on too.
    let mut guest = answering(&lab).await;
    remembers(&mut guest, "first").await;
    remember(&mut guest, "second").await;
    drop(guest);

    let first = back(&lab, "one").await;
    assert_ne!(first.pid(), process.pid());
    let mut guest = answering(&lab).await;
    remembers(&mut guest, "first").await;
    remember(&mut guest, "third").await;
    drop(guest);

    // And so on, generation after generation, while older ones stay what they are.
    save(&lab, "two").await;
    back(&lab, "two").await;
    let mut guest = answering(&lab).await;
    remembers(&mut guest, "third").await;
    remember(&mut guest, "fourth").await;
    drop(guest);
    save(&lab, "three").await;
    back(&lab, "three").await;
    remembers(&mut answering(&lab).await, "fourth").await;
    back(&lab, "two").await;
    remembers(&mut answering(&lab).await, "third").await;
    let last = back(&lab, "one").await;
    let mut guest = answering(&lab).await;
    remembers(&mut guest, "first").await;
    guest.say("poweroff").await;
    assert_eq!(last.wait().await.exit, Exit::PowerOff);
    lab.left_nothing().await;
    // It boots as ever.
    lab.start().await;
    lab.guest().await.ping("booted").await;
}

/// Bytes in pages that are not the same in two files.
fn different(one: &Path, other: &Path) -> u64 {
    let (one, other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let size = one.metadata().unwrap().len();
    assert_eq!(size, other.metadata().unwrap().len());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut different = 0;
    for at in (0..size).step_by(1 << 20) {
        one.read_exact_at(&mut a, at).unwrap();
        other.read_exact_at(&mut b, at).unwrap();
        let pages = a.chunks(4096).zip(b.chunks(4096));
        different += pages.filter(|(a, b)| a != b).count() as u64 * 4096;
    }
    different
}

async fn what_is_new_is_what_was_written(lab: Lab) {
    lab.start().await;
    drop(lab.guest().await);
    save(&lab, "one").await;
    let saved = lab.dir.file("one").join("memory");
    let metadata = fs::metadata(&saved).unwrap();
    assert_eq!(metadata.len(), MIB << 20);
    assert!(metadata.blocks() * 512 < MIB << 20, "zeros take no room");

    back(&lab, "one").await;
    let mut guest = answering(&lab).await;
    const WRITTEN: u64 = 8 << 20;
    let write = format!(
        "run dd if=/dev/urandom of=/big bs=1M count={}",
        WRITTEN >> 20
    );
    assert_eq!(guest.ask(&write).await, "ended 0");
    drop(guest);
    save(&lab, "two").await;
    let new = different(&saved, &lab.dir.file("two").join("memory"));
    println!("{} KiB are new", new >> 10);
    assert!((WRITTEN..WRITTEN + (16 << 20)).contains(&new), "{new}");

    // Generations later it is no more.
    back(&lab, "two").await;
    drop(answering(&lab).await);
    save(&lab, "three").await;
    let (two, three) = (lab.dir.file("two"), lab.dir.file("three"));
    let new = different(&two.join("memory"), &three.join("memory"));
    assert!(new < 16 << 20, "{new}");
}

/// Memory that a process has for itself alone, in KiB.
fn own_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    // The guest's memory: a file in memory, mapped privately.
    let mut lines = text
        .lines()
        .skip_while(|line| !line.contains("hutch-memory"));
    assert!(
        lines.next().is_some_and(|line| line.contains(" rw-p ")),
        "{text}"
    );
    let anonymous = lines.find_map(|line| line.strip_prefix("Anonymous:"));
    let words = anonymous.unwrap().split_ascii_whitespace().next();
    words.unwrap().parse().unwrap()
}

async fn copies_share_what_they_have_not_written(lab: Lab) {
    lab.start().await;
    remember(&mut lab.guest().await, "first").await;
    save(&lab, "one").await;
    let copies = [beside(&lab, "one"), beside(&lab, "one")];
    let inode = |process: &Process| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid())).unwrap();
        let line = maps.lines().find(|line| line.contains("hutch-memory"));
        line.unwrap()
            .split_ascii_whitespace()
            .nth(4)
            .unwrap()
            .to_owned()
    };
    let (one, other) = (
        goes_on(&copies[0], FROM).await,
        goes_on(&copies[1], FROM).await,
    );
    assert_eq!(inode(&one), inode(&other));
    for (copy, word) in copies.iter().zip(["second", "third"]) {
        let mut guest = answering(copy).await;
        remembers(&mut guest, "first").await;
        remember(&mut guest, word).await;
    }
    for (copy, word) in copies.iter().zip(["second", "third"]) {
        remembers(&mut answering(copy).await, word).await;
    }
    for process in [one, other] {
        let own = own_kib(process.pid());
        println!("{own} KiB of its own");
        assert!(own < 16 << 10, "{own}");
    }
    remembers(&mut answering(&lab).await, "first").await;
}

async fn one_that_was_not_told_to_go_on_waits(lab: Lab) {
    lab.start().await;
    remember(&mut lab.guest().await, "first").await;
    save(&lab, "one").await;
    lab.runtime.kill(&lab.dir).await.unwrap();
    links(&lab.dir.file("one"), &lab.dir.file(FROM));
    let restored = lab.runtime.restore(&lab.dir, &lab.spec, FROM.as_ref());
    let process = restored.await.unwrap();
    // Its server died here. What the next one finds stands still.
    assert_eq!(running(lab.adopt().await).pid(), process.pid());
    let mut guest = lab.connect().await;
    guest.say("ping early").await;
    let heard = tokio::time::timeout(std::time::Duration::from_millis(300), guest.hear()).await;
    assert!(heard.is_err(), "{heard:?}");
    drop(guest);
    let next = lab::runtime(lab.runtime.name(), &lab.dir);
    next.resume(&lab.dir).await.unwrap();
    remembers(&mut answering(&lab).await, "first").await;
}

async fn what_runs_cannot_be_saved_and_goes_on(lab: Lab) {
    lab.start().await;
    drop(lab.guest().await);
    let error = save_paused(&lab, "one").await.unwrap_err();
    assert!(error.to_string().contains("not paused"), "{error}");
    answering(&lab).await.ping("on").await;
    lab.runtime.kill(&lab.dir).await.unwrap();
    let error = save_paused(&lab, "two").await.unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
}

async fn what_cannot_be_gone_on_with_is_refused(mut lab: Lab) {
    lab.start().await;
    drop(lab.guest().await);
    save(&lab, "one").await;
    lab.runtime.kill(&lab.dir).await.unwrap();
    let (one, from) = (lab.dir.file("one"), lab.dir.file(FROM));
    let refused = async |lab: &Lab| {
        let restored = lab
            .runtime
            .restore(&lab.dir, &lab.spec, FROM.as_ref())
            .await;
        let ended = match restored {
            // Its process may come up before it finds out.
            Ok(process) => in_words(&Error::Exited {
                runtime: "it",
                report: process.wait().await,
            }),
            Err(error) => in_words(&error),
        };
        lab.left_nothing().await;
        ended
    };
    // Nothing is there.
    fs::create_dir(&from).unwrap();
    let error = refused(&lab).await;
    assert!(error.contains("No such file"), "{error}");
    // Not all is there.
    fs::hard_link(one.join("memory"), from.join("memory")).unwrap();
    let error = refused(&lab).await;
    assert!(error.contains("state"), "{error}");
    // It means nothing.
    fs::write(from.join("state"), [7; 20_000]).unwrap();
    let error = refused(&lab).await;
    assert!(error.contains("exit code 1"), "{error}");
    // It is of a machine of another size.
    fs::remove_file(from.join("state")).unwrap();
    fs::hard_link(one.join("state"), from.join("state")).unwrap();
    lab.spec.memory_mib = 256;
    let error = refused(&lab).await;
    assert!(error.contains("256 MiB"), "{error}");
    lab.spec.memory_mib = MIB as u32;
    goes_on(&lab, FROM).await;
    answering(&lab).await.ping("on").await;
}

async fn a_full_disk_is_told_and_harms_nobody(lab: Lab) {
    let full = tempfile::tempdir().unwrap();
    let flags = rustix::mount::MountFlags::empty();
    if rustix::mount::mount("hutch-test", full.path(), "tmpfs", flags, c"size=4m").is_err() {
        println!("skipped: a small file system takes the right to mount one");
        return;
    }
    lab.start().await;
    remember(&mut lab.guest().await, "first").await;
    lab.runtime.pause(&lab.dir).await.unwrap();
    let error = lab.runtime.snapshot(&lab.dir, full.path()).await;
    let unmounted = rustix::mount::unmount(full.path(), rustix::mount::UnmountFlags::DETACH);
    unmounted.unwrap();
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", in_words(&error));
    lab.runtime.resume(&lab.dir).await.unwrap();
    remembers(&mut answering(&lab).await, "first").await;
    // And it can be saved where there is room.
    save(&lab, "one").await;
    back(&lab, "one").await;
    remembers(&mut answering(&lab).await, "first").await;
}

async fn a_vmm_that_hangs_is_not_waited_for(lab: Lab) {
    let process = lab.start().await;
    drop(lab.guest().await);
    lab.runtime.pause(&lab.dir).await.unwrap();
    let pid = Pid::from_raw(process.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let error = save_paused(&lab, "one").await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    save_paused(&lab, "two").await.unwrap();
    lab.runtime.resume(&lab.dir).await.unwrap();
    answering(&lab).await.ping("on").await;
}

async fn what_it_began_with_must_be_there(lab: Lab) {
    lab.start().await;
    drop(lab.guest().await);
    save(&lab, "one").await;
    back(&lab, "one").await;
    drop(answering(&lab).await);
    // What it has written means nothing beside another file.
    let began = lab.dir.file(FROM).join("memory");
    fs::remove_file(&began).unwrap();
    fs::copy(lab.dir.file("one").join("memory"), &began).unwrap();
    lab.runtime.pause(&lab.dir).await.unwrap();
    let error = save_paused(&lab, "two").await.unwrap_err();
    assert!(
        in_words(&error).contains("not what the machine began with"),
        "{}",
        in_words(&error)
    );
    lab.runtime.resume(&lab.dir).await.unwrap();
    answering(&lab).await.ping("on").await;
    assert!(matches!(lab.adopt().await, Adopted::Running(_)));
}
