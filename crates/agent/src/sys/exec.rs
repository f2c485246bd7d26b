//! Fork and exec of one user process. The caller has prepared everything: between fork and exec nothing allocates,
//! since another thread may have held the allocator's lock.
#![expect(unsafe_code, reason = "fork, execve and sigprocmask")]

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid};

/// What the child was doing when it could not become the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Joining its control group.
    Cgroup = 1,
    /// A session, a terminal and standard streams of its own.
    Streams = 2,
    /// Becoming the wanted user.
    User = 3,
    /// Entering the working directory.
    Cwd = 4,
    /// The program itself.
    Exec = 5,
}

/// Length of a failure report on [`Exec::report`].
pub const REPORT: usize = 5;

/// Reads a report of a child that failed before exec.
pub fn parse_report(report: [u8; REPORT]) -> (Step, io::Error) {
    let [step, errno @ ..] = report;
    let step = match step {
        1 => Step::Cgroup,
        2 => Step::Streams,
        3 => Step::User,
        4 => Step::Cwd,
        _ => Step::Exec,
    };
    (
        step,
        io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
    )
}

/// Strings as execve wants them.
pub struct CStrings {
    pointers: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl CStrings {
    /// Keeps `strings` alive behind a null-terminated array.
    pub fn new(strings: Vec<CString>) -> Self {
        let pointers = strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([ptr::null()])
            .collect();
        Self {
            pointers,
            _owned: strings,
        }
    }
}

// SAFETY: the pointers lead into the owned strings, whose buffers neither move nor change.
unsafe impl Send for CStrings {}

/// User and groups that a process takes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// Supplementary groups.
    pub groups: Vec<Gid>,
}

/// A process to be.
pub struct Exec {
    /// Paths to try in order, the way execvp does.
    pub candidates: Vec<CString>,
    /// Arguments.
    pub argv: CStrings,
    /// Environment.
    pub envp: CStrings,
    /// Working directory.
    pub cwd: CString,
    /// Standard input, output and error.
    pub stdio: [OwnedFd; 3],
    /// Whether standard input is a terminal that becomes the controlling one.
    pub terminal: bool,
    /// `None` stays who the agent is.
    pub identity: Option<Identity>,
    /// An open `cgroup.procs` to join.
    pub cgroup: Option<OwnedFd>,
    /// Limit of open files, before the agent raised its own.
    pub open_files: Rlimit,
    /// Whether the process dies with the agent, where nothing else would end it.
    pub die_with_agent: bool,
    /// A close-on-exec pipe that gets [`REPORT`] bytes when the child fails before exec, else just its end.
    pub report: OwnedFd,
}

/// Forks and execs. The child is the caller's to reap.
///
/// # Errors
/// The fork itself; later failures come through [`Exec::report`].
pub fn spawn(exec: &Exec) -> io::Result<Pid> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut old = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are written before they are read. With every signal blocked, no handler of the agent runs in
    // the child before it has reset them. The child calls only async-signal-safe functions and never returns.
    let pid = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
        let pid = libc::fork();
        if pid == 0 {
            child(exec);
        }
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), ptr::null_mut());
        if pid == -1 {
            return Err(error);
        }
        pid
    };
    Pid::from_raw(pid).ok_or_else(|| io::ErrorKind::Other.into())
}

/// Never returns: the program, or a report and exit code 127.
fn child(exec: &Exec) -> ! {
    let (step, errno) = match become_program(exec) {
        Err(failure) => failure,
        Ok(never) => match never {},
    };
    let errno = errno.raw_os_error().to_ne_bytes();
    let report = [step as u8, errno[0], errno[1], errno[2], errno[3]];
    // The parent sees the end of the pipe even when this write is lost.
    let _ = rustix::io::write(&exec.report, &report);
    // SAFETY: ends the process without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

enum Never {}

fn become_program(exec: &Exec) -> Result<Never, (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    if let Some(procs) = &exec.cgroup {
        rustix::io::write(procs, b"0").map_err(at(Step::Cgroup))?;
    }
    // Raising it back from the agent's -1000 needs no privilege; on a host it is 0 already.
    if let Ok(score) = rustix::fs::open(
        c"/proc/self/oom_score_adj",
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        let _ = rustix::io::write(score, b"0");
    }
    streams(exec).map_err(at(Step::Streams))?;
    let _ = rustix::process::setrlimit(Resource::Nofile, exec.open_files);
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if let Some(identity) = &exec.identity {
        // The raw calls: glibc's tell all threads by signal, and there is only this one.
        rustix::thread::set_thread_groups(&identity.groups).map_err(at(Step::User))?;
        let (gid, uid) = (identity.gid, identity.uid);
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at(Step::User))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at(Step::User))?;
    }
    if exec.die_with_agent {
        // After the change of user, which clears it.
        let _ =
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    }
    rustix::process::chdir(exec.cwd.as_c_str()).map_err(at(Step::Cwd))?;
    default_signals();
    Err((Step::Exec, run(exec)))
}

fn streams(exec: &Exec) -> rustix::io::Result<()> {
    rustix::process::setsid()?;
    let [input, output, error] = &exec.stdio;
    if exec.terminal {
        rustix::process::ioctl_tiocsctty(input)?;
    }
    rustix::stdio::dup2_stdin(input)?;
    rustix::stdio::dup2_stdout(output)?;
    rustix::stdio::dup2_stderr(error)?;
    // All of the agent's are close-on-exec; this is for what the agent itself may have been left with.
    // SAFETY: marks descriptors that this process is about to lose anyway.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 4) };
    Ok(())
}

/// The raw call, since glibc refuses to touch the two signals that it uses itself, and they may have been ignored when
/// the agent was started.
fn default_signals() {
    const MASK_BYTES: usize = 8;
    // SIG_DFL, no flags, no restorer, no mask, in the layout of every architecture.
    let default = [0u64; 4];
    // SAFETY: the kernel reads at most as much as `default` has; SIG_DFL runs no code.
    unsafe {
        for signal in 1..=64 {
            let old = ptr::null_mut::<u64>();
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                old,
                MASK_BYTES,
            );
        }
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
}

/// Tries each candidate; a file that may not be executed is reported rather than a later one that does not exist.
fn run(exec: &Exec) -> Errno {
    let mut answer = Errno::NOENT;
    for path in &exec.candidates {
        let errno = execve(path, exec);
        match errno {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => answer = errno,
            _ => return errno,
        }
    }
    answer
}

fn execve(path: &CStr, exec: &Exec) -> Errno {
    // SAFETY: a path and two null-terminated arrays of strings, all alive.
    unsafe {
        libc::execve(
            path.as_ptr(),
            exec.argv.pointers.as_ptr(),
            exec.envp.pointers.as_ptr(),
        );
    }
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}
