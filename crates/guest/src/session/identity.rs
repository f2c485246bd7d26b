//! The calls about the machine as a whole: who it is, freezing and ending it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Session, wire::Wire};
use crate::deadlines;
use crate::error::{Error, Result, inert};
use crate::{limits, pb};

/// The largest generation that is believed to be one.
const GENERATION_SANE: u32 = 10_000;
/// Longest text in a Hello, in bytes; the kernel's release has 64 at most.
const HELLO_TEXT: usize = 128;
/// Most fields, and most bytes of text, that a guest may report as not applied.
const UNAPPLIED: usize = 64;
const UNAPPLIED_TEXT: usize = 256;

/// What an agent says of itself, checked for shape only: a guest may still lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The newest protocol generation that the agent knows; at least 1.
    pub generation: u32,
    /// Drawn at boot and replaced by Configure: tells incarnations apart.
    pub boot_nonce: [u8; 16],
    /// Whether this incarnation has its identity. While false, only [`Session::configure`] makes sense.
    pub configured: bool,
    /// Printable, at most 128 bytes, like the two below.
    pub agent_version: String,
    /// The guest kernel's release.
    pub kernel_release: String,
    /// Whether an earlier [`Session::quiesce`] is still in force.
    pub quiesced: bool,
    /// The guest kernel's boot id: proves a boot, identifies nothing since clones share it.
    pub boot_id: String,
}

/// A machine's identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configure {
    /// The machine's id.
    pub machine_id: String,
    /// The incarnation's new nonce.
    pub boot_nonce: [u8; 16],
    /// Host name; left alone when `None`.
    pub hostname: Option<String>,
    /// Addresses of its interfaces.
    pub addresses: Vec<Address>,
    /// Addresses of name servers.
    pub dns_servers: Vec<String>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Default environment of every process.
    pub environment: BTreeMap<String, String>,
    /// Lines for root's `authorized_keys`.
    pub ssh_authorized_keys: Vec<String>,
    /// Random bytes for the guest kernel's pool.
    pub entropy: Vec<u8>,
    /// UTC in milliseconds since 1970; 0 leaves the clock alone.
    pub clock_unix_ms: i64,
    /// Grow the root file system to the size of its disk.
    pub grow_root: bool,
    /// Default working directory of processes; empty for the agent's.
    pub default_cwd: String,
    /// Default user of processes; empty for root.
    pub default_user: String,
    /// Bytes of the largest packet of the interfaces that get addresses; 0 leaves it as it is.
    pub mtu: u32,
}

/// One address of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Address {
    /// Name of the interface in the guest.
    pub interface: String,
    /// Address and prefix: `172.16.0.7/32`.
    pub cidr: String,
    /// Where everything else goes; empty for nowhere.
    pub gateway: String,
}

/// A part of [`Configure`] that this guest could not apply. Text from the guest, escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unapplied {
    /// Name of the field.
    pub field: String,
    /// Why.
    pub reason: String,
}

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// Power off.
    PowerOff,
    /// Restart.
    Reboot,
}

pub(super) async fn hello(wire: &Wire) -> Result<Hello> {
    const CALL: &str = "Hello";
    let request = pb::HelloRequest {
        generation: limits::GENERATION,
    };
    let reply = wire.client(limits::STREAM_MESSAGE).hello(request).await;
    let reply = reply
        .map_err(|status| Error::from_status(CALL, status))?
        .into_inner();
    let lie = |what| Error::Protocol { call: CALL, what };
    if !(1..=GENERATION_SANE).contains(&reply.generation) {
        return Err(lie("a generation that does not exist"));
    }
    let boot_nonce = reply.boot_nonce[..]
        .try_into()
        .map_err(|_| lie("a boot nonce of another length"))?;
    for text in [&reply.agent_version, &reply.kernel_release, &reply.boot_id] {
        let printable = text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if text.len() > HELLO_TEXT || !printable {
            return Err(lie("text that is too long or not printable"));
        }
    }
    Ok(Hello {
        generation: reply.generation,
        boot_nonce,
        configured: reply.configured,
        agent_version: reply.agent_version,
        kernel_release: reply.kernel_release,
        quiesced: reply.quiesced,
        boot_id: reply.boot_id,
    })
}

impl Session {
    /// Gives the machine its identity and lets its processes run. Answers what could not be applied.
    pub async fn configure(&self, identity: &Configure) -> Result<Vec<Unapplied>> {
        let request = identity.to_request();
        let reply = self
            .unary("Configure", deadlines::CONFIGURE, |mut agent| async move {
                agent.configure(request).await
            })
            .await?;
        let unapplied = reply.unapplied.into_iter().take(UNAPPLIED);
        Ok(unapplied
            .map(|row| Unapplied {
                field: inert(&row.field, UNAPPLIED_TEXT),
                reason: inert(&row.reason, UNAPPLIED_TEXT),
            })
            .collect())
    }

    /// Freezes user processes and file systems for a snapshot. Ends by itself after ten seconds.
    pub async fn quiesce(&self) -> Result<()> {
        let request = pb::QuiesceRequest {};
        self.unary("Quiesce", deadlines::QUIESCE, |mut agent| async move {
            agent.quiesce(request).await
        })
        .await
        .map(drop)
    }

    /// Ends [`Session::quiesce`], or a pause, in the machine that goes on: its clock, which stood still meanwhile, is set
    /// to `clock_unix_ms` (UTC, milliseconds since 1970). Where nothing is frozen, only that.
    pub async fn thaw(&self, clock_unix_ms: i64) -> Result<()> {
        let request = pb::ThawRequest { clock_unix_ms };
        self.unary("Thaw", deadlines::THAW, |mut agent| async move {
            agent.thaw(request).await
        })
        .await
        .map(drop)
    }

    /// Asks for power-off or restart; `grace` is what user processes get between SIGTERM and SIGKILL. Answers before the
    /// effect.
    pub async fn shutdown(&self, mode: ShutdownMode, grace: Duration) -> Result<()> {
        let mode = match mode {
            ShutdownMode::PowerOff => pb::shutdown_request::Mode::PowerOff,
            ShutdownMode::Reboot => pb::shutdown_request::Mode::Reboot,
        };
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let request = pb::ShutdownRequest {
            mode: mode.into(),
            grace_ms,
        };
        self.unary("Shutdown", deadlines::SHUTDOWN, |mut agent| async move {
            agent.shutdown(request).await
        })
        .await
        .map(drop)
    }
}

impl Configure {
    fn to_request(&self) -> pb::ConfigureRequest {
        let identity = self.clone();
        let addresses = identity.addresses.into_iter().map(|address| pb::Address {
            interface: address.interface,
            cidr: address.cidr,
            gateway: address.gateway,
        });
        pb::ConfigureRequest {
            machine_id: identity.machine_id,
            boot_nonce: identity.boot_nonce.to_vec().into(),
            hostname: identity.hostname,
            addresses: addresses.collect(),
            dns_servers: identity.dns_servers,
            dns_search: identity.dns_search,
            environment: identity.environment,
            ssh_authorized_keys: identity.ssh_authorized_keys,
            entropy: identity.entropy.into(),
            clock_unix_ms: identity.clock_unix_ms,
            grow_root: identity.grow_root,
            default_cwd: identity.default_cwd,
            default_user: identity.default_user,
            mtu: identity.mtu,
        }
    }
}
