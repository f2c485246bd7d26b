//! The unprivileged child that turns archives into disks.
//!
//! Whoever reads a stranger's archive may be taken over by it, so that happens in a process of its
//! own: as nobody when we are root, without new privileges, with bounds on memory and on what it
//! can write, and with no descriptor but its inputs and its output. The job is one JSON document
//! on its stdin; reports, the result or an error are JSON lines on its stdout. It dies with the
//! thread that started it.

use crate::build::{Built, build_disk_and_layer};
use crate::check::NOBODY;
use crate::error::{Error, Kind, printable};
use crate::ext4::Purpose;
use crate::limits::Limits;
use crate::progress::{OnProgress, Progress};
use rustix::process::{Gid, Pid, Resource, Signal, Uid};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

/// The hidden subcommand under which an executable must call [`child_main`].
pub const SUBCOMMAND: &str = "build-disk";

/// What the child shall make of its inputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What the disk is for.
    pub purpose: Purpose,
    /// What the archives may ask of us.
    pub limits: Limits,
}

/// The job with what only the parent of this moment knows.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    job: Job,
    parent: i32,
    inputs: Vec<i32>,
    output: i32,
    layer: Option<i32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Progress(Progress),
    Built(Built),
    Error {
        kind: Kind,
        message: String,
        hint: Option<String>,
    },
}

/// Runs `exe build-disk` to write the tree of `inputs` (tar archives, lowest layer first) as an
/// ext4 filesystem to `output`, which must be open for reading and writing. Byte for byte the same
/// for root and ordinary users. `layer` becomes the last of the `inputs`, packed with zstd whatever it
/// was packed with. After an error the content of both means nothing.
pub fn build_in_child(
    exe: &Path,
    job: &Job,
    inputs: Vec<File>,
    output: File,
    layer: Option<File>,
    progress: OnProgress<'_>,
) -> Result<Built, Error> {
    let mut command = Command::new(exe);
    command.arg(SUBCOMMAND).env_clear().current_dir("/");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let files: Vec<&File> = inputs.iter().chain([&output]).chain(&layer).collect();
    crate::sys::bind(&mut command, &files, None, Signal::KILL);
    let child = command.spawn().map_err(Error::io("run", exe))?;
    let mut child = Running { child };
    let order = Order {
        job: job.clone(),
        parent: rustix::process::getpid().as_raw_nonzero().get(),
        inputs: inputs.iter().map(AsRawFd::as_raw_fd).collect(),
        output: output.as_raw_fd(),
        layer: layer.as_ref().map(AsRawFd::as_raw_fd),
    };
    let order = serde_json::to_vec(&order).expect("plain data");
    let mut stdin = child.child.stdin.take().expect("piped above");
    // A child that died before it read says so by its status below.
    let _ = stdin.write_all(&order);
    drop(stdin);
    drop((inputs, output, layer));
    let answer = listen(&mut child, progress)?;
    let status = child
        .child
        .wait()
        .map_err(Error::stream("wait for the disk writer"))?;
    match answer {
        Some(answer) => answer,
        None => Err(died(status, child.child.stderr.take())),
    }
}

/// A child that does not outlive this value.
struct Running {
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Reads lines until the answer; a child may say nothing longer than a line of 64 KiB.
fn listen(
    child: &mut Running,
    progress: OnProgress<'_>,
) -> Result<Option<Result<Built, Error>>, Error> {
    let mut stdout = BufReader::new(child.child.stdout.take().expect("piped above"));
    loop {
        let mut line = Vec::new();
        (&mut stdout)
            .take(64 << 10)
            .read_until(b'\n', &mut line)
            .map_err(Error::stream("hear the disk writer"))?;
        if line.is_empty() {
            return Ok(None);
        }
        match serde_json::from_slice(&line) {
            Ok(Line::Progress(report)) => progress(report),
            Ok(Line::Built(built)) => return Ok(Some(Ok(built))),
            Ok(Line::Error {
                kind,
                message,
                hint,
            }) => {
                return Ok(Some(Err(Error::Child {
                    kind,
                    message,
                    hint,
                })));
            }
            Err(error) => {
                let source = io::Error::from(error);
                return Err(Error::Stream {
                    action: "understand the disk writer",
                    source,
                });
            }
        }
    }
}

fn died(status: ExitStatus, stderr: Option<std::process::ChildStderr>) -> Error {
    let mut words = Vec::new();
    if let Some(stderr) = stderr {
        let _ = stderr.take(4096).read_to_end(&mut words);
    }
    // SIGXFSZ: the file would be larger than allowed. A failed allocation aborts, after a word.
    let out_of_memory = words
        .windows(17)
        .any(|window| window == b"memory allocation");
    let limited = out_of_memory || status.signal() == Some(Signal::XFSZ.as_raw());
    let words = printable(words.trim_ascii(), 400);
    let status = if words.is_empty() {
        status.to_string()
    } else {
        format!("{status}: {words}")
    };
    Error::ChildDied { status, limited }
}

/// The child's `main`. An executable calls it when its first argument is [`SUBCOMMAND`], before it
/// starts threads or reads anything.
pub fn child_main() -> ExitCode {
    let say = |line: &Line| {
        let mut text = serde_json::to_vec(line).expect("plain data");
        text.push(b'\n');
        // Without a listener nobody needs the disk.
        io::stdout().write_all(&text).is_ok()
    };
    let outcome = serve(&mut |report| {
        if !say(&Line::Progress(report)) {
            std::process::exit(1);
        }
    });
    let code = if outcome.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    say(&match outcome {
        Ok(built) => Line::Built(built),
        Err(error) => Line::Error {
            kind: error.kind(),
            message: chain(&error),
            hint: error.hint(),
        },
    });
    code
}

fn serve(progress: OnProgress<'_>) -> Result<Built, Error> {
    let mut text = Vec::new();
    let stdin = io::stdin().lock().take(1 << 20).read_to_end(&mut text);
    stdin.map_err(Error::stream("read the job"))?;
    let order: Order = serde_json::from_slice(&text).map_err(|error| Error::Stream {
        action: "understand the job",
        source: error.into(),
    })?;
    let files = || -> io::Result<(Vec<File>, File, Option<File>)> {
        let inputs = order
            .inputs
            .iter()
            .map(|number| crate::sys::inherited(*number));
        Ok((
            inputs.collect::<Result<_, _>>()?,
            crate::sys::inherited(order.output)?,
            order.layer.map(crate::sys::inherited).transpose()?,
        ))
    };
    let (mut inputs, output, layer) =
        files().map_err(Error::stream("take over the job's files"))?;
    let keep: Vec<&File> = inputs.iter().chain([&output]).chain(&layer).collect();
    confine(&order, &keep).map_err(Error::stream("give up privileges"))?;
    build_disk_and_layer(
        &mut inputs,
        &output,
        layer.as_ref(),
        order.job.purpose,
        &order.job.limits,
        progress,
    )
}

/// Gives up all that the job does not need.
fn confine(order: &Order, keep: &[&File]) -> io::Result<()> {
    crate::sys::close_others(keep)?;
    rustix::thread::set_no_new_privs(true)?;
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    crate::sys::lower(Resource::As, order.job.limits.max_memory_bytes)?;
    crate::sys::lower(Resource::Fsize, order.job.limits.max_disk_bytes)?;
    crate::sys::lower(Resource::Core, 0)?;
    crate::sys::lower(Resource::Nofile, 64)?;
    // A change of ids clears the signal that was set before exec. A parent that died in between
    // cannot send it any more.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = rustix::process::getppid().map(Pid::as_raw_nonzero);
    if parent.map(|pid| pid.get()) != Some(order.parent) {
        return Err(io::Error::other("the parent is gone"));
    }
    Ok(())
}

/// An error with all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
