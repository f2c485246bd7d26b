//! Which hierarchies are chosen, how limits are written, and a real group where this host lets us have one.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use rustix::process::Resource;

use super::*;
use crate::sys;

fn limits(name: &str, memory_bytes: u64) -> Limits {
    Limits {
        name: name.to_owned(),
        memory_bytes,
        tasks: 64,
        cpu_weight: 200,
        cpu_percent: Some(150),
    }
}

fn chosen(mountinfo: &str, v2: &'static str) -> Vec<(String, Vec<Controller>)> {
    let v2 = |_: &Path| v2.split(' ').map(str::to_owned).collect();
    let all = choose(&mounts::parse(mountinfo), v2).into_iter();
    all.map(|one| (one.mount.point.display().to_string(), one.controllers))
        .collect()
}

#[test]
fn each_kind_of_host_gets_what_it_has() {
    use Controller::{Cpu, Memory, Pids};
    let unified = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(
        chosen(unified, "cpuset cpu io memory hugetlb pids"),
        [("/sys/fs/cgroup".to_owned(), vec![Memory, Cpu, Pids])]
    );
    // Nothing is delegated: what is in a group can still be ended as one.
    assert_eq!(chosen(unified, ""), [("/sys/fs/cgroup".to_owned(), vec![])]);
    let again = format!("{unified}99 1 0:26 / /var/lib/box/sys/fs/cgroup rw - cgroup2 none rw\n");
    assert_eq!(chosen(&again, "memory").len(), 1);

    let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        38 31 0:35 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    assert_eq!(
        chosen(hybrid, "pids hugetlb"),
        [
            ("/sys/fs/cgroup/unified".to_owned(), vec![Pids]),
            ("/sys/fs/cgroup/memory".to_owned(), vec![Memory]),
            ("/sys/fs/cgroup/cpu,cpuacct".to_owned(), vec![Cpu]),
        ]
    );
    // A container may look and not touch.
    let closed = "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
    assert_eq!(chosen(closed, "memory"), []);
    assert_eq!(chosen("", ""), []);
}

#[test]
fn limits_are_written_as_each_version_wants_them() {
    let all = |version| {
        let limits = limits("h", 1 << 30);
        let all = Controller::ALL.iter();
        let settings = all.flat_map(|one| one.settings(version, &limits));
        settings
            .map(|(file, value)| format!("{file}={value}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        all(Version::V2),
        [
            "memory.max=1073741824",
            "memory.oom.group=1",
            "cpu.weight=200",
            "cpu.max=150000 100000",
            "pids.max=64"
        ]
    );
    assert_eq!(
        all(Version::V1),
        [
            "memory.limit_in_bytes=1073741824",
            "cpu.shares=2048",
            "cpu.cfs_period_us=100000",
            "cpu.cfs_quota_us=150000",
            "pids.max=64"
        ]
    );
}

#[test]
fn kills_for_memory_are_counted_in_both_versions() {
    assert_eq!(
        oom_kills("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n"),
        3
    );
    assert_eq!(
        oom_kills("oom_kill_disable 1\nunder_oom 0\noom_kill 2\n"),
        2
    );
    assert_eq!(oom_kills("oom_kill_disable 1\nunder_oom 0\n"), 0);
    assert_eq!(oom_kills(""), 0);
}

proptest! {
    #[test]
    fn only_labels_of_the_tag_are_its_own(tag in "[a-z2-9]{4}", other in "[a-z2-9]{4}", number in any::<u16>()) {
        prop_assert_eq!(slot(&format!("h{tag}-{number}"), &tag), Some(number));
        let label = format!("h{tag}-{number}");
        prop_assert!(is_name(&label));
        if other != tag {
            prop_assert_eq!(slot(&format!("h{other}-{number}"), &tag), None);
        }
        for odd in ["0", "+", "-", " ", "x"] {
            prop_assert_eq!(slot(&format!("h{tag}-{odd}{number}"), &tag), None);
        }
        prop_assert_eq!(slot(&format!("h{tag}-{number}.service"), &tag), None);
    }

    #[test]
    fn no_name_leads_elsewhere(before in ".{0,5}", after in ".{0,5}") {
        for odd in ["/", ".", "..", "\0", " ", "\n"] {
            let name = format!("{before}{odd}{after}");
            prop_assert!(!is_name(&name));
        }
    }
}

/// A group that this process may have, or `None` with words.
fn real(name: &str, memory_bytes: u64) -> Option<Cgroup> {
    let support = support();
    if !support.limited.contains(&"memory") {
        println!("skipped: no cgroups here: {:?}", support.reason);
        return None;
    }
    let cgroup = Cgroup::make(&limits(name, memory_bytes));
    assert_eq!(cgroup.flaws, [""; 0]);
    Some(cgroup)
}

fn name(n: u32) -> String {
    // One per process: several test runs may go on at once.
    format!("htest{}-{n}", std::process::id())
}

fn spawn(cgroup: &Cgroup, program: &str, argument: &str) -> std::process::Child {
    let mut command = Command::new(program);
    command
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let joints = cgroup.joints();
    let child = sys::Child {
        gains_privileges: false,
        join: joints.iter().map(AsRawFd::as_raw_fd).collect(),
        keep: Vec::new(),
        own_network: false,
        ids: None,
        // For a greedy one that has not joined.
        limits: vec![(Resource::As, 1 << 30)],
    };
    sys::set_up(&mut command, child);
    command.spawn().unwrap()
}

#[test]
fn a_greedy_child_is_killed_for_memory_and_its_group_goes() {
    let name = name(1);
    let Some(cgroup) = real(&name, 16 << 20) else {
        return;
    };
    let mut modest = spawn(&cgroup, "/bin/sleep", "600");
    assert_eq!(cgroup.placed(Pid::from_child(&modest)).flaws, [""; 0]);
    assert_eq!(cgroup.out_of_memory(), None);
    assert!(holds(&name, modest.id() as i32));
    assert!(!holds(&name, std::process::id() as i32));
    assert!(remove(&name).is_err(), "something is in it");

    let mut greedy = spawn(&cgroup, "/usr/bin/tail", "/dev/zero");
    // Its buffer grows until it is killed.
    assert_eq!(greedy.wait().unwrap().signal(), Some(9));
    assert_eq!(cgroup.out_of_memory(), Some(16 << 20));

    drop(cgroup);
    assert_eq!(modest.wait().unwrap().signal(), Some(9));
    let left: Vec<_> = Hierarchy::all()
        .iter()
        .map(|one| one.group(&name))
        .filter(|dir| dir.exists())
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new());
    remove(&name).unwrap();
}

#[test]
fn what_a_crash_left_in_a_group_ends_with_the_next_start() {
    let name = name(2);
    let Some(crashed) = real(&name, 64 << 20) else {
        return;
    };
    let mut orphan = spawn(&crashed, "/bin/sleep", "600");
    std::mem::forget(crashed);
    let again = real(&name, 64 << 20).unwrap();
    assert_eq!(orphan.wait().unwrap().signal(), Some(9));
    drop(again);
    destroy(&name).unwrap();
}
