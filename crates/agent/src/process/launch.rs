//! From a Start request to everything that the child needs: user, environment, directory, program, streams.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use hutch_guest::pb;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Rlimit, geteuid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tonic::Status;

use crate::accounts::{self, Account};
use crate::process::group::Group;
use crate::sys::exec::{CStrings, Exec, Step};

/// Where programs are looked for when nobody says otherwise.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of arguments and environment together; the kernel allows about as much.
const STRINGS: usize = 1024 * 1024;

/// What Configure set for all processes.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// Below the request's.
    pub environment: BTreeMap<String, String>,
    /// Empty: the home of the user.
    pub cwd: String,
    /// Empty: who the agent is.
    pub user: String,
}

/// The agent's ends of the streams.
pub struct Ends {
    /// Where input goes, when it is wanted.
    pub input: Option<OwnedFd>,
    /// Standard output, or the master of the terminal.
    pub output: OwnedFd,
    /// Standard error, when it is separate.
    pub error: Option<OwnedFd>,
    /// The slave of the terminal, kept open so that the process may close all of its own and open `/dev/tty` again.
    pub slave: Option<OwnedFd>,
}

/// A process that is ready to be forked.
pub struct Launch {
    /// For the child.
    pub exec: Exec,
    /// For the agent.
    pub ends: Ends,
    /// Where a failure report arrives.
    pub report: OwnedFd,
    /// What it belongs to.
    pub group: Group,
}

/// What in this agent's surroundings matters to a new process.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// Limit of open files before the agent raised its own.
    pub open_files: Rlimit,
    /// Whether processes die with the agent.
    pub die_with_agent: bool,
}

/// Prepares a process. Reads `/etc/passwd` and so may block.
///
/// # Errors
/// What is wrong with the request, in the caller's words.
pub fn prepare(
    request: &pb::StartRequest,
    defaults: &Defaults,
    group: Group,
    surroundings: Surroundings,
) -> Result<Launch, Status> {
    let user = [&request.user, &defaults.user]
        .into_iter()
        .find(|user| !user.is_empty());
    let account = match user {
        Some(user) => accounts::find(user)?,
        None => accounts::of_uid(geteuid()),
    };
    let environment = environment(request, defaults, &account);
    let cwd = cwd(request, defaults, &account);
    let candidates = candidates(&request.argv, environment.get("PATH"))?;
    let argv = c_strings("argument", request.argv.iter().cloned())?;
    let envp = c_strings(
        "environment variable",
        environment
            .iter()
            .map(|(name, value)| format!("{name}={value}")),
    )?;
    let size = argv
        .iter()
        .chain(&envp)
        .map(|s| s.as_bytes().len() + 9)
        .sum::<usize>();
    if size > STRINGS {
        return Err(Status::invalid_argument(
            "arguments and environment are larger than 1 MiB",
        ));
    }
    let identity = (user.is_some() || geteuid().is_root()).then_some(account.identity);
    let unchanged = |id: &crate::sys::exec::Identity| {
        !geteuid().is_root() && id.uid == geteuid() && id.gid == rustix::process::getegid()
    };
    let identity = identity.filter(|identity| !unchanged(identity));
    let owner = identity.as_ref().map(|identity| identity.uid);
    let failed = |what: &'static str| move |error: io::Error| crate::status::of_io(what, &error);
    let (stdio, ends) = match request.pty {
        Some(size) => terminal(size, owner).map_err(failed("open a terminal"))?,
        None => pipes(request.stdin).map_err(failed("make pipes"))?,
    };
    let (report, report_in) = pipe().map_err(failed("make pipes"))?;
    rustix::io::ioctl_fionbio(&report, true).map_err(|e| failed("make pipes")(e.into()))?;
    let exec = Exec {
        candidates,
        argv: CStrings::new(argv),
        envp: CStrings::new(envp),
        cwd: c_string("working directory", cwd)?,
        terminal: request.pty.is_some(),
        stdio,
        identity,
        cgroup: group
            .entrance()
            .map_err(failed("enter the control group"))?,
        open_files: surroundings.open_files,
        die_with_agent: surroundings.die_with_agent,
        report: report_in,
    };
    Ok(Launch {
        exec,
        ends,
        report,
        group,
    })
}

/// What went wrong in the child, as an answer to Start.
pub fn explain(
    request: &pb::StartRequest,
    defaults: &Defaults,
    step: Step,
    error: &io::Error,
) -> Status {
    let program = request.argv.first().map_or("", String::as_str);
    match step {
        Step::Cgroup => crate::status::of_io("enter the control group", error),
        Step::Streams => crate::status::of_io("set up standard streams", error),
        Step::User => crate::status::of_io("become the user", error),
        Step::Cwd => {
            let cwd = [&request.cwd, &defaults.cwd]
                .into_iter()
                .find(|cwd| !cwd.is_empty());
            let cwd = cwd.map_or("the home directory", String::as_str);
            let text = format!("working directory {cwd}: {}", crate::status::text(error));
            Status::failed_precondition(text)
        }
        Step::Exec if error.kind() == io::ErrorKind::NotFound => {
            Status::not_found(format!("executable not found: {program}"))
        }
        Step::Exec => crate::status::of_io(&format!("execute {program}"), error),
    }
}

fn environment(
    request: &pb::StartRequest,
    defaults: &Defaults,
    account: &Account,
) -> BTreeMap<String, String> {
    let base = [
        ("HOME", account.home.as_str()),
        ("LOGNAME", &account.name),
        ("PATH", PATH),
        ("SHELL", &account.shell),
        ("USER", &account.name),
    ];
    let base = base.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut environment = BTreeMap::from(base);
    if request.pty.is_some() {
        environment.insert("TERM".to_owned(), "xterm".to_owned());
    }
    environment.extend(defaults.environment.clone());
    environment.extend(request.environment.clone());
    environment
}

fn cwd(request: &pb::StartRequest, defaults: &Defaults, account: &Account) -> String {
    let base = match defaults.cwd.as_str() {
        // A home that was never made is no reason to refuse a process whose caller did not ask for it.
        "" if Path::new(&account.home).is_dir() => &account.home,
        "" => "/",
        cwd => cwd,
    };
    let joined = Path::new(base).join(&request.cwd);
    joined.to_str().unwrap_or("/").to_owned()
}

fn candidates(argv: &[String], path: Option<&String>) -> Result<Vec<CString>, Status> {
    let Some(program) = argv.first().filter(|program| !program.is_empty()) else {
        return Err(Status::invalid_argument("argv is empty"));
    };
    if program.contains('/') {
        return Ok(vec![c_string("program", program.clone())?]);
    }
    let path = path.map_or(PATH, String::as_str);
    let dirs = path
        .split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir });
    dirs.map(|dir| c_string("program", format!("{dir}/{program}")))
        .collect()
}

fn c_strings(what: &str, strings: impl Iterator<Item = String>) -> Result<Vec<CString>, Status> {
    strings.map(|string| c_string(what, string)).collect()
}

fn c_string(what: &str, string: String) -> Result<CString, Status> {
    CString::new(string).map_err(|_| Status::invalid_argument(format!("a NUL byte in a {what}")))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

fn pipes(stdin: bool) -> io::Result<([OwnedFd; 3], Ends)> {
    let (child_in, input) = if stdin {
        let (read, write) = pipe()?;
        rustix::io::ioctl_fionbio(&write, true)?;
        (read, Some(write))
    } else {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        (rustix::fs::open("/dev/null", flags, Mode::empty())?, None)
    };
    let (output, child_out) = pipe()?;
    let (error, child_err) = pipe()?;
    rustix::io::ioctl_fionbio(&output, true)?;
    rustix::io::ioctl_fionbio(&error, true)?;
    let ends = Ends {
        input,
        output,
        error: Some(error),
        slave: None,
    };
    Ok(([child_in, child_out, child_err], ends))
}

fn terminal(
    size: pb::PtySize,
    owner: Option<rustix::process::Uid>,
) -> io::Result<([OwnedFd; 3], Ends)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&slave, winsize(size))?;
    if owner.is_some() {
        // So that the user may open /dev/tty's name too. On a host without the privilege it stays ours.
        let _ = rustix::fs::fchown(&slave, owner, None);
    }
    rustix::io::ioctl_fionbio(&master, true)?;
    let stdio = [slave.try_clone()?, slave.try_clone()?, slave.try_clone()?];
    let ends = Ends {
        input: Some(master.try_clone()?),
        output: master,
        error: None,
        slave: Some(slave),
    };
    Ok((stdio, ends))
}

/// The kernel's form of a terminal's size; zero is "unknown" to programs, so a missing one is 80 × 24.
pub fn winsize(size: pb::PtySize) -> Winsize {
    let clamp = |value: u32, default: u16| match value {
        0 => default,
        value => u16::try_from(value).unwrap_or(u16::MAX),
    };
    Winsize {
        ws_row: clamp(size.rows, 24),
        ws_col: clamp(size.cols, 80),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Refuses names that no environment can hold.
pub fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), Status> {
    let bad = |name: &&String| name.is_empty() || name.contains(['=', '\0']);
    match environment.keys().find(bad) {
        Some(name) => Err(Status::invalid_argument(format!(
            "{:?} is no name of an environment variable",
            OsStr::from_bytes(&name.as_bytes()[..name.len().min(64)]),
        ))),
        None => Ok(()),
    }
}
