//! Machines for tests: their directories, their guests, and what the kernel says about their processes.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use hutch_runtime::cgroup;
use hutch_runtime::ring::{Follower, RingReader};
use hutch_runtime::table::Runtimes;
use hutch_runtime::{
    Adopted, Channel, Error, MachineDir, MachineSpec, Nic, Runtime, RuntimeConfig, User,
};
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::initramfs;

/// Far longer than anything takes here; a test that waits this long has failed.
pub const GENEROUS: Duration = Duration::from_secs(50);
/// Guests fill it byte by byte, which takes long where virtualization is emulated.
pub const CONSOLE_BYTES: u64 = 4 * 1024;
const STUB_PROGRAM: &str = env!("CARGO_BIN_EXE_hutch-stub-vmm");

/// A machine that ends with the test.
pub struct Lab {
    pub runtime: Arc<dyn Runtime>,
    pub dir: MachineDir,
    pub spec: MachineSpec,
    /// Dropped after the machine.
    _files: tempfile::TempDir,
}

/// All runtimes, as a server of these tests has them.
pub fn runtimes() -> Runtimes {
    Runtimes::new(config)
}

/// The configuration of a runtime in these tests.
pub fn config(name: &str) -> RuntimeConfig {
    RuntimeConfig {
        launcher: STUB_PROGRAM.into(),
        program: (name == "stub").then(|| STUB_PROGRAM.into()),
        // In a container the stub's guest is the agent.
        agent: STUB_PROGRAM.into(),
        docker_socket: docker_socket(),
        console_bytes: CONSOLE_BYTES,
        ..RuntimeConfig::default()
    }
}

/// A runtime whose configuration is changed.
pub fn runtime_with(name: &str, change: impl FnOnce(&mut RuntimeConfig)) -> Arc<dyn Runtime> {
    let mut changed = config(name);
    change(&mut changed);
    let runtimes = Runtimes::new(|_| changed.clone());
    runtimes.get(name).unwrap().clone()
}

/// The engine that `cargo xtask test` has started for these tests.
pub fn docker_socket() -> Option<PathBuf> {
    std::env::var_os("HUTCH_TEST_DOCKER").map(PathBuf::from)
}

/// A runtime as a server has it whose machine is in that directory.
pub fn runtime(name: &str, dir: &MachineDir) -> Arc<dyn Runtime> {
    if name != "virtualbox" {
        return runtimes().get(name).unwrap().clone();
    }
    let beside = |name: &str| dir.path().with_file_name(name);
    runtime_with(name, |config| {
        config.program = Some(beside("programs").join("VBoxManage"));
        config.base = Some("debian base@clean".into());
        let home = beside("virtualbox").display().to_string();
        config.environment = [("VBOX_USER_HOME".into(), home)].into();
    })
}

impl Lab {
    /// A machine whose guest reads lines. `None`, with words, where `runtime` lacks something.
    pub async fn new(name: &str) -> Option<Self> {
        let lab = Self::bare(name);
        let (runtime, dir) = (&lab.runtime, &lab.dir);
        if name == "virtualbox" {
            // The guest of what stands for VirtualBox is QEMU's.
            let qemu = self::runtime("qemu", dir).probe().await.usable;
            let Some(boot) = initramfs::boot_set("/dev/ttyS0").filter(|_| qemu) else {
                println!(
                    "skipped: QEMU, a kernel in HUTCH_TEST_KERNEL and its modules in HUTCH_TEST_MODULES are needed"
                );
                return None;
            };
            let guest = dir.path().with_file_name("virtualbox").join("guest");
            std::fs::create_dir(&guest).unwrap();
            std::fs::copy(boot.kernel, guest.join("kernel")).unwrap();
            std::fs::write(guest.join("initramfs"), &boot.initramfs).unwrap();
        } else if runtime.boots_kernel() {
            let info = runtime.probe().await;
            let wanted = |boot: initramfs::BootSet| {
                let is_elf = name == "firecracker";
                let kernel = if is_elf { boot.elf } else { boot.kernel };
                kernel.is_file().then_some((kernel, boot.initramfs))
            };
            let boot = initramfs::boot_set("/dev/vport*p1").and_then(wanted);
            let Some((kernel, initramfs)) = boot.filter(|_| info.usable) else {
                println!(
                    "skipped: {name} ({}), a kernel in HUTCH_TEST_KERNEL and its modules in HUTCH_TEST_MODULES are needed",
                    info.reason.as_deref().unwrap_or("installed")
                );
                return None;
            };
            std::fs::copy(kernel, dir.file(MachineDir::KERNEL)).unwrap();
            std::fs::write(dir.file(MachineDir::INITRAMFS), &initramfs).unwrap();
            let disk = std::fs::File::create(dir.file(MachineDir::DISK)).unwrap();
            disk.set_len(1 << 20).unwrap();
        } else if name == "docker" {
            docker_socket().or_else(|| {
                println!(
                    "skipped: an engine of ours is needed, with its socket in HUTCH_TEST_DOCKER"
                );
                None
            })?;
        } else {
            std::fs::write(dir.file("stub.json"), r#"{"agent": "lines"}"#).unwrap();
        }
        if name == "docker" {
            let image = crate::docker::layer(lab._files.path());
            let prepared = runtime.prepare(dir, &lab.spec, &image).await;
            prepared.unwrap();
        }
        Some(lab)
    }

    /// A machine whose directory is empty.
    pub fn bare(name: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        // Longer than the address of a socket may be.
        let path = files.path().join("m".repeat(120));
        // A VMM of another user may be a script in it.
        std::fs::set_permissions(files.path(), PermissionsExt::from_mode(0o711)).unwrap();
        std::fs::create_dir(&path).unwrap();
        let dir = MachineDir::new(path);
        if name == "virtualbox" {
            install_virtualbox(files.path());
        }
        let runtime = runtime(name, &dir);
        Self {
            runtime,
            dir,
            spec: spec(&label()),
            _files: files,
        }
    }

    /// The tag of the server whose machine it is.
    pub fn tag(&self) -> &str {
        self.spec.label[1..].split('-').next().unwrap()
    }

    /// Nothing of the machine is left but files: no process, no lock, no socket, no cgroup.
    pub async fn left_nothing(&self) {
        use std::os::unix::fs::FileTypeExt;
        let adopted = self.adopt().await;
        assert!(
            matches!(adopted, Adopted::Absent | Adopted::Exited(_)),
            "{adopted:?}"
        );
        let processes: Vec<_> = processes().filter(|pid| self.works_here(*pid)).collect();
        assert_eq!(processes, [0; 0], "still running");
        for dir in ["", "run", "run/vmm"] {
            let entries = std::fs::read_dir(self.dir.file(dir));
            for entry in entries.into_iter().flatten() {
                let entry = entry.unwrap();
                let is_socket = entry.file_type().unwrap().is_socket();
                assert!(!is_socket, "{} is left", entry.path().display());
            }
        }
        assert_eq!(cgroups_named(&self.spec.label), Vec::<PathBuf>::new());
    }

    fn works_here(&self, pid: u32) -> bool {
        let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"));
        alive(pid) && cwd.is_ok_and(|cwd| cwd.starts_with(self.dir.path()))
    }

    /// A machine of Firecracker in its jailer.
    pub async fn jailed() -> Option<Self> {
        let mut lab = Self::new("firecracker").await?;
        let program = lab.runtime.probe().await.path.unwrap();
        let jailer = Path::new(&program).with_file_name("jailer");
        if !jailer.is_file() || !is_root() {
            println!("skipped: {} and root are needed", jailer.display());
            return None;
        }
        let jailed = Runtimes::new(|_| RuntimeConfig {
            launcher: STUB_PROGRAM.into(),
            jailer: Some(jailer.clone()),
            console_bytes: CONSOLE_BYTES,
            ..RuntimeConfig::default()
        });
        lab.runtime = jailed.get("firecracker").unwrap().clone();
        Some(lab)
    }

    pub fn behave(&self, behaviour: &str) {
        std::fs::write(self.dir.file("stub.json"), behaviour).unwrap();
    }

    pub async fn start(&self) -> hutch_runtime::Process {
        self.runtime.start(&self.dir, &self.spec).await.unwrap()
    }

    pub async fn adopt(&self) -> Adopted {
        runtime(self.runtime.name(), &self.dir)
            .adopt(&self.dir)
            .await
            .unwrap()
    }

    /// A way to the guest, which may still be booting.
    pub async fn connect(&self) -> Guest {
        let opened = async {
            loop {
                match self.runtime.channel(&self.dir).await {
                    Ok(Channel::Wire(stream) | Channel::Connection(stream)) => return stream,
                    // Nobody listens in a guest that is still booting.
                    Err(Error::Timeout { .. } | Error::NotRunning { .. }) => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    Err(error) => panic!("{error}; {}", self.last_words()),
                }
            }
        };
        let Ok(stream) = tokio::time::timeout(GENEROUS, opened).await else {
            panic!("no channel; {}", self.last_words());
        };
        Guest(BufReader::new(stream))
    }

    /// A conversation with the guest, which may still be booting.
    pub async fn guest(&self) -> Guest {
        let mut guest = self.connect().await;
        // A guest that has not opened its end yet may lose what was sent before.
        let up = async {
            loop {
                guest.say("ping up").await;
                let answer = tokio::time::timeout(Duration::from_millis(500), guest.hear()).await;
                if answer.is_ok() {
                    return;
                }
            }
        };
        if tokio::time::timeout(GENEROUS, up).await.is_err() {
            panic!("no answer from the guest; {}", self.last_words());
        }
        // Behind all the answers to what was said too early.
        guest.ping("settled").await;
        guest
    }

    /// The console from `from` on until it contains `words`.
    pub async fn console_with(&self, from: u64, words: &str) -> String {
        let mut follower = Follower::open(self.dir.console(), from).unwrap();
        let mut text = Vec::new();
        let seen = async {
            while !String::from_utf8_lossy(&text).contains(words) {
                text.extend(follower.next(1 << 16).await.unwrap().bytes);
            }
        };
        tokio::time::timeout(GENEROUS, seen).await.expect(words);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The end of the console, for the message of a test that fails.
    pub fn last_words(&self) -> String {
        let ring = RingReader::open(&self.dir.console()).unwrap();
        String::from_utf8_lossy(&ring.tail(0, 4096).unwrap()).into_owned()
    }

    pub fn console_end(&self) -> u64 {
        RingReader::open(&self.dir.console())
            .unwrap()
            .end()
            .unwrap()
    }
}

/// The machine of this label.
pub fn spec(label: &str) -> MachineSpec {
    MachineSpec {
        id: format!("mch-{label}"),
        label: label.to_owned(),
        vcpu: 1,
        memory_mib: 128,
        kernel_args: Vec::new(),
        nic: Nic::Restricted,
        user: is_root().then_some(User {
            uid: 0x7000_0001,
            gid: 0x7000_0002,
        }),
    }
}

impl Drop for Lab {
    /// A machine whose test failed must not stay, whatever its record says: its shim has our lock for its input.
    fn drop(&mut self) {
        if self.runtime.name() == "docker" {
            docker_socket().inspect(|_| crate::docker::remove_all(self));
            return;
        }
        let lock = self.dir.file("run/lock");
        let holds = |pid: &u32| {
            let input = std::fs::read_link(format!("/proc/{pid}/fd/0"));
            input.is_ok_and(|input| input == lock)
        };
        for pid in processes().filter(holds) {
            let raw = Pid::from_raw(pid.try_into().unwrap()).unwrap();
            let _ = rustix::process::kill_process(raw, Signal::KILL);
            while alive(pid) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        cgroup::destroy(&self.spec.label).unwrap();
    }
}

/// Puts what stands for VirtualBox into a directory, under the names of its programs.
fn install_virtualbox(files: &Path) {
    std::fs::create_dir(files.join("programs")).unwrap();
    std::fs::create_dir(files.join("virtualbox")).unwrap();
    for name in ["VBoxManage", "VBoxHeadless"] {
        let program = files.join("programs").join(name);
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_hutch-stub-virtualbox"), program).unwrap();
    }
}

/// One for each machine of all tests that run at the same time.
fn label() -> String {
    static MACHINES: AtomicU16 = AtomicU16::new(0);
    let digit = |n: u32| char::from_digit(std::process::id() / n % 36, 36).unwrap();
    let tag: String = [36 * 36 * 36, 36 * 36, 36, 1].map(digit).iter().collect();
    format!("h{tag}-{}", MACHINES.fetch_add(1, Ordering::Relaxed))
}

pub struct Guest(BufReader<Box<dyn hutch_runtime::Stream>>);

impl Guest {
    pub async fn say(&mut self, line: &str) {
        let line = format!("{line}\n");
        self.0.write_all(line.as_bytes()).await.unwrap();
    }

    pub async fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        line.trim().to_owned()
    }

    /// Says a line and hears the answer to it.
    pub async fn ask(&mut self, line: &str) -> String {
        self.say(line).await;
        let answer = tokio::time::timeout(GENEROUS, self.hear()).await;
        answer.unwrap_or_else(|_| panic!("no answer to {line:?}"))
    }

    /// Asks for an echo, passing over older ones.
    pub async fn ping(&mut self, word: &str) {
        self.say(&format!("ping {word}")).await;
        let echoed = async { while self.hear().await != format!("pong {word}") {} };
        tokio::time::timeout(GENEROUS, echoed)
            .await
            .expect("an echo");
    }
}

/// An error with all that it rests on.
pub fn in_words(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let words: Vec<_> = sources.map(ToString::to_string).collect();
    words.join(": ")
}

fn processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name();
        name.to_str()?.parse::<u32>().ok()
    })
}

/// Where this host has a group of that name, in whatever hierarchy.
pub fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let roots = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
    let mut roots: Vec<_> = roots.map(|entry| entry.unwrap().path()).collect();
    roots.push("/sys/fs/cgroup".into());
    let groups = roots.iter().map(|root| root.join("hutch").join(name));
    groups.filter(|group| group.is_dir()).collect()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A line of `/proc/PID/status`.
pub fn status(pid: u32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap_or_else(|| panic!("{field}")).trim().to_owned()
}

/// Not even as a zombie of ours.
pub fn alive(pid: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

/// Number and target of each descriptor, made comparable.
pub fn descriptors(pid: u32) -> Vec<(u32, String)> {
    let dir = PathBuf::from(format!("/proc/{pid}/fd"));
    let mut all: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let target = std::fs::read_link(dir.join(&name)).ok()?;
            let target = target.to_string_lossy().into_owned();
            let kind = match target.split_once(":[") {
                Some((kind, _)) => kind.to_owned(),
                None => Path::new(&target)
                    .file_name()?
                    .to_string_lossy()
                    .into_owned(),
            };
            Some((name.parse().unwrap(), kind))
        })
        .collect();
    all.sort();
    all
}
