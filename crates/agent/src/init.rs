//! PID 1 of our initramfs: mounts, loads modules, switches to the machine's root, then looks after the agent.
//!
//! It stays small and has no runtime: when it dies, the kernel panics. A boot that fails says why in one line on the
//! console and powers off, so that the host sees an exit and a reason instead of a machine that never answers.
//! With an init of the image's as PID 1, the same boot would end in executing it, and [`supervise`] go on beside it.

mod disk;
mod root;
mod supervise;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit};
use rustix::system::RebootCommand;

use crate::agent::NONCE;
use crate::error::{Context, Result, chain, say};
use crate::params::Boot;

/// The modules to load, one path a line, in order.
const MODULES: &str = "/modules";
/// `MODULE_INIT_COMPRESSED_FILE` of `linux/module.h`.
const COMPRESSED: i32 = 4;
/// Open files of processes, soft and hard, as systemd sets them.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

/// That only a reset ends the VMM: what it would take for a power-off is a guest that halts for ever.
static RESETS: AtomicBool = AtomicBool::new(false);

/// Whether this process is the one that boots the machine.
pub fn is_wanted() -> bool {
    std::process::id() == 1 && Path::new(MODULES).exists()
}

/// Boots, and looks after the agent until the machine is to end.
pub fn run() -> ! {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("boot: {panic}"));
        power_off();
    }));
    let _ = rustix::thread::set_name(c"hutch-init");
    match boot() {
        Ok(end) => supervise::end(end),
        Err(error) => {
            say(&format!("boot: {}", chain(&error)));
            power_off();
        }
    }
}

fn boot() -> Result<supervise::End> {
    early_mounts()?;
    let cmdline = fs::read_to_string("/proc/cmdline").path("read", "/proc/cmdline")?;
    // First, since this decides how a boot ends whose parameters are refused.
    RESETS.store(Boot::resets(&cmdline), Ordering::Relaxed);
    let boot = Boot::parse(&cmdline)?;
    let modules = load_modules()?;
    let disks = disk::find(&boot, &modules)?;
    let root = root::mount_root(&disks)?;
    root::switch(root)?;
    let _ = rustix::process::setrlimit(Resource::Nofile, OPEN_FILES);
    // The kernel's ctrl-alt-del becomes a SIGINT for us.
    let _ = rustix::system::reboot(RebootCommand::CadOff);
    supervise::run(&boot, &new_state()?)
}

/// What the boot itself needs. The root disk's own directories come later.
fn early_mounts() -> Result<()> {
    let mounts = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];
    for (kind, target) in mounts {
        match fs::create_dir(target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).path("make directory", target);
            }
            _ => {}
        }
        let flags = match kind {
            "devtmpfs" => MountFlags::NOSUID,
            _ => MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        };
        match mount(kind, target, kind, flags, None) {
            Err(Errno::BUSY) => {}
            result => result.path("mount", target)?,
        }
        if kind == "devtmpfs" {
            open_console();
        }
    }
    Ok(())
}

/// The kernel opens the console for us only where the initramfs itself holds its node.
fn open_console() {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    if let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// What became of the modules.
#[derive(Default)]
struct Modules {
    listed: usize,
    refused: usize,
    /// The first one that did not load, and why.
    first: Option<String>,
}

/// Loads what is listed. A module that does not load is said and passed over: what it was for may be built in, and
/// whether it was needed shows soon.
fn load_modules() -> Result<Modules> {
    let list = fs::read_to_string(MODULES).path("read", MODULES)?;
    let mut modules = Modules::default();
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        modules.listed += 1;
        let file = File::open(path).path("open", path)?;
        let is_plain = Path::new(path)
            .extension()
            .is_some_and(|extension| extension == "ko");
        let flags = if is_plain { 0 } else { COMPRESSED };
        match rustix::system::finit_module(file, c"", flags) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                let refusal = format!("{path}: {}", io::Error::from(errno));
                say(&format!("load {refusal}"));
                modules.refused += 1;
                modules.first.get_or_insert(refusal);
            }
        }
    }
    Ok(modules)
}

/// What outlives an agent: a memory file with the boot nonce, which each agent finds as its standard input.
fn new_state() -> Result<File> {
    use rustix::rand::{GetRandomFlags, getrandom};
    let mut nonce = [0; NONCE];
    // A boot does not wait for entropy: the nonce must differ, not be secret.
    getrandom(&mut nonce, GetRandomFlags::INSECURE).what("draw a nonce")?;
    let state = rustix::fs::memfd_create("hutch-state", MemfdFlags::CLOEXEC);
    let state = File::from(state.what("make the state")?);
    std::os::unix::fs::FileExt::write_all_at(&state, &nonce, 0).what("write the state")?;
    Ok(state)
}

/// Says how the machine is about to end: where a VMM has one way to end, the host tells by these words what was meant.
fn last_word(word: &str) {
    say(word);
    // What is still in the line's buffer at the end is lost.
    let _ = rustix::termios::tcdrain(rustix::stdio::stderr());
}

/// Ends the machine. Should the kernel refuse, waiting is better than the panic that returning would be.
fn power_off() -> ! {
    rustix::fs::sync();
    let command = match RESETS.load(Ordering::Relaxed) {
        true => RebootCommand::Restart,
        false => RebootCommand::PowerOff,
    };
    last_word("power off");
    let _ = rustix::system::reboot(command);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
