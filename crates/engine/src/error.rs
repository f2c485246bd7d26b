//! What can go wrong in the engine. Each error is one fact with the things it is about; the chain holds the causes.

use std::path::PathBuf;

use hutch_contract::error::Kind;
use hutch_contract::machine::Status;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No machine, image or operation of that name, or not this owner's.
    #[error("{what} `{reference}` not found")]
    NotFound {
        /// `machine`, `image`, `operation`, `snapshot`, `process`.
        what: &'static str,
        /// What was asked for, cut to 64 characters.
        reference: String,
    },
    /// The name is taken.
    #[error("{what} `{name}` exists already")]
    NameTaken {
        /// `machine` or `image`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A field of a request has no possible meaning.
    #[error("`{field}` {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// It does not fit what the machine is doing.
    #[error("machine `{name}` is {status}: it cannot {verb}")]
    WrongStatus {
        /// The machine.
        name: String,
        /// Its status, as a word.
        status: &'static str,
        /// What was wanted of it.
        verb: &'static str,
    },
    /// The machine is failed, and so what was waited for will not come.
    #[error("machine `{name}` failed: {reason}")]
    MachineFailed {
        /// The machine.
        name: String,
        /// Why.
        reason: String,
    },
    /// The image has machines.
    #[error("image `{name}` is used by an operation that is going on")]
    ImageBusy {
        /// The image.
        name: String,
    },
    /// Something is being done to the machine already.
    #[error("machine `{name}` is being {doing}")]
    MachineBusy {
        /// The machine.
        name: String,
        /// What is done to it.
        doing: &'static str,
    },
    /// Something needs the snapshot.
    #[error("snapshot `{name}` is in use")]
    SnapshotBusy {
        /// The snapshot.
        name: String,
    },
    /// The snapshot's files are not those that were written.
    #[error("snapshot `{name}` is damaged: {problem}")]
    SnapshotBroken {
        /// The snapshot.
        name: String,
        /// Which file, and how.
        problem: String,
    },
    /// The snapshot's memory cannot be restored any more.
    #[error("the memory of snapshot `{name}` cannot be restored: {reason}")]
    SnapshotMisfit {
        /// The snapshot.
        name: String,
        /// What has changed.
        reason: String,
    },
    /// There are as many as there may be.
    #[error("there are {limit} {what} already")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// How an operation ended, told to whom waited for it.
    #[error("{message}")]
    Told {
        /// What sort of failure it was.
        kind: Kind,
        /// Its stable word.
        code: &'static str,
        /// It with its causes.
        message: String,
        /// What to do next.
        hint: Option<String>,
    },
    /// The same idempotency key came with another request.
    #[error("this idempotency key was used for another request")]
    IdempotencyMismatch,
    /// The key is missing, wrong, expired or revoked.
    #[error("no valid key was shown")]
    Unauthenticated,
    /// The key may not do this.
    #[error("this key may only read")]
    Denied,
    /// Something on the host is used up.
    #[error("not enough {what}: {need} {unit} needed, {have} {unit} left")]
    Exhausted {
        /// `memory`, `disk`, `machines`.
        what: &'static str,
        /// How much is needed.
        need: u64,
        /// How much there is.
        have: u64,
        /// In which unit.
        unit: &'static str,
    },
    /// No runtime of that name.
    #[error("there is no runtime `{name}`")]
    NoSuchRuntime {
        /// The name.
        name: String,
    },
    /// The runtime cannot be used here.
    #[error("runtime `{name}` cannot be used here: {reason}")]
    RuntimeUnusable {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
        /// How to change that.
        hint: Option<String>,
    },
    /// None of the runtimes can be used here.
    #[error("no runtime can be used here: {reasons}")]
    NoRuntime {
        /// Each with its reason.
        reasons: String,
        /// How to change that.
        hint: Option<String>,
    },
    /// The runtime cannot do it at all.
    #[error("runtime `{runtime}` cannot {what}")]
    Unable {
        /// Its name.
        runtime: String,
        /// A verb and its object.
        what: &'static str,
        /// One that could.
        could: Option<String>,
    },
    /// No kernel of that name.
    #[error("there is no kernel `{name}`")]
    NoSuchKernel {
        /// The name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The agent gave no answer in time.
    #[error("the agent of machine `{name}` does not answer")]
    AgentSilent {
        /// The machine.
        name: String,
    },
    /// No program in the machine takes connections there.
    #[error("nothing listens on port {port} of machine `{name}`")]
    NothingListens {
        /// The machine.
        name: String,
        /// The port.
        port: u16,
    },
    /// Somebody has that port of the host.
    #[error("port {port} of the host is taken")]
    PortTaken {
        /// The port.
        port: u16,
        /// By a machine of ours, for good; else by another program, or only for a moment.
        ours: bool,
    },
    /// The host does not let us listen there.
    #[error("listen on port {port} of the host")]
    PortRefused {
        /// The port.
        port: u16,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The port of the machine has no URL.
    #[error("port {port} of machine `{name}` is not exposed")]
    NotExposed {
        /// The machine.
        name: String,
        /// The port.
        port: u16,
    },
    /// It took too long.
    #[error("{what} took longer than {limit_ms} ms")]
    Timeout {
        /// What did.
        what: String,
        /// The deadline.
        limit_ms: u64,
    },
    /// The VMM ended while its guest was booting.
    #[error("the guest ended while it was booting: {how}")]
    EndedWhileBooting {
        /// How it ended, and the last words of VMM and console.
        how: String,
    },
    /// Another server has the data directory.
    #[error("another server uses the data directory {}", .path.display())]
    DataDirBusy {
        /// The directory.
        path: PathBuf,
    },
    /// A record was written by a newer version.
    #[error(
        "record `{key}` has format {format}, this version knows {}",
        hutch_contract::record::FORMAT
    )]
    NewerRecord {
        /// The record's key.
        key: String,
        /// Its format.
        format: u32,
    },
    /// A file of ours could not be read or written.
    #[error("{action} {}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The body of an upload broke off.
    #[error("the upload broke off")]
    Upload {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An upload is larger than images may be.
    #[error("the upload is larger than {limit} bytes")]
    UploadTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The end of the server interrupted it.
    #[error("the server ended before this was done")]
    Interrupted,
    /// The store.
    #[error("change the store")]
    Store(#[from] hutch_store::Error),
    /// Disks.
    #[error(transparent)]
    Disk(#[from] hutch_disk::Error),
    /// Images and kernels.
    #[error(transparent)]
    Image(#[from] hutch_image::Error),
    /// Runtimes.
    #[error(transparent)]
    Runtime(#[from] hutch_runtime::Error),
    /// Guests.
    #[error(transparent)]
    Guest(#[from] hutch_guest::session::Error),
    /// The kernel for guests could not be had.
    #[error("no kernel for guests: {reason}")]
    NoKernel {
        /// Why.
        reason: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Machines have no network of their own here, and what was asked for needs one.
    #[error("machines have no network of their own here: {reason}")]
    NoNetwork {
        /// Why.
        reason: String,
    },
    /// The configured network is not the one that machines are in.
    #[error("machines are in the network {network}, and cannot go to {wanted}")]
    NetworkInUse {
        /// Theirs.
        network: String,
        /// The configured one.
        wanted: String,
    },
    /// Each network that could be had overlaps with one of the host's.
    #[error("the host uses every network that machines could be in: {networks}")]
    NetworkTaken {
        /// Those that were tried.
        networks: String,
    },
    /// A network that cannot be one of machines.
    #[error(transparent)]
    NetworkUnfit(#[from] hutch_net::address::Unfit),
    /// The resolver of machines does not start.
    #[error("start the resolver of machines")]
    Resolver {
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Machines' links.
    #[error(transparent)]
    Link(#[from] hutch_net::link::Error),
    /// Machines' bridge.
    #[error(transparent)]
    Bridge(#[from] hutch_net::bridge::Error),
    /// Machines' taps.
    #[error(transparent)]
    Tap(#[from] hutch_net::tap::Error),
    /// Machines' firewall.
    #[error(transparent)]
    Firewall(#[from] hutch_net::firewall::Error),
    /// A task of ours ended by a panic.
    #[error("internal error in {what}")]
    Panicked {
        /// Which.
        what: &'static str,
    },
}

impl Error {
    pub(crate) fn not_found(what: &'static str, reference: &str) -> Error {
        Error::NotFound {
            what,
            reference: reference.chars().take(64).collect(),
        }
    }

    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Error {
        Error::Invalid {
            field,
            problem: problem.into(),
        }
    }

    pub(crate) fn timeout(what: impl Into<String>, limit: std::time::Duration) -> Error {
        Error::Timeout {
            what: what.into(),
            limit_ms: limit.as_millis() as u64,
        }
    }

    pub(crate) fn wrong_status(name: &impl ToString, status: Status, verb: &'static str) -> Error {
        Error::WrongStatus {
            name: name.to_string(),
            status: status.as_str(),
            verb,
        }
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::NotFound { .. } => Kind::NotFound,
            Error::NameTaken { .. }
            | Error::WrongStatus { .. }
            | Error::MachineFailed { .. }
            | Error::ImageBusy { .. }
            | Error::MachineBusy { .. }
            | Error::SnapshotBusy { .. }
            | Error::SnapshotBroken { .. }
            | Error::SnapshotMisfit { .. }
            | Error::DataDirBusy { .. }
            | Error::NetworkInUse { .. }
            | Error::NetworkTaken { .. }
            | Error::PortTaken { .. }
            | Error::NotExposed { .. }
            | Error::IdempotencyMismatch => Kind::Conflict,
            Error::Invalid { .. }
            | Error::NoSuchRuntime { .. }
            | Error::NoSuchKernel { .. }
            | Error::NetworkUnfit(_)
            | Error::Upload { .. } => Kind::Invalid,
            Error::Unable { .. } | Error::NoNetwork { .. } => Kind::Unsupported,
            Error::Link(error) => error.kind(),
            Error::Firewall(error) => error.kind(),
            Error::Bridge(error) => error.kind(),
            Error::Tap(error) => error.kind(),
            Error::TooMany { .. } => Kind::QuotaExceeded,
            Error::Told { kind, .. } => *kind,
            Error::Unauthenticated => Kind::Unauthenticated,
            Error::Denied => Kind::Denied,
            Error::Exhausted { .. } => Kind::Exhausted,
            Error::RuntimeUnusable { .. }
            | Error::NoRuntime { .. }
            | Error::AgentSilent { .. }
            | Error::NothingListens { .. }
            | Error::PortRefused { .. }
            | Error::EndedWhileBooting { .. }
            | Error::NoKernel { .. }
            | Error::Interrupted => Kind::Unavailable,
            Error::UploadTooLarge { .. } => Kind::TooLarge,
            Error::Timeout { .. } => Kind::Timeout,
            Error::NewerRecord { .. } | Error::Panicked { .. } | Error::Resolver { .. } => {
                Kind::Bug
            }
            Error::Io { source, .. } => match source.raw_os_error() {
                Some(28 | 122) => Kind::Exhausted,
                _ => Kind::Bug,
            },
            Error::Store(error) => match error.kind() {
                hutch_store::Kind::Conflict => Kind::Conflict,
                hutch_store::Kind::Invalid => Kind::Invalid,
                hutch_store::Kind::Exhausted => Kind::Exhausted,
                hutch_store::Kind::Unavailable => Kind::Unavailable,
                hutch_store::Kind::Internal => Kind::Bug,
            },
            Error::Disk(error) => match error.kind() {
                hutch_disk::Kind::Full => Kind::Exhausted,
                hutch_disk::Kind::Invalid => Kind::Invalid,
                hutch_disk::Kind::Unavailable => Kind::Unavailable,
                hutch_disk::Kind::NotFound | hutch_disk::Kind::Exists | hutch_disk::Kind::Other => {
                    Kind::Bug
                }
            },
            Error::Image(error) => match error.kind() {
                hutch_image::Kind::Invalid => Kind::Invalid,
                hutch_image::Kind::Exhausted => Kind::Exhausted,
                hutch_image::Kind::Unavailable | hutch_image::Kind::Cancelled => Kind::Unavailable,
                hutch_image::Kind::NotFound | hutch_image::Kind::Internal => Kind::Bug,
            },
            Error::Runtime(error) => error.kind(),
            Error::Guest(error) => match error.kind() {
                hutch_guest::Kind::NotFound => Kind::NotFound,
                hutch_guest::Kind::Invalid => Kind::Invalid,
                hutch_guest::Kind::Conflict => Kind::Conflict,
                hutch_guest::Kind::Denied => Kind::Denied,
                hutch_guest::Kind::Timeout => Kind::Timeout,
                hutch_guest::Kind::Exhausted => Kind::Exhausted,
                hutch_guest::Kind::Unsupported => Kind::Unsupported,
                _ => Kind::Unavailable,
            },
        }
    }

    /// Whether something was too small: memory, a disk, a number of machines.
    pub(crate) fn is_full(&self) -> bool {
        self.kind() == Kind::Exhausted
    }

    /// A stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Error::NotFound {
                what: "machine", ..
            } => "machine_not_found",
            Error::NotFound { what: "image", .. } => "image_not_found",
            Error::NotFound {
                what: "operation", ..
            } => "operation_not_found",
            Error::NotFound {
                what: "snapshot", ..
            } => "snapshot_not_found",
            Error::NotFound {
                what: "process", ..
            } => "process_not_found",
            Error::NotFound { .. } => "not_found",
            Error::NameTaken { .. } => "name_taken",
            Error::Invalid { .. } => "invalid",
            Error::WrongStatus { .. } => "wrong_status",
            Error::MachineFailed { .. } => "machine_failed",
            Error::ImageBusy { .. } => "image_busy",
            Error::MachineBusy { .. } => "machine_busy",
            Error::SnapshotBusy { .. } => "snapshot_busy",
            Error::SnapshotBroken { .. } => "snapshot_broken",
            Error::SnapshotMisfit { .. } => "snapshot_misfit",
            Error::TooMany { .. } => "quota_exceeded",
            Error::Told { code, .. } => code,
            Error::IdempotencyMismatch => "idempotency_mismatch",
            Error::Unauthenticated => "unauthenticated",
            Error::Denied => "denied",
            Error::Exhausted { .. } => "exhausted",
            Error::NoSuchRuntime { .. } => "no_such_runtime",
            Error::RuntimeUnusable { .. } | Error::NoRuntime { .. } => "runtime_unusable",
            Error::Unable { .. } => "unsupported",
            Error::NoSuchKernel { .. } => "no_such_kernel",
            Error::AgentSilent { .. } => "agent_silent",
            Error::NothingListens { .. } => "nothing_listens",
            Error::PortTaken { .. } => "port_taken",
            Error::PortRefused { .. } => "port_refused",
            Error::NotExposed { .. } => "not_exposed",
            Error::Timeout { .. } => "timeout",
            Error::EndedWhileBooting { .. } => "ended_while_booting",
            Error::DataDirBusy { .. } => "data_dir_busy",
            Error::NoKernel { .. } => "no_kernel",
            Error::Upload { .. } => "upload_broken",
            Error::Interrupted => "interrupted",
            Error::UploadTooLarge { .. } => "upload_too_large",
            Error::Guest(_) => "guest",
            Error::NoNetwork { .. } => "no_network",
            Error::NetworkInUse { .. } | Error::NetworkTaken { .. } | Error::NetworkUnfit(_) => {
                "network_taken"
            }
            Error::Link(_)
            | Error::Bridge(_)
            | Error::Tap(_)
            | Error::Firewall(_)
            | Error::Resolver { .. } => "network",
            Error::Image(_) => "image",
            Error::Runtime(_) => "runtime",
            Error::Disk(_) if self.kind() == Kind::Exhausted => "exhausted",
            Error::Disk(_) if self.kind() == Kind::Unavailable => "no_pool",
            Error::Io { .. } if self.kind() == Kind::Exhausted => "exhausted",
            Error::Store(_) if self.kind() == Kind::Exhausted => "exhausted",
            Error::NewerRecord { .. }
            | Error::Io { .. }
            | Error::Store(_)
            | Error::Disk(_)
            | Error::Panicked { .. } => "internal",
        }
    }

    /// What to do next, where we know.
    pub fn hint(&self) -> Option<String> {
        let fixed = match self {
            Error::NotFound { what: "image", .. } => {
                "`hutch image ls` lists what is here; `hutch image bootstrap` makes debian-base"
            }
            Error::NotFound {
                what: "machine", ..
            } => "`hutch list` shows the machines",
            Error::NotFound {
                what: "snapshot", ..
            } => "`hutch snapshot ls` shows the snapshots",
            Error::NotFound {
                what: "process", ..
            } => "`hutch ps` shows the processes of a machine",
            Error::MachineBusy { .. } => "wait until that is done, and ask again",
            Error::SnapshotBusy { .. } => {
                "a machine is being made from it or restored to it: wait for that"
            }
            Error::SnapshotBroken { .. } => "nothing was changed; delete it, and use another one",
            Error::SnapshotMisfit { .. } => {
                "its disk alone can be: add `--disk-only` (`disk_only` in the API); the machine then boots"
            }
            Error::TooMany {
                what: "snapshots", ..
            } => "delete those that are not needed: `hutch snapshot rm`",
            Error::Told { hint, .. } => return hint.clone(),
            Error::NameTaken { .. } => "choose another name, or delete the old one first",
            Error::WrongStatus {
                name,
                status: "stopped",
                ..
            } => return Some(format!("start it first: `hutch start {name}`")),
            Error::MachineFailed { name, .. } => {
                return Some(format!(
                    "`hutch logs {name}` shows its console; `hutch start {name}` tries again"
                ));
            }
            Error::Exhausted { what: "disk", .. } => {
                "delete machines or images, or give the data directory more room"
            }
            Error::Exhausted { what: "memory", .. } => {
                "ask for less memory, or stop other machines"
            }
            Error::Exhausted {
                what: "machines", ..
            } => "delete machines, or raise `max_machines`",
            Error::NoSuchRuntime { .. } => "`hutch runtime ls` lists them",
            Error::AgentSilent { name } => {
                return Some(format!(
                    "`hutch logs {name}` shows its console; `hutch restart {name}` boots it again"
                ));
            }
            Error::NothingListens { .. } => {
                "start a server there first; one that listens on 127.0.0.1 or ::1 in the machine is enough"
            }
            Error::PortTaken { ours: true, .. } => {
                "`hutch list` shows which machine has it; without `host_port` a free one is given"
            }
            Error::PortTaken { ours: false, .. } => {
                "another program of the host listens there; without `host_port` a free one is given"
            }
            Error::NotExposed { name, port } => {
                return Some(format!("`hutch port expose {name} {port}` gives it a URL"));
            }
            Error::Exhausted { what: "ports", .. } => {
                "take ports back, or give the server a larger range: gateway.port_max"
            }
            Error::Guest(error) => return error.hint(),
            Error::NoNetwork { .. } => {
                "run the server as root where it may make taps; `hutch doctor` says what is missing"
            }
            Error::NetworkInUse { .. } => {
                "delete the machines first, or take `network.subnet` back to what it was"
            }
            Error::NetworkTaken { .. } => {
                "name one that is free in the configuration: `network.subnet`"
            }
            Error::Interrupted => "ask again: nothing was left behind",
            Error::UploadTooLarge { .. } => "raise `image_max_bytes` in the configuration",
            Error::DataDirBusy { .. } => {
                "stop the other server, or choose another directory with --data-dir"
            }
            Error::NewerRecord { .. } => {
                "this data directory belongs to a newer hutch: install that one again"
            }
            Error::RuntimeUnusable { hint, .. }
            | Error::NoRuntime { hint, .. }
            | Error::NoKernel { hint, .. } => return hint.clone(),
            Error::Unable { could, .. } => {
                let could = could.as_ref()?;
                return Some(format!("a machine of the runtime `{could}` could"));
            }
            Error::NoSuchKernel { known, .. } if known.is_empty() => {
                "the administrator names kernels in the configuration, under `kernels`"
            }
            Error::NoSuchKernel { known, .. } => {
                return Some(format!("there are {}", known.join(", ")));
            }
            Error::Bridge(error) => return error.hint(),
            Error::Store(error) => return error.hint(),
            Error::Disk(error) => return error.hint(),
            Error::Image(error) => return error.hint(),
            Error::Runtime(error) => return error.hint(),
            _ => return None,
        };
        Some(fixed.to_owned())
    }

    /// The error and its causes in one line, for a record that outlives them. A cause that an error above it has told
    /// already (those of other crates often do) is not told again.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            let cause = error.to_string();
            if !text.ends_with(&cause) {
                text.push_str(": ");
                text.push_str(&cause);
            }
            source = error.source();
        }
        text
    }
}
