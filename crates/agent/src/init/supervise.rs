//! Looks after the agent: starts it, starts it again when it dies, reaps everybody's orphans, and ends the machine.
//!
//! The agent asks for the end by its exit code (0 power off, [`REBOOT`] restart). SIGTERM, SIGINT (ctrl-alt-del) and
//! SIGPWR, sent to us, power off.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::RebootCommand;

use super::{last_word, power_off};
use crate::REBOOT;
use crate::agent::GREETED;
use crate::error::{Context, Error, Result, say};
use crate::params::Boot;
use crate::process::launch::PATH;
use crate::sys::signal::{SignalSet, kill};

/// Waits between starts of an agent that keeps dying: the first, and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];
/// An agent that lived this long is not one that keeps dying.
const HEALTHY: Duration = Duration::from_secs(30);
/// A machine whose agents all died sooner than that, so many of them, and without a Hello, has not booted.
const STARTS: u32 = 10;
/// Between SIGTERM and SIGKILL when the agent is not the one that ends the machine.
const GRACE: Duration = Duration::from_secs(5);

/// What to do at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The machine stays off.
    PowerOff,
    /// The machine starts again.
    Reboot,
}

/// Runs agents until one of them, or a signal, ends the machine.
///
/// # Errors
/// The first agent cannot be started, or none stays up.
pub fn run(boot: &Boot, state: &File) -> Result<End> {
    let wanted = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR];
    let signals = SignalSet::block(&wanted).what("block signals")?;
    let mut agent = Some(start(boot, state)?);
    let mut started = Instant::now();
    let mut backoff = BACKOFF[0];
    let mut next_start = started;
    let mut starts = 1;
    let mut was_healthy = false;
    loop {
        let pause = next_start.saturating_duration_since(Instant::now());
        match signals.wait(agent.is_none().then_some(pause)) {
            Some(libc::SIGCHLD) | None => {}
            Some(_) => return Ok(End::PowerOff),
        }
        if agent.is_none() && next_start <= Instant::now() {
            started = Instant::now();
            starts += 1;
            match start(boot, state) {
                Ok(pid) => agent = Some(pid),
                Err(error) => {
                    say(&crate::error::chain(&error));
                    next_start = started + BACKOFF[1];
                }
            }
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if Some(pid) != agent {
                continue;
            }
            match status.exit_status() {
                Some(0) => return Ok(End::PowerOff),
                Some(code) if code == i32::from(REBOOT) => return Ok(End::Reboot),
                Some(code) => say(&format!("the agent ended with code {code}")),
                None => {
                    let signal = status.terminating_signal().unwrap_or(0);
                    say(&format!("the agent was killed by signal {signal}"));
                }
            }
            agent = None;
            if started.elapsed() > HEALTHY {
                backoff = BACKOFF[0];
                was_healthy = true;
            }
            if starts >= STARTS && !was_healthy && !was_greeted(state) {
                return Err(Error::NoAgent { starts });
            }
            next_start = Instant::now() + backoff;
            backoff = (backoff * 2).min(BACKOFF[1]);
        }
    }
}

fn was_greeted(state: &File) -> bool {
    let mut greeted = [0];
    state.read_exact_at(&mut greeted, GREETED).is_ok() && greeted != [0]
}

/// Starts the agent from our own executable, whose inode lives as long as we do.
fn start(boot: &Boot, state: &File) -> Result<Pid> {
    let path = "/proc/self/exe";
    let state = state.try_clone().what("hand over the state")?;
    let child = Command::new(path)
        .arg0("@hutch-agent")
        .arg("guest")
        .arg(boot.channel.to_string())
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::from(state))
        .spawn()
        .path("start the agent from", path)?;
    // So that under memory pressure the kernel takes user processes first.
    let score = format!("/proc/{}/oom_score_adj", child.id());
    let _ = std::fs::write(score, "-1000");
    // Reaped in `run`, by pid.
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or(rustix::io::Errno::SRCH).what("start the agent")
}

/// Ends all processes, brings the disk to rest, and powers off or restarts.
pub fn end(end: End) -> ! {
    let _ = kill(-1, libc::SIGTERM);
    if !all_gone(Instant::now() + GRACE) {
        let _ = kill(-1, libc::SIGKILL);
        all_gone(Instant::now() + GRACE);
    }
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    if end == End::Reboot {
        last_word("reboot");
        let _ = rustix::system::reboot(RebootCommand::Restart);
    }
    power_off()
}

/// Reaps until nobody is left; false when `deadline` came first.
fn all_gone(deadline: Instant) -> bool {
    let Ok(signals) = SignalSet::block(&[libc::SIGCHLD]) else {
        return false;
    };
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                signals.wait(Some(left));
            }
            Err(_) => return true,
        }
    }
}
