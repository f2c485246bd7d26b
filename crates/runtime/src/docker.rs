//! Containers of a Docker-compatible engine: the host's kernel is shared, so this is for development. The way to the
//! engine is in `docker/client.rs`, images are in `docker/image.rs`, what runs is in `docker/container.rs`.
//!
//! ```text
//! image's layer ──import──▶ hutch/TAG:img-…        labels hutch.tag, hutch.image
//!                                │ create
//!                                ▼
//!                    container hTAG-SLOT           labels hutch.tag, hutch.machine
//!   /.hutch/agent     the agent, PID 1, read-only
//!   /.hutch/run       run/vmm of the machine's directory: the agent's socket
//!   /workspace        workspace of the machine's directory
//! ```
//! The container is made once and started again and again: what its guest writes stays. Nothing without our labels is
//! ever touched.

mod client;
mod container;
mod image;

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::models::{
    ContainerCreateBody, ContainerUpdateBody, HostConfig, HostConfigLogConfig, Mount, MountType,
};
use bollard::query_parameters::{
    CreateContainerOptions, KillContainerOptions, ListContainersOptions, RemoveContainerOptions,
};
use hutch_contract::machine::Isolation;
use hutch_contract::node::{Capabilities, RuntimeInfo};

use crate::launch::{read_json, write_json};
use crate::process::{self, Adopted, Process};
use crate::ring::RingReader;
use crate::{
    Channel, Error, ImageLayer, MachineDir, MachineSpec, Outside, Root, Runtime, RuntimeConfig, tap,
};
use client::{Client, asked, found};
use container::{Container, Run, Seen, inspect};
use image::Imports;

/// The runtime's name.
pub(crate) const NAME: &str = "docker";

/// On everything of ours in the engine: the instance tag of its server.
const TAG_LABEL: &str = "hutch.tag";
const MACHINE_LABEL: &str = "hutch.machine";
const IMAGE_LABEL: &str = "hutch.image";
const KIND: &str = "container";

/// Where the container sees what, and the name of the agent's socket in the second.
const AGENT: &str = "/.hutch/agent";
const CHANNEL: &str = "/.hutch/run";
const WORKSPACE: &str = "/workspace";
const SOCKET: &str = "agent.sock";

/// What root in a container may still do: own its files, become its users, end its processes.
const CAPABILITIES: [&str; 6] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "SETUID",
    "SETGID",
    "KILL",
];
/// The most processes and threads of a container.
const PROCESSES: i64 = 4096;
/// The least that the engine keeps of the output, in bytes: there it waits for a server that is being restarted.
const LOG_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Clone)]
pub(crate) struct Docker {
    config: Arc<RuntimeConfig>,
    client: Arc<Client>,
    imports: Arc<Imports>,
}

impl Docker {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        Self {
            client: Arc::new(Client::new(config.docker_socket.clone())),
            config: Arc::new(config),
            imports: Arc::default(),
        }
    }

    fn process(&self, dir: &MachineDir, run: Run, pid: u32) -> Process {
        Process::new(Container {
            client: self.client.clone(),
            dir: dir.clone(),
            run,
            pid,
            console_bytes: self.config.console_bytes,
        })
    }

    /// The machine's container. Something else under its name is none.
    async fn container(&self, spec: &MachineSpec) -> Result<Option<Seen>, Error> {
        match inspect(&self.client, &spec.label).await? {
            Some(seen) if seen.machine.as_deref() != Some(&spec.id) => Err(Error::Monitor {
                command: "inspect",
                answer: format!("the container {} is not this machine's", spec.label),
            }),
            seen => Ok(seen),
        }
    }

    async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let options = RemoveContainerOptions {
            force: true,
            v: true,
            ..RemoveContainerOptions::default()
        };
        let engine = self.client.engine().await?;
        let removed = engine.remove_container(id, Some(options));
        found("remove", removed).await.map(drop)
    }

    fn body(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        image: String,
    ) -> Result<ContainerCreateBody, Error> {
        let bind = |source: &Path, target: &str, read_only| {
            let source = std::path::absolute(source).map_err(Error::io("name", source))?;
            Ok(Mount {
                typ: Some(MountType::BIND),
                source: Some(source.to_string_lossy().into_owned()),
                target: Some(target.to_owned()),
                read_only: Some(read_only),
                ..Mount::default()
            })
        };
        let log_bytes = (4 * self.config.console_bytes).max(LOG_BYTES);
        let text = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect());
        let host_config = HostConfig {
            mounts: Some(vec![
                bind(&self.config.agent, AGENT, true)?,
                bind(&dir.file(MachineDir::VMM), CHANNEL, false)?,
                bind(&dir.file(MachineDir::WORKSPACE), WORKSPACE, false)?,
            ]),
            memory: Some(memory(spec)),
            // Memory and swap together.
            memory_swap: Some(memory(spec)),
            nano_cpus: Some(nano_cpus(spec)),
            pids_limit: Some(PROCESSES),
            network_mode: Some(match &self.config.docker_network {
                Some(network) => network.clone(),
                None => "none".to_owned(),
            }),
            cap_drop: text(&["ALL"]),
            cap_add: text(&CAPABILITIES),
            security_opt: text(&["no-new-privileges"]),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                config: Some(HashMap::from([
                    ("max-size".to_owned(), log_bytes.to_string()),
                    ("max-file".to_owned(), "2".to_owned()),
                ])),
            }),
            ..HostConfig::default()
        };
        let tag = tag(spec);
        Ok(ContainerCreateBody {
            image: Some(image),
            hostname: Some(spec.label.clone()),
            user: Some("0:0".to_owned()),
            working_dir: Some("/".to_owned()),
            entrypoint: text(&[AGENT, "serve", "--unix", &format!("{CHANNEL}/{SOCKET}")]),
            cmd: Some(Vec::new()),
            labels: Some(HashMap::from([
                (TAG_LABEL.to_owned(), tag.to_owned()),
                (MACHINE_LABEL.to_owned(), spec.id.clone()),
            ])),
            host_config: Some(host_config),
            ..ContainerCreateBody::default()
        })
    }

    /// The limits of a machine may have changed since its container was made.
    async fn limit(&self, seen: &Seen, spec: &MachineSpec) -> Result<(), Error> {
        if (seen.memory, seen.nano_cpus) == (memory(spec), nano_cpus(spec)) {
            return Ok(());
        }
        let limits = ContainerUpdateBody {
            memory: Some(memory(spec)),
            memory_swap: Some(memory(spec)),
            nano_cpus: Some(nano_cpus(spec)),
            ..ContainerUpdateBody::default()
        };
        let engine = self.client.engine().await?;
        asked("update", engine.update_container(&seen.id, limits))
            .await
            .map(drop)
    }

    /// Everything of a start. Goes on to its end when nobody waits for it any more: see [`Runtime::start`].
    async fn start_now(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        let seen = self.container(spec).await?.ok_or_else(|| Error::Monitor {
            command: "start",
            answer: format!(
                "its container {} is gone, and its files with it",
                spec.label
            ),
        })?;
        if seen.running {
            return Err(Error::Locked {
                dir: dir.path().to_owned(),
            });
        }
        self.limit(&seen, spec).await?;
        let console = RingReader::open(&dir.console()).and_then(|ring| ring.end());
        let run = Run {
            container: seen.id,
            machine: spec.id.clone(),
            before: seen.started_at,
            console_from: console.unwrap_or(0),
        };
        for name in [&format!("{}/{SOCKET}", MachineDir::VMM), MachineDir::KILLED] {
            let path = dir.file(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", path)(error));
                }
                _ => {}
            }
        }
        let path = dir.file(MachineDir::CONTAINER);
        write_json(&path, &run).map_err(Error::io("write", path))?;
        let engine = self.client.engine().await?;
        let started = asked("start", engine.start_container(&run.container, None)).await;
        let found = inspect(&self.client, &run.container).await;
        match (started, found?) {
            // A start that was refused or took too long, and whatever it has become: nothing is left running.
            (Err(error), seen) => {
                if seen.is_some_and(|seen| seen.running) {
                    asked("kill", engine.kill_container(&run.container, None)).await?;
                }
                Err(error)
            }
            (Ok(()), Some(seen)) if seen.running => Ok(self.process(dir, run, seen.pid)),
            (Ok(()), _) => Err(Error::Exited {
                runtime: NAME,
                // Also reads what it said.
                report: self.process(dir, run, 0).wait().await,
            }),
        }
    }

    /// The container of a machine that runs.
    async fn running(&self, dir: &MachineDir) -> Result<Seen, Error> {
        let not_running = || Error::NotRunning {
            dir: dir.path().to_owned(),
        };
        let run: Run = read_json(&dir.file(MachineDir::CONTAINER)).ok_or_else(not_running)?;
        let seen = inspect(&self.client, &run.container).await?;
        seen.filter(|seen| seen.running).ok_or_else(not_running)
    }

    async fn containers(&self, tag: &str) -> Result<Vec<Outside>, Error> {
        let options = ListContainersOptions {
            all: true,
            filters: Some(labelled(tag)),
            ..ListContainersOptions::default()
        };
        let engine = self.client.engine().await?;
        let listed = asked("list", engine.list_containers(Some(options))).await?;
        let ours = listed.into_iter().filter_map(|container| {
            let labels = container.labels?;
            let of = labels.get(MACHINE_LABEL)?.clone();
            (labels.get(TAG_LABEL)? == tag).then_some(Outside {
                kind: KIND,
                name: container.id?,
                of,
            })
        });
        Ok(ours.collect())
    }
}

/// The filter for what carries a tag. What comes back is looked at all the same: engines differ.
fn labelled(tag: &str) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{TAG_LABEL}={tag}")])])
}

/// The instance tag in a machine's label, `h<tag>-<slot>`.
fn tag(spec: &MachineSpec) -> &str {
    let label = spec.label.strip_prefix('h').unwrap_or(&spec.label);
    label.split_once('-').map_or(label, |(tag, _)| tag)
}

fn memory(spec: &MachineSpec) -> i64 {
    i64::from(spec.memory_mib) << 20
}

fn nano_cpus(spec: &MachineSpec) -> i64 {
    i64::from(spec.vcpu) * 1_000_000_000
}

#[async_trait]
impl Runtime for Docker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn boots_kernel(&self) -> bool {
        false
    }

    fn root(&self) -> Root {
        Root::Layer
    }

    async fn probe(&self) -> RuntimeInfo {
        let version = self.client.version().await;
        let error = version.as_ref().err();
        RuntimeInfo {
            usable: error.is_none(),
            reason: error.map(ToString::to_string),
            hint: error.and_then(Error::hint),
            path: Some(self.client.socket().display().to_string()),
            version: version.ok(),
            ..RuntimeInfo::new(NAME, self.capabilities())
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::SharedKernel,
            pause: true,
            memory_snapshot: false,
            live_resize: false,
            network: false,
        }
    }

    async fn prepare(
        &self,
        dir: &MachineDir,
        spec: &MachineSpec,
        image: &ImageLayer,
    ) -> Result<(), Error> {
        tap::refuse(NAME, spec)?;
        let name = self.imports.import(&self.client, tag(spec), image).await?;
        let private = |name: &str, mode| {
            let path = dir.file(name);
            let made = std::fs::DirBuilder::new().mode(mode).create(&path);
            match made {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    Err(Error::io("make", path)(error))
                }
                _ => Ok(()),
            }
        };
        private(MachineDir::RUN, 0o700)?;
        private(MachineDir::VMM, 0o700)?;
        // Its root gives it to whom it likes.
        private(MachineDir::WORKSPACE, 0o755)?;
        if let Some(left) = self.container(spec).await? {
            self.remove_container(&left.id).await?;
        }
        let options = CreateContainerOptions {
            name: Some(spec.label.clone()),
            ..CreateContainerOptions::default()
        };
        let body = self.body(dir, spec, name)?;
        let engine = self.client.engine().await?;
        asked("create", engine.create_container(Some(options), body))
            .await
            .map(drop)
    }

    async fn remove(&self, spec: &MachineSpec) -> Result<(), Error> {
        match inspect(&self.client, &spec.label).await? {
            Some(seen) if seen.machine.as_deref() == Some(&spec.id) => {
                self.remove_container(&seen.id).await
            }
            _ => Ok(()),
        }
    }

    async fn outside(&self, tag: &str) -> Result<Vec<Outside>, Error> {
        let mut all = self.containers(tag).await?;
        all.extend(image::list(&self.client, tag).await?);
        Ok(all)
    }

    async fn remove_outside(&self, what: &Outside) -> Result<(), Error> {
        match what.kind {
            KIND => self.remove_container(&what.name).await,
            _ => image::remove(&self.client, &what.name).await,
        }
    }

    async fn start(&self, dir: &MachineDir, spec: &MachineSpec) -> Result<Process, Error> {
        tap::refuse(NAME, spec)?;
        let (docker, dir, spec) = (self.clone(), dir.clone(), spec.clone());
        let started = tokio::spawn(async move { docker.start_now(&dir, &spec).await });
        started.await.expect("starting a container does not panic")
    }

    async fn adopt(&self, dir: &MachineDir) -> Result<Adopted, Error> {
        let Some(run) = read_json::<Run>(&dir.file(MachineDir::CONTAINER)) else {
            return Ok(Adopted::Absent);
        };
        let unknown = |reason: String| Ok(Adopted::Unknown { reason });
        match inspect(&self.client, &run.container).await {
            Err(error) => unknown(error.to_string()),
            Ok(None) => Ok(Adopted::Exited(container::lost(dir))),
            Ok(Some(seen)) if seen.machine.as_ref() != Some(&run.machine) => {
                unknown("its container carries another machine's label".to_owned())
            }
            Ok(Some(seen)) if seen.running => {
                Ok(Adopted::Running(self.process(dir, run, seen.pid)))
            }
            // Its server died before the start.
            Ok(Some(seen)) if seen.started_at == run.before => Ok(Adopted::Absent),
            // Also reads what it said in the end.
            Ok(Some(_)) => Ok(Adopted::Exited(self.process(dir, run, 0).wait().await)),
        }
    }

    async fn stop(&self, dir: &MachineDir) -> Result<(), Error> {
        let seen = self.running(dir).await?;
        let options = KillContainerOptions {
            signal: "SIGTERM".to_owned(),
        };
        let engine = self.client.engine().await?;
        asked("stop", engine.kill_container(&seen.id, Some(options))).await
    }

    async fn kill(&self, dir: &MachineDir) -> Result<(), Error> {
        process::end(dir, self.adopt(dir).await?).await
    }

    async fn pause(&self, dir: &MachineDir) -> Result<(), Error> {
        let seen = self.running(dir).await?;
        let engine = self.client.engine().await?;
        match seen.paused {
            true => Ok(()),
            false => asked("pause", engine.pause_container(&seen.id)).await,
        }
    }

    async fn resume(&self, dir: &MachineDir) -> Result<(), Error> {
        let seen = self.running(dir).await?;
        let engine = self.client.engine().await?;
        match seen.paused {
            true => asked("resume", engine.unpause_container(&seen.id)).await,
            false => Ok(()),
        }
    }

    async fn channel(&self, dir: &MachineDir) -> Result<Channel, Error> {
        let stream = dir.connect_in(MachineDir::VMM, SOCKET).await?;
        Ok(Channel::Connection(Box::new(stream)))
    }
}
