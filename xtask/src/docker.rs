//! A Docker engine for one run of the tests: everything of it in a directory of its own, nothing of the host's network
//! touched, ended with the run.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;
use crate::command::{command, output, which};

/// Time for it to come up, and to end its containers.
const UP: Duration = Duration::from_secs(60);
const DOWN: Duration = Duration::from_secs(30);

/// A running engine.
pub struct Engine {
    daemon: Child,
    dir: PathBuf,
}

/// Starts one, or says loudly why there is none. `CI` with `HUTCH_TEST_REQUIRE` naming `docker` makes that a failure.
pub fn start() -> Result<Option<Engine>> {
    match Engine::start() {
        Ok(engine) => Ok(Some(engine)),
        Err(error) if is_required() => Err(error),
        Err(error) => {
            eprintln!("skipped: tests with Docker, since {error}");
            Ok(None)
        }
    }
}

fn is_required() -> bool {
    let named = std::env::var("HUTCH_TEST_REQUIRE").unwrap_or_default();
    std::env::var("CI").is_ok_and(|ci| ci == "true")
        && named.split([',', ' ']).any(|name| name == "docker")
}

impl Engine {
    fn start() -> Result<Engine> {
        let program = which("dockerd").ok_or("dockerd is not installed")?;
        if output(&mut command("id", ["-u"]))?.trim() != "0" {
            return Err("only root can start dockerd".into());
        }
        // Short: its sockets have paths of at most 107 bytes.
        let dir = std::env::temp_dir().join(format!("hutch-docker-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let log = fs::File::create(dir.join("log"))?;
        // A file of the host's must not give it another socket or network.
        fs::write(dir.join("daemon.json"), "{}")?;
        let mut daemon = Command::new(program);
        daemon
            .arg("--data-root")
            .arg(dir.join("data"))
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", dir.join("sock").display()))
            .arg("--config-file")
            .arg(dir.join("daemon.json"))
            .args([
                "--bridge=none",
                "--iptables=false",
                "--ip-forward=false",
                "--ip-masq=false",
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut engine = Engine {
            daemon: daemon.spawn()?,
            dir,
        };
        engine.wait_until_up()?;
        engine.unpacks()?;
        Ok(engine)
    }

    /// Whether it can do what it is for: in a chroot it comes up and cannot unpack an image.
    fn unpacks(&self) -> Result {
        let docker = || {
            let mut docker = Command::new("docker");
            docker
                .arg(format!("--host=unix://{}", self.socket().display()))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            docker
        };
        let mut import = docker()
            .args(["import", "-", "hutch-probe"])
            .stdin(Stdio::piped())
            .spawn()?;
        // An archive of nothing is its end alone.
        let sent = import.stdin.take().map(|mut to| to.write_all(&[0; 1024]));
        let answer = import.wait_with_output()?;
        if !answer.status.success() || !matches!(sent, Some(Ok(()))) {
            let words = String::from_utf8_lossy(&answer.stderr);
            return Err(format!("dockerd takes no image: {}", words.trim()).into());
        }
        docker().args(["rmi", "hutch-probe"]).output()?;
        Ok(())
    }

    fn wait_until_up(&mut self) -> Result {
        let begun = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            let log = || {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                let last = log.lines().rev().take(5).collect::<Vec<_>>();
                last.into_iter().rev().collect::<Vec<_>>().join("\n")
            };
            if let Some(status) = self.daemon.try_wait()? {
                return Err(format!("dockerd ended with {status}:\n{}", log()).into());
            }
            if begun.elapsed() > UP {
                return Err(format!("dockerd does not come up:\n{}", log()).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let pid = self.daemon.id().to_string();
        let asked = Command::new("kill").arg(&pid).status();
        let begun = Instant::now();
        while asked.is_ok() && begun.elapsed() < DOWN {
            match self.daemon.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(100)),
                _ => break,
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // Network namespaces and, after a hard end, layers stay mounted.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for point in points.filter(|point| std::path::Path::new(point).starts_with(&self.dir)) {
            let _ = Command::new("umount").args(["--lazy", point]).status();
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("xtask: {} is left behind: {error}", self.dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_leaves_nothing_behind() {
        let engine = match Engine::start() {
            Ok(engine) => engine,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let (pid, dir) = (engine.daemon.id(), engine.dir.clone());
        drop(engine);
        assert!(!dir.exists());
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&*dir.to_string_lossy()), "{mounts}");
    }
}
