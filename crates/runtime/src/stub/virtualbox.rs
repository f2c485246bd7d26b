//! What stands for VirtualBox in tests: `VBoxManage` and `VBoxHeadless` in one program, told apart by its name. It knows
//! the commands that we give, refuses all others, and runs QEMU as the virtual machine, so that serial line and guest
//! are real.
//!
//! All is in the directory `VBOX_USER_HOME`: `UUID.json` a machine, `commands` each command line that came, `guest/` the
//! kernel and initramfs of the base VM `debian base`, and `behave.json` how it misbehaves:
//! `{"VERB": "hang" | "fail" | "garbage" | "late", "headless": "exit" | "hang", "guest": "none", "orphans": true}`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::identity::{Identity, Proof, prove};
use crate::sys;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const BASE: &str = "debian base";
const BASE_UUID: &str = "00000000-0000-4000-8000-000000000001";
const SNAPSHOT: &str = "clean";
const OFF_REASON: &str = "/VirtualBox/HostInfo/VMPowerOffReason";

type Words<'a> = &'a [&'a str];

/// Why a command is refused, in VirtualBox' words.
struct Refusal(String);

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self(format!("{error} (NS_ERROR_FAILURE)"))
    }
}

fn refuse<T>(words: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(words.into()))
}

fn unknown<T>(what: &str) -> Result<T, Refusal> {
    refuse(format!(
        "Could not find a registered machine named '{what}'\nVBoxManage: error: Details: code \
         VBOX_E_OBJECT_NOT_FOUND (0x80bb0001), component VirtualBoxWrap, interface IVirtualBox"
    ))
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Vm {
    uuid: String,
    name: String,
    folder: PathBuf,
    state: String,
    process: Option<Identity>,
    settings: BTreeMap<String, String>,
    shared_folders: Vec<String>,
}

/// The directory of it all.
struct Home(PathBuf);

impl Home {
    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn find(&self, uuid: &str) -> Result<Vm, Refusal> {
        if uuid == BASE || uuid == BASE_UUID {
            let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
            return Ok(Vm {
                uuid: BASE_UUID.to_owned(),
                name: BASE.to_owned(),
                state: "poweroff".to_owned(),
                settings: [pair("nic1", "nat"), pair("nic2", "hostonly")].into(),
                shared_folders: vec!["home".to_owned()],
                ..Vm::default()
            });
        }
        let Ok(text) = fs::read(self.file(&format!("{uuid}.json"))) else {
            return unknown(uuid);
        };
        let mut vm: Vm = serde_json::from_slice(&text).map_err(io::Error::from)?;
        let lives = |identity| matches!(prove(identity, None), Proof::Alive(_));
        if vm.process.is_some_and(|process| !lives(process)) {
            vm.state = "aborted".to_owned();
            vm.process = None;
        }
        Ok(vm)
    }

    fn save(&self, vm: &Vm) -> Result<(), Refusal> {
        let path = self.file(&format!("{}.json", vm.uuid));
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(vm).map_err(io::Error::from)?)?;
        Ok(fs::rename(new, path)?)
    }

    fn behaviour(&self, what: &str) -> String {
        let text = fs::read(self.file("behave.json")).unwrap_or_default();
        let all: Value = serde_json::from_slice(&text).unwrap_or_default();
        match &all[what] {
            Value::String(word) => word.clone(),
            Value::Bool(true) => "yes".to_owned(),
            _ => String::new(),
        }
    }

    fn monitor(&self, uuid: &str) -> PathBuf {
        self.file(&format!("{uuid}.qmp"))
    }
}

fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// The program.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let name = PathBuf::from(arguments.next().unwrap_or_default());
    let arguments: Vec<String> = arguments
        .filter_map(|word| word.into_string().ok())
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if words == ["--version"] {
        println("7.0.20r163906");
        return ExitCode::SUCCESS;
    }
    let Some(home) = std::env::var_os("VBOX_USER_HOME").map(PathBuf::from) else {
        return fail("no VBOX_USER_HOME: NS_ERROR_FAILURE");
    };
    let home = Home(home);
    let ended = match name.file_name().and_then(|name| name.to_str()) {
        Some("VBoxHeadless") => headless(&home, &words),
        _ => manage(&home, &words),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Refusal(words)) => fail(&words),
    }
}

fn fail(words: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "VBoxManage: error: {words}");
    ExitCode::FAILURE
}

fn println(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn manage(home: &Home, words: Words<'_>) -> Result<(), Refusal> {
    let mut log = File::options()
        .append(true)
        .create(true)
        .open(home.file("commands"))?;
    log.write_all(format!("{}\n", words.join("|")).as_bytes())?;
    let verb = words.first().copied().unwrap_or_default();
    match home.behaviour(verb).as_str() {
        "hang" => hang(),
        "fail" => refuse("The machine is not mutable (VBOX_E_INVALID_VM_STATE)"),
        "garbage" => {
            let noise: Vec<u8> = (0..4096_u32).map(|n| (n * 7 + n / 3) as u8).collect();
            Ok(io::stdout().write_all(&noise)?)
        }
        // As when VBoxSVC finishes what its client has given up.
        "late" => {
            run(home, words)?;
            hang()
        }
        _ => run(home, words),
    }
}

fn run(home: &Home, words: Words<'_>) -> Result<(), Refusal> {
    match words {
        ["list", "vms"] => {
            println(&format!("\"{BASE}\" {{{BASE_UUID}}}"));
            for entry in fs::read_dir(&home.0)?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some(vm) = name
                    .strip_suffix(".json")
                    .and_then(|uuid| home.find(uuid).ok())
                {
                    println(&format!("\"{}\" {{{}}}", vm.name, vm.uuid));
                }
            }
            Ok(())
        }
        ["showvminfo", uuid, "--machinereadable"] => {
            let vm = home.find(uuid)?;
            println(&format!("name=\"{}\"\nUUID=\"{}\"", vm.name, vm.uuid));
            for (name, value) in &vm.settings {
                println(&format!("{name}=\"{value}\""));
            }
            println(&format!("VMState=\"{}\"", vm.state));
            for (n, folder) in vm.shared_folders.iter().enumerate() {
                println(&format!(
                    "SharedFolderNameMachineMapping{}=\"{folder}\"",
                    n + 1
                ));
            }
            Ok(())
        }
        ["clonevm", base, "--snapshot", snapshot, rest @ ..] => {
            if (*base, *snapshot) != (BASE, SNAPSHOT) {
                return unknown(base);
            }
            clone(home, rest)
        }
        ["modifyvm", uuid, rest @ ..] => modify(home, home.find(uuid)?, rest),
        ["setextradata", uuid, name, value] => {
            let mut vm = home.find(uuid)?;
            vm.settings.insert((*name).to_owned(), (*value).to_owned());
            home.save(&vm)
        }
        ["guestproperty", "get", uuid, name] | ["getextradata", uuid, name] => {
            let vm = home.find(uuid)?;
            match vm.settings.get(*name) {
                Some(value) => println(&format!("Value: {value}")),
                None => println("No value set!"),
            }
            Ok(())
        }
        ["sharedfolder", "remove", uuid, "--name", name] => {
            let mut vm = home.find(uuid)?;
            vm.shared_folders.retain(|folder| folder != name);
            home.save(&vm)
        }
        ["discardstate", uuid] => {
            let mut vm = home.find(uuid)?;
            if vm.state != "saved" {
                return refuse("The machine is not saved (VBOX_E_INVALID_VM_STATE)");
            }
            vm.state = "poweroff".to_owned();
            home.save(&vm)
        }
        ["controlvm", uuid, what] => control(home, home.find(uuid)?, what),
        ["unregistervm", uuid, "--delete"] => {
            let vm = home.find(uuid)?;
            if vm.uuid == BASE_UUID || vm.process.is_some() {
                return refuse(
                    "Cannot unregister the machine while it is locked (VBOX_E_INVALID_OBJECT_STATE)",
                );
            }
            let _ = fs::remove_dir_all(vm.folder.join(&vm.name));
            Ok(fs::remove_file(home.file(&format!("{}.json", vm.uuid)))?)
        }
        _ => refuse(format!("Syntax error: {}", words.join(" "))),
    }
}

fn clone(home: &Home, words: Words<'_>) -> Result<(), Refusal> {
    let [
        "--mode",
        "machine",
        "--options",
        "Link",
        "--name",
        name,
        "--uuid",
        uuid,
        "--basefolder",
        folder,
        "--register",
    ] = words
    else {
        return refuse(format!("Syntax error: {}", words.join(" ")));
    };
    let folder = PathBuf::from(folder);
    if !folder.is_absolute() || home.find(uuid).is_ok() {
        return refuse("E_INVALIDARG (0x80070057)");
    }
    fs::create_dir_all(folder.join(name))?;
    fs::write(
        folder.join(name).join(format!("{name}.vbox")),
        "<VirtualBox/>",
    )?;
    let base = home.find(BASE)?;
    home.save(&Vm {
        uuid: (*uuid).to_owned(),
        name: (*name).to_owned(),
        folder,
        ..base
    })
}

fn modify(home: &Home, mut vm: Vm, mut words: Words<'_>) -> Result<(), Refusal> {
    if vm.uuid == BASE_UUID || vm.state != "poweroff" && vm.state != "aborted" {
        return refuse("The machine is not mutable (VBOX_E_INVALID_VM_STATE)");
    }
    loop {
        let (name, value, rest) = match words {
            [] => return home.save(&vm),
            [name @ ("--uart1" | "--uart2"), address, irq, rest @ ..] => {
                (*name, format!("{address},{irq}"), rest)
            }
            [
                name @ ("--uart-mode1" | "--uart-mode2"),
                mode,
                path,
                rest @ ..,
            ] => (*name, format!("{mode},{path}"), rest),
            [name, value, rest @ ..]
                if matches!(*name, "--memory" | "--cpus") || name.starts_with("--nic") =>
            {
                (*name, (*value).to_owned(), rest)
            }
            _ => return refuse(format!("Syntax error: {}", words.join(" "))),
        };
        vm.settings
            .insert(name.trim_start_matches('-').to_owned(), value);
        words = rest;
    }
}

fn control(home: &Home, mut vm: Vm, what: &str) -> Result<(), Refusal> {
    let Some(process) = vm.process else {
        return refuse(format!("Machine '{}' is not currently running.", vm.name));
    };
    let (command, state) = match what {
        "pause" => ("stop", "paused"),
        "resume" => ("cont", "running"),
        "acpipowerbutton" => ("system_powerdown", "running"),
        _ => return refuse(format!("Syntax error: {what}")),
    };
    if what != "acpipowerbutton" && vm.state == state {
        return refuse(format!(
            "The machine is {state} already (VBOX_E_INVALID_VM_STATE)"
        ));
    }
    let mut stream = loop {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid));
        if stat?.contains(") T ") {
            hang();
        }
        match UnixStream::connect(home.monitor(&vm.uuid)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    for command in ["qmp_capabilities", command] {
        stream.write_all(format!("{}\n", json!({ "execute": command })).as_bytes())?;
        while !lines
            .next()
            .transpose()?
            .unwrap_or_default()
            .contains("\"return\"")
        {}
    }
    vm.state = state.to_owned();
    home.save(&vm)
}

fn headless(home: &Home, words: Words<'_>) -> Result<(), Refusal> {
    println("Oracle VM VirtualBox Headless Interface 7.0.20");
    let ["--startvm", uuid, "--vrde", "off"] = words else {
        return refuse(format!("Syntax error: {}", words.join(" ")));
    };
    let mut vm = home.find(uuid)?;
    if vm.process.is_some() || vm.state == "saved" {
        return refuse("The machine is already locked by a session (VBOX_E_INVALID_OBJECT_STATE)");
    }
    if home.behaviour("orphans") == "yes" {
        // As a set-uid exec does.
        rustix::process::set_parent_process_death_signal(None).map_err(io::Error::from)?;
    }
    match home.behaviour("headless").as_str() {
        "exit" => {
            println(
                "Error: failed to start machine. Error message: VT-x is not available (VERR_VMX_NO_VMX)",
            );
            return refuse("Operation failed: NS_ERROR_FAILURE");
        }
        "hang" => hang(),
        _ => {}
    }
    let me = Identity::of(rustix::process::getpid())?;
    vm.process = Some(me);
    vm.state = "running".to_owned();
    vm.settings.remove(OFF_REASON);
    home.save(&vm)?;
    if home.behaviour("guest") == "none" {
        let _listener = UnixListener::bind(uart(&vm, 1, "server")?)?;
        hang()
    }
    let reason = guest(home, &vm)?;
    let mut vm = home.find(uuid)?;
    vm.process = None;
    vm.state = "poweroff".to_owned();
    let turned = vm.settings.get("VBoxInternal2/TurnResetIntoPowerOff");
    if turned.is_some_and(|value| value == "1") {
        vm.settings.insert(OFF_REASON.to_owned(), reason.to_owned());
    }
    home.save(&vm)
}

/// What a serial line is connected to.
fn uart(vm: &Vm, n: u32, mode: &str) -> Result<String, Refusal> {
    let value = vm.settings.get(&format!("uart-mode{n}"));
    let path = value.and_then(|value| value.strip_prefix(mode)?.strip_prefix(','));
    path.map_or_else(
        || refuse(format!("no serial line {n}")),
        |path| Ok(path.to_owned()),
    )
}

/// Runs the guest until its end, and says in VirtualBox' words how that came.
fn guest(home: &Home, vm: &Vm) -> Result<&'static str, Refusal> {
    let (line, console) = (uart(vm, 1, "server")?, uart(vm, 2, "file")?);
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    let events = OwnedFd::from(theirs);
    // What VirtualBox does with a file: it opens it anew.
    let console = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(console)?;
    let setting = |name: &str| vm.settings.get(name).cloned().unwrap_or_default();
    let monitor = home.monitor(&vm.uuid);
    let _ = fs::remove_file(&monitor);
    #[cfg(target_arch = "x86_64")]
    let tsc = format!("tsc_early_khz={} mitigations=off", sys::tsc_khz());
    #[cfg(not(target_arch = "x86_64"))]
    let tsc = "";
    let mut command = Command::new(QEMU);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi,tb-size=128",
            "-cpu",
            "max",
        ])
        .args([
            "-m",
            &format!("{}M", setting("memory")),
            "-smp",
            &setting("cpus"),
        ])
        .arg("-kernel")
        .arg(home.file("guest/kernel"))
        .arg("-initrd")
        .arg(home.file("guest/initramfs"))
        .args([
            "-append",
            &format!("console=ttyS1 quiet cryptomgr.notests panic=-1 reboot=t {tsc}"),
        ])
        .args([
            "-chardev",
            &format!("socket,id=line,path={line},server=on,wait=off"),
        ])
        .args(["-serial", "chardev:line"])
        .args([
            "-chardev",
            "stdio,id=console,mux=off,signal=off",
            "-serial",
            "chardev:console",
        ])
        .args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ])
        .args([
            "-chardev",
            &format!("socket,id=events,fd={}", events.as_raw_fd()),
        ])
        .args(["-mon", "chardev=events,mode=control"])
        .stdin(Stdio::null())
        .stdout(console);
    sys::set_up(
        &mut command,
        sys::Child {
            join: Vec::new(),
            keep: vec![events.as_raw_fd()],
            ids: None,
            own_network: false,
            limits: Vec::new(),
            gains_privileges: false,
        },
    );
    let mut child = command.spawn()?;
    drop((events, command));
    let mut text = String::new();
    ours.read_to_string(&mut text)?;
    child.wait()?;
    let _ = fs::remove_file(monitor);
    Ok(match text.contains("\"reason\": \"guest-reset\"") {
        true => "Reset",
        false => "PowerOff",
    })
}
