//! Runs the binary and shows what a person would see of it.

use std::process::Stdio;

use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

/// An empty home, and which server is meant there.
pub struct Hutch {
    /// The home; also the working directory.
    pub home: TempDir,
    url: Option<String>,
}

/// What came out.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Code and both streams as one text.
    pub fn shown(&self) -> String {
        let code = self.code.map_or("none".to_owned(), |code| code.to_string());
        format!(
            "exit code {code}\n--- stdout\n{}--- stderr\n{}",
            self.stdout, self.stderr
        )
    }
}

impl Hutch {
    /// With a server.
    pub fn at(url: &str) -> Hutch {
        Hutch {
            home: tempfile::tempdir().unwrap(),
            url: Some(url.to_owned()),
        }
    }

    /// With nothing named: the server of the data directory `data` in the home is meant.
    pub fn alone() -> Hutch {
        Hutch {
            home: tempfile::tempdir().unwrap(),
            url: None,
        }
    }

    /// The binary with nothing of our own environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hutch"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            // The host's own network is left alone.
            .env("HUTCH_NETWORK_MODE", "none")
            // Nor is anything mounted on it.
            .env("HUTCH_DISK_POOL", "off")
            .current_dir(self.home.path());
        command.env("HUTCH_DATA_DIR", self.home.path().join("data"));
        // Tests run beside each other.
        command.env("HUTCH_HTTP_LISTEN", "127.0.0.1:0");
        if let Some(url) = &self.url {
            command.env("HUTCH_URL", url);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs it to its end.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments).spawn().unwrap()).await
    }

    /// The same with something piped in.
    pub async fn run_with(&self, arguments: &[&str], stdin: &[u8]) -> Ended {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let stdin = stdin.to_vec();
        // It may well end without reading everything.
        let writing = tokio::spawn(async move { drop(pipe.write_all(&stdin).await) });
        let ended = ended(child).await;
        writing.await.unwrap();
        ended
    }
}

/// Waits for its end.
pub async fn ended(child: Child) -> Ended {
    let output = child.wait_with_output().await.unwrap();
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Sends it a signal.
pub fn send(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
