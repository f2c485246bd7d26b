//! `VBoxManage`: one process for each command, with a deadline, a bounded answer and an environment that is all ours.
//! What is asked and what answers mean is decided elsewhere.
//!
//! Its first call starts VirtualBox' own server, `VBoxSVC`, which goes on by itself and may keep our pipes open: so an
//! answer ends with the process and not with its pipes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use crate::Error;
use crate::process::printable;

/// The most bytes read of an answer. What VirtualBox says about a machine has some kilobytes.
const ANSWER: usize = 1024 * 1024;
/// The most bytes of a refusal that are passed on.
const WORDS: usize = 600;
/// Time for the last of what an ended process wrote to come through its pipes.
const LAST_BYTES: Duration = Duration::from_millis(200);

/// A way to give commands.
#[derive(Debug, Clone)]
pub(super) struct Manage {
    pub(super) program: String,
    pub(super) env: BTreeMap<String, String>,
}

impl Manage {
    /// Runs one command in `dir` and returns what it printed.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it does not end within `limit`: it is killed then. [`Error::Refused`] with its words
    /// when it ends with another code than 0. [`Error::Io`] when it cannot be started.
    pub(super) async fn run(
        &self,
        dir: &Path,
        arguments: &[String],
        limit: Duration,
    ) -> Result<String, Error> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env_clear()
            .envs(&self.env)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::io("run", &self.program))?;
        let mut out = Answer::new(child.stdout.take());
        let mut err = Answer::new(child.stderr.take());
        let ended = async {
            let status = {
                let reading = async { tokio::join!(out.read(), err.read()) };
                tokio::pin!(reading);
                tokio::select! {
                    status = child.wait() => status,
                    _ = &mut reading => child.wait().await,
                }
            };
            let rest = async { tokio::join!(out.read(), err.read()) };
            let _ = tokio::time::timeout(LAST_BYTES, rest).await;
            status
        };
        let status = match tokio::time::timeout(limit, ended).await {
            Ok(status) => status.map_err(Error::io("wait for", &self.program))?,
            Err(_) => {
                return Err(Error::Timeout {
                    what: "VBoxManage",
                    seconds: limit.as_secs(),
                });
            }
        };
        let command = arguments.first().map_or("", String::as_str);
        tracing::debug!(command, %status, "VBoxManage");
        if status.success() {
            return Ok(String::from_utf8_lossy(&out.bytes).into_owned());
        }
        // It tells errors on one stream and progress on either.
        let words = if err.bytes.trim_ascii().is_empty() {
            &out.bytes
        } else {
            &err.bytes
        };
        let answer = match printable(words, WORDS) {
            words if words.is_empty() => format!("{status}, without a word"),
            words => words,
        };
        Err(Error::Refused {
            program: "VBoxManage",
            command: command.to_owned(),
            hint: hint(&answer),
            answer,
        })
    }
}

/// What to do about a refusal, where its words say what is wrong. The names are those of `VBox/err.h` and
/// `VirtualBox.xidl`.
fn hint(answer: &str) -> Option<String> {
    let known = [
        (
            NOT_FOUND,
            "`VBoxManage list vms` as the server's user shows the machines that there are; another VBOX_USER_HOME shows others",
        ),
        ("vboxdrv", "load the kernel module: modprobe vboxdrv"),
        ("VERR_VM_DRIVER", "load the kernel module: modprobe vboxdrv"),
        (
            "VERR_VMX_IN_VMX_ROOT_MODE",
            "another hypervisor holds the processor: unload the modules of KVM",
        ),
        (
            "NS_ERROR_FAILURE",
            "VBoxSVC does not answer: see VBoxSVC.log in the directory VBOX_USER_HOME",
        ),
    ];
    let found = known.iter().find(|(words, _)| answer.contains(words));
    found.map(|(_, hint)| (*hint).to_owned())
}

/// The code that VirtualBox gives for what it does not know.
const NOT_FOUND: &str = "VBOX_E_OBJECT_NOT_FOUND";

/// Whether VirtualBox said that there is no such thing.
pub(super) fn is_not_found(error: &Error) -> bool {
    matches!(error, Error::Refused { answer, .. } if answer.contains(NOT_FOUND))
}

/// What came out of a pipe so far. Bytes beyond the bound are read and dropped, so that nobody waits for room.
struct Answer<P> {
    pipe: Option<P>,
    bytes: Vec<u8>,
}

impl<P: AsyncRead + Unpin> Answer<P> {
    fn new(pipe: Option<P>) -> Self {
        Self {
            pipe,
            bytes: Vec::new(),
        }
    }

    /// Until the end of the pipe. May be dropped and asked again.
    async fn read(&mut self) {
        let mut buffer = [0; 8192];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer).await {
                Ok(0) | Err(_) => self.pipe = None,
                Ok(read) => {
                    let room = ANSWER.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&buffer[..read.min(room)]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    async fn run(script: &str, limit: Duration) -> Result<String, Error> {
        let manage = Manage {
            program: "/bin/sh".to_owned(),
            env: BTreeMap::from([("GIVEN".to_owned(), "yes".to_owned())]),
        };
        let arguments = ["-c", script].map(str::to_owned);
        manage.run(Path::new("/"), &arguments, limit).await
    }

    const GENEROUS: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn an_answer_ends_with_its_process() {
        // As a first call leaves VBoxSVC behind, with the pipes that it inherited.
        let began = Instant::now();
        let answer = run("sleep 25 & echo ready", GENEROUS).await.unwrap();
        assert_eq!(answer, "ready\n");
        assert!(began.elapsed() < GENEROUS / 2);
    }

    #[tokio::test]
    async fn only_what_is_given_is_in_its_environment() {
        let answer = run("echo $GIVEN $HOME", GENEROUS).await.unwrap();
        assert_eq!(answer, "yes\n");
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_its_own_words() {
        let error = run(
            "echo 'VBOX_E_OBJECT_NOT_FOUND \x1b[1m' >&2; exit 1",
            GENEROUS,
        )
        .await
        .unwrap_err();
        assert!(is_not_found(&error), "{error}");
        assert!(!error.to_string().contains('\x1b'), "{error}");
        assert!(error.hint().unwrap().contains("list vms"));
        let error = run("exit 3", GENEROUS).await.unwrap_err();
        assert!(error.to_string().contains("without a word"), "{error}");
    }

    #[tokio::test]
    async fn too_much_is_cut_and_blocks_nobody() {
        let answer = run("head -c 3000000 /dev/zero", GENEROUS).await.unwrap();
        assert_eq!(answer.len(), ANSWER);
    }

    #[tokio::test]
    async fn one_that_hangs_is_ended() {
        let dir = std::env::temp_dir().join(format!("hutch-manage-{}", std::process::id()));
        let script = format!("echo $$ > {}; exec sleep 600", dir.display());
        let error = run(&script, Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        let pid = std::fs::read_to_string(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = async {
            loop {
                let text = std::fs::read_to_string(&stat).unwrap_or_default();
                if text.is_empty() || text.contains(") Z ") {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(GENEROUS, gone).await.unwrap();
    }
}
