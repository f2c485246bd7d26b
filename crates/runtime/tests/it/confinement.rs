//! What the kernel says about a VMM that runs: one row per runtime, with what is different about it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hutch_runtime::cgroup;

use crate::lab::{self, Lab, cgroups_named, descriptors, is_root, status};

/// What is expected of a VMM in `/proc/PID`.
struct Facts {
    /// `status`: 0 none, 2 a filter of its own.
    seccomp: &'static str,
    /// The same of each other thread.
    threads: &'static str,
    /// `status`, for a server that is root: the sets of capabilities that are empty.
    without: &'static [&'static str],
    /// What it may be a further member of: the group that owns this file, when only that may open it.
    group_of: Option<&'static str>,
    /// Relative to the machine's directory.
    cwd: &'static str,
    /// The first descriptors: their numbers and what they point to.
    inherits: &'static [(u32, &'static str)],
    /// What it has opened itself, besides sockets and what a loop of events needs.
    opens: &'static [&'static str],
    /// Files of the machine, and their modes.
    modes: &'static [(&'static str, u32)],
    /// How many descriptors its shim has.
    shim_descriptors: usize,
    /// Whether it has a network namespace of its own.
    own_network: bool,
}

/// A VMM that gets its sockets from its shim and speaks QMP.
const QMP: Facts = Facts {
    seccomp: "0",
    threads: "0",
    without: &["CapPrm", "CapEff", "CapAmb", "CapBnd"],
    group_of: None,
    cwd: "",
    inherits: &[
        (0, "null"),
        (1, "pipe"),
        (2, "pipe"),
        (3, "socket"),
        (4, "socket"),
        (5, "socket"),
    ],
    opens: &[],
    modes: &[
        ("run", 0o700),
        ("run/lock", 0o600),
        ("run/shim.json", 0o600),
        ("console.log", 0o600),
        ("run/agent.sock", 0o600),
        ("run/qmp.sock", 0o600),
    ],
    shim_descriptors: 10,
    own_network: false,
};

/// One test per row.
macro_rules! rows {
    ($($runtime:ident: $facts:expr;)*) => {
        $(#[tokio::test] async fn $runtime() {
            let name = stringify!($runtime).replace('_', "-");
            if let Some(lab) = Lab::new(&name).await { is_confined(lab, $facts).await; }
        })*
    };
}

/// A VMM with an API, that makes sockets of its own.
const API: Facts = Facts {
    threads: "2",
    group_of: Some("/dev/kvm"),
    modes: &[
        ("run/lock", 0o600),
        ("run/shim.json", 0o600),
        ("console.log", 0o600),
        ("run/vmm", 0o700),
    ],
    ..QMP
};

rows! {
    stub: QMP;
    // A pipe: its standard error once more.
    firecracker: Facts {
        seccomp: "2", inherits: &[(0, "null"), (1, "pipe"), (2, "pipe")], shim_descriptors: 8,
        opens: &["disk.raw", "kvm", "kvm-vm", "kvm-vcpu", "pipe"], ..API
    };
    // Its filters are each thread's own, and the first one only waits for the others. A pipe: the console once more.
    cloud_hypervisor: Facts {
        inherits: &[(0, "null"), (1, "pipe"), (2, "pipe"), (3, "socket"), (4, "socket")],
        opens: &["disk.raw", "initramfs", "kernel", "kvm", "kvm-vm", "kvm-vcpu", "urandom", "pipe"], ..API
    };
    qemu: Facts { seccomp: "2", threads: "2", group_of: Some("/dev/kvm"), opens: &["disk.raw", "kvm", "kvm-vm", "kvm-vcpu"], ..QMP };
}

#[tokio::test]
async fn jailed() {
    let facts = Facts {
        seccomp: "2",
        // Its bounding set had to let the jailer work, and gives nothing to who may gain no privileges.
        without: &["CapPrm", "CapEff", "CapAmb"],
        // Its root is in no other's sight.
        cwd: "/",
        inherits: &[(0, "null"), (1, "pipe"), (2, "pipe")],
        opens: &["disk.raw", "kvm", "kvm-vm", "kvm-vcpu"],
        shim_descriptors: 8,
        own_network: true,
        ..API
    };
    if let Some(lab) = Lab::jailed().await {
        is_confined(lab, facts).await;
    }
}

async fn is_confined(lab: Lab, facts: Facts) {
    let process = lab.start().await;
    lab.guest().await.ping("up").await;
    let (pid, shim) = (process.pid(), process.shim_pid().unwrap());

    let network = |process| std::fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
    assert_eq!(network(pid) != network(shim), facts.own_network);
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), facts.seccomp);
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    for thread in threads.map(|thread| thread.unwrap().file_name().into_string().unwrap()) {
        let thread = thread.parse().unwrap();
        if thread != pid {
            let name = status(thread, "Name");
            assert_eq!(status(thread, "Seccomp"), facts.threads, "{name}");
        }
    }
    assert_eq!(status(pid, "PPid"), shim.to_string());
    assert_eq!(std::fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(cwd, lab.dir.path().join(facts.cwd).components().as_path());
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let mut limits = limits.lines();
    let core = limits.find(|line| line.starts_with("Max core")).unwrap();
    let core: Vec<_> = core.split_whitespace().skip(4).take(2).collect();
    assert_eq!(core, ["0", "0"]);

    if is_root() {
        user_and_capabilities(&lab, &facts, pid);
        cgroups(&lab, pid, shim);
    } else {
        println!("skipped: user, groups, capabilities and cgroup, which change for root only");
    }

    let all = descriptors(pid);
    let (inherited, opened) = all.split_at(facts.inherits.len());
    let inherited: Vec<_> = inherited
        .iter()
        .map(|(n, kind)| (*n, kind.as_str()))
        .collect();
    assert_eq!(inherited, facts.inherits);
    let known = |kind: &str| {
        // Such as `anon_inode:kvm-vcpu:0`.
        let kind = kind.strip_prefix("anon_inode:").unwrap_or(kind);
        let kind = kind.split(':').next().unwrap_or(kind);
        ["socket", "anon_inode"].contains(&kind) || facts.opens.contains(&kind)
    };
    let foreign: Vec<_> = opened.iter().filter(|(_, kind)| !known(kind)).collect();
    assert!(foreign.is_empty(), "{foreign:?} of {all:?}");

    let all = descriptors(shim);
    let standard = [(0, "lock".into()), (1, "null".into()), (2, "null".into())];
    assert_eq!(all[..3], standard);
    let known = [
        "console.log",
        "vmm.log",
        "events.log",
        "pipe",
        "socket",
        "anon_inode",
    ];
    let foreign: Vec<_> = all[3..]
        .iter()
        .filter(|(_, kind)| !known.contains(&kind.as_str()))
        .collect();
    assert!(foreign.is_empty(), "{foreign:?} of {all:?}");
    assert_eq!(all.len(), facts.shim_descriptors, "{all:?}");

    for (file, mode) in facts.modes {
        let metadata = std::fs::metadata(lab.dir.file(file)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, *mode, "{file}");
    }
    process.kill().await.unwrap();
    lab.left_nothing().await;
}

fn user_and_capabilities(lab: &Lab, facts: &Facts, pid: u32) {
    let user = lab.spec.user.unwrap();
    let four = |id: u32| [id.to_string().as_str(); 4].join("\t");
    assert_eq!(status(pid, "Uid"), four(user.uid));
    assert_eq!(status(pid, "Gid"), four(user.gid));
    let groups = status(pid, "Groups");
    let device = facts.group_of.and_then(|file| std::fs::metadata(file).ok());
    let device = device.map(|metadata| std::os::unix::fs::MetadataExt::gid(&metadata).to_string());
    assert!(
        groups.is_empty() || Some(&groups) == device.as_ref(),
        "{groups}"
    );
    for set in facts.without {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
}

/// The VMM is in the machine's group with its limits, and the shim is not.
fn cgroups(lab: &Lab, pid: u32, shim: u32) {
    let support = cgroup::support();
    if !support.unlimited.is_empty() {
        println!(
            "skipped: no limits of {:?}: {:?}",
            support.unlimited, support.reason
        );
    }
    let (groups_of_vmm, groups_of_shim) = (groups(pid), groups(shim));
    let own = format!("/hutch/{}", lab.spec.label);
    for controller in &support.limited {
        let group = groups_of_vmm
            .iter()
            // One that is in no hierarchy of version 1 is in that of version 2.
            .find(|(controllers, _)| controllers.split(',').any(|one| one == *controller))
            .or_else(|| {
                groups_of_vmm
                    .iter()
                    .find(|(controllers, _)| controllers.is_empty())
            });
        let (_, group) = group.unwrap();
        assert!(group.ends_with(&own), "{controller}: {group}");
    }
    assert!(
        groups_of_shim
            .iter()
            .all(|(_, group)| !group.contains("/hutch/"))
    );

    let dirs = cgroups_named(&lab.spec.label);
    let read = |dir: &Path, file: &str| std::fs::read_to_string(dir.join(file)).ok();
    let value = |files: [&str; 2]| {
        let mut values = dirs
            .iter()
            .flat_map(|dir| files.map(|file| read(dir, file)));
        values.find_map(|value| value?.trim().parse::<u64>().ok())
    };
    if support.limited.contains(&"memory") {
        let limit = value(["memory.max", "memory.limit_in_bytes"]).unwrap();
        let guest = u64::from(lab.spec.memory_mib) << 20;
        assert!((guest + 1..guest + (2 << 30)).contains(&limit), "{limit}");
    }
    if support.limited.contains(&"pids") {
        assert!(value(["pids.max", "pids.max"]).is_some());
    }
}

/// Which controllers (none: version 2) with which group: `/proc/PID/cgroup`.
fn groups(pid: u32) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    text.lines().filter_map(group).collect()
}

#[tokio::test]
async fn a_vmm_runs_on_the_cpus_that_it_may() {
    let lab = Lab::new("stub").await.unwrap();
    let allowed = status(std::process::id(), "Cpus_allowed_list");
    let last = allowed.split(['-', ',']).next_back().unwrap();
    let on = |cpu| lab::runtime_with("stub", |config| config.affinity = vec![cpu]);
    let started = on(last.parse().unwrap()).start(&lab.dir, &lab.spec).await;
    let process = started.unwrap();
    assert_eq!(status(process.pid(), "Cpus_allowed_list"), last);
    process.kill().await.unwrap();
    for nowhere in [1023, 1024, u32::MAX] {
        let started = on(nowhere).start(&lab.dir, &lab.spec).await;
        let error = started.unwrap_err();
        let words = lab::in_words(&error);
        assert!(words.contains(&format!("CPUs [{nowhere}]")), "{words}");
        lab.left_nothing().await;
    }
}
