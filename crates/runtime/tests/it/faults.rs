//! Programs that are no good: each gives a clear error within its time and leaves nothing behind. One row per runtime
//! that starts a VMM.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Error, MachineDir, Runtime};

use crate::lab::{self, GENEROUS, Lab, in_words};

/// What a scripted VMM must know to be taken for a real one.
struct Vmm {
    runtime: &'static str,
    /// What `--version` says.
    version: &'static str,
    /// The same of one that is too old.
    old: &'static str,
    /// Where its commands come in: `fd:N`, or a path in the machine's directory.
    socket: &'static str,
}

impl Vmm {
    fn runtime(&self) -> String {
        self.runtime.replace('_', "-")
    }

    /// With this program, and the KVM that some cannot do without: scripts do not mind.
    fn with(&self, program: &Path) -> Arc<dyn Runtime> {
        lab::runtime_with(&self.runtime(), |config| {
            config.program = Some(program.to_owned());
            config.acceleration = Some("kvm".to_owned());
        })
    }
}

/// One module of tests per row, one test per fault.
macro_rules! rows {
    ($($runtime:ident: $version:literal, $old:literal, $socket:literal;)*) => {
        $(mod $runtime {
            const VMM: super::Vmm = super::Vmm {
                runtime: stringify!($runtime), version: $version, old: $old, socket: $socket,
            };
            super::faults!();
        })*
    };
}

macro_rules! faults {
    () => {
        crate::faults::faults! {
            a_missing_program
            a_program_that_cannot_run
            a_program_of_another_kind
            an_old_program
            a_program_that_hangs_when_asked_for_its_version
            a_program_that_dies_at_start
            a_program_that_is_killed_at_start
            a_program_that_hangs_at_start
            a_program_that_closes_its_socket
            a_program_that_says_nothing
            a_program_that_talks_garbage
            a_program_that_floods
        }
    };
    ($($name:ident)*) => { $(#[tokio::test] async fn $name() { crate::faults::$name(&VMM).await; })* };
}
use faults;

// The name, its version and an old one as the program tells them, and its socket.
rows! {
    qemu: "QEMU emulator version 8.2.0", "QEMU emulator version 2.11.1", "fd:4";
    firecracker: "Firecracker v1.16.1", "Firecracker v1.10.1", "run/vmm/api.sock";
    cloud_hypervisor: "cloud-hypervisor v53.0", "cloud-hypervisor v52.0", "fd:3";
}

/// A machine whose VMM is this script.
struct Scripted {
    lab: Lab,
    vmm: &'static Vmm,
    program: PathBuf,
}

impl Scripted {
    fn new(vmm: &'static Vmm) -> Self {
        let lab = Lab::bare(&vmm.runtime());
        for file in [MachineDir::KERNEL, MachineDir::INITRAMFS, MachineDir::DISK] {
            // As a kernel begins that all of them take.
            std::fs::write(lab.dir.file(file), b"\x7fELF").unwrap();
        }
        // Beside the machine, where its user may go.
        let program = lab.dir.path().with_file_name("vmm");
        Self { lab, vmm, program }
    }

    /// Tells its version, and then does this.
    fn does(vmm: &'static Vmm, what: &str) -> Self {
        let version = vmm.version;
        let all = format!("case \"$*\" in *-version*) echo '{version}'; exit;; esac\n{what}");
        Self::script(vmm, &all)
    }

    fn script(vmm: &'static Vmm, text: &str) -> Self {
        let scripted = Self::new(vmm);
        std::fs::write(&scripted.program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&scripted.program, PermissionsExt::from_mode(0o755)).unwrap();
        scripted
    }

    /// Runs, and lies on its socket.
    fn lies(vmm: &'static Vmm, how: &str) -> Self {
        let liar = env!("CARGO_BIN_EXE_hutch-stub-vmm");
        Self::does(vmm, &format!("exec '{liar}' lie '{how}' {}", vmm.socket))
    }

    /// The start fails, in time, and nothing is left.
    async fn fails(self) -> Error {
        let runtime = self.vmm.with(&self.program);
        let started = runtime.start(&self.lab.dir, &self.lab.spec);
        let started = tokio::time::timeout(GENEROUS, started).await;
        let error = started
            .expect("each start has its own deadline")
            .unwrap_err();
        assert_ne!(in_words(&error), "");
        self.lab.left_nothing().await;
        // What it is asked for afterwards has clear answers too.
        let paused = runtime.pause(&self.lab.dir).await;
        assert!(
            matches!(paused, Err(Error::NotRunning { .. })),
            "{paused:?}"
        );
        runtime.kill(&self.lab.dir).await.unwrap();
        error
    }

    /// The same, for a program that is refused before it is started.
    async fn refused(self) -> Error {
        let info = self.vmm.with(&self.program).probe().await;
        assert!(!info.usable, "{info:?}");
        let error = self.fails().await;
        assert_eq!(info.reason.unwrap(), error.to_string());
        error
    }
}

async fn a_missing_program(vmm: &'static Vmm) {
    let error = Scripted::new(vmm).refused().await;
    assert!(matches!(error, Error::ProgramMissing { .. }), "{error:?}");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_ne!(error.hint().unwrap(), "");
}

async fn a_program_that_cannot_run(vmm: &'static Vmm) {
    let scripted = Scripted::script(vmm, "exit");
    std::fs::set_permissions(&scripted.program, PermissionsExt::from_mode(0o644)).unwrap();
    let error = scripted.refused().await;
    assert!(matches!(error, Error::Launch { .. }), "{error:?}");
    let directory = Scripted::new(vmm);
    std::fs::create_dir(&directory.program).unwrap();
    let error = directory.refused().await;
    assert!(matches!(error, Error::ProgramMissing { .. }), "{error:?}");
}

async fn a_program_of_another_kind(vmm: &'static Vmm) {
    for says in ["", "hello", "\\377\\000\\033[2J"] {
        let error = Scripted::script(vmm, &format!("printf '{says}'"))
            .refused()
            .await;
        let words = in_words(&error);
        assert!(words.contains("tells no version"), "{words}");
    }
}

async fn an_old_program(vmm: &'static Vmm) {
    let error = Scripted::script(vmm, &format!("echo '{}'", vmm.old))
        .refused()
        .await;
    assert!(matches!(error, Error::TooOld { .. }), "{error:?}");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_ne!(error.hint().unwrap(), "");
}

async fn a_program_that_hangs_when_asked_for_its_version(vmm: &'static Vmm) {
    let error = Scripted::script(vmm, "exec sleep 600").refused().await;
    let words = in_words(&error);
    assert!(words.contains("does not answer"), "{words}");
}

fn exited(error: &Error) -> (&Exit, &str) {
    match error {
        Error::Exited { report, .. } => (&report.exit, &report.stderr_tail),
        other => panic!("{other:?}"),
    }
}

async fn a_program_that_dies_at_start(vmm: &'static Vmm) {
    let error = Scripted::does(vmm, "echo 'no such device' >&2; exit 3")
        .fails()
        .await;
    assert_eq!(exited(&error), (&Exit::Code { code: 3 }, "no such device"));
}

async fn a_program_that_is_killed_at_start(vmm: &'static Vmm) {
    let error = Scripted::does(vmm, "kill -SEGV $$").fails().await;
    assert_eq!(exited(&error), (&Exit::Signal { signal: 11 }, ""));
}

async fn a_program_that_hangs_at_start(vmm: &'static Vmm) {
    // With a child, that must not be left either.
    let error = Scripted::does(vmm, "sleep 600 & exec sleep 600")
        .fails()
        .await;
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
}

async fn a_program_that_closes_its_socket(vmm: &'static Vmm) {
    let error = Scripted::lies(vmm, "close").fails().await;
    assert!(is_about_the_socket(&error), "{error:?}");
}

async fn a_program_that_says_nothing(vmm: &'static Vmm) {
    let error = Scripted::lies(vmm, "silence").fails().await;
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
}

async fn a_program_that_talks_garbage(vmm: &'static Vmm) {
    for line in [
        "garbage",
        "line=null",
        "line={\"return\": 7}",
        "line=HTTP/1.1 200",
    ] {
        let error = Scripted::lies(vmm, line).fails().await;
        assert!(is_about_the_socket(&error), "{line}: {error:?}");
        let words = in_words(&error);
        assert!(!words.contains('\x1b'), "{words:?}");
    }
}

async fn a_program_that_floods(vmm: &'static Vmm) {
    let error = Scripted::lies(vmm, "flood").fails().await;
    assert!(is_about_the_socket(&error), "{error:?}");
}

/// Either what it said makes no sense, or sense was waited for too long.
fn is_about_the_socket(error: &Error) -> bool {
    matches!(error, Error::Monitor { .. } | Error::Timeout { .. })
}
