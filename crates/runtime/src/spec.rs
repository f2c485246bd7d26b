//! What a runtime is told: plain data.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// A machine as a runtime sees it. Its files are in its directory under fixed names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// The machine's id, for process titles and labels.
    pub id: String,
    /// `h<tag>-<slot>`: the name that everything outside of its directory carries.
    pub label: String,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Added to the kernel's command line.
    pub kernel_args: Vec<String>,
    /// Its network card.
    pub nic: Nic,
    /// Who the VMM runs as; only when the server is root.
    pub user: Option<User>,
}

/// What the root file systems of a runtime's machines are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// The image's disk: a clone of it is in the machine's directory before [`prepare`](crate::Runtime::prepare).
    Disk,
    /// The image's layer, which `prepare` is given.
    Layer,
    /// Something that the user made and the configuration names. The image is not looked at.
    Elsewhere,
}

/// An image as a runtime sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    /// The image's id.
    pub id: String,
    /// Its root file system, a tar compressed with zstd. Images that came as disks have none.
    pub path: PathBuf,
}

/// Something of ours that a program of the host keeps, outside of every directory of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Outside {
    /// `container`, `container image`.
    pub kind: &'static str,
    /// What that program calls it.
    pub name: String,
    /// The id of the machine or image that it was made for.
    pub of: String,
}

/// A machine's network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nic {
    /// None at all.
    None,
    /// The VMM's own user-mode network with every way out closed: the guest sees a card and reaches nothing.
    Restricted,
    /// A tap of the host's.
    Tap {
        /// Its name. It is there, stays when nobody has it open, and belongs to the machine's user; otherwise a start is
        /// refused.
        name: String,
        /// The guest's address on it. A machine that goes on from another's memory has that one's.
        mac: [u8; 6],
    },
    /// passt behind a filter: the way out for machines of a server that is not root.
    Filtered(UserNet),
}

/// A user-mode network that reaches what is public, over IPv4, by this host's own sockets. Nobody reaches the guest by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNet {
    /// passt, by its absolute path: see [`user_network`](crate::user_network).
    pub program: PathBuf,
    /// The guest's address on its card.
    pub mac: [u8; 6],
    /// The guest's address. No packet leaves with another one.
    pub address: Ipv4Addr,
    /// What the guest takes for its router and only neighbour. It answers nothing but questions for names.
    pub gateway: Ipv4Addr,
    /// The gateway's address on the card.
    pub gateway_mac: [u8; 6],
    /// Whether the gateway hands on questions for names (by UDP) to the host's resolver.
    pub dns: bool,
    /// Networks that the guest does not reach, each an address and the length of its prefix: private ones, say. The
    /// host's own addresses, loopback, link-local, multicast and broadcast are refused in any case.
    pub refuse: Vec<(Ipv4Addr, u8)>,
}

/// Who a VMM runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What all runtimes are configured with.
#[derive(Debug, Clone, Default)]
pub struct RuntimeConfig {
    /// The program whose hidden subcommand `shim` launches VMMs: `hutch` itself.
    pub launcher: PathBuf,
    /// The VMM, when it is not in one of the system's usual directories.
    pub program: Option<PathBuf>,
    /// Where programs are that we installed.
    pub programs_dir: Option<PathBuf>,
    /// `kvm` or `tcg`, when it is not to be found out.
    pub acceleration: Option<String>,
    /// The agent, for runtimes that run it on the host's kernel (Docker, the stub).
    pub agent: PathBuf,
    /// Where a Docker-compatible engine listens, when it is not the usual place.
    pub docker_socket: Option<PathBuf>,
    /// The engine's network that containers are in: `bridge`, or one by name. Without it they have none.
    pub docker_network: Option<String>,
    /// What machines are made from, for a runtime whose machines are clones of what its user made: `VM@SNAPSHOT`.
    pub base: Option<String>,
    /// The environment of programs that work for a user's account: `HOME` and the like. Others get none.
    pub environment: BTreeMap<String, String>,
    /// The processor that guests see, as the VMM calls it; only Firecracker has such templates.
    pub cpu_template: Option<String>,
    /// Back the memory of guests with huge pages of the host, where a VMM can.
    pub huge_pages: bool,
    /// Firecracker's jailer, when its machines are to run in it; only when the server is root.
    pub jailer: Option<PathBuf>,
    /// Give memory that a guest frees back to the host, where a VMM can.
    pub balloon: bool,
    /// The most that a guest may read and write on each disk in a second, in bytes, where a VMM can limit it.
    pub disk_bytes_per_s: Option<u64>,
    /// The same in operations.
    pub disk_ops_per_s: Option<u64>,
    /// The host's CPUs that VMMs may run on; empty: all.
    pub affinity: Vec<u32>,
    /// The most CPU time of the host for each virtual CPU, in percent of one CPU; none: as much as there is.
    pub cpu_percent: Option<u32>,
    /// The most bytes of console output kept per machine.
    pub console_bytes: u64,
}
