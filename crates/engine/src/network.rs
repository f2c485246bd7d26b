//! The network of this server's machines: which kind the host can give, and what a machine of a slot gets of it.
//!
//! Reading order: `policy.rs` is pure; `settle.rs` finds the addresses; `routed.rs` does it, `names.rs` is what the
//! resolver asks; `user.rs` is for servers without root; `clear.rs` finds, and removes, what is left.

mod clear;
mod names;
mod policy;
mod routed;
mod settle;
mod user;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use hutch_contract::machine::{Machine, Status};
use hutch_contract::network::{MachineNetwork, NetworkMode, NetworkPolicy};
use hutch_contract::record::MachineRecord;
use hutch_guest::session::{Address, Configure};
use hutch_net::address::GATEWAY6;
use hutch_net::link::Links;
use hutch_net::{dns, firewall};
use hutch_runtime::{Nic, Runtime};
use hutch_store::Store;
use tracing::{info, warn};

use crate::access::{self, Access};
use crate::config::{Mode, NetworkConfig};
use crate::drive::blocking;
use crate::engine::Shared;
use crate::rows::Instance;
use crate::{Engine, Error, Principal, engine, plan};

pub(crate) use clear::{BRIDGE, CLAIM, FIREWALL, inventory};
use policy::Member;
pub(crate) use policy::check;
use routed::{Card, Routed};
use user::User;

/// A VMM's user id is this and the machine's slot: far above people's and services'.
const FIRST_UID: u32 = 0x7000_0000;
/// Where taps come from.
pub(crate) const TUN: &str = "/dev/net/tun";

/// The user that the VMM of a slot runs as, and that its tap belongs to, where the server is root.
pub(crate) fn uid(slot: u16) -> u32 {
    FIRST_UID + u32::from(slot)
}

/// What machines of this server have for a network.
#[derive(Clone)]
pub(crate) enum Network {
    /// The host routes for them.
    Routed(Arc<Routed>),
    /// A program without privilege carries their connections out.
    User(Arc<User>),
    /// A card that reaches nothing.
    None {
        /// Why no more.
        reason: String,
    },
}

/// What a start of a machine needs to know.
#[derive(Debug, Clone)]
pub(crate) struct Plug {
    pub nic: Nic,
    /// What the agent is told of the guest's network; the rest is as it is by default.
    pub identity: Configure,
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
        if records.is_empty() {
            let (tag, of) = (instance.tag.clone(), data_dir.display().to_string());
            let clear = move || {
                clear::try_clear(&tag, &of);
                Ok(())
            };
            blocking("clear the host's network", clear).await?;
        }
        match (config.mode, obstacle()) {
            (Mode::None, _) => {
                let reason = "the configuration says so".to_owned();
                return Ok(Network::None { reason });
            }
            (Mode::Routed, Some((reason, _))) => return Err(Error::NoNetwork { reason }),
            (Mode::Auto, Some((reason, _))) => {
                return Ok(match user(config, &instance.tag).await {
                    Ok(network) => network,
                    Err(also) => {
                        let reason = format!("{reason}; {also}");
                        info!(reason, "machines have no network of their own");
                        Network::None { reason }
                    }
                });
            }
            (Mode::User, _) => {
                let user = user(config, &instance.tag).await;
                return user.map_err(|reason| Error::NoNetwork { reason });
            }
            (Mode::Routed | Mode::Auto, None) => {}
        }
        match settle::routed(config, store, instance, data_dir, &records).await {
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
        if let Err(error) = routed.remove_strays(uid) {
            warn!(error = %error.chain(), "what a crash left of machines' networks cannot be removed");
        }
        let keeper = routed.clone();
        let spawned = std::thread::Builder::new()
            .name("hutch-firewall".into())
            .spawn(move || keeper.keep());
        if let Err(error) = spawned {
            warn!(%error, "the firewall is not kept");
        }
        if routed.on_bridge() {
            let keeper = routed.clone();
            let spawned = std::thread::Builder::new()
                .name("hutch-bridge".into())
                .spawn(move || keeper.keep_bridge());
            if let Err(error) = spawned {
                warn!(%error, "the bridge of machines is not kept");
            }
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
            Network::User(_) | Network::None { .. } => u16::MAX - 1,
        }
    }

    /// Makes a machine's network before its VMM is started. It may be there already.
    pub async fn up(
        &self,
        machine: &Arc<engine::Machine>,
        slot: u16,
        runtime: &dyn Runtime,
    ) -> Result<Plug, Error> {
        let routed = match self {
            Network::Routed(routed) if runtime.capabilities().network => routed.clone(),
            _ => {
                let current = machine.cell.get();
                return Ok(current.map_or_else(Plug::restricted, |current| {
                    self.plug(&current.record, runtime)
                }));
            }
        };
        let machine = machine.clone();
        let card = blocking("make the machine's network", move || {
            routed.up(slot, uid(slot), || member(&machine))
        });
        Ok(match card.await? {
            Some(card) => Plug::tap(card),
            None => Plug::restricted(),
        })
    }

    /// What a machine that runs was plugged into.
    pub fn plug(&self, record: &MachineRecord, runtime: &dyn Runtime) -> Plug {
        match self {
            Network::Routed(routed) if runtime.capabilities().network => routed
                .card(record.slot)
                .map_or_else(Plug::restricted, Plug::tap),
            Network::User(user) if runtime.has_user_network() => user.plug(record),
            _ => Plug::restricted(),
        }
    }

    /// Removes what a machine had, whatever that was. Its VMM is gone.
    pub async fn down(&self, slot: u16, tag: &str) -> Result<(), Error> {
        let routed = match self {
            Network::Routed(routed) => Some(routed.clone()),
            Network::User(_) | Network::None { .. } => None,
        };
        let label = hutch_net::label(tag, slot);
        blocking("remove the machine's network", move || match routed {
            Some(routed) => routed.down(slot, uid(slot)),
            // Of a time when machines had one.
            None if rustix::process::geteuid().is_root() => {
                Ok(Links::open()?.down(&label, uid(slot))?)
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
        let user =
            matches!(self, Network::User(_)) && runtime.is_some_and(Runtime::has_user_network);
        let mode = match runtime.map(Runtime::root) {
            _ if routed
                .as_ref()
                .is_some_and(|(routed, _)| routed.on_bridge()) =>
            {
                NetworkMode::Bridge
            }
            _ if routed.is_some() => NetworkMode::Routed,
            _ if user => NetworkMode::User,
            Some(hutch_runtime::Root::Layer) => NetworkMode::Runtime,
            _ => NetworkMode::None,
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
            identity: Configure::default(),
        }
    }

    fn tap(card: Card) -> Plug {
        let machine = &card.machine;
        let mut addresses = vec![address(machine.ipv4, card.gateway)];
        if card.ipv6 {
            addresses.push(address(machine.ipv6, GATEWAY6));
        }
        Plug {
            nic: Nic::Tap {
                name: machine.label.clone(),
                mac: machine.mac,
            },
            identity: Configure {
                addresses,
                mtu: card.mtu,
                dns_servers: vec![card.gateway.to_string()],
                dns_search: vec![dns::ZONE.to_owned()],
                ..Configure::default()
            },
        }
    }
}

/// The one address of the guest's only card, with everything else behind the gateway.
fn address(address: impl Into<IpAddr>, gateway: impl Into<IpAddr>) -> Address {
    let address = address.into();
    let bits = if address.is_ipv4() { 32 } else { 128 };
    Address {
        interface: String::new(),
        cidr: format!("{address}/{bits}"),
        gateway: gateway.into().to_string(),
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
            let stopped = matches!(plan::status(&record), Status::Stopped | Status::Failed);
            if matches!(shared.network(), Network::User(_)) && !stopped && policy != record.network
            {
                return Err(Error::wrong_status(
                    &record.name,
                    plan::status(&record),
                    "change its network, which a server without root settles at the start",
                ));
            }
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
        let able = match self.network() {
            Network::User(_) => runtime.has_user_network(),
            Network::Routed(_) | Network::None { .. } => runtime.capabilities().network,
        };
        if !able {
            return Err(Error::Unable {
                runtime: runtime.name().to_owned(),
                what: "give machines a network with a policy",
                could: None,
            });
        }
        match self.network() {
            Network::Routed(_) => Ok(()),
            Network::User(_) if User::holds(policy) => Ok(()),
            Network::User(_) => Err(Error::NoNetwork {
                reason: "without root there is only the egress `public` or `none`".into(),
            }),
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

/// The network of machines whose server has no privilege, or why there is none.
async fn user(config: &NetworkConfig, tag: &str) -> Result<Network, String> {
    let found = hutch_runtime::user_network(None).await;
    let program = found.map_err(|why| why.reason)?;
    let user = User::new(program, tag, &config.private);
    user.map(|user| Network::User(Arc::new(user)))
        .ok_or_else(|| "no address is to be had".to_owned())
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
