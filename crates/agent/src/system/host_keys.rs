//! The SSH host keys of a guest that has become somebody else: a copy of a disk has those of its original, and machines of
//! one image would all have the image's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

/// Where sshd has its keys; sshd_config(5).
pub const DIRECTORY: &str = "/etc/ssh";
/// The program that makes them; ssh-keygen(1).
pub const PROGRAM: &str = "/usr/bin/ssh-keygen";
/// Where sshd of most distributions writes its number; sshd(8).
const SSHD_PID: &str = "/run/sshd.pid";
/// For all of them: large RSA keys take their time in an emulator.
const LIMIT: Duration = Duration::from_secs(40);

/// Makes new keys of the kinds that are there, and lets an sshd that runs read them. No key of before is left, also when no
/// new one can be made.
///
/// # Errors
/// The first that could not be removed or made, once all were tried.
pub fn renew(directory: &Path, program: &Path) -> io::Result<()> {
    let old = keys(directory)?;
    if old.is_empty() {
        return Ok(());
    }
    let mut outcome = Ok(());
    for key in &old {
        for file in [key.clone(), key.with_extension("pub")] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    outcome = outcome.and(Err(error));
                }
                _ => {}
            }
        }
    }
    let end = Instant::now() + LIMIT;
    // The quick ones first.
    let mut kinds: Vec<_> = old.iter().filter_map(|key| kind(key)).collect();
    kinds.sort_by_key(|kind| *kind == "rsa");
    for kind in kinds {
        outcome = outcome.and(make(directory, program, kind, end));
    }
    reload();
    outcome
}

/// Paths of the private keys, such as `ssh_host_ed25519_key`.
fn keys(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path()));
    let paths: io::Result<Vec<PathBuf>> = paths.collect();
    Ok(paths?
        .into_iter()
        .filter(|path| kind(path).is_some())
        .collect())
}

fn kind(key: &Path) -> Option<&str> {
    let name = key.file_name()?.to_str()?;
    let kind = name.strip_prefix("ssh_host_")?.strip_suffix("_key")?;
    ["ed25519", "ecdsa", "rsa"].contains(&kind).then_some(kind)
}

fn make(directory: &Path, program: &Path, kind: &str, end: Instant) -> io::Result<()> {
    let key = directory.join(format!("ssh_host_{kind}_key"));
    let child = Command::new(program)
        .args(["-q", "-N", "", "-t", kind, "-f"])
        .arg(&key)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| said(&format!("{} cannot be started", program.display()), &error))?;
    ended(child, end)?;
    // How it ended may be told to the agent's reaper instead of to us.
    match key.with_extension("pub").exists() && key.exists() {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "no new {kind} host key could be made"
        ))),
    }
}

/// Waits for a program of the guest's, and ends it when it takes too long.
fn ended(mut child: Child, end: Instant) -> io::Result<()> {
    let pid = Pid::from_child(&child);
    let over = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
            let over = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ended, Some(&left)))?;
            if over == 0 {
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            }
            over > 0
        }
        // It has ended and was reaped.
        Err(Errno::SRCH) => true,
        Err(error) => return Err(error.into()),
    };
    // An error: it was reaped.
    let _ = child.wait();
    match over {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "making new SSH host keys takes too long",
        )),
    }
}

/// Lets sshd read its keys anew, as sshd(8) says. One that does not run needs nothing.
fn reload() {
    let pid = fs::read_to_string(SSHD_PID).ok();
    let pid = pid.and_then(|text| text.trim().parse::<i32>().ok());
    let Some(pid) = pid.filter(|pid| *pid > 1).and_then(Pid::from_raw) else {
        return;
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm", pid = pid.as_raw_nonzero()));
    // The number of one that ended may be somebody else's.
    if name.is_ok_and(|name| name.trim() == "sshd") {
        let _ = rustix::process::kill_process(pid, Signal::HUP);
    }
}

fn said(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
        let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_guest_without_keys_gets_none() {
        let dir = tempfile::tempdir().unwrap();
        renew(&dir.path().join("ssh"), Path::new(PROGRAM)).unwrap();
        fs::write(dir.path().join("sshd_config"), "").unwrap();
        renew(dir.path(), Path::new("/nonexistent")).unwrap();
        assert_eq!(names(dir.path()), ["sshd_config"]);
    }

    #[test]
    fn keys_of_the_kinds_that_are_there_are_made_anew() {
        if !Path::new(PROGRAM).exists() {
            eprintln!("skipped: {PROGRAM} is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let all = ["ssh_host_ecdsa_key", "ssh_host_ed25519_key"];
        for key in all {
            fs::write(dir.path().join(key), "old").unwrap();
        }
        renew(dir.path(), Path::new(PROGRAM)).unwrap();
        assert_eq!(
            names(dir.path()),
            [
                all[0],
                "ssh_host_ecdsa_key.pub",
                all[1],
                "ssh_host_ed25519_key.pub"
            ]
        );
        let key = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        let first = all.map(key);
        assert!(first.iter().all(|key| key.contains("PRIVATE KEY")));
        renew(dir.path(), Path::new(PROGRAM)).unwrap();
        assert!(all.map(key).iter().zip(&first).all(|(new, old)| new != old));
    }

    #[test]
    fn the_keys_of_before_are_gone_also_where_no_new_ones_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ssh_host_rsa_key"), "old").unwrap();
        for program in ["/nonexistent", "/bin/false"] {
            fs::write(dir.path().join("ssh_host_ed25519_key"), "old").unwrap();
            assert!(renew(dir.path(), Path::new(program)).is_err());
            assert_eq!(names(dir.path()), [""; 0]);
        }
    }
}
