//! passt, the user-mode network of machines that have no tap because the server is not root: how it is started, who may
//! have it, and whether it works here. Its frames go through a filter of ours, see `shim/frames.rs`.
//!
//! What it is told here, the version in Debian 12 (2023-03-09) understands as well as those after it.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use crate::process::printable;
use crate::program::{Program, Wanted};
use crate::shim::frames::Filter;
use crate::{Error, MachineSpec, Nic, RuntimeConfig, UserNet, sys, tap};

const PROGRAM: Wanted = Wanted {
    name: "passt",
    install: "apt-get install passt",
    // Debian's tells none.
    oldest: (0, 0, 0),
    needs_kvm: false,
};
/// The most descriptors it may have open, and with them the most connections and ports of the host that it takes for its
/// guest.
const OPEN_FILES: u64 = 4096;
/// Its memory beside that of the VMM: some 25 MiB seen, and buffers that fill with use.
pub(crate) const OVERHEAD_MIB: u32 = 64;
/// Time for it to answer when it is tried.
const ANSWERS: Duration = Duration::from_secs(5);
/// The most bytes of its own words about why it did not.
const WORDS: usize = 1024;

/// A passt and its filter, as a shim is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaunchPasst {
    /// The program and its arguments, without its descriptor.
    pub(crate) argv: Vec<String>,
    /// The number under which the VMM finds its end.
    pub(crate) fd: i32,
    pub(crate) filter: Filter,
}

impl LaunchPasst {
    /// That of a machine whose VMM finds its end under that number, if it has one.
    ///
    /// # Errors
    /// [`Error::Setting`] for a program whose path is not text or not absolute; [`Error::Unsupported`] where it would
    /// run as root.
    pub(crate) fn of(
        runtime: &'static str,
        spec: &MachineSpec,
        fd: i32,
    ) -> Result<Option<Self>, Error> {
        let Nic::Filtered(network) = &spec.nic else {
            return Ok(None);
        };
        if spec.user.is_none() && rustix::process::geteuid().is_root() {
            return Err(Error::Unsupported {
                runtime,
                what: "use passt as root",
            });
        }
        let program = network.program.to_str();
        let Some(program) = program.filter(|_| network.program.is_absolute()) else {
            return Err(Error::Setting {
                runtime,
                setting: "passt",
                value: network.program.display().to_string(),
            });
        };
        Ok(Some(Self {
            argv: arguments(program, network),
            fd,
            filter: Filter {
                mac: network.mac,
                address: network.address,
                gateway: network.gateway,
                dns: network.dns,
                refuse: network.refuse.clone(),
            },
        }))
    }
}

/// For runtimes whose machines have no passt.
///
/// # Errors
/// [`Error::Unsupported`] for a machine that is to have one.
pub(crate) fn refuse(runtime: &'static str, spec: &MachineSpec) -> Result<(), Error> {
    match spec.nic {
        Nic::None | Nic::Restricted | Nic::Tap { .. } => Ok(()),
        Nic::Filtered(_) => Err(Error::Unsupported {
            runtime,
            what: "use passt",
        }),
    }
}

pub(crate) fn arguments(program: &str, network: &UserNet) -> Vec<String> {
    let (address, gateway) = (network.address.to_string(), network.gateway.to_string());
    let mac = tap::mac(&network.gateway_mac);
    let mut all = vec![program];
    // In the foreground it stays our child. IPv6 would pass no filter.
    all.extend(["--foreground", "--stderr", "--quiet", "--ipv4-only"]);
    all.extend(["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"]);
    // The gateway's address would be the host's loopback.
    all.push("--no-map-gw");
    all.extend(["--tcp-ports", "none", "--udp-ports", "none"]);
    all.extend(["--address", &address, "--netmask", "32"]);
    // Without these the guest would learn those of the host.
    all.extend(["--gateway", &gateway, "--mac-addr", &mac]);
    if network.dns {
        all.extend(["--dns-forward", &gateway]);
    }
    all.into_iter().map(str::to_owned).collect()
}

/// Starts it, in `set_up`'s hands until it runs. Ours is the other end of its connection; it ends when that is closed.
pub(crate) fn spawn(
    argv: &[String],
    theirs: &OwnedFd,
    stderr: Stdio,
    child: sys::Child,
) -> io::Result<Child> {
    let [program, arguments @ ..] = argv else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["--fd", &theirs.as_raw_fd().to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    // It raises its soft limit by itself, and an ordinary user cannot raise a hard one.
    let open_files = rustix::process::getrlimit(Resource::Nofile).maximum;
    let open_files = open_files.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    sys::set_up(
        &mut command,
        sys::Child {
            keep: vec![theirs.as_raw_fd()],
            limits: vec![(Resource::Core, 0), (Resource::Nofile, open_files)],
            ..child
        },
    );
    command.spawn()
}

/// Why machines of a server that is not root reach nothing here, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoUserNetwork {
    /// What is missing or does not work.
    pub reason: String,
    /// What would help, where that is known.
    pub hint: Option<String>,
}

/// Finds passt (`program`, else in the system's usual directories) and tries it: it is started as a machine's would be,
/// and must answer a guest. Takes some milliseconds, and a few seconds where it hangs. Within a tokio runtime.
///
/// # Errors
/// Why it is not there or does not work; always for root, whose machines have taps.
pub async fn user_network(program: Option<&Path>) -> Result<PathBuf, NoUserNetwork> {
    let because = |reason: String| NoUserNetwork {
        hint: reason.contains("user namespace").then(|| {
            "it confines itself in a user namespace: see the sysctls user.max_user_namespaces and \
             kernel.apparmor_restrict_unprivileged_userns"
                .to_owned()
        }),
        reason,
    };
    if rustix::process::geteuid().is_root() {
        return Err(because(
            "the server is root: its machines use taps".to_owned(),
        ));
    }
    let config = RuntimeConfig {
        program: program.map(Path::to_owned),
        ..RuntimeConfig::default()
    };
    let program = Program::new(PROGRAM, &config).path();
    let program = program.map_err(|error| NoUserNetwork {
        reason: error.to_string(),
        hint: error.hint(),
    })?;
    let tried = program.clone();
    let answered = tokio::task::spawn_blocking(move || answers(&tried));
    match answered.await.expect("trying passt does not panic") {
        Ok(()) => Ok(program),
        Err(reason) => Err(because(format!("{}: {reason}", program.display()))),
    }
}

/// Whether a passt tells the first guest it has who its gateway is.
fn answers(program: &Path) -> Result<(), String> {
    let network = UserNet {
        program: program.to_owned(),
        mac: [2, 0, 0, 0, 0, 2],
        address: Ipv4Addr::new(192, 0, 2, 2),
        gateway: Ipv4Addr::new(192, 0, 2, 1),
        gateway_mac: [2, 0, 0, 0, 0, 1],
        dns: true,
        refuse: Vec::new(),
    };
    let Some(text) = program.to_str() else {
        return Err("its path is not text".to_owned());
    };
    let argv = arguments(text, &network);
    let in_words = |error: io::Error| error.to_string();
    let (mut ours, theirs) = UnixStream::pair().map_err(in_words)?;
    ours.set_read_timeout(Some(ANSWERS)).map_err(in_words)?;
    let theirs = OwnedFd::from(theirs);
    let child = sys::Child {
        join: Vec::new(),
        keep: Vec::new(),
        ids: None,
        own_network: false,
        limits: Vec::new(),
        gains_privileges: false,
    };
    let mut child = spawn(&argv, &theirs, Stdio::piped(), child).map_err(in_words)?;
    drop(theirs);
    let mut answer = [0; 4 + 42];
    let asked = ours.write_all(&question(&network));
    let answered = asked.and_then(|()| ours.read_exact(&mut answer));
    let _ = child.kill();
    let _ = child.wait();
    match answered {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err("it does not answer".to_owned())
        }
        Err(_) => {
            let mut words = Vec::new();
            let said = child.stderr.map(|said| said.take(64 * 1024));
            let _ = said.map(|mut said| said.read_to_end(&mut words));
            let words = printable(&words, WORDS);
            // Where there is no system log it complains of that first, and again for each word.
            let words = words
                .lines()
                .filter(|line| !line.starts_with("Failed to send"));
            match words.collect::<Vec<_>>().join("; ") {
                silent if silent.is_empty() => Err("it ends without a word".to_owned()),
                words => Err(words),
            }
        }
    }
}

/// The request of RFC 826 for the gateway's address, with its length before it.
fn question(network: &UserNet) -> Vec<u8> {
    let (mac, address) = (network.mac, network.address.octets());
    let arp = [0, 1, 8, 0, 6, 4, 0, 1];
    let frame = [&[0xff; 6][..], &mac, &[8, 6], &arp, &mac, &address, &[0; 6]].concat();
    let frame = [&frame[..], &network.gateway.octets()].concat();
    let length = u32::try_from(frame.len()).unwrap_or(0).to_be_bytes();
    [&length[..], &frame].concat()
}
