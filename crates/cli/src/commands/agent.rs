//! `hutch agent`: brings our agent into a virtual machine that boots by itself, as a service on its serial line. Its disk
//! is never mounted here: the machine itself does the installing.

mod iso;

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use hutch_server::Flags;

use super::{App, serve};
use crate::error::Error;

const UNIT: &str = include_str!("../../../../deploy/agent/hutch-agent.service");
const INSTALLER: &str = include_str!("../../../../deploy/agent/install.sh");
/// The line that the unit names.
const SERIAL: &str = "ttyS0";
/// Where the files are put in the machine, until they are installed.
const INBOX: &str = "/tmp/hutch-agent-install";
/// The same in the home directory of who comes by SSH.
const SSH_INBOX: &str = ".hutch-agent-install";
/// Time for one command of `VBoxManage`, which may wait for the Guest Additions.
const GUESTCONTROL: Duration = Duration::from_secs(120);

/// The program that runs in guests
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch agent install --vm debian --user root --password-file pw
  hutch agent install --ssh root@192.168.56.10
  hutch agent install --iso agent.iso")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Install it into a virtual machine that boots by itself, such as a base VM of VirtualBox
    #[command(after_help = "Examples:
  hutch agent install --vm debian --user root --password-file pw
  hutch agent install --ssh admin@192.168.56.10 --ssh-port 2222
  hutch agent install --iso agent.iso

Afterwards shut the machine down and take a snapshot; name both in the server's configuration as VM@SNAPSHOT.")]
    Install(Install),
}

#[derive(Debug, clap::Args)]
#[group(id = "way", required = true, multiple = false, args = ["vm", "ssh", "iso"])]
struct Install {
    /// By VBoxManage guestcontrol: the VM runs, with Guest Additions
    #[arg(long, value_name = "VM", requires = "user", requires = "password_file")]
    vm: Option<String>,
    /// By your ssh and scp
    #[arg(long, value_name = "[USER@]HOST")]
    ssh: Option<String>,
    /// Write an ISO image to attach to the VM, with install.sh on it
    #[arg(long, value_name = "FILE")]
    iso: Option<PathBuf>,
    /// User in the VM, with --vm
    #[arg(long)]
    user: Option<String>,
    /// File with that user's password, with --vm
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Port of the VM's sshd, with --ssh
    #[arg(long, value_name = "PORT")]
    ssh_port: Option<u16>,
    /// The VM's serial line
    #[arg(long, value_name = "LINE", default_value = SERIAL, value_parser = serial_line)]
    serial: String,
    /// The agent [default: the server's]
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// VBoxManage, with --vm [default: the one in PATH]
    #[arg(
        long,
        value_name = "FILE",
        default_value = "VBoxManage",
        hide_default_value = true
    )]
    vboxmanage: PathBuf,
}

/// `ttyS1`: what stands in the unit's name of a getty and after `/dev/`.
fn serial_line(text: &str) -> Result<String, String> {
    let line = text.strip_prefix("/dev/").unwrap_or(text);
    let fits = line.starts_with("tty") && line.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match fits {
        true => Ok(line.to_owned()),
        false => Err("is no serial line, such as ttyS0".to_owned()),
    }
}

/// The name of each file and what is in it. Names are such that ISO 9660 has them too.
type Files = [(&'static str, Vec<u8>); 3];

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let Verb::Install(install) = args.verb;
    let agent = match &install.agent {
        Some(agent) => agent.clone(),
        None => {
            let flags = Flags {
                data_dir: app.place.data_dir.clone(),
                ..Flags::default()
            };
            serve::load(app, flags)?.config.agent
        }
    };
    let bytes = std::fs::read(&agent).map_err(|source| Error::File {
        action: "read",
        path: agent,
        source,
    })?;
    let files: Files = [
        ("agent", bytes),
        ("install.sh", INSTALLER.into()),
        ("unit", UNIT.replace(SERIAL, &install.serial).into()),
    ];
    match (&install.vm, &install.ssh, &install.iso) {
        (Some(vm), _, _) => by_guestcontrol(&install, vm, &files).await?,
        (_, Some(target), _) => by_ssh(&install, target, &files).await?,
        (_, _, Some(path)) => {
            write_iso(path, &files)?;
            app.ui.say(format!(
                "attach {} to the VM; in it: mount /dev/sr0 /mnt && sh /mnt/install.sh",
                path.display()
            ));
            return Ok(ExitCode::SUCCESS);
        }
        _ => unreachable!("clap has seen one of them"),
    }
    app.ui
        .say("shut the machine down and take a snapshot of it");
    Ok(ExitCode::SUCCESS)
}

fn write_iso(path: &Path, files: &Files) -> Result<(), Error> {
    let failed = |source| Error::File {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let files = files
        .each_ref()
        .map(|(name, bytes)| (*name, bytes.as_slice()));
    let mut file = std::fs::File::create_new(path).map_err(failed)?;
    std::io::Write::write_all(&mut file, &iso::image(&files)).map_err(failed)
}

/// The files in a directory that goes away with the value.
fn on_disk(files: &Files) -> Result<tempfile::TempDir, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File {
            action: "write",
            path,
            source,
        }
    };
    let dir = tempfile::tempdir().map_err(failed(&std::env::temp_dir()))?;
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).map_err(failed(&path))?;
    }
    Ok(dir)
}

/// Command lines as in the manual page `VBoxManage-guestcontrol` of 7.0 and 7.1.
async fn by_guestcontrol(install: &Install, vm: &str, files: &Files) -> Result<(), Error> {
    let dir = on_disk(files)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let word = |name: &str, value: &str| format!("--{name}={value}");
    let user = install.user.as_deref().unwrap_or_default();
    let password = install.password_file.as_deref().unwrap_or(Path::new(""));
    let password = std::path::absolute(password).map_err(|source| Error::File {
        action: "name",
        path: password.to_owned(),
        source,
    })?;
    let login = [
        word("username", user),
        word("passwordfile", &text(&password)),
    ];
    let command = |verb: &str, rest: Vec<String>| {
        let head = ["guestcontrol", vm, verb].map(str::to_owned);
        head.into_iter()
            .chain(login.clone())
            .chain(rest)
            .collect::<Vec<_>>()
    };
    let mut copy = vec![word("target-directory", &format!("{INBOX}/"))];
    copy.extend(files.iter().map(|(name, _)| text(&dir.path().join(name))));
    // Twice: some versions take the first word for the program's name, others for its first argument.
    let script = format!("{INBOX}/install.sh");
    let options = ["--exe=/bin/sh", "--wait-stdout", "--wait-stderr", "--"].map(str::to_owned);
    let run = options
        .into_iter()
        .chain([script.clone(), script])
        .collect();
    for arguments in [
        command(
            "mkdir",
            ["--parents", "--mode=0700", INBOX]
                .map(str::to_owned)
                .into(),
        ),
        command("copyto", copy),
        command("run", run),
        command(
            "rm",
            files
                .iter()
                .map(|(name, _)| format!("{INBOX}/{name}"))
                .collect(),
        ),
        command("rmdir", vec![INBOX.to_owned()]),
    ] {
        let done = spawn(&install.vboxmanage, &arguments, Stdio::null());
        let limit = tokio::time::timeout(GUESTCONTROL, done).await;
        limit.unwrap_or_else(|_| {
            Err(Error::Program {
                program: format!("VBoxManage guestcontrol {}", arguments[2]),
                how: format!("no end after {} s", GUESTCONTROL.as_secs()),
                hint: GUEST_HINT,
            })
        })?;
    }
    Ok(())
}

const GUEST_HINT: &str = "the VM must run and have Guest Additions, and the user be root or have sudo without a password; \
                          --ssh and --iso need neither";

/// With the user's own programs, so that keys, agents and configuration are those that the user has.
async fn by_ssh(install: &Install, target: &str, files: &Files) -> Result<(), Error> {
    let dir = on_disk(files)?;
    let port = |flag: &str| match install.ssh_port {
        Some(port) => vec![flag.to_owned(), port.to_string()],
        None => Vec::new(),
    };
    // A target that begins so would be an option.
    let ssh = |more: &[&str], command: String| {
        let words = more.iter().map(|word| (*word).to_owned());
        let tail = ["--".to_owned(), target.to_owned(), command];
        port("-p")
            .into_iter()
            .chain(words)
            .chain(tail)
            .collect::<Vec<_>>()
    };
    let mut copy = port("-P");
    copy.extend(["-q", "--"].map(str::to_owned));
    copy.extend(
        files
            .iter()
            .map(|(name, _)| dir.path().join(name).display().to_string()),
    );
    copy.push(format!("{target}:{SSH_INBOX}/"));
    // For sudo to ask, where there is somebody to be asked.
    let terminal: &[&str] = match std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        true => &["-t"],
        false => &[],
    };
    let make = format!("rm -rf {SSH_INBOX} && mkdir -m 700 {SSH_INBOX}");
    let install = format!("sh {SSH_INBOX}/install.sh; code=$?; rm -rf {SSH_INBOX}; exit $code");
    spawn(Path::new("ssh"), &ssh(&[], make), Stdio::inherit()).await?;
    spawn(Path::new("scp"), &copy, Stdio::inherit()).await?;
    spawn(Path::new("ssh"), &ssh(terminal, install), Stdio::inherit()).await
}

/// Runs a program to its end; what it says is for the person who watches.
async fn spawn(program: &Path, arguments: &[String], input: Stdio) -> Result<(), Error> {
    let failed = |how: String| Error::Program {
        program: program.display().to_string(),
        how,
        hint: match arguments.first().map(String::as_str) {
            Some("guestcontrol") => GUEST_HINT,
            _ => "the account needs root or sudo in the VM",
        },
    };
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(input)
        .stdout(std::io::stderr())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let status = child
        .wait()
        .await
        .map_err(|error| failed(error.to_string()))?;
    match status.success() {
        true => Ok(()),
        false => Err(failed(status.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_line_is_a_name_and_nothing_else() {
        assert_eq!(serial_line("/dev/ttyS1").as_deref(), Ok("ttyS1"));
        assert_eq!(serial_line("ttyAMA0").as_deref(), Ok("ttyAMA0"));
        for bad in [
            "",
            "/dev/sda",
            "ttyS0 --root /",
            "../ttyS0",
            "ttyS0\nExecStart=x",
        ] {
            assert!(serial_line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_unit_names_the_line_in_every_place() {
        let unit = UNIT.replace(SERIAL, "ttyS3");
        assert!(unit.contains("--serial /dev/ttyS3 --guest"));
        assert!(unit.contains("Conflicts=serial-getty@ttyS3.service"));
        assert!(!unit.contains("ttyS0"));
    }
}
