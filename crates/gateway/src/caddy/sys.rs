//! A child that does not outlive us.
#![expect(
    unsafe_code,
    reason = "what happens between fork and exec has no safe interface"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, Signal};

/// Makes the child of `command` be killed when the thread that spawns it ends, thus at the latest with this process. The
/// kernel forgets that when the program has capabilities of its own (`PR_SET_PDEATHSIG`, prctl(2)).
pub(super) fn die_with_thread(command: &mut Command) {
    let parent = rustix::process::getpid();
    // SAFETY: the closure makes plain system calls and allocates nothing.
    unsafe { command.pre_exec(move || between_fork_and_exec(parent)) };
}

fn between_fork_and_exec(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before we said that.
    match rustix::process::getppid() {
        Some(pid) if pid == parent => Ok(()),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}
