//! The network of this server's machines: which kind the host can give, and what a machine of a slot gets of it.
//!
//! Reading order: `network/policy.rs` is pure; `network/routed.rs` does it.

mod names;
mod policy;
mod routed;

use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;

use hutch_contract::machine::Machine;
use hutch_contract::network::{MachineNetwork, NetworkMode, NetworkPolicy};
use hutch_contract::record::{FORMAT, MachineRecord};
use hutch_guest::session::{Address, Configure};
use hutch_net::address::{Addresses, CANDIDATES, GATEWAY, GATEWAY6};
use hutch_net::cidr::Cidr;
use hutch_net::link::Links;
use hutch_net::{dns, firewall};
use hutch_runtime::{Nic, Runtime};
use hutch_store::{Store, Write};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::access::{self, Access};
use crate::config::{Mode, NetworkConfig};
use crate::drive::blocking;
use crate::engine::Shared;
use crate::rows::{self, Instance};
use crate::{Engine, Error, Principal, engine, keys, plan};

use policy::Member;
pub(crate) use policy::check;
use routed::{Card, Identity, Routed};

/// A VMM's user id is this and the machine's slot: far above people's and services'.
const FIRST_UID: u32 = 0x7000_0000;
/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// The user that the VMM of a slot runs as, and that its tap belongs to, where the server is root.
pub(crate) fn user(slot: u16) -> u32 {
    FIRST_UID + u32::from(slot)
}

/// What machines of this server have for a network.
#[derive(Clone)]
pub(crate) enum Network {
    /// The host routes for them.
    Routed(Arc<Routed>),
    /// A card that reaches nothing.
    None {
        /// Why no more.
        reason: String,
    },
}

/// The network that this data directory's machines are in, for good.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NetworkRow {
    format: u32,
    /// In CIDR form.
    ipv4: String,
    /// Of the unique local network of IPv6 (RFC 4193).
    global_id: [u8; 5],
    /// Where the resolver was last, so that the rules can stay when a server starts.
    #[serde(default)]
    dns_port: Option<u16>,
}

/// What a start of a machine needs to know.
#[derive(Debug, Clone)]
pub(crate) struct Plug {
    pub nic: Nic,
    card: Option<Card>,
}

impl Network {
    /// Finds out what the host can give, and takes over what is there of an earlier server: before anything is done to
    /// machines. `records`: all that there are, of runtimes that can have a network.
    pub async fn open(
        config: &NetworkConfig,
        store: &dyn Store,
        instance: &Instance,
        data_dir: &Path,
        records: Vec<MachineRecord>,
    ) -> Result<Network, Error> {
        let reason = match config.mode {
            Mode::None => Some("the configuration says so".to_owned()),
            Mode::Auto => obstacle().map(|(reason, _)| reason),
            Mode::Routed => match obstacle() {
                Some((reason, _)) => return Err(Error::NoNetwork { reason }),
                None => None,
            },
        };
        if let Some(reason) = reason {
            info!(reason, "machines have no network of their own");
            return Ok(Network::None { reason });
        }
        match routed(config, store, instance, data_dir, &records).await {
            Ok(routed) => Ok(Network::Routed(routed)),
            // One who has machines in a network must not find them without it, nor beside its firewall.
            Err(error) if config.mode == Mode::Auto && records.is_empty() => {
                let reason = error.chain();
                warn!(
                    reason,
                    hint = error.hint(),
                    "machines have no network of their own"
                );
                Ok(Network::None { reason })
            }
            Err(error) => Err(error),
        }
    }

    /// Begins to keep what others may change, and removes what a crash left.
    pub fn start(&self, shared: &Shared) {
        let Network::Routed(routed) = self else {
            return;
        };
        if let Err(error) = routed.remove_strays(user) {
            warn!(error = %error.chain(), "what a crash left of machines' networks cannot be removed");
        }
        let keeper = routed.clone();
        let spawned = std::thread::Builder::new()
            .name("hutch-firewall".into())
            .spawn(move || keeper.keep());
        if let Err(error) = spawned {
            warn!(%error, "the firewall is not kept");
        }
        info!(
            subnet = %routed.network(),
            tag = shared.instance.tag,
            "the host routes for machines"
        );
    }

    /// Ends the keeper; with no machine left, nothing of ours stays on the host.
    pub async fn end(&self) {
        if let Network::Routed(routed) = self {
            let routed = routed.clone();
            let ended = blocking("end the network", move || {
                routed.end();
                Ok(())
            });
            if let Err(error) = ended.await {
                warn!(error = %error.chain(), "the network is not ended");
            }
        }
    }

    /// The highest slot that a machine may have.
    pub fn last_slot(&self) -> u16 {
        match self {
            Network::Routed(routed) => routed.last_slot(),
            Network::None { .. } => u16::MAX - 1,
        }
    }

    /// Makes a machine's network before its VMM is started. It may be there already.
    pub async fn up(
        &self,
        machine: &Arc<engine::Machine>,
        slot: u16,
        runtime: &dyn Runtime,
    ) -> Result<Plug, Error> {
        let Network::Routed(routed) = self else {
            return Ok(Plug::restricted());
        };
        if !runtime.capabilities().network {
            return Ok(Plug::restricted());
        }
        let (routed, machine) = (routed.clone(), machine.clone());
        let card = blocking("make the machine's network", move || {
            routed.up(slot, user(slot), || member(&machine))
        });
        Ok(match card.await? {
            Some(card) => Plug::tap(card),
            None => Plug::restricted(),
        })
    }

    /// What a machine that runs was plugged into.
    pub fn plug(&self, slot: u16, runtime: &dyn Runtime) -> Plug {
        match self {
            Network::Routed(routed) if runtime.capabilities().network => {
                routed.card(slot).map_or_else(Plug::restricted, Plug::tap)
            }
            _ => Plug::restricted(),
        }
    }

    /// Removes what a machine had, whatever that was. Its VMM is gone.
    pub async fn down(&self, slot: u16, tag: &str) -> Result<(), Error> {
        let routed = match self {
            Network::Routed(routed) => Some(routed.clone()),
            Network::None { .. } => None,
        };
        let label = hutch_net::label(tag, slot);
        blocking("remove the machine's network", move || match routed {
            Some(routed) => routed.down(slot, user(slot)),
            // Of a time when machines had one.
            None if rustix::process::geteuid().is_root() => {
                Ok(Links::open()?.down(&label, user(slot))?)
            }
            None => Ok(()),
        })
        .await
    }

    /// As the API shows it.
    pub fn view(&self, record: &MachineRecord, runtime: Option<&dyn Runtime>) -> MachineNetwork {
        let able = runtime.is_some_and(|runtime| runtime.capabilities().network);
        let routed = match self {
            Network::Routed(routed) if able => routed.machine(record.slot).map(|it| (routed, it)),
            _ => None,
        };
        let mode = match (&routed, runtime.map(Runtime::root)) {
            (Some(_), _) => NetworkMode::Routed,
            (None, Some(hutch_runtime::Root::Layer)) => NetworkMode::Runtime,
            (None, _) => NetworkMode::None,
        };
        let ipv6 = routed.as_ref().filter(|(routed, _)| routed.ipv6());
        MachineNetwork {
            mode,
            ipv4: routed.as_ref().map(|(_, machine)| machine.ipv4),
            ipv6: ipv6.map(|(_, machine)| machine.ipv6),
            policy: record.network.clone(),
        }
    }

    /// Where a machine can be connected to without its agent.
    pub fn address(
        &self,
        record: &MachineRecord,
        runtime: &dyn Runtime,
    ) -> Option<std::net::Ipv4Addr> {
        match self {
            Network::Routed(routed) if runtime.capabilities().network => {
                routed.machine(record.slot).map(|machine| machine.ipv4)
            }
            _ => None,
        }
    }
}

impl Plug {
    fn restricted() -> Plug {
        Plug {
            nic: Nic::Restricted,
            card: None,
        }
    }

    fn tap(card: Card) -> Plug {
        Plug {
            nic: Nic::Tap {
                name: card.machine.label.clone(),
                mac: card.machine.mac,
            },
            card: Some(card),
        }
    }

    /// What the agent is told of the guest's network.
    pub fn identity(&self) -> Configure {
        let Some(card) = &self.card else {
            return Configure::default();
        };
        let address = |cidr: String, gateway: String| Address {
            interface: String::new(),
            cidr,
            gateway,
        };
        let mut all = vec![address(
            format!("{}/32", card.machine.ipv4),
            GATEWAY.to_string(),
        )];
        if card.ipv6 {
            all.push(address(
                format!("{}/128", card.machine.ipv6),
                GATEWAY6.to_string(),
            ));
        }
        Configure {
            addresses: all,
            mtu: card.mtu,
            dns_servers: vec![GATEWAY.to_string()],
            dns_search: vec![dns::ZONE.to_owned()],
            ..Configure::default()
        }
    }
}

impl Engine {
    /// Gives a machine another policy, which holds for its next packet; connections that it denies are ended.
    ///
    /// # Errors
    /// What is wrong with the policy; that machines have no such network here; [`Error::NotFound`].
    pub async fn set_network(
        &self,
        who: &Principal,
        reference: &str,
        policy: NetworkPolicy,
    ) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        policy::check(&policy)?;
        let machine = self.find_machine(who, reference)?;
        let engine = self.clone();
        self.unbroken("change a machine's network", async move {
            let shared = &engine.shared;
            let record = machine.cell.get().map(|current| current.record);
            let record =
                record.ok_or_else(|| Error::not_found("machine", machine.cell.id.as_str()))?;
            shared.must_hold(&policy, &record.runtime)?;
            let current = machine
                .cell
                .update(|record| {
                    if record.wanted == hutch_contract::record::Wanted::Deleted {
                        return Err(Error::wrong_status(
                            &record.name,
                            plan::status(record),
                            "change its network",
                        ));
                    }
                    record.network = policy;
                    Ok(())
                })
                .await?;
            if let Network::Routed(routed) = shared.network() {
                let (routed, slot) = (routed.clone(), current.record.slot);
                let renewed = machine.clone();
                blocking("change a machine's network", move || {
                    routed.renew(slot, || member(&renewed))
                })
                .await?;
            }
            Ok(shared.view(&current))
        })
        .await
    }
}

impl Shared {
    /// Refuses a policy that nothing here would enforce.
    pub fn must_hold(&self, policy: &NetworkPolicy, runtime: &str) -> Result<(), Error> {
        if policy.is_default() {
            return Ok(());
        }
        let runtime = self.runtime(runtime)?;
        if !runtime.capabilities().network {
            return Err(Error::Unable {
                runtime: runtime.name().to_owned(),
                what: "give machines a network with a policy",
                could: None,
            });
        }
        match self.network() {
            Network::Routed(_) => Ok(()),
            // Nothing is reached there: that is less than any policy allows, and what "none" asks for.
            Network::None { .. } if *policy == none() => Ok(()),
            Network::None { reason } => Err(Error::NoNetwork {
                reason: reason.clone(),
            }),
        }
    }
}

fn none() -> NetworkPolicy {
    NetworkPolicy {
        egress: hutch_contract::network::Egress::None,
        ..NetworkPolicy::default()
    }
}

/// A machine as its record says it now; none when it is gone.
fn member(machine: &engine::Machine) -> Option<Member> {
    let current = machine.cell.get()?;
    Some(Member::of(&current.record))
}

/// Why the host cannot route for machines, as far as a look tells, and what would help.
pub(crate) fn obstacle() -> Option<(String, &'static str)> {
    if !rustix::process::geteuid().is_root() {
        let reason = "the server is not root, and so makes no taps";
        return Some((reason.into(), "run the server as root"));
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open(TUN) {
        let hint = "load the module `tun`; in a container, give it /dev/net/tun and NET_ADMIN";
        return Some((format!("{TUN}: {error}"), hint));
    }
    firewall::probe().err().map(|error| {
        let hint = "load the module `nf_tables`; in a container, give it NET_ADMIN";
        (Error::from(error).chain(), hint)
    })
}

/// Where machines' packets leave the host, in words.
pub(crate) fn ways_out() -> Result<String, Error> {
    let uplinks = Links::open()?.uplinks()?;
    let words = uplinks.iter().map(|uplink| {
        let families = match (uplink.ipv4, uplink.ipv6) {
            (true, true) => "IPv4 and IPv6",
            (true, false) => "IPv4",
            _ => "IPv6",
        };
        format!("out by {} ({families}, MTU {})", uplink.name, uplink.mtu)
    });
    let words: Vec<_> = words.collect();
    Ok(match words.is_empty() {
        true => {
            "the host has no default route, and so machines reach its own networks at most".into()
        }
        false => words.join(", "),
    })
}

/// Sixteen bits that tell what is of this instance in the kernel from what others' is: of the tag's twenty.
fn number(tag: &str) -> NonZeroU16 {
    let hash = tag.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    NonZeroU16::new((hash >> 16) as u16 ^ hash as u16).unwrap_or(NonZeroU16::MAX)
}

async fn routed(
    config: &NetworkConfig,
    store: &dyn Store,
    instance: &Instance,
    data_dir: &Path,
    records: &[MachineRecord],
) -> Result<Arc<Routed>, Error> {
    let number = number(&instance.tag);
    let mut links = blocking("look at the host's network", || Ok(Links::open()?)).await?;
    let addresses;
    let mut row;
    (links, addresses, row) =
        settle(config, store, instance, links, number, !records.is_empty()).await?;
    let members: Vec<_> = records
        .iter()
        .map(|record| (record.slot, Member::of(record)))
        .collect();
    let identity = Identity {
        number,
        tag: instance.tag.clone(),
        instance: data_dir.display().to_string(),
        dns_port: row.dns_port,
    };
    let config = config.clone();
    let runtime = tokio::runtime::Handle::current();
    let routed = blocking("make the firewall", move || {
        let _runtime = runtime.enter();
        Routed::open(&config, &identity, links, addresses, members)
    })
    .await?;
    if row.dns_port != routed.dns_port() {
        row.dns_port = routed.dns_port();
        let write = Write::json(rows::network(), &row)?;
        store.commit(Vec::new(), vec![write]).await?;
    }
    Ok(routed)
}

/// The network that machines are in: the one of earlier servers, the configured one, or one that nobody uses. It is on
/// record before it is claimed.
async fn settle(
    config: &NetworkConfig,
    store: &dyn Store,
    instance: &Instance,
    mut links: Links,
    number: NonZeroU16,
    in_use: bool,
) -> Result<(Links, Addresses, NetworkRow), Error> {
    let key = rows::network();
    let row = store.get_json::<NetworkRow>(&key).await?;
    let known = match &row {
        Some(row) => {
            rows::known_format(&key, row.value.format)?;
            row.value.ipv4.parse::<Cidr>().ok()
        }
        None => None,
    };
    let global_id = row
        .as_ref()
        .map_or_else(keys::random_bytes::<5>, |row| row.value.global_id);
    let mut candidates = match (config.subnet, known) {
        (Some(wanted), Some(known)) if wanted != known && in_use => {
            return Err(Error::NetworkInUse {
                network: known.to_string(),
                wanted: wanted.to_string(),
            });
        }
        (Some(wanted), _) => vec![wanted],
        (None, Some(known)) if in_use => vec![known],
        (None, Some(known)) => std::iter::once(known).chain(CANDIDATES).collect(),
        (None, None) => CANDIDATES.to_vec(),
    };
    let all = candidates.clone();
    while !candidates.is_empty() {
        let network;
        (links, network) = blocking("look at the host's network", move || {
            let network = links.unused(&candidates, number)?;
            Ok((links, network))
        })
        .await?;
        let Some(network) = network else {
            break;
        };
        let addresses = Addresses::new(&instance.tag, network, global_id)?;
        let made = NetworkRow {
            format: FORMAT,
            ipv4: network.to_string(),
            global_id,
            dns_port: row.as_ref().and_then(|row| row.value.dns_port),
        };
        if known != Some(network) || row.is_none() {
            let write = Write::json(key.clone(), &made)?;
            store.commit(Vec::new(), vec![write]).await?;
        }
        let claimed;
        (links, claimed) = blocking("claim the network", move || {
            let claimed = links.claim(&network, number)?;
            Ok((links, claimed))
        })
        .await?;
        if claimed {
            return Ok((links, addresses, made));
        }
        candidates = all
            .iter()
            .copied()
            .skip_while(|candidate| *candidate != network)
            .skip(1)
            .collect();
    }
    let tried = all.iter().map(Cidr::to_string).collect::<Vec<_>>();
    Err(Error::NetworkTaken {
        networks: tried.join(", "),
    })
}
