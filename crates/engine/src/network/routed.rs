//! Machines that the host routes for: their taps and the firewall, as their records say.
//!
//! One lock holds what is in the kernel, so that what is applied is never older than what was applied before; the calls to the
//! kernel below it take about a millisecond.

mod bridged;

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hutch_net::address::{Addresses, GATEWAY};
use hutch_net::bridge::{self, Bridge};
use hutch_net::cidr::Cidr;
use hutch_net::dns::{self, Upstreams};
use hutch_net::domain::{Domain, Judgement};
use hutch_net::elements::{self, Limits};
use hutch_net::firewall::{Config, Firewall, Verified};
use hutch_net::link::{Links, mtu};
use hutch_net::rules::{Link, Rules};
use hutch_net::tap::Tap;
use tracing::{error, info, warn};

use super::names::{Members, Names};
use super::policy::{Member, machines};
use crate::Error;
use crate::config::NetworkConfig;

/// Whom the host asks about names.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Between two looks at the firewall when no event says that somebody changed it, and at the uplinks.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The routed network of an instance.
pub(crate) struct Routed {
    number: NonZeroU16,
    addresses: Addresses,
    /// The host's address as machines see it.
    gateway: Ipv4Addr,
    on_bridge: bool,
    ipv6: bool,
    limits: Limits,
    names: Arc<Names>,
    resolver: Mutex<Option<dns::Server>>,
    inner: Mutex<Inner>,
    /// Set once; the keeper then ends at its next look.
    ended: AtomicBool,
}

struct Inner {
    links: Links,
    bridge: Option<Bridge>,
    firewall: Firewall,
    mtu: u32,
}

/// What a machine is told of its network.
#[derive(Debug, Clone)]
pub(crate) struct Card {
    pub machine: elements::Machine,
    pub gateway: Ipv4Addr,
    pub mtu: u32,
    pub ipv6: bool,
}

/// What an instance is on its host.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Tells its connections and networks from those of others.
    pub number: NonZeroU16,
    pub tag: String,
    /// For whoever finds what is ours.
    pub instance: String,
    /// The port of the resolver of the server before.
    pub dns_port: Option<u16>,
}

impl Routed {
    /// Takes over what is there of this instance, with just these machines in the firewall.
    pub fn open(
        config: &NetworkConfig,
        identity: &Identity,
        mut links: Links,
        addresses: Addresses,
        members: impl IntoIterator<Item = (u16, Member)>,
    ) -> Result<Arc<Routed>, Error> {
        links.forward()?;
        let mtu = mtu(&links.uplinks()?);
        let mut bridge = match &config.bridge {
            Some(name) => Some(open_bridge(name, identity, &addresses, mtu, links.ipv6())?),
            None => None,
        };
        let gateway = match &bridge {
            Some(_) => addresses.on_the_bridge().0,
            None => GATEWAY,
        };
        let limits = Limits {
            connections: config.connections,
            out_bytes: config.out_bytes_per_s,
            in_bytes: config.in_bytes_per_s,
        };
        let members: Members = members
            .into_iter()
            .filter_map(|(slot, member)| {
                let machine = machine_of(&addresses, slot, identity.number, bridge.is_some())?;
                Some((machine.label.clone(), (machine, member)))
            })
            .collect();
        let all = machines(&members, members.keys().cloned(), limits);
        if let Some(bridge) = &mut bridge {
            bridge.remember(&all)?;
        }
        let names = Arc::new(Names::new(members, &all));
        let resolver = dns::Server::start(
            dns::Config {
                address: gateway.into(),
                port: identity.dns_port,
                upstreams: match config.dns.is_empty() {
                    true => Upstreams::File(RESOLV_CONF.into()),
                    false => Upstreams::Given(config.dns.clone()),
                },
                host_networks: config.private.clone(),
                limits: dns::Limits::default(),
            },
            names.clone(),
        );
        let resolver = resolver.map_err(|source| Error::Resolver { source })?;
        let firewall = Firewall::open(
            Config {
                rules: Rules {
                    tag: identity.tag.clone(),
                    gateway,
                    dns_port: Some(resolver.port()),
                    host_networks: config.private.clone(),
                    link: bridge.as_ref().map_or(Link::Taps, Bridge::link),
                },
                instance: identity.instance.clone(),
                number: identity.number,
                own: true,
            },
            all,
        )?;
        let routed = Arc::new(Routed {
            number: identity.number,
            addresses,
            gateway,
            on_bridge: bridge.is_some(),
            ipv6: bridge.as_ref().map_or(links.ipv6(), Bridge::ipv6),
            limits,
            names,
            resolver: Mutex::new(Some(resolver)),
            inner: Mutex::new(Inner {
                mtu: bridge.as_ref().map_or(mtu, Bridge::mtu),
                links,
                bridge,
                firewall,
            }),
            ended: AtomicBool::new(false),
        });
        routed.names.recorded_by(&routed);
        Ok(routed)
    }

    /// Where the resolver listens on the gateway's address.
    pub fn dns_port(&self) -> Option<u16> {
        let resolver = self.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        resolver.as_ref().map(dns::Server::port)
    }

    /// Puts what a name led a machine to into the firewall.
    pub fn learn(
        &self,
        label: &str,
        name: &Domain,
        addresses: &[IpAddr],
        lifetime: Duration,
    ) -> Result<Judgement, Error> {
        let mut inner = self.inner();
        Ok(inner.firewall.learn(label, name, addresses, lifetime)?)
    }

    /// The network that machines are in.
    pub fn network(&self) -> Cidr {
        self.addresses.ipv4()
    }

    /// The addresses of a slot.
    pub fn machine(&self, slot: u16) -> Option<elements::Machine> {
        machine_of(&self.addresses, slot, self.number, self.on_bridge)
    }

    /// Whether they are on a bridge.
    pub fn on_bridge(&self) -> bool {
        self.on_bridge
    }

    /// The highest slot that has addresses.
    pub fn last_slot(&self) -> u16 {
        self.addresses.last_slot()
    }

    /// Whether machines have IPv6 among themselves and to the host.
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// Lets a machine's packets through as its policy says, then brings its tap up. What is so already stays. `member`
    /// is asked below the lock, so that a policy that is changed meanwhile is not undone.
    pub fn up(
        &self,
        slot: u16,
        owner: u32,
        member: impl FnOnce() -> Option<Member>,
    ) -> Result<Option<Card>, Error> {
        let machine = self.machine(slot);
        let machine = machine.ok_or_else(|| self.no_room())?;
        let mut inner = self.inner();
        let Some(member) = member() else {
            return Ok(None);
        };
        let alias = member.id.to_string();
        self.apply(&mut inner, &machine, Some(member))?;
        let mtu = inner.mtu;
        let Inner { links, bridge, .. } = &mut *inner;
        match bridge {
            Some(bridge) => {
                Tap::new(&machine.label, owner)?.make()?;
                bridge.attach(&machine, &alias)?;
            }
            None => links.up(&machine, owner, mtu, &alias)?,
        }
        Ok(Some(self.plugged(machine, mtu)))
    }

    /// What a machine that is up is told.
    pub fn card(&self, slot: u16) -> Option<Card> {
        let mtu = self.inner().mtu;
        Some(self.plugged(self.machine(slot)?, mtu))
    }

    fn plugged(&self, machine: elements::Machine, mtu: u32) -> Card {
        Card {
            machine,
            gateway: self.gateway,
            mtu,
            ipv6: self.ipv6,
        }
    }

    /// Applies a machine's policy as it is now, when it has a network.
    pub fn renew(&self, slot: u16, member: impl FnOnce() -> Option<Member>) -> Result<(), Error> {
        let Some(machine) = self.machine(slot) else {
            return Ok(());
        };
        let mut inner = self.inner();
        match member() {
            Some(member) if self.knows(&machine.label) => {
                self.apply(&mut inner, &machine, Some(member))
            }
            _ => Ok(()),
        }
    }

    /// Removes a machine's tap, its elements in the firewall and its connections. Its VMM is gone.
    pub fn down(&self, slot: u16, owner: u32) -> Result<(), Error> {
        let Some(machine) = self.machine(slot) else {
            return Ok(());
        };
        // The kernel takes longer for this than for all else together, waiting for its processors to have let go of the
        // device; meanwhile other machines come and go. With its VMM gone, nobody speaks through the tap.
        Tap::new(&machine.label, owner)?.remove()?;
        let mut inner = self.inner();
        if let Some(bridge) = &mut inner.bridge {
            bridge.detach(&machine)?;
        }
        self.apply(&mut inner, &machine, None)?;
        inner.firewall.forget_connections(slot)?;
        Ok(())
    }

    /// Removes the taps of slots that have no machine: what a crash left.
    pub fn remove_strays(&self, owner: impl Fn(u16) -> u32) -> Result<(), Error> {
        let mut inner = self.inner();
        let prefix = inner.firewall.prefix();
        for name in inner.links.names(&prefix)? {
            if self.knows(&name) {
                continue;
            }
            let slot = name
                .strip_prefix(&prefix)
                .and_then(|slot| slot.parse().ok());
            let Some(slot) = slot else {
                warn!(name, "an interface with a name like ours is none of ours");
                continue;
            };
            warn!(name, "removing the tap of no machine");
            inner.links.down(&name, owner(slot))?;
            inner.firewall.forget_connections(slot)?;
        }
        if let Some(bridge) = &mut inner.bridge {
            let all: Vec<_> = self.names.members(|members| {
                members
                    .values()
                    .map(|(machine, _)| machine.clone())
                    .collect()
            });
            bridge.sweep(self.number, &all)?;
        }
        Ok(())
    }

    /// Puts right what others changed, as soon as the kernel tells of it, until [`Routed::end`]. Blocks.
    pub fn keep(&self) {
        let mut events = match self.inner().firewall.events() {
            Ok(events) => events,
            Err(error) => {
                error!(error = %Error::from(error).chain(), "changes of the firewall by others are not told");
                return;
            }
        };
        while !self.ended.load(Ordering::Acquire) {
            if let Err(error) = events.wait(LOOK_AGAIN) {
                warn!(%error, "changes of the firewall by others are not told");
                std::thread::sleep(LOOK_AGAIN);
            }
            let mut inner = self.inner();
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            match inner.firewall.verify() {
                Ok(Verified::Sound) => {}
                Ok(Verified::Repaired) => {
                    warn!("somebody changed the firewall of machines: it is as it should be again");
                }
                Err(error) => {
                    error!(error = %Error::from(error).chain(), "the firewall of machines is not as it should be");
                }
            }
            if !self.on_bridge
                && let Ok(uplinks) = inner.links.uplinks()
            {
                inner.mtu = mtu(&uplinks);
            }
        }
    }

    /// Ends the keeper. Without a machine, nothing of the network stays on the host.
    pub fn end(&self) {
        let mut inner = self.inner();
        self.ended.store(true, Ordering::Release);
        drop(self.resolver.lock().map(|mut resolver| resolver.take()));
        if !self.names.members(Members::is_empty) {
            return;
        }
        let network = self.addresses.ipv4();
        let removed = inner.firewall.destroy().map_err(Error::from);
        let bridge = inner.bridge.take();
        let removed = removed.and_then(|()| match bridge {
            Some(bridge) => Ok(bridge.remove().map(drop)?),
            None => Ok(inner.links.give_up(&network, self.number)?),
        });
        match removed {
            Ok(()) => info!("the network of machines is taken down, since there is none"),
            Err(error) => {
                warn!(error = %error.chain(), "the network of machines cannot be taken down")
            }
        }
    }

    /// Remembers a machine, or forgets one, and changes in the firewall whomever that concerns.
    fn apply(
        &self,
        inner: &mut Inner,
        machine: &elements::Machine,
        member: Option<Member>,
    ) -> Result<(), Error> {
        let label = machine.label.clone();
        let mut concerned: Vec<String> = self.names.members(|members| {
            let before = members.get(&label).map(|(_, member)| member);
            let others = members.iter().filter(|(other, (_, its))| {
                let mut of = before.into_iter().chain(&member);
                **other != label && of.any(|member| member.shares_a_group(its))
            });
            others.map(|(label, _)| label.clone()).collect()
        });
        match member {
            Some(member) => {
                let row = (machine.clone(), member);
                self.names
                    .change(|members| members.insert(label.clone(), row));
                concerned.push(label);
            }
            None => {
                inner.firewall.remove(&label)?;
                self.names.change(|members| members.remove(&label));
            }
        }
        let wanted = self
            .names
            .members(|members| machines(members, concerned, self.limits));
        for wanted in wanted {
            let there = inner.firewall.machines().get(&wanted.label);
            match there.map(|there| *there == wanted) {
                Some(true) => {}
                Some(false) => inner
                    .firewall
                    .set_policy(&wanted.label, wanted.policy.clone())?,
                None => inner.firewall.add(wanted.clone())?,
            }
            self.names.are(&[wanted]);
        }
        Ok(())
    }

    fn knows(&self, label: &str) -> bool {
        self.names.members(|members| members.contains_key(label))
    }

    fn no_room(&self) -> Error {
        Error::Exhausted {
            what: "addresses",
            need: 1,
            have: 0,
            unit: "addresses",
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic below it leaves what the kernel has; the keeper puts the rest right.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The machine of a slot, as it is on its link.
fn machine_of(
    addresses: &Addresses,
    slot: u16,
    number: NonZeroU16,
    on_bridge: bool,
) -> Option<elements::Machine> {
    let machine = addresses.machine(slot)?;
    Some(match on_bridge {
        true => bridge::on_bridge(machine, number),
        false => machine,
    })
}

fn open_bridge(
    name: &str,
    identity: &Identity,
    addresses: &Addresses,
    mtu: u32,
    ipv6: bool,
) -> Result<Bridge, Error> {
    let (ipv4_gateway, ipv6_gateway) = addresses.on_the_bridge();
    Ok(Bridge::open(bridge::Config {
        name: name.to_owned(),
        instance: identity.instance.clone(),
        ipv4: (ipv4_gateway, addresses.ipv4().prefix()),
        ipv6: ipv6.then_some((ipv6_gateway, addresses.ipv6().prefix())),
        mtu,
    })?)
}
