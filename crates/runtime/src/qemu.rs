//! QEMU's `microvm` machine: the runtime for anywhere, with KVM where that is real and by emulation elsewhere.
//! Its command line is in `qemu/arguments.rs`, the choice of acceleration in `qemu/acceleration.rs`, memory that is saved and
//! gone on with in `qemu/snapshot.rs`.

mod acceleration;
mod arguments;
mod snapshot;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};

use crate::breaker::Breakers;
use crate::cgroup::Limits;
use crate::launch::{self, Launch, LaunchUser, Listen};
use crate::memory::Memories;
use crate::passt::{self, LaunchPasst};
use crate::process::{self, Adopted, Process};
use crate::program::{Program, Version, Wanted};
use crate::qmp;
use crate::tap::LaunchTap;
use crate::{Channel, Error, MachineDir, MachineSpec, Nic, Runtime, RuntimeConfig};
use acceleration::Acceleration;

/// The runtime's name.
pub(crate) const NAME: &str = "qemu";
const PROGRAM: Wanted = Wanted {
    name: "qemu-system-x86_64",
    install: "apt-get install qemu-system-x86",
    // With all that the command line asks for.
    oldest: (6, 2, 0),
    needs_kvm: false,
};
/// The first version whose card can be a stream of frames.
const STREAMS: Version = (7, 2, 0);
/// Time for QEMU to be ready for commands.
const READY: Duration = Duration::from_secs(10);
/// The most descriptors that QEMU may have open; it needs fewer than forty.
const OPEN_FILES: u64 = 256;

/// What QEMU may use beside the guest's memory: itself with its libraries, devices and caches (some 60 MiB seen), and
/// room for the bookkeeping that grows with the guest's memory. Emulation keeps translated code besides.
const OVERHEAD_MIB: u32 = 256;
/// The most threads beside the virtual CPUs; its pool for disk requests alone may have 64.
const TASKS: u32 = 128;

/// The descriptor numbers that QEMU finds its sockets under.
const AGENT_FD: i32 = 3;
const MONITOR_FD: i32 = 4;
const EVENTS_FD: i32 = 5;
/// The same of its tap.
const TAP_FD: i32 = 6;
/// The same of its user-mode network.
const PASST_FD: i32 = 7;
/// The same of what it goes on from: the guest's memory, and the state of its devices.
const MEMORY_FD: i32 = 8;
const STATE_FD: i32 = 9;

/// See the module.
pub(crate) struct Qemu {
    config: RuntimeConfig,
    breakers: Breakers,
    acceleration: Result<Acceleration, String>,
    program: Program,
    memories: Memories,
}

impl Qemu {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            acceleration: acceleration::choose(config.acceleration.as_deref()),
            program: Program::new(PROGRAM, &config),
            config,
            breakers: Breakers::default(),
            memories: Memories::default(),
        }
    }

    fn acceleration(&self) -> Result<&Acceleration, Error> {
        self.acceleration.as_ref().map_err(|_| Error::Setting {
            runtime: NAME,
            setting: "acceleration",
            value: self.config.acceleration.clone().unwrap_or_default(),
        })
    }

    async fn launch(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        from: Option<&Path>,
    ) -> Result<Process, Error> {
        self.program.check().await?;
        if let Nic::Filtered(_) = spec.nic {
            self.program.is_since(STREAMS).await?;
        }
        let mut what = self.order(dir, spec, from.is_some())?;
        if let Some(from) = from {
            let (memory, state) = self.goes_on_from(dir, spec, from).await?;
            what.memory = Some(memory);
            what.open.push(state);
        }
        self.breakers.forget(dir);
        qmp::launch(NAME, &self.config, dir, what, READY).await
    }

    /// What the shim is told.
    fn order(&self, dir: &MachineDir, spec: &MachineSpec, goes_on: bool) -> Result<Launch, Error> {
        let acceleration = self.acceleration()?;
        let has_modules = dir.file(MachineDir::MODULES).is_file();
        let mut argv = vec![self.program.text(NAME)?];
        argv.extend(arguments::arguments(
            spec,
            acceleration,
            has_modules,
            goes_on,
        ));
        let listen = |path: &str, fd| Listen {
            path: path.to_owned(),
            fd,
        };
        let plain = Launch::new(argv, spec, &self.config);
        let passt = LaunchPasst::of(NAME, spec, PASST_FD)?;
        let (user, overhead_mib) = match acceleration {
            Acceleration::Kvm => (spec.user.map(LaunchUser::with_kvm), OVERHEAD_MIB),
            Acceleration::Tcg { .. } => {
                (plain.user.clone(), OVERHEAD_MIB + arguments::TCG_CODE_MIB)
            }
        };
        let overhead_mib = match passt {
            Some(_) => overhead_mib + passt::OVERHEAD_MIB,
            None => overhead_mib,
        };
        Ok(Launch {
            user,
            passt,
            listen: vec![
                listen(MachineDir::AGENT_SOCKET, AGENT_FD),
                listen(MachineDir::MONITOR_SOCKET, MONITOR_FD),
            ],
            taps: LaunchTap::of(NAME, spec, Some(TAP_FD))?,
            monitor: Some(launch::Monitor {
                fd: EVENTS_FD,
                greeting: qmp::GREETING.to_owned(),
                ends_on: None,
            }),
            open_files: OPEN_FILES,
            cgroup: Some(Limits::new(spec, &self.config, overhead_mib, TASKS)),
            ..plain
        })
    }
}

#[async_trait]
impl Runtime for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn has_user_network(&self) -> bool {
        true
    }

    async fn probe(&self) -> RuntimeInfo {
        let mut info = RuntimeInfo::new(NAME, self.capabilities());
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
        self.program.probe(&mut info).await;
        info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: match self.acceleration {
                Ok(Acceleration::Kvm) => Isolation::Hardware,
                Ok(Acceleration::Tcg { .. }) | Err(_) => Isolation::Emulation,
            },
            pause: true,
            memory_snapshot: true,
            live_resize: false,
            network: true,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        self.launch(dir, spec, None).await
    }

    async fn restore(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        snapshot: &Path,
    ) -> Result<Process, Error> {
        self.launch(dir, spec, Some(snapshot)).await
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

    async fn snapshot(&self, dir: &MachineDir, into: &Path) -> Result<(), Error> {
        self.save(dir, into).await
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        let stream = dir.connect(MachineDir::AGENT_SOCKET).await?;
        Ok(Channel::Wire(Box::new(stream)))
    }
}
