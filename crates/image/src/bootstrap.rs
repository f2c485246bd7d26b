//! A Debian root filesystem from the distribution's packages, by `mmdebstrap`, as a tar archive.

use crate::error::{Error, printable};
use crate::progress::{OnProgress, Progress};
use crate::sources;
use rustix::process::{Pid, Signal};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long `mmdebstrap` may take to clean up after itself when it is asked to stop.
const GRACE: Duration = Duration::from_secs(5);

/// What a machine needs beside the smallest installation to be of use.
const PACKAGES: [&str; 3] = ["ca-certificates", "iproute2", "procps"];

/// Files of packages that only take space in a machine.
const LEFT_OUT: [&str; 5] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// What to install.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bootstrap {
    /// Debian's release by code name; by default the host's, or `bookworm` when the host is no
    /// Debian.
    pub suite: Option<String>,
    /// Packages beside the default ones.
    pub packages: Vec<String>,
}

/// Writes the archive as the new file `target`, which is removed when anything fails or `cancel`
/// becomes true. The host's own apt sources for the release are used, and its proxy.
pub fn bootstrap(
    what: &Bootstrap,
    target: &Path,
    cancel: &AtomicBool,
    progress: OnProgress<'_>,
) -> Result<(), Error> {
    let mode = mode()?;
    let suite = what.suite.clone().unwrap_or_else(sources::host_suite);
    let out = OpenOptions::new().write(true).create_new(true).open(target);
    let out = out.map_err(Error::io("create", target))?;
    let mut command = Command::new("mmdebstrap");
    let packages: Vec<&str> = PACKAGES
        .iter()
        .copied()
        .chain(what.packages.iter().map(String::as_str))
        .collect();
    command.args(["--variant=minbase", "--format=tar"]);
    command
        .arg(format!("--mode={mode}"))
        .arg(format!("--include={}", packages.join(",")));
    command.args(LEFT_OUT.map(|option| format!("--dpkgopt={option}")));
    command
        .args(["--", &suite, "-"])
        .args(sources::for_suite(&suite));
    if let Some(proxy) = sources::apt_proxy() {
        command.env("http_proxy", proxy);
    }
    if mode == "root" {
        // Killed, it leaves its tree behind, with /proc and /sys mounted in it. Mounts of its own end with it, and the
        // tree is where the caller cleans up instead of in /tmp. As an ordinary user it works in a namespace anyway, and
        // under another id, to which the caller's directory may be closed.
        crate::sys::own_mounts(&mut command);
        if let Some(dir) = target.parent() {
            command.env("TMPDIR", dir);
        }
    }
    run(command, out, cancel, progress).inspect_err(|_| {
        // The first error is the one to report.
        let _ = std::fs::remove_file(target);
    })
}

/// How `mmdebstrap` gets the owners of files right.
fn mode() -> Result<&'static str, Error> {
    if rustix::process::geteuid().is_root() {
        return Ok("root");
    }
    let helpers = ["/usr/bin/newuidmap", "/usr/bin/newgidmap"];
    let ranges = ["/etc/subuid", "/etc/subgid"];
    let has_range = |path: &str| {
        let (uid, name) = (rustix::process::getuid().as_raw(), sources::user_name());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split(':').next())
            .any(|owner| owner == uid.to_string() || name.as_deref() == Some(owner))
    };
    let ready = helpers.iter().all(|path| Path::new(path).exists())
        && ranges.iter().all(|path| has_range(path));
    if ready {
        Ok("unshare")
    } else {
        Err(Error::NoSubordinateIds)
    }
}

/// The program and its own children, ended with this value.
struct Group {
    child: Child,
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let group = Pid::from_child(&self.child);
        let _ = rustix::process::kill_process_group(group, Signal::TERM);
        let asked = Instant::now();
        while asked.elapsed() < GRACE && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

fn run(
    mut command: Command,
    out: File,
    cancel: &AtomicBool,
    progress: OnProgress<'_>,
) -> Result<(), Error> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::from(out))
        .stderr(Stdio::piped());
    command.env("LC_ALL", "C.UTF-8").process_group(0);
    // It ends its own children and removes what it made only when it is asked to end.
    crate::sys::bind(&mut command, &[], None, Signal::TERM);
    let spawned = command.spawn();
    // It holds the archive open.
    drop(command);
    let child = spawned.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::MissingProgram {
            program: "mmdebstrap",
            package: "mmdebstrap",
        },
        _ => Error::Stream {
            action: "run mmdebstrap",
            source,
        },
    })?;
    let mut group = Group { child };
    let lines = lines(group.child.stderr.take().expect("piped above"));
    let mut last: Vec<String> = Vec::new();
    let mut count = 0;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                count += 1;
                let text = printable(line.trim_ascii(), 300);
                if let Some(step) = text.strip_prefix("I: ") {
                    progress(Progress::step(step, count));
                }
                last.push(text);
                last.drain(..last.len().saturating_sub(12));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = group
        .child
        .wait()
        .map_err(Error::stream("wait for mmdebstrap"))?;
    if status.success() {
        return Ok(());
    }
    let hint = "check the network and the host's apt sources (apt-get update must work)";
    Err(Error::Program {
        program: "mmdebstrap",
        status: status.to_string(),
        words: last.join("; "),
        hint: Some(hint.into()),
    })
}

/// Lines as they come, at most 4 KiB each; the channel closes at the end.
fn lines(stderr: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(64);
    std::thread::spawn(move || {
        let mut stderr = BufReader::new(stderr);
        loop {
            let mut line = Vec::new();
            match (&mut stderr).take(4096).read_until(b'\n', &mut line) {
                Ok(1..) if sender.send(line).is_ok() => {}
                _ => return,
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn go(script: &str, cancel: bool) -> (Result<(), Error>, Vec<String>) {
        let mut phases = Vec::new();
        let out = tempfile::tempfile().unwrap();
        let outcome = run(
            shell(script),
            out,
            &AtomicBool::new(cancel),
            &mut |report| {
                phases.push(report.phase);
            },
        );
        (outcome, phases)
    }

    #[test]
    fn steps_are_reported_and_the_last_words_kept() {
        let (outcome, phases) = go(
            "echo 'I: one' >&2; echo noise >&2; echo 'I: two' >&2",
            false,
        );
        outcome.unwrap();
        assert_eq!(phases, ["one", "two"]);
        let (outcome, _) = go("echo 'E: no network' >&2; exit 7", false);
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("no network"), "{error}");
        assert!(error.hint().unwrap().contains("apt-get update"));
    }

    #[test]
    fn cancelling_ends_the_program_and_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let cancel = AtomicBool::new(false);
        let out = tempfile::tempfile().unwrap();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| run(shell(&script), out, &cancel, &mut |_| {}));
            while std::fs::read_to_string(&pid)
                .unwrap_or_default()
                .trim()
                .is_empty()
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            cancel.store(true, Ordering::Relaxed);
            assert!(matches!(running.join().unwrap(), Err(Error::Cancelled)));
        });
        let pid = std::fs::read_to_string(&pid).unwrap();
        // It has its signal, and is nobody's child that could be waited for. A test that waits for ever is ended.
        let stat = format!("/proc/{}/stat", pid.trim());
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
