//! The lab's machine: QEMU with an emulated processor that has SVM, so that KVM is real inside.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::Result;
use crate::command::{self, command};
use crate::lab::root::Root;

/// After the last word, to write what goes out and to power off.
const LEAVE: Duration = Duration::from_secs(60);

/// What to boot.
pub struct Machine<'a> {
    pub root: &'a Root,
    pub load: &'a Path,
    /// For what it leaves here.
    pub dir: PathBuf,
    /// With more than one, the emulation of SVM is not to be trusted: the kernel inside was seen to die, after some 35
    /// boots of guests (QEMU 7.2: a page fault without its GS).
    pub vcpus: u32,
    pub memory_mib: u32,
    /// For what runs in it, on its kernel's command line.
    pub words: String,
}

/// Ends QEMU with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Machine<'_> {
    /// Boots it, gives every line of its job to `line`, and returns the job's exit code. At the deadline it is ended.
    pub fn run(&self, deadline: Instant, mut line: impl FnMut(&str)) -> Result<i32> {
        let mut qemu = self.qemu();
        qemu.args(["-chardev", "file,id=talk,path=/dev/fd/1"]);
        qemu.args(["-device", "virtserialport,chardev=talk,name=lab.talk"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut running = Running(qemu.spawn()?);
        let stdout = running.0.stdout.take().expect("it is piped");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout)
                .split(b'\n')
                .map_while(|line| line.ok())
            {
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let (mut code, mut deadline) = (None, deadline);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(text) => match text.strip_prefix("lab:end ") {
                    Some(end) => {
                        code = end.trim().parse().ok();
                        deadline = Instant::now() + LEAVE;
                    }
                    None => line(text.trim_end_matches('\r')),
                },
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("the lab does not end and is ended");
                    break;
                }
            }
        }
        drop(running);
        code.ok_or_else(|| self.last_words().into())
    }

    /// Boots it with this terminal as the job's.
    pub fn terminal(&self) -> Result {
        let mut qemu = self.qemu();
        qemu.args(["-chardev", "stdio,id=terminal,signal=off"]);
        qemu.args(["-device", "virtconsole,chardev=terminal"]);
        qemu.args(["-chardev", "null,id=talk"]);
        qemu.args(["-device", "virtserialport,chardev=talk,name=lab.talk"]);
        command::run(&mut qemu)
    }

    /// Where the job's `/out` is put, as a tar archive.
    pub fn out(&self) -> PathBuf {
        self.dir.join("out.tar")
    }

    fn qemu(&self) -> std::process::Command {
        let drive = |file: &Path, options: &str| {
            // A comma in a name is doubled, for QEMU.
            let file = file.to_string_lossy().replace(',', ",,");
            [
                "-drive".to_owned(),
                format!("file={file},format=raw,if=virtio,{options}"),
            ]
        };
        // It ends with us, however we end.
        let mut qemu = command("setpriv", ["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-M", "q35"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"])
            .args(["-smp", &self.vcpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&self.root.kernel)
            .arg("-initrd")
            .arg(&self.root.initramfs)
            .arg("-append")
            // Nobody attacks it, and it has no time. A tick that the emulation loses must not be the last one.
            .arg(format!(
                "console=ttyS0 panic=1 loglevel=5 mitigations=off nohz=off highres=off {}",
                self.words
            ))
            // What is written to the root is forgotten.
            .args(drive(&self.root.disk, "snapshot=on,cache=unsafe"))
            .args(drive(self.load, "readonly=on"))
            .args(["-serial", "file:console.log"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", "file,id=out,path=out.tar"])
            .args(["-device", "virtserialport,chardev=out,name=lab.out"])
            .current_dir(&self.dir);
        // It warns of the processor's parts that it does not emulate.
        if let Ok(errors) = fs::File::create(self.dir.join("qemu.log")) {
            qemu.stderr(errors);
        }
        qemu
    }

    fn last_words(&self) -> String {
        let tail = |name| {
            let text = fs::read(self.dir.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(15)..].join("\n")
        };
        format!(
            "the lab ended without a result; its console says:\n{}\nand qemu:\n{}",
            tail("console.log"),
            tail("qemu.log")
        )
    }
}
