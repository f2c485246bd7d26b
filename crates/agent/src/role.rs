//! The agent's roles: in a guest, with our PID 1 above it or as a service of another, and as a plain process on a
//! host. They differ in what is given to [`Agent`].

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use rustix::system::RebootCommand;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{Agent, Ending, NONCE};
use crate::channel;
use crate::error::{Context, Result, say};
use crate::params::{Channel, Serve};
use crate::process::Table;
use crate::process::group::Groups;
use crate::process::launch::{PATH, Surroundings};
use crate::system::System;
use crate::system::guest::Guest;

/// Threads for file work. Each may be held by a file system that does not answer.
const THREADS: usize = 16;
/// Memory of all output rings together, in bytes; in small guests an eighth of what there is.
const RINGS: u64 = 64 * 1024 * 1024;
/// Where the agent and the user processes have their control groups in a guest.
const CGROUP: &str = "/sys/fs/cgroup/hutch";
/// Between SIGTERM and SIGKILL when we are told to end by a signal.
const GRACE: Duration = Duration::from_secs(2);

/// Serves as the child of our PID 1.
///
/// # Errors
/// The channel cannot be opened.
pub fn guest(channel: Channel) -> Result<Ending> {
    let _ = rustix::thread::set_name(c"hutch-agent");
    let state = std::io::stdin().as_fd().try_clone_to_owned();
    let state = File::from(state.what("take over the state")?);
    let mut nonce = [0; NONCE];
    state.read_exact_at(&mut nonce, 0).what("read the state")?;
    in_guest(channel, nonce, Some(state))
}

/// Serves in a machine whose PID 1 is another: a service of it. Ends the machine as a person at its console would.
///
/// # Errors
/// The channel cannot be opened, or the machine not ended.
pub fn service(channel: Channel) -> Result<Ending> {
    let ending = in_guest(channel, new_nonce()?, None)?;
    if ending.machine {
        end_machine(ending.reboot)?;
    }
    Ok(ending)
}

/// Asks PID 1, in the way that all of them have in common; without one that can be asked, the kernel.
fn end_machine(reboot: bool) -> Result<()> {
    let (program, command) = match reboot {
        true => ("reboot", RebootCommand::Restart),
        false => ("poweroff", RebootCommand::PowerOff),
    };
    let asked = std::process::Command::new(program)
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .status();
    match asked {
        Ok(status) if status.success() => Ok(()),
        failed => {
            say(&format!("{program}: {failed:?}; asking the kernel"));
            rustix::fs::sync();
            rustix::system::reboot(command).what("end the machine")
        }
    }
}

fn in_guest(channel: Channel, nonce: [u8; NONCE], state: Option<File>) -> Result<Ending> {
    let groups = match own_cgroup() {
        Ok(groups) => groups,
        Err(error) => {
            say(&format!("no control groups: {error}"));
            Groups::Walk
        }
    };
    let system: Arc<dyn System> = Arc::new(Guest::new().path("open", "/")?);
    // An agent that died between Quiesce and its end has left everything frozen.
    let _ = system.thaw_root();
    let _ = groups.thaw();
    let surroundings = surroundings(false);
    run(channel, || {
        Agent::new(
            Table::new(groups, ring_bytes(), surroundings),
            None,
            Some(system),
            nonce,
            state,
        )
    })
}

/// Below the group that we were started in, when somebody gave us one: then that one is ours to divide.
fn own_cgroup() -> std::io::Result<Groups> {
    let given = std::fs::read_to_string("/proc/self/cgroup")?;
    let given = given.lines().find_map(|line| line.strip_prefix("0::/"));
    let base = match given.unwrap_or_default() {
        "" => PathBuf::from(CGROUP),
        given => Path::new("/sys/fs/cgroup").join(given),
    };
    let base = base.as_path();
    std::fs::create_dir_all(base.join("agent"))?;
    std::fs::write(base.join("agent/cgroup.procs"), "0")?;
    Groups::in_cgroup(base)
}

/// Serves as a plain process on a host.
///
/// # Errors
/// The channel cannot be opened, or the control group not used.
pub fn serve(serve: Serve) -> Result<Ending> {
    let groups = match &serve.cgroup {
        Some(dir) => Groups::in_cgroup(dir).path("use control group", dir)?,
        None => Groups::Walk,
    };
    // Orphans come to us instead of leaving for the host's init, so that they can be found at the end.
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).what("adopt orphans")?;
    let root = serve
        .root
        .map(|root| root.canonicalize().path("use", root))
        .transpose()?;
    let nonce = new_nonce()?;
    if let Some(path) = &serve.pid_file {
        let pid = format!("{}\n", std::process::id());
        std::fs::write(path, pid).path("write", path)?;
    }
    let surroundings = surroundings(true);
    run(serve.channel, || {
        let table = Table::new(groups, ring_bytes(), surroundings);
        Agent::new(table, root, None, nonce, None)
    })
}

fn new_nonce() -> Result<[u8; NONCE]> {
    let mut nonce = [0; NONCE];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
        .what("draw a nonce")?;
    Ok(nonce)
}

/// Raises our own limit of open files: each process has up to five.
fn surroundings(die_with_agent: bool) -> Surroundings {
    let open_files = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: open_files.maximum,
        ..open_files
    };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
    Surroundings {
        open_files,
        die_with_agent,
    }
}

fn ring_bytes() -> usize {
    let info = rustix::system::sysinfo();
    let memory = (info.totalram as u64).saturating_mul(info.mem_unit.into());
    usize::try_from(RINGS.min(memory / 8)).unwrap_or(usize::MAX)
}

fn run(channel: Channel, agent: impl FnOnce() -> Agent) -> Result<Ending> {
    // Our PID 1 waits for its signals blocked, and children inherit that.
    crate::sys::signal::unblock_all().what("unblock signals")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .build()
        .what("start the runtime")?;
    let ended = runtime.block_on(async {
        let agent = Arc::new(agent());
        let mut children = signal(SignalKind::child()).what("watch children")?;
        let mut terminate = signal(SignalKind::terminate()).what("watch signals")?;
        let table = agent.table.clone();
        tokio::spawn(async move {
            loop {
                table.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        let told = async {
            terminate.recv().await;
            agent.leave(GRACE);
            std::future::pending().await
        };
        let result = tokio::select! {
            result = channel::serve(channel, agent.clone()) => result.map(|never| match never {}),
            ending = agent.ended() => Ok(ending),
            never = told => never,
        };
        result
    });
    // File work may hang on a file system that does not answer; it does not hold up the end.
    runtime.shutdown_background();
    ended
}
