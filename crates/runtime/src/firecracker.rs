//! Firecracker: a VMM for KVM alone, confined by its own seccomp filters. What it is told is in `firecracker/config.rs`,
//! what its end meant in `firecracker/end.rs`, how it is jailed in `firecracker/jail.rs`.
//!
//! It has no power-off: a guest that powers off halts, and its VMM goes on; only a reset ends it. So our PID 1 is told
//! `hutch.end=reset`.

mod config;
mod end;
mod jail;

use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};
use serde::Deserialize;
use serde_json::json;

use crate::api::Api;
use crate::breaker::Breakers;
use crate::cgroup::Limits;
use crate::launch::{self, Launch, LaunchUser};
use crate::process::{self, Adopted, Process};
use crate::program::{Program, Wanted};
use crate::tap::LaunchTap;
use crate::vsock;
use crate::{Channel, Error, MachineDir, MachineSpec, Runtime, RuntimeConfig, passt};
use jail::{Jail, Place};

/// The runtime's name.
pub(crate) const NAME: &str = "firecracker";
const PROGRAM: Wanted = Wanted {
    name: "firecracker",
    install: "hutch runtime install firecracker",
    // The first that lets restored machines choose where their vsock's socket is.
    oldest: (1, 16, 1),
    needs_kvm: true,
};
/// What the VMM may use beside the guest's memory: itself, and the bookkeeping that grows with the guest's memory.
const OVERHEAD_MIB: u32 = 128;
/// The most threads beside the virtual CPUs.
const TASKS: u32 = 64;
/// Time until the guest runs.
const READY: Duration = Duration::from_secs(10);
/// The most descriptors that it may have open: some for each device and vCPU, one for each connection to the guest, of
/// which it takes 1023.
const OPEN_FILES: u64 = 2048;
/// Its API, and the way to the guest's vsock, among its own files.
const API_SOCKET: &str = "api.sock";
const CHANNEL_SOCKET: &str = "vsock.sock";

/// See the module.
pub(crate) struct Firecracker {
    config: RuntimeConfig,
    breakers: Breakers,
    program: Program,
}

impl Firecracker {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            breakers: Breakers::default(),
            program: Program::new(PROGRAM, &config),
            config,
        }
    }

    fn launch(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Launch, Error> {
        let has_modules = dir.file(MachineDir::MODULES).is_file();
        let jail = match (&self.config.jailer, spec.user) {
            (Some(jailer), Some(user)) => Some(Jail::new(jailer, &self.program.path()?, user)?),
            _ => None,
        };
        let (place, own, argv, links) = match &jail {
            Some(jail) => (
                Place::JAIL,
                jail.root.as_str(),
                jail.argv(),
                jail.links(has_modules),
            ),
            None => (
                Place::SHIM,
                MachineDir::VMM,
                vec![
                    self.program.text(NAME)?,
                    "--id".to_owned(),
                    config::id(spec),
                ],
                Vec::new(),
            ),
        };
        let text = config::text(spec, &self.config, place, has_modules);
        let argv = argv.into_iter().chain(config::arguments(place)).collect();
        passt::refuse(NAME, spec)?;
        let taps = LaunchTap::of(NAME, spec, None)?;
        Ok(Launch {
            user: spec.user.map(LaunchUser::with_kvm),
            own_dir: true,
            changes_user: jail.is_some(),
            links,
            files: BTreeMap::from([(format!("{own}/{}", config::FILE), text)]),
            // A tap is found by its name where it is.
            own_network: jail.is_some() && taps.is_empty(),
            taps,
            open_files: OPEN_FILES,
            cgroup: Some(Limits::new(spec, &self.config, OVERHEAD_MIB, TASKS)),
            last_words: Some(end::HALTED.to_owned()),
            ..Launch::new(argv, spec, &self.config)
        })
    }

    fn api<'a>(&'a self, dir: &'a MachineDir, own: &'a str) -> Api<'a> {
        Api::new(dir, own, API_SOCKET, "", &self.breakers)
    }

    /// Waits until the guest runs. The API answers only when all is made.
    async fn ready(&self, dir: &MachineDir) -> Result<(), Error> {
        match self.state(dir).await?.as_str() {
            "Running" => Ok(()),
            state => Err(Error::Monitor {
                command: "/",
                answer: process::printable(state.as_bytes(), 64),
            }),
        }
    }

    async fn state(&self, dir: &MachineDir) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Info {
            state: String,
        }
        let own = own(dir)?;
        let info: Info = self.api(dir, &own).ready("/").await?;
        Ok(info.state)
    }

    /// Refuses what it could only refuse less clearly.
    fn check_kernel(dir: &MachineDir) -> Result<(), Error> {
        let path = dir.file(MachineDir::KERNEL);
        let mut magic = [0; 4];
        let read = std::fs::File::open(&path).and_then(|mut kernel| kernel.read_exact(&mut magic));
        read.map_err(Error::io("read", &path))?;
        match &magic {
            b"\x7fELF" => Ok(()),
            _ => Err(Error::Unusable {
                runtime: NAME,
                reason: "the kernel is no ELF file".to_owned(),
            }),
        }
    }
}

/// Where the VMM of this run has its sockets: beside its configuration.
fn own(dir: &MachineDir) -> Result<String, Error> {
    let launch: Option<Launch> = launch::read_json(&dir.file(MachineDir::LAUNCH));
    let file = launch.and_then(|launch| launch.files.into_keys().next());
    let own = file.and_then(|file| Some(file.rsplit_once('/')?.0.to_owned()));
    own.ok_or_else(|| Error::NotRunning {
        dir: dir.path().to_owned(),
    })
}

#[async_trait]
impl Runtime for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn boots_elf_only(&self) -> bool {
        true
    }

    async fn probe(&self) -> RuntimeInfo {
        let mut info = RuntimeInfo {
            acceleration: Some("kvm".to_owned()),
            ..RuntimeInfo::new(NAME, self.capabilities())
        };
        self.program.probe(&mut info).await;
        info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::Hardware,
            pause: true,
            memory_snapshot: false,
            live_resize: false,
            network: true,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        self.program.check().await?;
        Self::check_kernel(dir)?;
        let what = self.launch(dir, spec)?;
        self.breakers.forget(dir);
        let ready = self.ready(dir);
        launch::until_ready(NAME, &self.config, dir, what, end::judge, READY, ready).await
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        process::adopt(NAME, dir, end::judge).await
    }

    /// By ctrl-alt-del, which a guest without a keyboard driver does not see.
    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        let action = json!({"action_type": "SendCtrlAltDel"});
        self.api(dir, &own(dir)?).put("/actions", &action).await
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        let killed = process::kill(NAME, dir, end::judge).await;
        self.breakers.forget(dir);
        killed
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        let own = own(dir)?;
        let api = self.api(dir, &own);
        api.patch("/vm", &json!({"state": "Paused"})).await?;
        // After a pause alone the vsock is dead for ever: resuming makes the device wait until the guest has seen that
        // its connections were reset, which is told it only when a snapshot is taken (#6100; so it is in 1.16.1). Taking
        // one is what tells it, and that this one cannot be written comes later.
        let nowhere = json!({"snapshot_path": ".", "mem_file_path": "."});
        match api.put("/snapshot/create", &nowhere).await {
            Ok(()) | Err(Error::Monitor { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        // Of one that runs it would reset what goes through the vsock.
        if self.state(dir).await? == "Running" {
            return Ok(());
        }
        let state = json!({"state": "Resumed"});
        self.api(dir, &own(dir)?).patch("/vm", &state).await
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        vsock::connect(dir, &own(dir)?, CHANNEL_SOCKET).await
    }
}
