//! The stub's VMM: answers the few QMP commands that runtimes give, and runs the agent as its "guest".
//!
//! How it misbehaves is told by `stub.json` in the machine's directory:
//! `{"start": "run" | "hang" | "crash" | "devour" | "stray" | {"exit_code": N}, "agent": "real" | "lines" | "silent" | "garbage" | "none"}`.
//! The guest `lines` needs no agent: it reads commands as lines from its channel (`ping WORD`, `print TEXT`,
//! `flood KIB`, `poweroff`, `reboot`, `reset`, `panic`), as the initramfs of the conformance tests does in real machines.
//!
//! An agent that exits with 0 has powered off, with [`REBOOT`] it wants a reboot, with [`USAGE`] it is the wrong one;
//! otherwise it is started again, as PID 1 of a guest would.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::sys;

/// The exit code by which the agent asks for a reboot.
pub const REBOOT: i32 = 64;

/// The exit code by which the agent refuses its arguments.
const USAGE: i32 = 2;

pub(super) const AGENT_FD: i32 = 3;
pub(super) const MONITOR_FD: i32 = 4;
pub(super) const EVENTS_FD: i32 = 5;
/// The machine's tap. It is held, and no frame is read from it: a stub's guest has the host's network.
pub(super) const TAP_FD: i32 = 6;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Behaviour {
    start: Start,
    agent: Guest,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Start {
    #[default]
    Run,
    Hang,
    Crash,
    /// Wants ever more memory.
    Devour,
    /// Runs, and does not die with its shim any more.
    Stray,
    ExitCode(u8),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Guest {
    #[default]
    Real,
    Lines,
    Silent,
    Garbage,
    None,
}

/// The program: `hutch-stub-vmm vmm AGENT`, started by a shim in a machine's directory.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let behaviour = match std::fs::read("stub.json") {
        Err(_) => Ok(Behaviour::default()),
        Ok(text) => serde_json::from_slice(&text),
    };
    let (Ok(behaviour), Some(agent)) = (behaviour, arguments.next()) else {
        return fail("stub.json or the arguments mean nothing");
    };
    match behaviour.start {
        Start::Run => {}
        Start::Hang => loop {
            std::thread::park();
        },
        Start::Crash => std::process::abort(),
        Start::Devour => return devour(),
        Start::Stray => {
            if rustix::process::set_parent_process_death_signal(None).is_err() {
                return fail("cannot get loose");
            }
        }
        Start::ExitCode(code) => {
            fail("told to end at once");
            return ExitCode::from(code);
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime.and_then(|runtime| runtime.block_on(run(agent, behaviour.agent))) {
        Ok(never) => match never {},
        Err(error) => fail(&error.to_string()),
    }
}

/// Ends by being killed, at the latest with a GiB: nobody may have set a limit.
fn devour() -> ExitCode {
    let mut all = Vec::new();
    for _ in 0..1024 {
        all.push(vec![1_u8; 1 << 20]);
        std::hint::black_box(&all);
    }
    fail("nobody minds")
}

/// The guest `lines` alone, with the arguments of the agent: `--unix PATH`. It ends as an agent does.
pub fn serve(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(_), Some(path)) = (arguments.next(), arguments.next()) else {
        return fail("the arguments mean nothing");
    };
    let serve = async {
        let channel = UnixListener::bind(path)?;
        let machine = Arc::new(Machine {
            events: None,
            paused: watch::Sender::new(false),
            agent: AtomicI32::new(0),
        });
        println("stub: guest boots");
        let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            () = serve_guest(channel, Guest::Lines, machine.clone()) => {}
            _ = told.recv() => machine.end("guest-shutdown"),
        }
        Ok::<_, io::Error>(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime.and_then(|runtime| runtime.block_on(serve)) {
        Ok(()) => ExitCode::FAILURE,
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(why: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "stub: {why}");
    ExitCode::FAILURE
}

enum Never {}

/// What the tasks share.
struct Machine {
    /// Where ends are announced; a guest without a VMM says it by its exit code.
    events: Option<OwnedFd>,
    paused: watch::Sender<bool>,
    /// Leader of the agent's process group; 0 while there is none.
    agent: AtomicI32,
}

async fn run(agent: OsString, guest: Guest) -> io::Result<Never> {
    let channel = listener(AGENT_FD)?;
    let monitor = UnixListener::from_std(listener(MONITOR_FD)?)?;
    let machine = Arc::new(Machine {
        events: Some(sys::inherited(EVENTS_FD)?),
        paused: watch::Sender::new(false),
        agent: AtomicI32::new(0),
    });
    println("stub: guest boots");
    match guest {
        Guest::None => drop(channel),
        Guest::Real => drop(tokio::spawn(keep_agent(agent, channel, machine.clone()))),
        Guest::Lines | Guest::Silent | Guest::Garbage => {
            let channel = UnixListener::from_std(channel)?;
            drop(tokio::spawn(serve_guest(channel, guest, machine.clone())));
        }
    }
    loop {
        let (stream, _) = monitor.accept().await?;
        drop(tokio::spawn(serve_monitor(stream, machine.clone())));
    }
}

fn listener(fd: i32) -> io::Result<std::os::unix::net::UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(sys::inherited(fd)?);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Onto the guest's console; a reader that is gone is not our problem.
fn println(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

impl Machine {
    /// Ends as QEMU does: an event says why, the exit code is 0. Without a VMM it ends as an agent does.
    fn end(&self, reason: &str) -> ! {
        let Some(events) = &self.events else {
            std::process::exit(if reason == "guest-reset" { REBOOT } else { 0 })
        };
        let guest = reason.starts_with("guest");
        let event = json!({"event": "SHUTDOWN", "data": {"guest": guest, "reason": reason}});
        let _ = rustix::io::write(events, format!("{event}\r\n").as_bytes());
        self.signal_agent(Signal::KILL);
        std::process::exit(0)
    }

    fn signal_agent(&self, signal: Signal) {
        if let Some(group) = Pid::from_raw(self.agent.load(Ordering::Relaxed)) {
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }

    fn set_paused(&self, paused: bool) {
        self.signal_agent(if paused { Signal::STOP } else { Signal::CONT });
        self.paused.send_replace(paused);
    }
}

async fn serve_monitor(stream: UnixStream, machine: Arc<Machine>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let greeting = json!({"QMP": {"version": {}, "capabilities": []}});
    stream
        .write_all(format!("{greeting}\r\n").as_bytes())
        .await?;
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        let request: Value = serde_json::from_str(&line)?;
        line.clear();
        let command = request["execute"].as_str().unwrap_or_default();
        match command {
            "stop" => machine.set_paused(true),
            "cont" => machine.set_paused(false),
            _ => {}
        }
        let mut answer = match command {
            "qmp_capabilities" | "stop" | "cont" | "system_powerdown" | "quit" => {
                json!({"return": {}})
            }
            _ => json!({"error": {"class": "CommandNotFound", "desc": "no such command"}}),
        };
        answer["id"] = request["id"].clone();
        stream.write_all(format!("{answer}\r\n").as_bytes()).await?;
        match command {
            "system_powerdown" => machine.end("guest-shutdown"),
            "quit" => machine.end("host-qmp-quit"),
            _ => {}
        }
    }
    Ok(())
}

/// Runs the agent, again when it crashes.
async fn keep_agent(
    agent: OsString,
    channel: std::os::unix::net::UnixListener,
    machine: Arc<Machine>,
) {
    let channel = OwnedFd::from(channel);
    loop {
        let code = match run_agent(&agent, &channel, &machine).await {
            Ok(status) => status.code(),
            Err(error) => {
                println(&format!("stub: {}: {error}", agent.display()));
                None
            }
        };
        machine.agent.store(0, Ordering::Relaxed);
        match code {
            Some(0) => machine.end("guest-shutdown"),
            Some(REBOOT) => machine.end("guest-reset"),
            Some(USAGE) => {
                fail("the agent refuses its arguments");
                std::process::exit(1)
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn run_agent(
    agent: &OsString,
    channel: &OwnedFd,
    machine: &Machine,
) -> io::Result<std::process::ExitStatus> {
    use std::os::fd::AsRawFd;
    let fd = channel.as_raw_fd();
    let mut command = std::process::Command::new(agent);
    command
        .args(["serve", "--fd", &fd.to_string(), "--root", super::GUEST])
        .stdin(Stdio::null())
        .process_group(0);
    sys::set_up(
        &mut command,
        sys::Child {
            join: Vec::new(),
            keep: vec![fd],
            ids: None,
            own_network: false,
            limits: Vec::new(),
            gains_privileges: false,
        },
    );
    let mut child = tokio::process::Command::from(command).spawn()?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    machine.agent.store(pid.unwrap_or(0), Ordering::Relaxed);
    if *machine.paused.borrow() {
        machine.signal_agent(Signal::STOP);
    }
    child.wait().await
}

async fn serve_guest(channel: UnixListener, guest: Guest, machine: Arc<Machine>) {
    let mut silent = Vec::new();
    while let Ok((mut stream, _)) = channel.accept().await {
        match guest {
            Guest::Lines => drop(tokio::spawn(serve_lines(stream, machine.clone()))),
            Guest::Garbage => {
                drop(tokio::spawn(async move {
                    let garbage: Vec<u8> = (0..4096_u32).map(|n| (n * 7 + n / 3) as u8).collect();
                    while stream.write_all(&garbage).await.is_ok() {}
                }));
            }
            _ => silent.push(stream),
        }
    }
}

async fn serve_lines(stream: UnixStream, machine: Arc<Machine>) -> io::Result<()> {
    let mut paused = machine.paused.subscribe();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        let _ = paused.wait_for(|paused| !paused).await;
        let (command, argument) = line
            .trim_end()
            .split_once(' ')
            .unwrap_or((line.trim_end(), ""));
        match command {
            "ping" => {
                let answer = format!("pong {argument}\n");
                stream.write_all(answer.as_bytes()).await?;
            }
            "print" => println(argument),
            "flood" => {
                let kib: usize = argument.parse().unwrap_or(0);
                (0..kib).for_each(|_| println(&"x".repeat(1023)));
                stream.write_all(b"done\n").await?;
            }
            "poweroff" => machine.end("guest-shutdown"),
            "reboot" | "reset" => machine.end("guest-reset"),
            "panic" => {
                println("Kernel panic - not syncing: stub");
                machine.end("guest-reset")
            }
            _ => {}
        }
        line.clear();
    }
    Ok(())
}
