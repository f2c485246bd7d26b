//! A data directory with its engine, the words in which tests speak of it, and its end.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use hutch_contract::exec::{Exec, ExecResult};
use hutch_contract::id::OperationId;
use hutch_contract::image::ImportFormat;
use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::operation::OperationState;
use hutch_engine::{
    Engine, EngineConfig, Error, Item, Kernels, Mode, NetworkConfig, PoolMode, Principal, Reach,
    RuntimeOptions, Target, inventory,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A bound for broken code, not a measure.
pub const LONG: Duration = Duration::from_secs(60);

/// A place for engines, one after the other; gone with all that works in it.
pub struct Home(TempDir);

impl Home {
    /// `None`, loudly, when the programs of this build are not there.
    pub fn new() -> Option<Home> {
        for program in ["hutch-stub-vmm", "hutch-agent", "hutch-build-disk"] {
            if !programs().join(program).is_file() {
                eprintln!("skipped: {program} is not built; run `cargo xtask test`");
                return None;
            }
        }
        let home = Home(tempfile::tempdir().unwrap());
        // Machines are users of their own.
        mode(home.path(), 0o711);
        let at = |name: &str| programs().join(name).display().to_string();
        let launcher = format!(
            "#!/bin/sh\ncase $1 in shim) exec {} shim;; *) exec {} \"$@\";; esac\n",
            at("hutch-stub-vmm"),
            at("hutch-build-disk")
        );
        home.program("launcher", &launcher);
        Some(home)
    }

    /// A directory that machines may write to: the stub's guests see the host's files.
    pub fn shared(&self) -> String {
        let dir = self.path().join("shared");
        std::fs::create_dir(&dir).unwrap();
        mode(&dir, 0o777);
        dir.to_str().unwrap().to_owned()
    }

    /// A script that machines may run.
    pub fn program(&self, name: &str, script: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, script).unwrap();
        mode(&path, 0o755);
        path
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    pub fn config(&self) -> EngineConfig {
        EngineConfig {
            // The host's own network is left alone.
            network: NetworkConfig {
                mode: Mode::None,
                ..NetworkConfig::default()
            },
            data_dir: self.data(),
            cache_dir: self.path().join("cache"),
            launcher: self.path().join("launcher"),
            agent: programs().join("hutch-agent"),
            // Nothing here boots a kernel, and none must be downloaded.
            kernel: Some("/nowhere/kernel.deb".into()),
            kernels: Kernels::default(),
            runtime: Some("stub".into()),
            runtime_programs: BTreeMap::from([(
                "stub".to_owned(),
                programs().join("hutch-stub-vmm"),
            )]),
            acceleration: None,
            runtime_options: RuntimeOptions {
                // Never the host's own engine.
                docker_socket: Some("/nonexistent/docker.sock".into()),
                ..RuntimeOptions::default()
            },
            allow_emulation: true,
            max_machines: 100,
            memory_overcommit: 4,
            memory_floor_mib: 0,
            pool: PoolMode::Off,
            disk_reserve_mib: 0,
            image_max_bytes: 1 << 30,
            templates_max_mib: 1 << 10,
            console_bytes: 64 * 1024,
            boot_timeout_ms: 30_000,
            reach: Reach {
                ports: 22_001..=32_000,
                ports_bind: [127, 0, 0, 1].into(),
                urls: None,
            },
        }
    }

    /// What the engine of this place has on the host besides images. The stub's guest dies a moment after its VMM.
    pub fn left(&self) -> Vec<Item> {
        self.settle(0);
        let mut items = inventory(&self.data()).unwrap();
        items.retain(|item| item.kind != "image directory");
        items
    }

    /// Waits until so many processes work here; returns how many it are.
    pub fn settle(&self, wanted: usize) -> usize {
        let count = || {
            let items = inventory(&self.data()).unwrap();
            items.iter().filter(|item| item.kind == "process").count()
        };
        for _ in 0..400 {
            if count() == wanted {
                break;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        count()
    }
}

/// A test that fails leaves machines: whatever works here is ended. A start that was under way when its engine was
/// thrown away may come up a moment later, so it is looked at until nothing was there for a while.
impl Drop for Home {
    fn drop(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            let items = inventory(&self.data()).unwrap_or_default();
            let processes = items.iter().filter(|item| item.kind == "process");
            let pids = processes.filter_map(|item| Pid::from_raw(item.name.parse().ok()?));
            let ended = pids
                .filter(|pid| kill_process(*pid, Signal::KILL).is_ok())
                .count();
            for item in items.iter().filter(|item| item.kind == "cgroup") {
                drop(hutch_runtime::cgroup::destroy(&item.name));
            }
            quiet = if ended == 0 { quiet + 1 } else { 0 };
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Where the programs of this build are.
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().to_owned()
}

/// An engine at work, with an image `tiny`.
pub struct Lab {
    pub engine: Engine,
    pub who: Principal,
    pub home: Home,
}

impl Lab {
    pub async fn new() -> Option<Lab> {
        Lab::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut EngineConfig)) -> Option<Lab> {
        let home = Home::new()?;
        let mut config = home.config();
        change(&mut config);
        let engine = Engine::open(config).await.unwrap();
        let lab = Lab::of(home, engine);
        assert_eq!(lab.import("tiny", tiny()).await, OperationState::Succeeded);
        Some(lab)
    }

    pub fn of(home: Home, engine: Engine) -> Lab {
        let who = engine.local_admin();
        Lab { engine, who, home }
    }

    /// Imports a tar, and says how that ended.
    pub async fn import(&self, name: &str, tar: Vec<u8>) -> OperationState {
        let (name, body) = (name.parse().unwrap(), body(tar));
        let accepted = self
            .engine
            .import_image(&self.who, name, ImportFormat::Tar, body)
            .await
            .unwrap();
        self.ended(&accepted.operation).await
    }

    /// How an operation ended, once it has.
    pub async fn ended(&self, id: &OperationId) -> OperationState {
        let mut version = 0;
        loop {
            let waited = self.engine.wait_operation(&self.who, id, version, LONG);
            let operation = waited.await.unwrap();
            match operation.state {
                OperationState::Running { .. } => version = operation.version,
                ended => return ended,
            }
        }
    }

    pub async fn create(&self, name: &str) -> Result<Machine, Error> {
        let admitted = self.engine.create(&self.who, spec(name), None).await?;
        Ok(admitted.machine)
    }

    pub async fn wait(&self, name: &str, status: Status) -> Result<Machine, Error> {
        let target = Target::Status(status);
        let machine = self.engine.wait(&self.who, name, target, LONG).await?;
        Ok(machine.unwrap())
    }

    pub async fn running(&self, name: &str) -> Machine {
        self.create(name).await.unwrap();
        self.wait(name, Status::Running).await.unwrap()
    }

    /// A machine that is stopped, and will behave so when it is started.
    pub async fn stopped(&self, name: &str, behaviour: &str) -> Machine {
        self.running(name).await;
        self.engine.stop(&self.who, name).await.unwrap();
        let machine = self.wait(name, Status::Stopped).await.unwrap();
        std::fs::write(self.dir(&machine).join("stub.json"), behaviour).unwrap();
        machine
    }

    pub async fn start(&self, name: &str) -> Machine {
        self.engine.start(&self.who, name).await.unwrap()
    }

    pub async fn stop(&self, name: &str) -> Machine {
        self.engine.stop(&self.who, name).await.unwrap()
    }

    pub async fn restart(&self, name: &str) -> Machine {
        self.engine.restart(&self.who, name).await.unwrap()
    }

    /// Deletes it and waits until it is gone.
    pub async fn delete(&self, name: &str) {
        let machine = self.engine.delete(&self.who, name).await.unwrap();
        let gone = self
            .engine
            .wait(&self.who, machine.id.as_str(), Target::Gone, LONG);
        assert_eq!(gone.await.unwrap(), None);
    }

    pub fn now(&self, name: &str) -> Machine {
        self.engine.machine(&self.who, name).unwrap()
    }

    pub async fn sh(&self, name: &str, script: &str) -> Result<ExecResult, Error> {
        self.engine.exec_blocking(&self.who, name, sh(script)).await
    }

    pub fn dir(&self, machine: &Machine) -> PathBuf {
        self.home.data().join("machines").join(machine.id.as_str())
    }

    /// The pid of its VMM, or of its `shim`.
    pub fn pid(&self, machine: &Machine, which: &str) -> Pid {
        let text = std::fs::read(self.dir(machine).join("run/shim.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
        Pid::from_raw(record[which]["pid"].as_i64().unwrap().try_into().unwrap()).unwrap()
    }
}

pub fn sh(script: &str) -> Exec {
    serde_json::from_value(serde_json::json!({ "command": ["/bin/sh", "-c", script] })).unwrap()
}

pub fn spec(name: &str) -> CreateMachine {
    serde_json::from_value(
        serde_json::json!({ "image": "tiny", "name": name, "memory_mib": 128, "disk_gib": 1 }),
    )
    .unwrap()
}

/// The smallest root that there is.
pub fn tiny() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(6);
    header.set_mode(0o644);
    tar.append_data(&mut header, "etc/hello", &b"hello\n"[..])
        .unwrap();
    tar.into_inner().unwrap()
}

pub fn body(bytes: Vec<u8>) -> futures::stream::BoxStream<'static, std::io::Result<Bytes>> {
    futures::stream::iter([Ok(Bytes::from(bytes))]).boxed()
}
