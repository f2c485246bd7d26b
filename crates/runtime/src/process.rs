//! A machine's processes: waiting for their end, ending them, and finding them again after a restart of the server.
//! What an end means is each runtime's affair; how processes are told apart is in `identity.rs`.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Exit;
use rustix::fs::inotify::WatchFlags;
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::identity::{self, Proof};
use crate::launch::{ExitRecord, ExitStatus, Record, read_json};
use crate::memory::Memory;
use crate::ring::RingReader;
use crate::watch::Watch;
use crate::{Error, MachineDir, sys};

/// Time for a shim to say who it is, or to go once its VMM has gone.
const SHIM_SPEAKS: Duration = Duration::from_secs(5);
/// Time for a start that is just beginning to remove the record of the run before it.
const OLD_RECORD_GOES: Duration = Duration::from_millis(500);
/// How often a held lock is tried again: its release is no event.
const LOCK_AGAIN: Duration = Duration::from_millis(50);
/// Time for a VMM to die of SIGKILL and for its shim to say so.
const KILL_WORKS: Duration = Duration::from_secs(5);
/// The most bytes of a VMM's last words in a report.
const LAST_WORDS: usize = 2048;

/// How a machine's VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    /// How.
    pub exit: Exit,
    /// The last of what the VMM itself said in that run, printable, at most 2 KiB; and a line of ours when the kernel
    /// killed it for memory.
    pub stderr_tail: String,
}

/// What is the case with a machine that an earlier server started.
#[derive(Debug)]
pub enum Adopted {
    /// It runs.
    Running(Process),
    /// It ran, and ended so.
    Exited(ExitReport),
    /// It never ran.
    Absent,
    /// Something holds its lock and cannot be proved to be it. Nothing may be done.
    Unknown {
        /// What is missing from the proof.
        reason: String,
    },
}

/// All that is known of an end, for a runtime to judge.
pub(crate) struct Evidence {
    pub(crate) status: ExitStatus,
    /// What the VMM's event monitor said.
    pub(crate) events: Vec<u8>,
    /// The last of what the guest's console printed in that run.
    pub(crate) console: Vec<u8>,
    /// The last of what the VMM itself said in that run.
    pub(crate) words: Vec<u8>,
}

/// Says what an end meant that was not our own SIGKILL.
pub(crate) type Judge = fn(&Evidence) -> Exit;

/// What is alive of a machine: a VMM below its shim, or something that another program of the host keeps for us.
#[async_trait]
pub(crate) trait Life: std::fmt::Debug + Send + Sync {
    /// The process to show for it.
    fn pid(&self) -> u32;

    /// The process of ours above it, where there is one.
    fn shim_pid(&self) -> Option<u32> {
        None
    }

    /// Where this run begins in the ring of the console.
    fn console_from(&self) -> u64;

    /// Waits for its end, by event, until all that it said is on file. Asked once in a [`Process`]' life.
    async fn ended(&self) -> ExitReport;

    /// Ends it at once, and does not wait for the end. `again`: the first time did not help.
    async fn kill(&self, again: bool) -> Result<(), Error>;
}

/// A machine's running VMM, or what stands for one. Clones are the same.
///
/// Belongs to the tokio runtime that it was made in.
#[derive(Debug, Clone)]
pub struct Process(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    life: Box<dyn Life>,
    report: OnceCell<ExitReport>,
}

impl Process {
    /// Of something that is proved to be this machine.
    pub(crate) fn new(life: impl Life + 'static) -> Self {
        let process = Self(Arc::new(Inner {
            life: Box::new(life),
            report: OnceCell::new(),
        }));
        // Its end is noted even when nobody asks: a child is reaped, and the report is read before a next run.
        let watched = process.clone();
        drop(tokio::spawn(async move { watched.wait().await }));
        process
    }

    /// The id of the VMM's process, or of the first process of a container.
    pub fn pid(&self) -> u32 {
        self.0.life.pid()
    }

    /// The process id of its shim. `None` where another program of the host is its parent.
    pub fn shim_pid(&self) -> Option<u32> {
        self.0.life.shim_pid()
    }

    /// Where this run begins in the ring of the console.
    pub fn console_from(&self) -> u64 {
        self.0.life.console_from()
    }

    /// Waits until it has ended and all that it said is on file.
    pub async fn wait(&self) -> ExitReport {
        let report = self.0.report.get_or_init(|| self.0.life.ended());
        report.await.clone()
    }

    /// Ends it at once, for a life that stands on this one.
    pub(crate) async fn signal(&self, again: bool) -> Result<(), Error> {
        self.0.life.kill(again).await
    }

    /// Ends it at once and waits for its end.
    ///
    /// # Errors
    /// [`Error::Timeout`] when the host does not get rid of it, [`Error::Io`] when it may not be signalled.
    pub async fn kill(&self) -> Result<ExitReport, Error> {
        if let Some(report) = self.0.report.get() {
            return Ok(report.clone());
        }
        for again in [false, true] {
            self.0.life.kill(again).await?;
            if let Ok(report) = tokio::time::timeout(KILL_WORKS, self.wait()).await {
                return Ok(report);
            }
        }
        Err(Error::Timeout {
            what: "end of a killed VMM",
            seconds: 2 * KILL_WORKS.as_secs(),
        })
    }
}

/// A VMM and its shim.
#[derive(Debug)]
pub(crate) struct Vmm {
    runtime: &'static str,
    dir: MachineDir,
    record: Record,
    judge: Judge,
    shim: AsyncFd<OwnedFd>,
    /// `None` when it was gone already.
    vmm: Option<OwnedFd>,
    /// What its guest went on with.
    _memory: Option<Arc<Memory>>,
}

impl Vmm {
    /// `shim` and `vmm` are descriptors of proved processes.
    pub(crate) fn new(
        runtime: &'static str,
        dir: MachineDir,
        record: Record,
        judge: Judge,
        shim: OwnedFd,
        vmm: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let shim = sys::readable(shim).map_err(Error::io("watch the shim of", dir.path()))?;
        Ok(Self {
            runtime,
            dir,
            record,
            judge,
            shim,
            vmm,
            _memory: None,
        })
    }

    /// Keeps what its guest goes on with at hand for others.
    pub(crate) fn with(self, memory: Option<Arc<Memory>>) -> Self {
        Self {
            _memory: memory,
            ..self
        }
    }

    fn signal(&self, process: &OwnedFd) -> Result<(), Error> {
        match rustix::process::pidfd_send_signal(process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(Error::io("kill the VMM of", self.dir.path())(error.into())),
        }
    }
}

#[async_trait]
impl Life for Vmm {
    fn pid(&self) -> u32 {
        self.record.vmm.pid.unsigned_abs()
    }

    fn shim_pid(&self) -> Option<u32> {
        Some(self.record.shim.pid.unsigned_abs())
    }

    fn console_from(&self) -> u64 {
        self.record.console_from
    }

    async fn ended(&self) -> ExitReport {
        // A descriptor of a process is readable from its end on. An error means that the tokio runtime ends.
        if self.shim.readable().await.is_err() {
            return ExitReport {
                exit: Exit::Lost,
                stderr_tail: String::new(),
            };
        }
        // Only for our own children; for others it fails, and somebody else does it.
        let id = WaitId::PidFd(std::os::fd::AsFd::as_fd(self.shim.get_ref()));
        let _ = rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        let (dir, record, judge) = (self.dir.clone(), self.record.clone(), self.judge);
        let report = tokio::task::spawn_blocking(move || report(&dir, &record, judge)).await;
        let report = report.expect("reading a report does not panic");
        tracing::debug!(dir = %self.dir.path().display(), runtime = self.runtime, exit = ?report.exit, "VMM ended");
        report
    }

    /// At first the VMM. Then its shim, which was stopped or is stuck: the VMM has its signal, so this cannot make a
    /// second owner.
    async fn kill(&self, again: bool) -> Result<(), Error> {
        if again {
            return self.signal(self.shim.get_ref());
        }
        mark_killed(&self.dir).await;
        self.vmm.as_ref().map_or(Ok(()), |vmm| self.signal(vmm))
    }
}

/// Notes that we want a machine to end: before it is done, so that a server that dies now leaves the truth about it.
pub(crate) async fn mark_killed(dir: &MachineDir) {
    let marker = dir.file(MachineDir::KILLED);
    if let Err(error) = tokio::fs::write(&marker, "").await {
        tracing::warn!(path = %marker.display(), %error, "a kill of ours will look like somebody else's");
    }
}

/// Finds out what is the case with a machine. Kills nothing.
pub(crate) async fn adopt(
    runtime: &'static str,
    dir: &MachineDir,
    judge: Judge,
) -> Result<Adopted, Error> {
    let began = Instant::now();
    let mut watch = Watch::new(&dir.file(MachineDir::RUN), WatchFlags::MOVED_TO).ok();
    loop {
        let looked_at = dir.clone();
        let seen = tokio::task::spawn_blocking(move || look(&looked_at, judge));
        let seen = match seen.await {
            Ok(seen) => seen?,
            // Only the end of the runtime cancels it, and with it whoever waits here.
            Err(error) if error.is_cancelled() => std::future::pending().await,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let (reason, within) = match seen {
            Seen::Absent => return Ok(Adopted::Absent),
            Seen::Exited(report) => return Ok(Adopted::Exited(report)),
            Seen::Running { record, shim, vmm } => {
                let vmm = Vmm::new(runtime, dir.clone(), record, judge, shim, Some(vmm))?;
                return Ok(Adopted::Running(Process::new(vmm)));
            }
            Seen::Early(reason) => (reason, SHIM_SPEAKS),
            Seen::Doubt(reason) => (reason, OLD_RECORD_GOES),
        };
        if began.elapsed() >= within {
            let reason = reason.to_owned();
            return Ok(Adopted::Unknown { reason });
        }
        let change = async {
            match &mut watch {
                Some(watch) => drop(watch.changed().await),
                None => std::future::pending().await,
            }
        };
        let _ = tokio::time::timeout(LOCK_AGAIN, change).await;
    }
}

/// Opens something of the process of a VMM that runs. `open` is given its number, which it has at least until `open`
/// has returned without an error. Blocks.
pub(crate) fn open_vmm<T>(
    dir: &MachineDir,
    judge: Judge,
    open: impl FnOnce(u32) -> std::io::Result<T>,
) -> Result<T, Error> {
    let not_running = || Error::NotRunning {
        dir: dir.path().to_owned(),
    };
    let Seen::Running { record, vmm, .. } = look(dir, judge)? else {
        return Err(not_running());
    };
    let opened = open(record.vmm.pid.unsigned_abs());
    match identity::ended(&vmm, Duration::ZERO) {
        true => Err(not_running()),
        false => opened.map_err(Error::io("look into the VMM of", dir.path())),
    }
}

/// Ends what runs, if it can be proved to be this machine.
pub(crate) async fn kill(
    runtime: &'static str,
    dir: &MachineDir,
    judge: Judge,
) -> Result<(), Error> {
    end(dir, adopt(runtime, dir, judge).await?).await
}

/// Ends what was found running.
pub(crate) async fn end(dir: &MachineDir, found: Adopted) -> Result<(), Error> {
    match found {
        Adopted::Running(process) => process.kill().await.map(drop),
        Adopted::Exited(_) | Adopted::Absent => Ok(()),
        Adopted::Unknown { reason } => {
            let alone = dir.clone();
            let ended = tokio::task::spawn_blocking(move || end_alone(&alone));
            if ended.await.expect("ending a VMM does not panic") {
                return Ok(());
            }
            Err(Error::Unproved {
                dir: dir.path().to_owned(),
                reason,
            })
        }
    }
}

/// Ends a VMM that outlived its shim: then the lock is free. Blocks.
fn end_alone(dir: &MachineDir) -> bool {
    let lock = crate::launch::lock(dir, false);
    matches!(lock, Ok((_, true))) && identity::end_orphan(dir, KILL_WORKS)
}

enum Seen {
    Absent,
    Exited(ExitReport),
    Running {
        record: Record,
        shim: OwnedFd,
        vmm: OwnedFd,
    },
    /// A start or an end that is under way explains it.
    Early(&'static str),
    /// Nothing explains it but a lie or somebody else.
    Doubt(&'static str),
}

fn look(dir: &MachineDir, judge: Judge) -> Result<Seen, Error> {
    let (lock, ours) = match crate::launch::lock(dir, false) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Seen::Absent),
        other => other.map_err(Error::io("lock", dir.file(MachineDir::LOCK)))?,
    };
    let record = read_json::<Record>(&dir.file(MachineDir::SHIM));
    if ours {
        let Some(record) = record else {
            return Ok(Seen::Absent);
        };
        return Ok(if identity::orphan_is_gone(dir, SHIM_SPEAKS) {
            Seen::Exited(report(dir, &record, judge))
        } else {
            Seen::Doubt("its shim is dead and its VMM is not")
        });
    }
    let Some(record) = record else {
        return Ok(Seen::Doubt(
            "its lock is held, and there is no record by whom",
        ));
    };
    if !identity::boot_id().is_ok_and(|id| id == record.boot_id) {
        return Ok(Seen::Doubt(
            "its lock is held, and the record is of another boot of the host",
        ));
    }
    let shim = match identity::prove(record.shim, None) {
        Proof::Alive(shim) => shim,
        Proof::Gone => {
            return Ok(Seen::Doubt(
                "its lock is held, and not by the recorded shim",
            ));
        }
        Proof::Doubt(why) => return Ok(Seen::Doubt(why)),
    };
    // One that may not be looked at (a launcher with file capabilities) rests on its number and start time.
    if identity::holds(record.shim.pid, &lock) == Some(false) {
        return Ok(Seen::Doubt("the recorded process does not hold the lock"));
    }
    Ok(match identity::prove(record.vmm, Some(record.shim.pid)) {
        Proof::Alive(vmm) => Seen::Running { record, shim, vmm },
        Proof::Gone => Seen::Early("its VMM has ended, and its shim has not"),
        Proof::Doubt(why) => Seen::Doubt(why),
    })
}

/// What the files say about a run that is over.
fn report(dir: &MachineDir, record: &Record, judge: Judge) -> ExitReport {
    let tail = |name, from, limit| {
        let ring = RingReader::open(&dir.file(name));
        ring.and_then(|ring| ring.tail(from, limit))
            .unwrap_or_default()
    };
    let exit = read_json::<ExitRecord>(&dir.file(MachineDir::EXIT));
    let exit = exit.filter(|exit| exit.shim == record.shim);
    let limit = exit.as_ref().and_then(|exit| exit.out_of_memory);
    let status = exit.map(|exit| exit.status);
    let ours = exists(&dir.file(MachineDir::KILLED));
    let words = tail(MachineDir::VMM_LOG, record.vmm_log_from, LAST_WORDS);
    let exit = match status {
        None | Some(ExitStatus::Signal(libc::SIGKILL)) if ours => Exit::Killed,
        None => Exit::Lost,
        Some(status) => judge(&Evidence {
            status,
            events: tail(MachineDir::EVENTS, 0, 64 * 1024),
            console: tail(MachineDir::CONSOLE, record.console_from, 8 * 1024),
            words: words.clone(),
        }),
    };
    let mut stderr_tail = printable(&words, LAST_WORDS);
    if let Some(limit) = limit {
        let line_end = if stderr_tail.is_empty() { "" } else { "\n" };
        let mib = limit >> 20;
        stderr_tail += &format!(
            "{line_end}killed for memory: the VMM needed more than the {mib} MiB that it may use"
        );
    }
    ExitReport { exit, stderr_tail }
}

/// Whether a console ends with a panic of the kernel. A guest can print this too: it lies about nobody but itself.
pub(crate) fn panicked(console: &[u8]) -> bool {
    const WORDS: &[u8] = b"Kernel panic - not syncing";
    console.windows(WORDS.len()).any(|window| window == WORDS)
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The end of foreign text, safe to show: no control characters but line ends, nothing that changes the direction of
/// writing, at most `limit` bytes.
pub(crate) fn printable(bytes: &[u8], limit: usize) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| match c {
            '\n' => c,
            '\t' => ' ',
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '?',
            c if c.is_control() => '?',
            c => c,
        })
        .collect();
    let start = text.len().saturating_sub(limit);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at));
    text[start.unwrap_or(text.len())..].trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn foreign_text_is_made_safe_to_show() {
        assert_eq!(
            printable(b"\x1b[31mred\r\n\xff\0", 100),
            "?[31mred?\n\u{fffd}?"
        );
        assert_eq!(printable("a\u{202e}b".as_bytes(), 100), "a?b");
        assert_eq!(printable("ääää".as_bytes(), 3), "ä");
        assert_eq!(printable(b"", 3), "");
    }
}
