//! QEMU's `microvm` machine: the runtime for anywhere, with KVM where that is real and by emulation elsewhere.
//! Its command line is in `qemu/arguments.rs`, the choice of acceleration in `qemu/acceleration.rs`.

mod acceleration;
mod arguments;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};
use tokio::sync::OnceCell;

use crate::launch::{self, Launch, LaunchUser, Listen};
use crate::process::{self, Adopted, Process};
use crate::qmp;
use crate::{Channel, Error, MachineDir, MachineSpec, Runtime, RuntimeConfig};
use acceleration::Acceleration;

/// The runtime's name.
pub(crate) const NAME: &str = "qemu";
const PROGRAM: &str = "qemu-system-x86_64";
const INSTALL: &str = "apt-get install qemu-system-x86";
const USUAL_DIRS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// The oldest version with all that the command line asks for.
const OLDEST: (u32, u32) = (6, 2);
/// Time for QEMU to be ready for commands.
const READY: Duration = Duration::from_secs(10);
const VERSION: Duration = Duration::from_secs(5);
/// The most descriptors that QEMU may have open; it needs fewer than forty.
const OPEN_FILES: u64 = 256;

/// The descriptor numbers that QEMU finds its sockets under.
const AGENT_FD: i32 = 3;
const MONITOR_FD: i32 = 4;
const EVENTS_FD: i32 = 5;

/// See the module.
pub(crate) struct Qemu {
    config: RuntimeConfig,
    acceleration: Result<Acceleration, String>,
    version: OnceCell<Result<(u32, u32), String>>,
}

impl Qemu {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            acceleration: acceleration::choose(config.acceleration.as_deref()),
            config,
            version: OnceCell::new(),
        }
    }

    fn acceleration(&self) -> Result<&Acceleration, Error> {
        self.acceleration.as_ref().map_err(|_| Error::Setting {
            runtime: NAME,
            setting: "acceleration",
            value: self.config.acceleration.clone().unwrap_or_default(),
        })
    }

    fn program(&self) -> Result<PathBuf, Error> {
        let found = match &self.config.program {
            Some(program) => std::path::absolute(program).ok(),
            None => USUAL_DIRS
                .iter()
                .map(|dir| Path::new(dir).join(PROGRAM))
                .find(|p| p.is_file()),
        };
        found
            .filter(|program| program.is_file())
            .ok_or_else(|| Error::ProgramMissing {
                program: match &self.config.program {
                    Some(program) => program.display().to_string(),
                    None => PROGRAM.to_owned(),
                },
                hint: INSTALL,
            })
    }

    /// Asks the program once; another try only when that could not be done.
    async fn version(&self) -> &Result<(u32, u32), String> {
        let ask = async {
            let program = self.program().map_err(|error| error.to_string())?;
            let asked = tokio::process::Command::new(&program)
                .arg("--version")
                .env_clear()
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .output();
            let output = tokio::time::timeout(VERSION, asked).await;
            let output = output.map_err(|_| format!("{} does not answer", program.display()))?;
            let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
            let text = String::from_utf8_lossy(&output.stdout);
            parse_version(&text).ok_or_else(|| format!("{} tells no version", program.display()))
        };
        self.version.get_or_init(|| ask).await
    }

    fn launch(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Launch, Error> {
        let acceleration = self.acceleration()?;
        let program = self.program()?;
        let program = program.into_os_string().into_string();
        let program = program.map_err(|program| Error::Setting {
            runtime: NAME,
            setting: "program",
            value: program.to_string_lossy().into_owned(),
        })?;
        let has_modules = dir.file(MachineDir::MODULES).is_file();
        let mut argv = vec![program];
        argv.extend(arguments::arguments(spec, acceleration, has_modules));
        let listen = |path: &str, fd| Listen {
            path: path.to_owned(),
            fd,
        };
        Ok(Launch {
            argv,
            env: BTreeMap::new(),
            user: spec.user.map(|user| LaunchUser {
                uid: user.uid,
                gid: user.gid,
                groups: match acceleration {
                    Acceleration::Kvm => launch::group_of_device(acceleration::KVM, user),
                    Acceleration::Tcg { .. } => Vec::new(),
                },
            }),
            own: vec![MachineDir::DISK.to_owned()],
            listen: vec![
                listen(MachineDir::AGENT_SOCKET, AGENT_FD),
                listen(MachineDir::MONITOR_SOCKET, MONITOR_FD),
            ],
            monitor: Some(launch::Monitor {
                fd: EVENTS_FD,
                greeting: qmp::GREETING.to_owned(),
            }),
            open_files: OPEN_FILES,
            console_bytes: self.config.console_bytes,
        })
    }
}

#[async_trait]
impl Runtime for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn probe(&self) -> RuntimeInfo {
        let mut info = RuntimeInfo {
            name: NAME.to_owned(),
            usable: false,
            reason: None,
            hint: None,
            version: None,
            acceleration: None,
            capabilities: self.capabilities(),
        };
        match &self.acceleration {
            Err(reason) => {
                info.reason = Some(reason.clone());
                return info;
            }
            Ok(acceleration) => {
                info.acceleration = Some(acceleration.name().to_owned());
                info.hint = acceleration.hint();
            }
        }
        if let Err(error) = self.program() {
            info.reason = Some(error.to_string());
            info.hint = error.hint();
            return info;
        }
        match self.version().await {
            Err(reason) => info.reason = Some(reason.clone()),
            Ok((major, minor)) => {
                info.version = Some(format!("{major}.{minor}"));
                info.usable = (*major, *minor) >= OLDEST;
                if !info.usable {
                    info.reason = Some(format!("older than {}.{}", OLDEST.0, OLDEST.1));
                }
            }
        }
        info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: match self.acceleration {
                Ok(Acceleration::Kvm) => Isolation::Hardware,
                Ok(Acceleration::Tcg { .. }) | Err(_) => Isolation::Emulation,
            },
            pause: true,
            memory_snapshot: false,
            live_resize: false,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        let what = self.launch(dir, spec)?;
        qmp::launch(NAME, &self.config, dir, what, READY).await
    }

    async fn restore(&self, _: &MachineDir, _: &MachineSpec, _: &Path) -> Result<Process, Error> {
        Err(Error::Unsupported {
            runtime: NAME,
            what: "restore memory",
        })
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        process::adopt(NAME, dir, qmp::judge).await
    }

    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(dir, "system_powerdown").await.map(drop)
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        process::kill(NAME, dir, qmp::judge).await
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(dir, "stop").await.map(drop)
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(dir, "cont").await.map(drop)
    }

    async fn snapshot(&self, _: &MachineDir, _: &Path) -> Result<(), Error> {
        Err(Error::Unsupported {
            runtime: NAME,
            what: "snapshot memory",
        })
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        let stream = dir.connect(MachineDir::AGENT_SOCKET).await?;
        Ok(Channel::Wire(Box::new(stream)))
    }
}

/// From `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut words = text.split_ascii_whitespace();
    let version = words
        .by_ref()
        .skip_while(|word| *word != "version")
        .nth(1)?;
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.0"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator"), None);
        assert_eq!(parse_version("version seven"), None);
    }
}
