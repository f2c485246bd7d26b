//! The shapes of what leaves or outlives a process. A change here is a change for clients or for stored data.
//!
//! Each file in `golden/` is what released versions wrote: it must be read and written back unchanged. New fields come
//! with a default, and the old file stays beside the new one. `UPDATE_GOLDEN=1` writes files that are missing.

use std::path::Path;

use hutch_contract::error::ErrorBody;
use hutch_contract::exec::{Exec, ExecEvent, ExecExit, ExecResult};
use hutch_contract::expose::{
    Access, ChangeMachine, Expose, Exposure, GivenPort, MintToken, Port, PortKind, PortState,
    PublishPort, UrlToken,
};
use hutch_contract::file::{FileInfo, FileKind};
use hutch_contract::image::{BootstrapImage, Image, ImageSource};
use hutch_contract::key::Scope;
use hutch_contract::lifetime::{Lifetime, Restart, TtlAction};
use hutch_contract::machine::{CreateMachine, Exit, Isolation, Machine, Status, Timing};
use hutch_contract::network::{Egress, MachineNetwork, NetworkMode, NetworkPolicy};
use hutch_contract::node::Capabilities;
use hutch_contract::operation::{Operation, OperationState, Progress};
use hutch_contract::process::{
    AttachError, ClientMessage, Process, Processes, PtySize, SendSignal, ServerMessage, Signal,
    StartProcess,
};
use hutch_contract::record::{
    FORMAT, Fit, ImageRecord, KeyRecord, MachineRecord, Observed, OperationRecord, SnapshotFile,
    SnapshotRecord, Wanted, Work,
};
use hutch_contract::snapshot::{
    Copied, CreateSnapshot, ForkMachine, Forked, RestoreMachine, Snapshot, SnapshotState,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

const ULID: &str = "01k2j3m4n5p6q7r8s9t0v1w2x3";

fn id<T: std::str::FromStr<Err: std::fmt::Debug>>(prefix: &str) -> T {
    format!("{prefix}-{ULID}").parse().expect("a canonical id")
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a name")
}

/// The golden file reads as `value`, and `value` is written as the golden file.
fn check<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(file: &str, value: &T) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(file);
    let written = serde_json::to_string_pretty(value).expect("it can be written") + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, &written).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    let read: T = serde_json::from_str(&golden).unwrap_or_else(|error| panic!("{file}: {error}"));
    assert_eq!(&read, value, "{file} reads as something else");
    assert_eq!(written, golden, "{file} would be written otherwise");
}

fn timing() -> Timing {
    Timing {
        phase: "agent".into(),
        start_us: 90_000,
        took_us: 2_500_000,
    }
}

fn policy() -> NetworkPolicy {
    NetworkPolicy {
        egress: Egress::None,
        allow: vec!["10.1.0.0/16".into(), "*.example.com".into()],
        deny: vec!["10.1.2.3".into()],
        groups: vec![name("backend")],
    }
}

fn lifetime() -> Lifetime {
    Lifetime {
        idle_pause_s: Some(600),
        ttl_s: Some(3600),
        ttl_action: Some(TtlAction::Stop),
        restart: None,
    }
}

fn comes_back() -> Lifetime {
    Lifetime {
        restart: Some(Restart::OnFailure),
        ..Lifetime::default()
    }
}

fn machine_record() -> MachineRecord {
    MachineRecord {
        format: FORMAT,
        id: id("mch"),
        owner: id("own"),
        name: name("very-silly-penguin"),
        slot: 7,
        image: id("img"),
        image_name: name("debian-base"),
        runtime: "qemu".into(),
        isolation: Isolation::Emulation,
        kernel: None,
        vcpu: 2,
        memory_mib: 512,
        disk_gib: 8,
        env: [("LANG".to_owned(), "C.UTF-8".to_owned())].into(),
        labels: [("team".to_owned(), "blue".to_owned())].into(),
        network: NetworkPolicy::default(),
        lifetime: Lifetime::default(),
        expires_at_ms: None,
        wanted: Wanted::Running,
        observed: Observed::Failed {
            code: "timeout".into(),
            reason: "no answer".into(),
        },
        generation: 4,
        served: 3,
        restart: true,
        exit: Some(Exit::Signal { signal: 9 }),
        starts: 2,
        failed_starts: 1,
        created_at_ms: 1_763_779_200_000,
        started_at_ms: Some(1_763_779_203_000),
        unapplied: vec!["clock: not permitted".into()],
        timings: vec![timing()],
        exposure: Exposure::default(),
        work: None,
        origin: None,
        head: None,
        snapshots: 0,
        resume_from: None,
        keep_initial: false,
        cold: false,
        warm: false,
    }
}

fn exposure() -> Exposure {
    Exposure {
        host: Some("web".into()),
        http_port: 3000,
        expose: Expose::Ports(vec![5173]),
        access: Access::Public,
        generation: 2,
        ports: vec![
            GivenPort {
                host_port: 22_001,
                guest_port: 22,
                kind: PortKind::Ssh,
                bind: [127, 0, 0, 1].into(),
            },
            GivenPort {
                host_port: 8443,
                guest_port: 443,
                kind: PortKind::Tcp,
                bind: std::net::Ipv6Addr::LOCALHOST.into(),
            },
        ],
    }
}

#[test]
fn records_of_format_1() {
    check("record-machine-1.json", &machine_record());
    check(
        "record-machine-1-network.json",
        &MachineRecord {
            network: policy(),
            ..machine_record()
        },
    );
    check(
        "record-machine-1-kernel.json",
        &MachineRecord {
            kernel: Some("mine".into()),
            ..machine_record()
        },
    );
    check(
        "record-machine-1-lifetime.json",
        &MachineRecord {
            lifetime: lifetime(),
            expires_at_ms: Some(1_763_782_800_000),
            ..machine_record()
        },
    );
    check(
        "record-machine-1-restart.json",
        &MachineRecord {
            lifetime: comes_back(),
            ..machine_record()
        },
    );
    check(
        "record-machine-1-warm.json",
        &MachineRecord {
            cold: true,
            warm: true,
            ..machine_record()
        },
    );
    check(
        "record-machine-1-initial.json",
        &MachineRecord {
            keep_initial: true,
            ..machine_record()
        },
    );
    check(
        "record-machine-1-exposure.json",
        &MachineRecord {
            exposure: exposure(),
            ..machine_record()
        },
    );
    check(
        "record-image-1.json",
        &ImageRecord {
            format: FORMAT,
            id: id("img"),
            owner: id("own"),
            name: name("debian-base"),
            source: ImageSource::Bootstrap {
                distribution: "debian".into(),
                suite: "bookworm".into(),
            },
            sha256: "00ff".into(),
            size_bytes: 321_000_000,
            used_bytes: 165_000_000,
            created_at_ms: 1_763_779_200_000,
        },
    );
    check(
        "record-operation-1.json",
        &OperationRecord {
            format: FORMAT,
            id: id("op"),
            owner: id("own"),
            kind: "image-import".into(),
            target: "img-x".into(),
            state: OperationState::Failed {
                code: "image".into(),
                message: "no".into(),
                hint: Some("try".into()),
            },
            created_at_ms: 1_763_779_200_000,
            work: None,
        },
    );
    check(
        "record-key-1.json",
        &KeyRecord {
            format: FORMAT,
            id: id("key"),
            owner: id("own"),
            scope: Scope::Admin,
            secret_sha256: "00ff".into(),
            created_at_ms: 1_763_779_200_000,
            expires_at_ms: None,
        },
    );
}

#[test]
fn machines() {
    let record = machine_record();
    let machine = Machine {
        id: record.id,
        name: record.name,
        status: Status::Failed,
        reason: Some("no answer".into()),
        exit: Some(Exit::PowerOff),
        image: record.image,
        image_name: record.image_name,
        runtime: record.runtime,
        isolation: record.isolation,
        capabilities: None,
        kernel: None,
        vcpu: record.vcpu,
        memory_mib: record.memory_mib,
        disk_gib: record.disk_gib,
        env: record.env.clone(),
        labels: record.labels.clone(),
        network: None,
        lifetime: Lifetime::default(),
        expires_at_ms: None,
        starts: record.starts,
        warm: false,
        created_at_ms: record.created_at_ms,
        started_at_ms: record.started_at_ms,
        operation: Some(id("op")),
        unapplied: record.unapplied,
        timings: record.timings,
        url: None,
        urls: Default::default(),
        http_port: None,
        expose: Expose::default(),
        access: None,
        ports: vec![],
        version: 12,
    };
    check("machine.json", &machine);
    let capabilities = Capabilities {
        isolation: Isolation::Hardware,
        pause: true,
        memory_snapshot: true,
        live_resize: false,
        network: true,
    };
    check(
        "machine-network.json",
        &Machine {
            network: Some(MachineNetwork {
                mode: NetworkMode::Routed,
                ipv4: Some([172, 16, 0, 8].into()),
                ipv6: Some([0xfd01, 0x203, 0x405, 0, 0, 0, 0, 8].into()),
                policy: policy(),
            }),
            ..machine.clone()
        },
    );
    check(
        "machine-capabilities.json",
        &Machine {
            capabilities: Some(capabilities),
            kernel: Some("mine".into()),
            ..machine.clone()
        },
    );
    let url = "https://web.vms.example.net";
    check(
        "machine-reached.json",
        &Machine {
            url: Some(url.into()),
            urls: [(5173, url.replace("web", "5173-web"))].into(),
            http_port: Some(3000),
            expose: Expose::Ports(vec![5173]),
            access: Some(Access::Public),
            ports: vec![Port {
                host_port: 22_001,
                guest_port: 22,
                kind: PortKind::Ssh,
                bind: [0, 0, 0, 0].into(),
                state: PortState::Waiting,
                reason: Some("the port is in use".into()),
            }],
            ..machine
        },
    );
    let create = CreateMachine {
        image: "debian-base".into(),
        name: Some(name("web")),
        runtime: Some("qemu".into()),
        kernel: None,
        vcpu: Some(2),
        memory_mib: Some(1024),
        disk_gib: Some(10),
        env: record.env,
        labels: record.labels,
        network: NetworkPolicy::default(),
        lifetime: Lifetime::default(),
        cold: true,
        snapshot_initial: false,
        ports: vec![],
        ssh: false,
        http_port: None,
        expose: Expose::default(),
        access: Access::Private,
    };
    check("create-machine.json", &create);
    check(
        "create-machine-network.json",
        &CreateMachine {
            network: policy(),
            ..create.clone()
        },
    );
    check(
        "create-machine-kernel.json",
        &CreateMachine {
            kernel: Some("mine".into()),
            ..create.clone()
        },
    );
    let port = PublishPort {
        guest_port: 80,
        host_port: Some(8000),
        bind: Some([0, 0, 0, 0].into()),
    };
    check(
        "create-machine-reached.json",
        &CreateMachine {
            ports: vec![
                port.clone(),
                PublishPort {
                    host_port: None,
                    bind: None,
                    ..port
                },
            ],
            ssh: true,
            http_port: Some(3000),
            expose: Expose::ALL,
            access: Access::Public,
            ..create
        },
    );
    check("status.json", &Status::ALL.to_vec());
}

#[test]
fn ways_to_a_machine() {
    check(
        "change-machine.json",
        &ChangeMachine {
            access: Some(Access::Private),
            http_port: Some(80),
            expose: Some(Expose::Ports(vec![])),
            lifetime: None,
        },
    );
    check(
        "change-machine-lifetime.json",
        &ChangeMachine {
            lifetime: Some(lifetime()),
            ..ChangeMachine::default()
        },
    );
    check(
        "change-machine-restart.json",
        &ChangeMachine {
            lifetime: Some(comes_back()),
            ..ChangeMachine::default()
        },
    );
    check(
        "mint-token.json",
        &MintToken {
            lifetime_s: Some(60),
            port: Some(5173),
        },
    );
    check(
        "url-token.json",
        &UrlToken {
            token: "1763779200.mac".into(),
            url: Some("https://web.vms.example.net/?hutch_token=1763779200.mac".into()),
            expires_at_ms: 1_763_779_200_000,
        },
    );
    let nonsense = serde_json::from_str::<Expose>(r#""some""#).expect_err("no word but all");
    assert_eq!(nonsense.to_string(), "a list of ports, or \"all\"");
}

#[test]
fn images_and_operations() {
    check(
        "image.json",
        &Image {
            id: id("img"),
            name: name("busybox"),
            source: ImageSource::Busybox,
            sha256: "00ff".into(),
            size_bytes: 2,
            used_bytes: 1,
            created_at_ms: 1_763_779_200_000,
        },
    );
    check(
        "bootstrap-image.json",
        &BootstrapImage {
            distribution: "debian".into(),
            suite: Some("bookworm".into()),
            name: None,
        },
    );
    check(
        "operation.json",
        &Operation {
            id: id("op"),
            kind: "image-import".into(),
            target: "img-x".into(),
            state: OperationState::Running {
                progress: Some(Progress {
                    phase: "writing the disk".into(),
                    done: 1,
                    total: Some(2),
                    unit: "bytes".into(),
                }),
            },
            created_at_ms: 1_763_779_200_000,
            version: 3,
        },
    );
}

#[test]
fn processes() {
    let size = PtySize { rows: 24, cols: 80 };
    check(
        "start-process.json",
        &StartProcess {
            command: vec!["sh".into(), "-l".into()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            cwd: Some("/tmp".into()),
            user: Some("nobody".into()),
            stdin: true,
            pty: Some(size),
            timeout_ms: Some(1000),
        },
    );
    let exit = ExecExit {
        exit_code: 143,
        signal: Some(15),
        timed_out: false,
    };
    check(
        "processes.json",
        &Processes {
            items: vec![Process {
                id: id("prc"),
                pid: 77,
                command: vec!["sh".into()],
                started_at_ms: 1_763_779_200_000,
                pty: true,
                exit: Some(exit.clone()),
            }],
        },
    );
    let signals = [Signal::Name("TERM".into()), Signal::Number(15)];
    let signals = signals.map(|signal| SendSignal { signal, all: true });
    check("send-signal.json", &signals.to_vec());
    let why = AttachError {
        code: "stopping".into(),
        message: "the server is stopping".into(),
        hint: Some("ask again".into()),
    };
    check(
        "attach-server.json",
        &vec![
            ServerMessage::Exit(exit),
            ServerMessage::Dropped(4),
            ServerMessage::Refused(why.clone()),
            ServerMessage::Error(why),
        ],
    );
    check(
        "attach-client.json",
        &vec![
            ClientMessage::Resize(size),
            ClientMessage::Signal(Signal::Name("INT".into())),
            ClientMessage::Eof(true),
        ],
    );
}

#[test]
fn commands_and_files() {
    check(
        "exec.json",
        &Exec {
            command: vec!["sh".into(), "-c".into(), "exit 3".into()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            cwd: Some("/tmp".into()),
            user: Some("nobody".into()),
            stdin_base64: Some("aGk=".into()),
            timeout_ms: Some(1000),
        },
    );
    let exit = ExecExit {
        exit_code: 137,
        signal: Some(9),
        timed_out: true,
    };
    check(
        "exec-result.json",
        &ExecResult {
            exit: exit.clone(),
            stdout: "out\n".into(),
            stderr: "err\n".into(),
            dropped_bytes: 5,
        },
    );
    check(
        "exec-events.json",
        &vec![
            ExecEvent::Started { process: id("prc") },
            ExecEvent::Stdout {
                sequence: 0,
                data_base64: "aGk=".into(),
            },
            ExecEvent::Stderr {
                sequence: 2,
                data_base64: "aGk=".into(),
            },
            ExecEvent::Dropped { bytes: 4 },
            ExecEvent::Exit(exit),
            ExecEvent::Error {
                code: "guest".into(),
                message: "lost".into(),
                hint: None,
            },
        ],
    );
    check(
        "file.json",
        &FileInfo {
            name: "passwd".into(),
            path: None,
            kind: FileKind::File,
            size_bytes: 9,
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified_at_ms: -1,
            link_target: None,
        },
    );
    check(
        "error.json",
        &ErrorBody {
            code: "machine_not_found".into(),
            message: "machine `x` not found".into(),
            hint: Some("`hutch list` shows the machines".into()),
            request_id: "01k2".into(),
        },
    );
}

fn snapshot_record() -> SnapshotRecord {
    SnapshotRecord {
        format: FORMAT,
        id: id("snp"),
        owner: id("own"),
        name: name("before"),
        state: SnapshotState::Ready,
        machine: id("mch"),
        machine_name: name("web"),
        image: id("img"),
        image_name: name("busybox"),
        parent: Some(id("snp")),
        sequence: 3,
        passing: false,
        memory: true,
        frozen: true,
        runtime: "qemu".into(),
        kernel: None,
        vcpu: 1,
        memory_mib: 256,
        disk_gib: 8,
        fit: Some(Fit {
            vmm: "8.2.2".into(),
            acceleration: "kvm".into(),
            cpu: "a processor (00ff00ff00ff)".into(),
            agent: "0.1.0".into(),
            kernel: "6.1.0".into(),
        }),
        files: vec![SnapshotFile {
            name: "disk.raw".into(),
            size_bytes: 8 << 30,
            used_bytes: 2 << 20,
            sha256: "00ff".into(),
        }],
        manifest_sha256: "ff00".into(),
        pause_us: Some(48_000),
        created_at_ms: 1_763_779_200_000,
        timings: vec![timing()],
        operation: Some(id("op")),
    }
}

#[test]
fn snapshots() {
    check("record-snapshot-1.json", &snapshot_record());
    check("snapshot.json", &Snapshot::from(snapshot_record()));
    for (file, work) in [
        (
            "record-machine-1-snapshot.json",
            Work::Snapshot {
                snapshot: id("snp"),
                memory: true,
                operation: id("op"),
            },
        ),
        (
            "record-machine-1-restore.json",
            Work::Restore {
                snapshot: id("snp"),
                disk_only: true,
                operation: id("op"),
            },
        ),
    ] {
        let record = MachineRecord {
            work: Some(work),
            origin: Some(id("snp")),
            head: Some(id("snp")),
            snapshots: 3,
            resume_from: Some(id("snp")),
            ..machine_record()
        };
        check(file, &record);
    }
    let fork = ForkMachine {
        count: Some(2),
        memory: true,
        snapshot: Some("before".into()),
        names: vec![name("a"), name("b")],
        name_prefix: Some(name("try")),
    };
    check("fork-machine.json", &fork);
    let create = CreateSnapshot {
        name: Some(name("before")),
        memory: true,
    };
    check("create-snapshot.json", &create);
    let restore = RestoreMachine {
        snapshot: "before".into(),
        disk_only: true,
    };
    check("restore-machine.json", &restore);
    let forked = Forked {
        pause_us: Some(48_000),
        copies: vec![Copied::Error {
            code: "name_taken".into(),
            message: "machine `a` exists already".into(),
            hint: Some("choose another name".into()),
        }],
    };
    check("forked.json", &forked);
}
