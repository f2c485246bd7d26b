//! One server on a directory of its own.
//!
//! ```text
//! /tmp/hutch-lab-PID-N/     short, for sockets, and passable, for VMMs with users of their own
//!   bin/                    the programs under test, linked: a rebuild does not change them
//!   data/                   the server's data directory
//!   home/ server.log
//! ```

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use hutch_contract::client::{Client, Error, Target, Until};
use hutch_contract::exec::{Exec, ExecResult};
use hutch_contract::image::{BootstrapImage, Image, ImportFormat};
use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::operation::{Operation, OperationState};
use hutch_engine::Item;
use rustix::process::Signal;
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::program::{self, Ran};
use crate::raw::{self, Answer};
use crate::world::World;
use crate::{cache_dir, docker, host};

/// No wait of the harness is longer. Emulated guests on a busy machine are slow.
const LIMIT: Duration = Duration::from_secs(300);
/// Prefix of the directories, by which those of killed tests are found.
const PREFIX: &str = "hutch-lab-";

/// Ports of the host that a lab has to itself, and how many of them its server may give to machines.
const BLOCK: u16 = 64;
const GIVEN: u16 = 32;

/// What runs a lab's machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// A process that behaves like a VMM.
    Stub,
    /// Real guests.
    Qemu,
    /// Real guests, on KVM alone.
    Firecracker,
    /// Real guests, on KVM alone.
    CloudHypervisor,
    /// Containers.
    Docker,
}

impl Runtime {
    /// The word for it in the API.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Stub => "stub",
            Runtime::Qemu => "qemu",
            Runtime::Firecracker => "firecracker",
            Runtime::CloudHypervisor => "cloud-hypervisor",
            Runtime::Docker => "docker",
        }
    }

    /// The runtime of this name.
    pub fn named(name: &str) -> Option<Runtime> {
        let all = [
            Self::Stub,
            Self::Qemu,
            Self::Firecracker,
            Self::CloudHypervisor,
        ];
        all.into_iter().find(|runtime| runtime.name() == name)
    }

    /// Why tests cannot use it here.
    pub fn missing(self) -> Option<String> {
        if !Path::new("/bin/busybox").exists() {
            return Some("busybox is not installed, so there is no image".to_owned());
        }
        match self {
            Runtime::Qemu if host::qemu().is_none() => Some("qemu is not installed".to_owned()),
            Runtime::Stub | Runtime::Qemu => None,
            Runtime::Firecracker | Runtime::CloudHypervisor => {
                let name = self.name();
                if host::program(name).is_none() {
                    Some(format!("{name} is not installed"))
                } else if !host::has_virtualization() {
                    Some(format!("{name} needs KVM; `cargo xtask lab` has it"))
                } else {
                    None
                }
            }
            Runtime::Docker if docker::socket().is_none() => Some(
                "there is no Docker engine for tests (its socket in HUTCH_TEST_DOCKER)".to_owned(),
            ),
            Runtime::Docker => None,
        }
    }
}

/// A server and its directory. Call [`Lab::finish`] at the end of a test; a lab that is dropped before ends all that it
/// started, too.
pub struct Lab {
    /// Its directory.
    pub dir: PathBuf,
    /// What runs its machines.
    pub runtime: Runtime,
    /// The first of its own ports of the host.
    ports: u16,
    env: Vec<(String, String)>,
    user: Option<u32>,
    world: Option<Arc<World>>,
    server: Option<Child>,
}

impl Lab {
    /// A directory and programs; no server yet.
    pub fn new(runtime: Runtime) -> Lab {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let (pid, n) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("{PREFIX}{pid}-{n}"));
        for dir in [
            dir.clone(),
            dir.join("bin"),
            dir.join("bin/guest"),
            dir.join("home"),
        ] {
            fs::create_dir(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let built = programs();
        for program in ["hutch", "hutch-stub-vmm", "guest/hutch-agent"] {
            let (from, to) = (built.join(program), dir.join("bin").join(program));
            if !from.exists() && program == "hutch-stub-vmm" && runtime != Runtime::Stub {
                continue;
            }
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(&from, &to).unwrap_or_else(|error| {
                    panic!("{}: {error}; `cargo xtask build` makes it", from.display())
                });
            }
        }
        let stub = dir.join("bin/hutch-stub-vmm");
        let lab = Lab {
            dir,
            runtime,
            ports: block(n),
            env: Vec::new(),
            user: None,
            world: None,
            server: None,
        };
        let first = lab.ports;
        // Never the host's own engine.
        let socket = docker::socket().unwrap_or_else(|| "/nonexistent/docker.sock".into());
        lab.env("HUTCH_RUNTIME_DEFAULT", runtime.name())
            .env("HUTCH_RUNTIME_DOCKER_SOCKET", &socket)
            .env("HUTCH_RUNTIME_PROGRAMS_STUB", stub.to_str().unwrap())
            .env("HUTCH_CACHE_DIR", cache_dir().to_str().unwrap())
            .env("HUTCH_LISTEN", "127.0.0.1:0")
            // The host's own network is left alone.
            .env("HUTCH_NETWORK_MODE", "none")
            // Nor is anything mounted on it.
            .env("HUTCH_DISK_POOL", "off")
            .env("HUTCH_HTTP_LISTEN", &format!("127.0.0.1:{first}"))
            .env("PORT_MIN", &(first + 1).to_string())
            .env("PORT_MAX", &(first + GIVEN).to_string())
            .env("HUTCH_LOG", "info,hutch_engine=debug")
    }

    /// Changes the environment of server and command line. See `default.toml` for the names.
    pub fn env(mut self, name: &str, value: &str) -> Lab {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The server is on the host of this world, and its machines' network is routed there.
    pub fn inside(mut self, world: &Arc<World>) -> Lab {
        self.world = Some(world.clone());
        self.env("HUTCH_NETWORK_MODE", "routed")
    }

    /// Everything runs as this user, who has a home, a cache and nothing else. Only root can do this.
    pub fn user(mut self, uid: u32) -> Lab {
        self.user = Some(uid);
        let cache = self.dir.join("home/.cache/hutch");
        fs::create_dir_all(&cache).unwrap();
        // What is there already is not downloaded once more.
        for part in ["boot", "distribution", "kernels"] {
            let from = cache_dir().join(part);
            if !from.exists() {
                continue;
            }
            let copy = std::process::Command::new("cp")
                .arg("-r")
                .arg(from)
                .arg(&cache)
                .status();
            assert!(copy.unwrap().success());
        }
        let data = self.data_dir();
        fs::create_dir(&data).unwrap();
        let owner = format!("{uid}:{uid}");
        let mut chown = std::process::Command::new("chown");
        let given = chown
            .args(["-R", &owner])
            .arg(self.dir.join("home"))
            .arg(data)
            .status();
        assert!(given.unwrap().success());
        let cache = cache.to_str().unwrap().to_owned();
        self.env("HUTCH_CACHE_DIR", &cache)
    }

    /// With a stub that misbehaves: see `crates/runtime/src/stub/vmm.rs` for the words.
    pub fn misbehaving(self, behaviour: &str) -> Lab {
        let dir = self.dir.join("odd");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("stub.json"), behaviour).unwrap();
        let script = dir.join("vmm");
        let (place, program) = (dir.display(), self.dir.join("bin/hutch-stub-vmm"));
        let text = format!(
            "#!/bin/sh\ncd {place} && exec {} \"$@\"\n",
            program.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        self.env("HUTCH_RUNTIME_PROGRAMS_STUB", script.to_str().unwrap())
    }

    /// Starts the server.
    pub async fn start(mut self) -> Lab {
        self.restart().await;
        self
    }

    /// Starts the server, again after [`Lab::kill`] or [`Lab::stop`].
    pub async fn restart(&mut self) {
        assert!(self.server.is_none(), "the lab's server runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("server.log"))
            .unwrap();
        let mut serve = self.command(&["serve"]);
        serve
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true);
        let mut server = self.spawn(serve);
        let start = Instant::now();
        loop {
            if self.client().health().await.is_ok() {
                break;
            }
            if let Some(status) = server.try_wait().unwrap() {
                panic!("the server ended: {status}\n{}", self.log());
            }
            assert!(
                start.elapsed() < LIMIT,
                "the server does not answer\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.server = Some(server);
    }

    /// What a server says that does not start.
    pub async fn refused(&self) -> String {
        let mut serve = self.command(&["serve"]);
        serve
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let serve = self.spawn(serve);
        let ended = tokio::time::timeout(LIMIT, serve.wait_with_output()).await;
        let ended = ended.expect("the server ends").unwrap();
        assert!(!ended.status.success(), "the server started");
        String::from_utf8_lossy(&ended.stderr).into_owned()
    }

    /// Starts a program on the host of the lab's world.
    fn spawn(&self, mut program: Command) -> Child {
        match &self.world {
            None => program.spawn().unwrap(),
            Some(world) => {
                let runtime = tokio::runtime::Handle::current();
                world.on_host(|| {
                    let _runtime = runtime.enter();
                    program.spawn().unwrap()
                })
            }
        }
    }

    /// Kills the server at once, as a crash does.
    pub async fn kill(&mut self) {
        let mut server = self.server.take().expect("the lab's server runs");
        server.kill().await.unwrap();
    }

    /// Asks the server to end.
    pub async fn stop(&mut self) {
        let mut server = self.server.take().expect("the lab's server runs");
        host::kill(server.id().unwrap().try_into().unwrap(), Signal::TERM);
        let ended = tokio::time::timeout(LIMIT, server.wait())
            .await
            .expect("the server ends");
        assert!(ended.unwrap().success(), "{}", self.log());
    }

    /// Stops the server's execution, or lets it go on: meanwhile guests and tests have each other to themselves.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        host::kill(self.server_pid().try_into().unwrap(), signal);
    }

    /// Process id of the server.
    pub fn server_pid(&self) -> u32 {
        self.server
            .as_ref()
            .and_then(Child::id)
            .expect("the lab's server runs")
    }

    /// Where HTTP for machines comes in; the same after a restart.
    pub fn gateway(&self) -> u16 {
        self.ports
    }

    /// The `n`th port of the host that no other lab uses, nor this one's server by itself.
    pub fn port(&self, n: u16) -> u16 {
        assert!(n < BLOCK - GIVEN - 1, "a lab has no more ports");
        self.ports + GIVEN + 1 + n
    }

    /// Where machines and images are.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The directory of a machine.
    pub fn machine_dir(&self, machine: &Machine) -> PathBuf {
        self.data_dir().join("machines").join(machine.id.as_str())
    }

    /// What the server said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("server.log")).unwrap_or_default()
    }

    /// A client over the server's socket.
    pub fn client(&self) -> Client {
        Client::new(Target::Unix(self.data_dir().join("hutch.sock"))).unwrap()
    }

    /// A request by hand.
    pub async fn raw(&self, method: &str, path: &str, body: &str) -> Answer {
        raw::request(&self.data_dir().join("hutch.sock"), method, path, body).await
    }

    /// `hutch` with these arguments, for this lab's server.
    fn command(&self, arguments: &[&str]) -> Command {
        let hutch = self.dir.join("bin/hutch");
        let mut command = match self.user {
            None => Command::new(hutch),
            Some(uid) => {
                let mut command = Command::new("setpriv");
                let id = uid.to_string();
                command.args([
                    "--reuid",
                    &id,
                    "--regid",
                    &id,
                    "--clear-groups",
                    "--no-new-privs",
                ]);
                command.arg("--inh-caps=-all").arg(hutch);
                command
            }
        };
        command
            .args(arguments)
            .current_dir(self.dir.join("home"))
            .env_clear();
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        command
            .env("HOME", self.dir.join("home"))
            .env("HUTCH_DATA_DIR", self.data_dir());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `hutch` to its end.
    pub async fn hutch(&self, arguments: &[&str]) -> Ran {
        program::run(self.command(arguments), LIMIT).await
    }

    /// Makes the image `busybox`.
    pub async fn busybox(&self) -> Image {
        let wanted = BootstrapImage {
            distribution: "busybox".to_owned(),
            suite: None,
            name: None,
        };
        let accepted = self.client().bootstrap_image(&wanted).await.unwrap();
        let ended = self.operation(accepted.operation.as_str()).await;
        assert_eq!(ended.state, OperationState::Succeeded, "{}", self.log());
        self.client().image(&ended.target).await.unwrap()
    }

    /// Imports a tar; what became of it.
    pub async fn import(&self, name: &str, tar: Vec<u8>) -> Result<Operation, Error> {
        let size = tar.len() as u64;
        let chunks: Vec<_> = tar
            .chunks(64 << 10)
            .map(Bytes::copy_from_slice)
            .map(Ok)
            .collect();
        let body = futures::stream::iter(chunks).boxed();
        let name = name.parse().unwrap();
        let accepted = self
            .client()
            .import_image(&name, ImportFormat::Tar, Some(size), body)
            .await?;
        Ok(self.operation(accepted.operation.as_str()).await)
    }

    /// Waits for the end of an operation.
    pub async fn operation(&self, id: &str) -> Operation {
        let (client, id, start) = (self.client(), id.parse().unwrap(), Instant::now());
        loop {
            let found = client.operation(&id).await.unwrap();
            if !matches!(found.state, OperationState::Running { .. }) {
                return found;
            }
            assert!(start.elapsed() < LIMIT, "{found:?}");
            drop(
                client
                    .wait_operation(&id, found.version, Duration::from_secs(10))
                    .await,
            );
        }
    }

    /// What a test asks for when it asks for a machine: small, of busybox.
    pub fn request(&self, name: &str) -> CreateMachine {
        CreateMachine {
            image: "busybox".to_owned(),
            name: Some(name.parse().unwrap()),
            memory_mib: Some(128),
            disk_gib: Some(1),
            cold: true,
            ..CreateMachine::default()
        }
    }

    /// Makes a machine of busybox and waits until it runs.
    pub async fn create(&self, name: &str) -> Machine {
        let created = self
            .client()
            .create(&self.request(name), None, Some(LIMIT))
            .await;
        created.unwrap_or_else(|error| panic!("{error}: {:?}\n{}", error.hint(), self.log()))
    }

    /// Waits for a state.
    pub async fn wait(&self, machine: &str, status: Status) -> Machine {
        let waited = self
            .client()
            .wait(machine, Until::Status(status), LIMIT)
            .await;
        waited
            .unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
            .expect("it is not deleted")
    }

    /// Runs a script in a machine.
    pub async fn sh(&self, machine: &str, script: &str) -> ExecResult {
        let exec = Exec {
            command: ["sh", "-c", script].map(str::to_owned).into(),
            env: Default::default(),
            cwd: None,
            user: None,
            stdin_base64: None,
            timeout_ms: Some(280_000),
        };
        let ran = self.client().exec(machine, &exec).await;
        ran.unwrap_or_else(|error| panic!("{script}: {error}\n{}", self.log()))
    }

    /// The id that the guest's kernel drew when it booted; with the stub that of the host.
    pub async fn boot_id(&self, machine: &str) -> String {
        let read = self
            .sh(machine, "cat /proc/sys/kernel/random/boot_id")
            .await;
        assert_eq!(read.exit.exit_code, 0, "{read:?}");
        read.stdout
    }

    /// Process id of a machine's VMM, or of the first process of its container.
    pub fn vmm_pid(&self, machine: &Machine) -> i32 {
        if self.runtime == Runtime::Docker {
            return docker::pid(machine.id.as_str());
        }
        let text = fs::read(self.machine_dir(machine).join("run/shim.json")).unwrap();
        let record: Value = serde_json::from_slice(&text).unwrap();
        record["vmm"]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// Ends a machine's VMM from outside, as a crash of it does.
    pub fn kill_vmm(&self, machine: &Machine) {
        host::kill(self.vmm_pid(machine), Signal::KILL);
    }

    /// What the server has outside of its store, as text.
    pub fn inventory(&self) -> Vec<String> {
        let items = self.items().into_iter().map(in_words);
        items.chain(self.containers()).collect()
    }

    /// The same without what a server has as long as it runs.
    pub fn machines_leave(&self) -> Vec<String> {
        let items = self.items().into_iter();
        let items = items.filter(|item| !item.is_of_the_server()).map(in_words);
        items.chain(self.containers()).collect()
    }

    fn items(&self) -> Vec<Item> {
        let list = || hutch_engine::inventory(&self.data_dir()).unwrap();
        match &self.world {
            None => list(),
            Some(world) => world.on_host(list),
        }
    }

    fn containers(&self) -> Vec<String> {
        match self.runtime {
            Runtime::Docker => {
                let tags = self.tags();
                tags.iter().flat_map(|tag| docker::all_of(tag)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The tag that the server put on what it has outside of its directory: it says so when it starts.
    fn tags(&self) -> std::collections::BTreeSet<String> {
        let log = self.log();
        let said = log.split("tag=\"").skip(1);
        said.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()))
            .collect()
    }

    /// Deletes everything through the API, ends the server, and looks whether anything is left.
    pub async fn finish(mut self) {
        if self.server.is_none() {
            self.restart().await;
        }
        let client = self.client();
        for machine in client.all_machines(None).await.unwrap() {
            let gone = client.delete(machine.id.as_str(), Some(LIMIT)).await;
            gone.unwrap_or_else(|error| panic!("delete {machine:?}: {error}\n{}", self.log()));
        }
        for image in client.all_images().await.unwrap() {
            client.delete_image(image.id.as_str()).await.unwrap();
        }
        self.nothing_left().await;
        self.stop().await;
        assert_eq!(self.inventory(), [""; 0], "left behind\n{}", self.log());
        assert_eq!(
            processes_of(&self.dir),
            [""; 0],
            "still running\n{}",
            self.log()
        );
        assert!(!self.log().contains("panicked at"), "{}", self.log());
    }

    /// Waits until there is nothing but the store and the server itself. A VMM's last process may take a moment to be
    /// gone.
    pub async fn nothing_left(&self) {
        let empty = async || self.machines_leave().is_empty();
        host::wait_until("inventory() is empty", Duration::from_secs(30), empty).await;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- server.log\n{}", self.log());
        }
        if let Some(pid) = self.server.take().and_then(|server| server.id()) {
            host::kill(pid.try_into().unwrap(), Signal::KILL);
        }
        if self.runtime == Runtime::Docker {
            self.tags().iter().for_each(|tag| docker::remove_all(tag));
        }
        host::clear(&self.dir);
    }
}

/// Ports for the `n`th lab of this process, below those that the system gives out by itself: labs of processes that run
/// at the same time have others, as their process ids are near each other.
fn block(n: u32) -> u16 {
    let blocks = 10_000..(32_000 - BLOCK);
    let count = u32::from((blocks.end - blocks.start) / BLOCK);
    let at = |block: u32| blocks.start + u16::try_from(block % count).unwrap() * BLOCK;
    let first = std::process::id() + n;
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut all = (first..first + count).map(at);
    all.find(free).expect("some ports are free")
}

fn in_words(item: Item) -> String {
    format!("{} {}", item.kind, item.name)
}

fn processes_of(dir: &Path) -> Vec<String> {
    let shown = |pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    host::processes_below(dir)
        .into_iter()
        .map(|pid| format!("{pid} {}", shown(pid)))
        .collect()
}

/// Where the programs under test are: in `HUTCH_TEST_PROGRAMS`, else beside this test.
pub fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("HUTCH_TEST_PROGRAMS") {
        return dir.into();
    }
    let test = std::env::current_exe().unwrap();
    let dir = test.ancestors().find(|dir| dir.join("hutch").is_file());
    dir.expect("`cargo xtask build` was run").to_owned()
}

/// Clears what tests left that were killed.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let owner = rest.split('-').next().unwrap_or_default();
        // Only root sees what ordinary users left, and only what is ours to remove is removed.
        let dead = !Path::new("/proc").join(owner).exists();
        let ours = entry.metadata().is_ok_and(|metadata| {
            std::os::unix::fs::MetadataExt::uid(&metadata) == rustix::process::geteuid().as_raw()
        });
        if dead && ours && !owner.is_empty() {
            host::clear(&entry.path());
        }
    }
}

/// Starts a lab, or ends the test when it cannot.
#[macro_export]
macro_rules! lab {
    ($runtime:expr) => {{
        if let Some(why) = $runtime.missing() {
            $crate::skip!("{why}");
        }
        $crate::Lab::new($runtime)
    }};
}
