//! The runtime for tests: machines are a small process that behaves like a VMM (`stub/vmm.rs`), with the real agent
//! as its guest. Launch, adoption, confinement and monitor are those of the real runtimes; there is no isolation.

pub mod guest;
pub mod liar;
pub mod virtualbox;
pub mod vmm;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};

use crate::breaker::Breakers;
use crate::cgroup::Limits;
use crate::launch::{self, Launch, Listen};
use crate::process::{self, Adopted, Process};
use crate::tap::LaunchTap;
use crate::{Channel, Error, MachineDir, MachineSpec, Runtime, RuntimeConfig};
use crate::{passt, qmp};

/// The runtime's name.
pub(crate) const NAME: &str = "stub";
const READY: Duration = Duration::from_secs(3);
/// Its guests are processes of the host: they need room for what they do there.
const OVERHEAD_MIB: u32 = 512;
const TASKS: u32 = 4096;
/// The guest's root directory, in the machine's.
const GUEST: &str = "guest";

/// See the module. `program` is the path of `hutch-stub-vmm`, `agent` that of `hutch-agent`.
pub(crate) struct Stub {
    config: RuntimeConfig,
    breakers: Breakers,
}

impl Stub {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            config,
            breakers: Breakers::default(),
        }
    }

    fn launch(&self, spec: &MachineSpec) -> Result<Launch, Error> {
        let text = |path: &Path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            path.to_string_lossy().into_owned()
        };
        let program = self.config.program.as_deref();
        let program = program.ok_or_else(|| Error::ProgramMissing {
            program: "hutch-stub-vmm".to_owned(),
            hint: "name it in the configuration",
        })?;
        let listen = |path: &str, fd| Listen {
            path: path.to_owned(),
            fd,
        };
        let argv = vec![text(program), "vmm".to_owned(), text(&self.config.agent)];
        Ok(Launch {
            own: vec![GUEST.to_owned()],
            listen: vec![
                listen(MachineDir::AGENT_SOCKET, vmm::AGENT_FD),
                listen(MachineDir::MONITOR_SOCKET, vmm::MONITOR_FD),
            ],
            monitor: Some(launch::Monitor {
                fd: vmm::EVENTS_FD,
                greeting: qmp::GREETING.to_owned(),
                ends_on: None,
            }),
            open_files: 1024,
            taps: LaunchTap::of(NAME, spec, Some(vmm::TAP_FD))?,
            cgroup: Some(Limits::new(spec, &self.config, OVERHEAD_MIB, TASKS)),
            ..Launch::new(argv, spec, &self.config)
        })
    }
}

#[async_trait]
impl Runtime for Stub {
    fn name(&self) -> &'static str {
        NAME
    }

    fn boots_kernel(&self) -> bool {
        false
    }

    async fn probe(&self) -> RuntimeInfo {
        let program = self.config.program.as_deref();
        let usable = program.is_some_and(Path::is_file);
        RuntimeInfo {
            usable,
            reason: (!usable).then(|| "its program is not named".to_owned()),
            path: program.map(|program| program.display().to_string()),
            ..RuntimeInfo::new(NAME, self.capabilities())
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::None,
            pause: true,
            memory_snapshot: false,
            live_resize: false,
            network: true,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        passt::refuse(NAME, spec)?;
        let what = self.launch(spec)?;
        let guest = dir.file(GUEST);
        match tokio::fs::create_dir(&guest).await {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make", guest)(error));
            }
            _ => {}
        }
        self.breakers.forget(dir);
        qmp::launch(NAME, &self.config, dir, what, READY).await
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        process::adopt(NAME, dir, qmp::judge).await
    }

    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(&self.breakers, dir, "system_powerdown")
            .await
            .map(drop)
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        let killed = process::kill(NAME, dir, qmp::judge).await;
        self.breakers.forget(dir);
        killed
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(&self.breakers, dir, "stop").await.map(drop)
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        qmp::execute(&self.breakers, dir, "cont").await.map(drop)
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        let stream = dir.connect(MachineDir::AGENT_SOCKET).await?;
        Ok(Channel::Connection(Box::new(stream)))
    }
}
