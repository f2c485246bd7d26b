//! VirtualBox, for where only that exists: each machine is a linked clone of a base VM at a snapshot.
//!
//! **This runtime has not met the real program.** Its command lines and what it takes from VirtualBox' answers come from
//! the manual and the sources of 7.0 and 7.1; the tests run them against a program that stands for VirtualBox.
//!
//! `VBoxManage` makes, changes and removes machines (`virtualbox/manage.rs`, `virtualbox/machine.rs`); the VMM is
//! `VBoxHeadless` below our shim, which stays in the foreground and ends with its guest, so locks, adoption, ends by event
//! and the bounded console are those of all runtimes. What differs, and why:
//!
//! - **The VMM runs as the server's user.** Base VM and clone are in one registry, kept by that user's `VBoxSVC`, and
//!   only one user's. Run the server as a user of its own where it has VirtualBox machines.
//! - **It may gain privileges.** `VBoxHeadless` is set-uid root in all usual builds: it opens the kernel's driver and drops
//!   to its user again. Under `no_new_privs` it would refuse to run, so that is off unless we are root already.
//! - **The death of its shim may not end it**: the kernel forgets a parent-death signal at a set-uid exec. The record
//!   still proves which process it is; so the next look at the machine ends it ([`end_orphan`]), before anything else may
//!   hold it for dead or start a second one. A VMM without a shim thus lives at most until then, and cannot be used.
//! - **SIGTERM saves the machine's memory** instead of ending it. We never send one; memory saved by others (a host that
//!   shuts down) is thrown away at the next start: a start is a boot.
//! - **A reset by the guest** is turned into an end, whose reason VirtualBox leaves in a property of the machine.
//! - **A machine is registered** in VirtualBox, outside of its directory, and known there as ours by its UUID
//!   (`unregister`, `machine::is_of`).
//! - **The agent is a service of the guest's** on its first serial line; the second one is the console. Kernel,
//!   initramfs, disk image and disk size are the base VM's affair.

mod info;
mod machine;
mod manage;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::{Exit, Isolation};
use hutch_contract::node::{Capabilities, RuntimeInfo};
use rustix::fs::inotify::WatchFlags;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::identity::{self, Proof};
use crate::launch::{self, ExitStatus, Launch, Record, read_json};
use crate::process::{self, Adopted, Evidence, ExitReport, Life, Process, printable};
use crate::program::{Program, Wanted};
use crate::ring::RingReader;
use crate::watch::Watch;
use crate::{
    Channel, Error, ImageLayer, MachineDir, MachineSpec, Outside, Root, Runtime, RuntimeConfig, tap,
};
use info::{Info, State};
use machine::{Base, CHANNEL, LinkedClone};
use manage::Manage;

/// The runtime's name.
pub(crate) const NAME: &str = "virtualbox";
const INSTALL: &str = "apt-get install virtualbox, or a package from virtualbox.org";
const PROGRAM: Wanted = Wanted {
    name: "VBoxManage",
    install: INSTALL,
    // The first with `--uart-mode1`.
    oldest: (7, 0, 0),
    needs_kvm: false,
};
/// The VMM, beside `VBoxManage`.
const VMM: &str = "VBoxHeadless";
/// For the scripts that the programs of some packages are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Time for a question, the start of VBoxSVC included.
const ASK: Duration = Duration::from_secs(5);
/// Time for a change of a machine.
const CHANGE: Duration = Duration::from_secs(10);
/// Time for a linked clone to be made or a machine to be removed: a few small files.
const MAKE: Duration = Duration::from_secs(20);
/// Time for pause, resume and the power button.
const CONTROL: Duration = Duration::from_secs(4);
/// Time for VirtualBox to notice that a VMM has gone.
const SETTLE: Duration = Duration::from_secs(4);
/// How often it is asked about that: it tells nobody.
const SETTLE_AGAIN: Duration = Duration::from_millis(100);
/// Time for the VMM to have its devices.
const READY: Duration = Duration::from_secs(12);
/// How often the socket is looked for besides being told of it.
const READY_AGAIN: Duration = Duration::from_millis(250);
/// Time for a serial line that is there to take connections.
const LISTENS: Duration = Duration::from_secs(2);
const LISTENS_AGAIN: Duration = Duration::from_millis(20);
/// Time for a VMM that its shim left behind to die.
const ORPHAN_DIES: Duration = Duration::from_secs(5);
/// The most descriptors that the VMM may have open: its disks, devices and COM connections.
const OPEN_FILES: u64 = 4096;
/// The most bytes of its last words.
const LAST_WORDS: usize = 2048;

/// See the module. Configured by `program` (`VBoxManage`), `base` and `environment`.
pub(crate) struct VirtualBox {
    config: RuntimeConfig,
    program: Program,
    base: Option<Base>,
}

impl VirtualBox {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            program: Program::new(PROGRAM, &config),
            base: config.base.as_deref().and_then(Base::parse),
            config,
        }
    }

    /// The environment of VirtualBox' programs: where the registry is, and English.
    fn env(&self) -> BTreeMap<String, String> {
        let ours = [("PATH", PATH), ("LC_ALL", "C")];
        let ours = ours.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut env = BTreeMap::from(ours);
        env.extend(self.config.environment.clone());
        env
    }

    fn manage(&self) -> Result<Manage, Error> {
        Ok(Manage {
            program: self.program.text(NAME)?,
            env: self.env(),
        })
    }

    fn vmm(&self) -> Result<String, Error> {
        let beside = self.program.path()?.with_file_name(VMM);
        if !beside.is_file() {
            return Err(Error::ProgramMissing {
                program: beside.display().to_string(),
                hint: INSTALL,
            });
        }
        Ok(beside.to_string_lossy().into_owned())
    }

    fn base(&self) -> Result<&Base, Error> {
        self.base.as_ref().ok_or_else(|| Error::Setting {
            runtime: NAME,
            setting: "base",
            value: self.config.base.clone().unwrap_or_default(),
        })
    }

    /// What VirtualBox knows about a machine; `None` when it does not know it.
    async fn show(&self, dir: &Path, arguments: &[String]) -> Result<Option<Info>, Error> {
        match self.manage()?.run(dir, arguments, ASK).await {
            Ok(text) => Info::parse(&text).map(Some).ok_or_else(|| Error::Refused {
                program: PROGRAM.name,
                command: "showvminfo".to_owned(),
                answer: match printable(text.as_bytes(), 200) {
                    text if text.is_empty() => "an empty answer".to_owned(),
                    text => format!("an answer without a state: {text}"),
                },
                hint: None,
            }),
            Err(error) if manage::is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the machine where there is none.
    async fn make(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
    ) -> Result<(LinkedClone, Option<Info>), Error> {
        let manage = self.manage()?;
        let clone = LinkedClone::of(&spec.label)?;
        let (noted, its_dir) = (clone.clone(), dir.clone());
        blocking(move || noted.note(&its_dir)).await?;
        let mut info = self.show(dir.path(), &clone.show()).await?;
        if info.is_none() {
            let whole = std::path::absolute(dir.path()).map_err(Error::io("name", dir.path()))?;
            let make = clone.make(self.base()?, &whole);
            if let Err(error) = manage.run(dir.path(), &make, MAKE).await {
                // It may be half there, or be finished by VBoxSVC after we gave up.
                if let Err(error) = self.forget(dir, &clone).await {
                    tracing::warn!(%error, name = clone.name, "a clone that was not made may be left");
                }
                return Err(error);
            }
            info = self.show(dir.path(), &clone.show()).await?;
        }
        // Each time, since the time before it may have been too late.
        let whose = clone.belongs(&spec.id);
        manage.run(dir.path(), &whose, CHANGE).await?;
        Ok((clone, info))
    }

    /// Makes the machine where there is none, and brings it into the shape and state to be started.
    async fn bring_up(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<LinkedClone, Error> {
        let manage = self.manage()?;
        let (clone, mut info) = self.make(dir, spec).await?;
        let began = Instant::now();
        let info = loop {
            match info {
                Some(Info {
                    state: State::On(state),
                    ..
                }) if began.elapsed() >= SETTLE => {
                    return Err(Error::Unproved {
                        dir: dir.path().to_owned(),
                        reason: format!(
                            "VirtualBox says that it is {state}, and nothing of ours runs"
                        ),
                    });
                }
                Some(Info {
                    state: State::On(_),
                    ..
                }) => tokio::time::sleep(SETTLE_AGAIN).await,
                Some(Info {
                    state: State::Saved,
                    ..
                }) => {
                    manage.run(dir.path(), &clone.discard(), CHANGE).await?;
                }
                Some(info) => break info,
                None => {
                    return Err(Error::Refused {
                        program: PROGRAM.name,
                        command: "clonevm".to_owned(),
                        answer: "it made a machine and does not know it".to_owned(),
                        hint: None,
                    });
                }
            }
            info = self.show(dir.path(), &clone.show()).await?;
        };
        for line in clone.shape(spec, &info) {
            manage.run(dir.path(), &line, CHANGE).await?;
        }
        Ok(clone)
    }

    fn launch(&self, clone: &LinkedClone, spec: &MachineSpec) -> Result<Launch, Error> {
        Ok(Launch {
            env: self.env(),
            user: None,
            own: Vec::new(),
            own_dir: true,
            // As root there is nothing to gain, and all that `no_new_privs` means is kept.
            gains_privileges: !rustix::process::geteuid().is_root(),
            open_files: OPEN_FILES,
            // VBoxSVC may be started by a VMM and must not end with it: it serves all machines of the account.
            cgroup: None,
            ..Launch::new(clone.run(self.vmm()?), spec, &self.config)
        })
    }

    /// Waits until the VMM has its devices; its serial line is one of them.
    async fn ready(&self, dir: &MachineDir, process: &Process) -> Result<(), Error> {
        let socket = dir.file(CHANNEL);
        let mut watch = Watch::new(&dir.file(MachineDir::VMM), WatchFlags::CREATE).ok();
        let there = async {
            while std::fs::symlink_metadata(&socket).is_err() {
                let change = async {
                    match &mut watch {
                        Some(watch) => drop(watch.changed().await),
                        None => std::future::pending().await,
                    }
                };
                let _ = tokio::time::timeout(READY_AGAIN, change).await;
            }
        };
        tokio::select! {
            biased;
            report = process.wait() => Err(Error::Exited { runtime: NAME, report }),
            done = tokio::time::timeout(READY, there) => done.map_err(|_| Error::Timeout {
                what: "start of the VMM",
                seconds: READY.as_secs(),
            }),
        }
    }

    /// The clone of a machine that runs.
    async fn running(&self, dir: &MachineDir) -> Result<LinkedClone, Error> {
        let its_dir = dir.clone();
        let held = blocking(move || match launch::lock(&its_dir, false) {
            Ok((_, ours)) => Ok(!ours),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("lock", its_dir.file(MachineDir::LOCK))(error)),
        });
        match LinkedClone::find(dir) {
            Some(clone) if held.await? => Ok(clone),
            _ => Err(Error::NotRunning {
                dir: dir.path().to_owned(),
            }),
        }
    }

    fn explained(&self, dir: &MachineDir, process: Process) -> Process {
        Process::new(Explained {
            process,
            runtime: Self::new(self.config.clone()),
            dir: dir.clone(),
        })
    }

    /// Why the base VM will not do, and what to do about it.
    async fn look_at(&self, base: &Base) -> Option<(String, Option<String>)> {
        let show = ["showvminfo", base.vm(), "--machinereadable"].map(str::to_owned);
        match self.show(Path::new("/"), &show).await {
            Ok(Some(Info {
                state: State::Inaccessible,
                ..
            })) => Some((
                format!("VirtualBox cannot read the files of {:?}", base.vm()),
                None,
            )),
            Ok(Some(_)) => None,
            Ok(None) => Some((
                format!("VirtualBox knows no VM {:?}", base.vm()),
                Some(
                    "`VBoxManage list vms` as the server's user shows those that there are"
                        .to_owned(),
                ),
            )),
            Err(error) => Some((error.to_string(), error.hint())),
        }
    }

    async fn control(&self, dir: &MachineDir, what: &'static str) -> Result<(), Error> {
        let clone = self.running(dir).await?;
        let (manage, what) = (self.manage()?, clone.control(what));
        manage.run(dir.path(), &what, CONTROL).await.map(drop)
    }

    /// Gives an order that is refused to a machine that is already in the state `as_it_is`.
    async fn bring_to(
        &self,
        as_it_is: &str,
        dir: &MachineDir,
        order: &'static str,
    ) -> Result<(), Error> {
        let refused = match self.control(dir, order).await {
            Err(refused @ Error::Refused { .. }) => refused,
            outcome => return outcome,
        };
        let clone = self.running(dir).await?;
        match self.show(dir.path(), &clone.show()).await? {
            Some(Info {
                state: State::On(state),
                ..
            }) if state == as_it_is => Ok(()),
            _ => Err(refused),
        }
    }

    /// Says more about an end than an exit code does.
    async fn explain(&self, dir: &MachineDir, mut report: ExitReport) -> ExitReport {
        if report.exit != (Exit::Code { code: 0 }) {
            return report;
        }
        let Some(clone) = LinkedClone::find(dir) else {
            return report;
        };
        let looked = async {
            let began = Instant::now();
            loop {
                match self.show(dir.path(), &clone.show()).await? {
                    // Its VMM has said good-bye, and VBoxSVC is about to take notice.
                    Some(Info {
                        state: State::On(_),
                        ..
                    }) if began.elapsed() < SETTLE => {
                        tokio::time::sleep(SETTLE_AGAIN).await;
                    }
                    info => return Ok::<_, Error>(info.map(|info| info.state)),
                }
            }
        };
        match looked.await {
            Ok(Some(State::PoweredOff)) => {
                let why = match self.manage() {
                    Ok(manage) => manage.run(dir.path(), &clone.why_off(), ASK).await,
                    Err(error) => Err(error),
                };
                let why = why.unwrap_or_default();
                report.exit = match info::property(&why) {
                    Some("Reset") if self.panicked(dir) => Exit::Panic,
                    Some("Reset") => Exit::Reboot,
                    _ => Exit::PowerOff,
                };
            }
            Ok(Some(State::Saved)) => {
                report.stderr_tail = "VirtualBox saved its state, as it does on SIGTERM".to_owned();
            }
            Ok(_) => {}
            Err(error) => report.stderr_tail = error.to_string(),
        }
        report
    }

    /// A guest can print this too and then reboot: it lies about nobody but itself.
    fn panicked(&self, dir: &MachineDir) -> bool {
        const WORDS: &str = "Kernel panic - not syncing";
        self.console_tail(dir, 8 * 1024).contains(WORDS)
    }

    /// The end of what this run printed.
    fn console_tail(&self, dir: &MachineDir, limit: usize) -> String {
        let from = read_json::<Record>(&dir.file(MachineDir::SHIM))
            .map_or(0, |record| record.console_from);
        let tail = RingReader::open(&dir.console()).and_then(|ring| ring.tail(from, limit));
        String::from_utf8_lossy(&tail.unwrap_or_default()).into_owned()
    }

    /// Removes a machine with all of its files. Nothing there is no error.
    async fn unregister(&self, uuid: &str) -> Result<(), Error> {
        let manage = self.manage()?;
        let began = Instant::now();
        loop {
            match manage
                .run(Path::new("/"), &machine::remove(uuid), MAKE)
                .await
            {
                Ok(_) => return Ok(()),
                Err(error) if manage::is_not_found(&error) => return Ok(()),
                // VBoxSVC may still hold the machine for a VMM that we have just killed.
                Err(Error::Refused { answer, .. })
                    if answer.contains("VBOX_E_INVALID_OBJECT_STATE")
                        && began.elapsed() < SETTLE =>
                {
                    tokio::time::sleep(SETTLE_AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes what a clone that failed may have left, here and there.
    async fn forget(&self, dir: &MachineDir, clone: &LinkedClone) -> Result<(), Error> {
        self.unregister(&clone.uuid).await?;
        let dir = dir.clone();
        blocking(move || LinkedClone::forget(&dir)).await
    }
}

/// Ends a VMM whose shim has died and that outlived it. Only one that is proved to be it.
async fn end_orphan(dir: &MachineDir) -> Result<(), Error> {
    if LinkedClone::find(dir).is_none() {
        // Of another runtime, whose VMMs do die with their shims.
        return Ok(());
    }
    let dir = dir.clone();
    blocking(move || {
        let Ok((_lock, true)) = launch::lock(&dir, false) else {
            return Ok(());
        };
        if identity::orphan_is_gone(&dir, Duration::ZERO) {
            return Ok(());
        }
        let Some(record) = read_json::<Record>(&dir.file(MachineDir::SHIM)) else {
            return Ok(());
        };
        if let Proof::Alive(vmm) = identity::prove(record.vmm, None) {
            tracing::warn!(dir = %dir.path().display(), pid = record.vmm.pid, "ends a VMM without a shim");
            match rustix::process::pidfd_send_signal(&vmm, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(Error::io("kill the VMM of", dir.path())(error.into())),
            }
            identity::ended(&vmm, ORPHAN_DIES);
        }
        Ok(())
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.expect("file work does not panic")
}

/// What an end of `VBoxHeadless` meant, as far as the kernel knows; the rest is asked of VirtualBox.
fn judge(evidence: &Evidence) -> Exit {
    match evidence.status {
        ExitStatus::Signal(signal) => Exit::Signal { signal },
        ExitStatus::Code(code) => Exit::Code { code },
    }
}

/// A VMM whose end is explained by VirtualBox.
struct Explained {
    process: Process,
    runtime: VirtualBox,
    dir: MachineDir,
}

impl std::fmt::Debug for Explained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.process.fmt(f)
    }
}

#[async_trait]
impl Life for Explained {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn shim_pid(&self) -> Option<u32> {
        self.process.shim_pid()
    }

    fn console_from(&self) -> u64 {
        self.process.console_from()
    }

    async fn ended(&self) -> ExitReport {
        let report = self.process.wait().await;
        self.runtime.explain(&self.dir, report).await
    }

    async fn kill(&self, again: bool) -> Result<(), Error> {
        self.process.signal(again).await
    }
}

#[async_trait]
impl Runtime for VirtualBox {
    fn name(&self) -> &'static str {
        NAME
    }

    fn boots_kernel(&self) -> bool {
        false
    }

    fn root(&self) -> Root {
        Root::Elsewhere
    }

    async fn prepare(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        _image: &ImageLayer,
    ) -> Result<(), Error> {
        tap::refuse(NAME, spec)?;
        self.program.check().await?;
        // Of an attempt whose directory is gone.
        Runtime::remove(self, spec).await?;
        self.make(dir, spec).await.map(drop)
    }

    async fn remove(&self, spec: &MachineSpec) -> Result<(), Error> {
        self.unregister(&LinkedClone::of(&spec.label)?.uuid).await
    }

    async fn outside(&self, tag: &str) -> Result<Vec<Outside>, Error> {
        let manage = self.manage()?;
        let list = ["list", "vms"].map(str::to_owned);
        let all = manage.run(Path::new("/"), &list, ASK).await?;
        let mut found = Vec::new();
        for uuid in info::machines(&all) {
            if !machine::is_of(uuid, tag) {
                continue;
            }
            let whose = match manage.run(Path::new("/"), &machine::whose(uuid), ASK).await {
                Ok(whose) => whose,
                // In doubt nothing is removed. VirtualBox says nothing of a machine whose files it cannot read.
                Err(error @ Error::Refused { .. }) => {
                    tracing::debug!(%error, uuid, "a machine that cannot be asked whose it is");
                    continue;
                }
                Err(error) => return Err(error),
            };
            // Without an owner it was not made to its end, and has never run.
            found.push(Outside {
                kind: "VirtualBox machine",
                name: uuid.to_owned(),
                of: info::property(&whose).unwrap_or_default().to_owned(),
            });
        }
        Ok(found)
    }

    async fn remove_outside(&self, what: &Outside) -> Result<(), Error> {
        self.unregister(&what.name).await
    }

    async fn probe(&self) -> RuntimeInfo {
        let mut info = RuntimeInfo::new(NAME, self.capabilities());
        self.program.probe(&mut info).await;
        if !info.usable {
            return info;
        }
        let refused = match (self.vmm(), self.base()) {
            (Err(error), _) => Some((error.to_string(), error.hint())),
            (_, Err(_)) => Some((
                match &self.config.base {
                    Some(base) => format!("{base:?} is no VM@SNAPSHOT"),
                    None => "no base VM is configured".to_owned(),
                },
                Some(
                    "set `base` of this runtime to VM@SNAPSHOT; `hutch agent install` brings the agent into a VM"
                        .to_owned(),
                ),
            )),
            (Ok(_), Ok(base)) => self.look_at(base).await,
        };
        if let Some((reason, hint)) = refused {
            info.usable = false;
            info.reason = Some(reason);
            info.hint = hint;
        }
        info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::Hardware,
            pause: true,
            memory_snapshot: false,
            live_resize: false,
            network: false,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        tap::refuse(NAME, spec)?;
        self.program.check().await?;
        self.base()?;
        end_orphan(dir).await?;
        if self.running(dir).await.is_ok() {
            return Err(Error::Locked {
                dir: dir.path().to_owned(),
            });
        }
        let clone = self.bring_up(dir, spec).await?;
        let what = self.launch(&clone, spec)?;
        let process = launch::launch(NAME, &self.config, dir, what, judge).await?;
        match self.ready(dir, &process).await {
            Ok(()) => Ok(self.explained(dir, process)),
            // It tells on its standard output why it does not start.
            Err(Error::Exited {
                runtime,
                mut report,
            }) => {
                let words = format!(
                    "{}\n{}",
                    self.console_tail(dir, LAST_WORDS),
                    report.stderr_tail
                );
                report.stderr_tail = printable(words.as_bytes(), LAST_WORDS);
                Err(Error::Exited { runtime, report })
            }
            Err(error) => {
                process.kill().await?;
                Err(error)
            }
        }
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        end_orphan(dir).await?;
        Ok(match process::adopt(NAME, dir, judge).await? {
            Adopted::Running(process) => Adopted::Running(self.explained(dir, process)),
            Adopted::Exited(report) => Adopted::Exited(self.explain(dir, report).await),
            other => other,
        })
    }

    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        self.control(dir, "acpipowerbutton").await
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        end_orphan(dir).await?;
        process::kill(NAME, dir, judge).await
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        self.bring_to("paused", dir, "pause").await
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        self.bring_to("running", dir, "resume").await
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        let began = Instant::now();
        let stream = loop {
            match dir.connect(CHANNEL).await {
                // It has its name before it listens.
                Err(Error::NotRunning { .. })
                    if began.elapsed() < LISTENS && self.running(dir).await.is_ok() =>
                {
                    tokio::time::sleep(LISTENS_AGAIN).await;
                }
                connected => break connected?,
            }
        };
        Ok(Channel::Wire(Box::new(stream)))
    }
}
