//! Cloud Hypervisor: a VMM for KVM alone, confined by seccomp and, where the host's kernel has it, Landlock. Its command
//! line is in `cloud_hypervisor/arguments.rs`, what it says about its guest in `cloud_hypervisor/events.rs`.
//!
//! A guest that resets (a reboot, a panic, sysrq, a triple fault) would boot again in the same process; no option makes
//! that an end. It announces it as an event first thing, though, and the shim, which records the events, kills it then:
//! a reset ends the VMM here as everywhere, whoever in the guest did it and whether a server runs or not.

mod arguments;
mod events;

use std::time::Duration;

use async_trait::async_trait;
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};
use serde::Deserialize;

use crate::api::Api;
use crate::breaker::Breakers;
use crate::cgroup::Limits;
use crate::launch::{self, Launch, LaunchUser, Listen};
use crate::process::{self, Adopted, Process};
use crate::program::{Program, Wanted};
use crate::ring::Follower;
use crate::tap::LaunchTap;
use crate::{Channel, Error, MachineDir, MachineSpec, Runtime, RuntimeConfig};
use crate::{passt, sys, vsock};
use arguments::Host;

/// The runtime's name.
pub(crate) const NAME: &str = "cloud-hypervisor";
const PROGRAM: Wanted = Wanted {
    name: "cloud-hypervisor",
    install: "hutch runtime install cloud-hypervisor",
    // The first that writes out what disks have under way before it pauses (a snapshot misses it otherwise), that
    // takes odd accesses of guests without a panic of its own, and that lets us say where on the bus a balloon is. With
    // 52.0 already: places for other devices, and no use after free in reach of guests' disks (GHSA-f47p-p25q-83rh).
    oldest: (53, 0, 0),
    needs_kvm: true,
};
/// The Landlock that it asks the kernel for, and does without for nobody: Linux 6.2.
const LANDLOCK: i32 = 3;
/// What the VMM may use beside the guest's memory: itself, and the bookkeeping that grows with the guest's memory.
const OVERHEAD_MIB: u32 = 128;
/// The most threads beside the virtual CPUs.
const TASKS: u32 = 64;
/// Time until the guest runs.
const READY: Duration = Duration::from_secs(10);
/// The most descriptors that it may have open: some for each device and vCPU, one for each connection to the guest.
const OPEN_FILES: u64 = 2048;

/// The descriptor numbers that it finds its sockets under.
const API_FD: i32 = 3;
const EVENTS_FD: i32 = 4;
/// The same of its tap.
const TAP_FD: i32 = 5;
/// Its API, in [`MachineDir::RUN`].
const API_SOCKET: &str = "api.sock";
/// The way to the guest's vsock, in [`MachineDir::VMM`].
const CHANNEL_SOCKET: &str = "vsock.sock";

/// See the module.
pub(crate) struct CloudHypervisor {
    config: RuntimeConfig,
    breakers: Breakers,
    program: Program,
    landlock: bool,
}

impl CloudHypervisor {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            breakers: Breakers::default(),
            program: Program::new(PROGRAM, &config),
            landlock: sys::landlock_abi() >= LANDLOCK,
            config,
        }
    }

    fn launch(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Launch, Error> {
        let host = Host {
            landlock: self.landlock,
            config: &self.config,
        };
        let has_modules = dir.file(MachineDir::MODULES).is_file();
        let mut argv = vec![self.program.text(NAME)?];
        argv.extend(arguments::arguments(spec, host, has_modules));
        passt::refuse(NAME, spec)?;
        Ok(Launch {
            user: spec.user.map(LaunchUser::with_kvm),
            own_dir: true,
            listen: vec![Listen {
                path: format!("{}/{API_SOCKET}", MachineDir::RUN),
                fd: API_FD,
            }],
            taps: LaunchTap::of(NAME, spec, Some(TAP_FD))?,
            monitor: Some(launch::Monitor {
                fd: EVENTS_FD,
                greeting: String::new(),
                ends_on: Some(events::RESET.to_owned()),
            }),
            open_files: OPEN_FILES,
            cgroup: Some(Limits::new(spec, &self.config, OVERHEAD_MIB, TASKS)),
            ..Launch::new(argv, spec, &self.config)
        })
    }

    fn api<'a>(&'a self, dir: &'a MachineDir) -> Api<'a> {
        Api::new(dir, MachineDir::RUN, API_SOCKET, "/api/v1/", &self.breakers)
    }

    /// Waits until the guest runs and the API says so too.
    async fn ready(&self, dir: &MachineDir) -> Result<(), Error> {
        booted(dir).await?;
        match self.state(dir).await?.as_str() {
            "Running" => Ok(()),
            state => Err(Error::Monitor {
                command: "vm.info",
                answer: process::printable(state.as_bytes(), 64),
            }),
        }
    }

    async fn state(&self, dir: &MachineDir) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Info {
            state: String,
        }
        let info: Info = self.api(dir).ready("vm.info").await?;
        Ok(info.state)
    }

    /// Gives an order that is refused to a machine that is already as it wants it.
    async fn bring_to(
        &self,
        state: &str,
        dir: &MachineDir,
        order: &'static str,
    ) -> Result<(), Error> {
        match self.api(dir).order(order).await {
            Err(Error::Monitor { .. }) if self.state(dir).await? == state => Ok(()),
            outcome => outcome,
        }
    }
}

/// Until then a question about the machine would be refused: there is none yet.
async fn booted(dir: &MachineDir) -> Result<(), Error> {
    let path = dir.file(MachineDir::EVENTS);
    let mut follower = Follower::open(&path, 0).map_err(Error::io("open", &path))?;
    let mut text = Vec::new();
    while !events::is_booted(&text) {
        let more = follower
            .next(4096)
            .await
            .map_err(Error::io("read", &path))?;
        text.extend(more.bytes);
    }
    Ok(())
}

#[async_trait]
impl Runtime for CloudHypervisor {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn probe(&self) -> RuntimeInfo {
        let mut info = RuntimeInfo {
            hint: (!self.landlock).then(|| {
                "the host's kernel has no Landlock (Linux 6.2, switched on): VMMs are confined without it".to_owned()
            }),
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
        let what = self.launch(dir, spec)?;
        self.breakers.forget(dir);
        let ready = self.ready(dir);
        launch::until_ready(NAME, &self.config, dir, what, events::judge, READY, ready).await
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        process::adopt(NAME, dir, events::judge).await
    }

    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        self.api(dir).order("vm.power-button").await
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        let killed = process::kill(NAME, dir, events::judge).await;
        self.breakers.forget(dir);
        killed
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        self.bring_to("Paused", dir, "vm.pause").await
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        self.bring_to("Running", dir, "vm.resume").await
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        vsock::connect(dir, MachineDir::VMM, CHANNEL_SOCKET).await
    }
}
