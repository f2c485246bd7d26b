//! A bridge that machines' taps are ports of: made and kept by us, or somebody else's that has our gateway's address.
//!
//! Machines have the host as their router here, too, and the ports pass nothing to each other; so all that differs from
//! taps alone is that others may add ports of their own, and that machines need MACs of their own. Routes to machines
//! are those that the bridge's own addresses bring. Of somebody else's bridge nothing is changed but that our taps
//! become ports of it, which keeps its MAC and MTU as they are, and that neighbours are added.
//!
//! Facts: the kernel's `net/bridge/br_if.c`, `br_stp_if.c` (the bridge's MAC), `br_fdb.c` (what frames move).

mod keep;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use hutch_contract::error::Kind;
use hutch_netlink::route::{self, Change};
use hutch_netlink::{Protocol, Socket, bridge};
use rustix::io::Errno;

use crate::address::{GATEWAY_MAC, GATEWAY6, link_local};
use crate::elements::Machine;
use crate::link::{self, ensure, kernel, read, settings};
use crate::rules::Link;
use keep::Looks;
pub use keep::Verified;

/// The driver's word.
const KIND: &str = "bridge";
/// How the alias of every bridge of ours begins.
const ALIAS: &str = "hutch ";
/// The kernel takes less than 256 bytes (`IFALIASZ`).
const ALIAS_MAX: usize = 200;

/// Why a bridge is not to be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something else has the name. Nothing was done to it.
    #[error("the interface {name} cannot have machines: {because}")]
    Foreign {
        /// Its name.
        name: String,
        /// What it is, and its addresses.
        because: String,
        /// What it would need.
        gateway: String,
    },
    /// Somebody else's bridge that machines were on is no longer there.
    #[error("the bridge {name}, which somebody else made, is gone")]
    Gone {
        /// Its name.
        name: String,
    },
    /// The kernel refused, or a setting cannot be written.
    #[error(transparent)]
    Link(#[from] link::Error),
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Foreign { .. } => Kind::Conflict,
            Error::Gone { .. } => Kind::Unavailable,
            Error::Link(error) => error.kind(),
        }
    }

    /// What may help.
    pub fn hint(&self) -> Option<String> {
        let (name, gateway) = match self {
            Error::Foreign { name, gateway, .. } => (name, gateway),
            Error::Gone { name } => {
                return Some(format!(
                    "make {name} again as it was: machines come back to it by themselves"
                ));
            }
            Error::Link(_) => return None,
        };
        Some(format!(
            "name a bridge that does not exist, and it is made; or choose the network whose first address {name} has; \
             or give {name}, as a bridge, {gateway} and no other IPv4 address (other systems that make a br0 use \
             172.16.0.1/16, 10.20.1.1/24 or 192.168.100.1/24)"
        ))
    }
}

/// What every call here returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Which bridge, and what it is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its name.
    pub name: String,
    /// Whose it is, for whoever finds it; tells ours from those of other instances.
    pub instance: String,
    /// The gateway's address and the machines' network: the first address of, say, 172.16.0.0/16.
    pub ipv4: (Ipv4Addr, u8),
    /// The host's address in the machines' unique local network; none where the host has no IPv6.
    pub ipv6: Option<(Ipv6Addr, u8)>,
    /// Bytes of the largest packet, for one that we make.
    pub mtu: u32,
}

/// A bridge that is there and fits. Blocking; a call takes about a millisecond.
///
/// It belongs to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Bridge {
    config: Config,
    socket: Socket,
    index: u32,
    mac: [u8; 6],
    mtu: u32,
    ours: bool,
    ipv6: bool,
    /// As it was when it last fitted.
    looks: Option<Looks>,
}

/// Something of ours around bridges.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Found {
    /// A bridge that we made.
    Bridge(String),
    /// A machine's address whose MAC a bridge has been told.
    Neighbour(String, IpAddr),
}

impl Bridge {
    /// Makes the bridge, or takes the one that is there: ours is repaired, somebody else's must fit as it is.
    ///
    /// # Errors
    /// [`Error::Foreign`], or the kernel refuses.
    pub fn open(config: Config) -> Result<Self> {
        let name = config.name.clone();
        let socket = Socket::open(Protocol::Route).map_err(kernel("ask about", &name))?;
        let mut opened = Self {
            socket,
            index: 0,
            mac: GATEWAY_MAC,
            mtu: config.mtu,
            ours: false,
            ipv6: config.ipv6.is_some(),
            looks: None,
            config,
        };
        opened.settle()?;
        Ok(opened)
    }

    /// Finds the bridge, or makes it, and sees to it that it is as it must be.
    fn settle(&mut self) -> Result<()> {
        let name = self.config.name.clone();
        let mut found = find(&mut self.socket, &name)?;
        if found.is_none() {
            let made = self.socket.apply(&[bridge::create(&name, GATEWAY_MAC)]);
            made.map_err(kernel("make the bridge", &name))?;
            found = find(&mut self.socket, &name)?;
        }
        let Some(link) = found else {
            return Err(gone(&name));
        };
        let ours = link.kind == KIND && link.alias == alias(&self.config.instance);
        self.ours = ours || self.is_half_made(&link)?;
        match self.ours {
            true => self.repair(&link)?,
            false => self.use_as_it_is(&link)?,
        }
        let link = find(&mut self.socket, &name)?.ok_or_else(|| gone(&name))?;
        self.looks = Some(self.look(link)?);
        Ok(())
    }

    /// For the firewall's rules. It may change when somebody changes a bridge that is not ours.
    pub fn link(&self) -> Link {
        Link::Bridge {
            name: self.config.name.clone(),
            mac: self.mac,
        }
    }

    /// Bytes of the largest packet of a machine's card.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Whether machines have IPv6: somebody else's bridge may lack the addresses.
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// Whether we made it.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Makes a machine's tap, which must be there, a port that is confined to the host, and brings it up. The firewall
    /// must know the machine before. Repairs one that is a port already. `alias` is for whoever finds the tap.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(&mut self, machine: &Machine, alias: &str) -> Result<()> {
        self.join(machine, Some(alias))
    }

    fn join(&mut self, machine: &Machine, alias: Option<&str>) -> Result<()> {
        let name = machine.label.as_str();
        let port = route::index(&mut self.socket, name).map_err(kernel("find", name))?;
        // A bridge takes the lowest MAC and MTU of its ports where nobody has set others.
        let before = Change {
            mtu: Some(self.mtu),
            address: Some(self.mac),
            alias,
            ..Change::default()
        };
        // The port itself speaks to nobody.
        let setting = format!("ipv6/conf/{name}/disable_ipv6");
        if read(&setting).is_some() {
            ensure(&setting, "1")?;
        }
        let up = Change {
            up: Some(true),
            ..Change::default()
        };
        let mut messages = vec![
            route::change(port, &before),
            bridge::join(port, self.index),
            bridge::confine(port),
            bridge::add_place(port, machine.mac),
        ];
        let addresses = self.addresses(machine).into_iter();
        let neighbour = |address| route::add_neighbour(self.index, address, machine.mac);
        messages.extend(addresses.map(neighbour));
        // A port that is not confined must not come up.
        let confined = self.socket.apply(&messages);
        confined.map_err(kernel("confine the tap", name))?;
        let done = self.socket.apply(&[route::change(port, &up)]);
        Ok(done.map_err(kernel("bring up the tap", name))?)
    }

    /// Tells the bridge again about machines whose taps are ports of it: it may have forgotten.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remember(&mut self, machines: &[Machine]) -> Result<()> {
        let mut messages = Vec::new();
        for machine in machines {
            let addresses = self.addresses(machine).into_iter();
            let neighbour = |address| route::add_neighbour(self.index, address, machine.mac);
            messages.extend(addresses.map(neighbour));
        }
        let done = self.socket.apply(&messages);
        Ok(done.map_err(kernel("tell neighbours to", &self.config.name))?)
    }

    /// Forgets what the bridge was told about a machine, whose tap has been removed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn detach(&mut self, machine: &Machine) -> Result<()> {
        for address in self.addresses(machine) {
            self.forget(address)?;
        }
        Ok(())
    }

    /// Forgets what the bridge was told about machines of this instance that are none of these.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sweep(&mut self, number: NonZeroU16, machines: &[Machine]) -> Result<()> {
        let known = neighbours(&mut self.socket, self.index, &self.config.name, number)?;
        for (address, mac) in known {
            let is_of = |machine: &Machine| machine.mac[..] == mac[..];
            if !machines.iter().any(is_of) {
                self.forget(address)?;
            }
        }
        Ok(())
    }

    /// Removes the bridge if we made it and it has no port any more; returns whether it did.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(mut self) -> Result<bool> {
        match self.ours {
            true => remove(&mut self.socket, self.index, &self.config.name),
            false => Ok(false),
        }
    }

    /// Whether we were stopped when we had made it, and it had no alias yet.
    fn is_half_made(&mut self, link: &route::Link) -> Result<bool> {
        let bare = link.kind == KIND && link.alias.is_empty() && !link.up;
        Ok(bare && link.address == GATEWAY_MAC && addresses(&mut self.socket, link)?.is_empty())
    }

    fn repair(&mut self, link: &route::Link) -> Result<()> {
        (self.index, self.mac, self.mtu) = (link.index, GATEWAY_MAC, self.config.mtu);
        self.ipv6 = self.config.ipv6.is_some();
        let name = &self.config.name;
        let alias = alias(&self.config.instance);
        let change = Change {
            mtu: Some(self.config.mtu),
            // To be told a MAC makes a bridge forget its neighbours, also when it is the one that it has.
            address: (link.address[..] != GATEWAY_MAC).then_some(GATEWAY_MAC),
            alias: Some(&alias),
            no_own_ipv6: self.ipv6,
            ..Change::default()
        };
        let (address, prefix) = self.config.ipv4;
        let mut messages = vec![
            route::change(self.index, &change),
            bridge::no_spanning_tree(self.index),
            route::add_address(self.index, address.into(), prefix),
        ];
        if let Some((address, prefix)) = self.config.ipv6 {
            messages.extend([
                route::add_address(self.index, address.into(), prefix),
                route::add_address(self.index, GATEWAY6.into(), 64),
            ]);
        }
        let up = Change {
            up: Some(true),
            ..Change::default()
        };
        settings(name, self.ipv6)?;
        messages.push(route::change(self.index, &up));
        let done = self.socket.apply(&messages);
        Ok(done.map_err(kernel("set up the bridge", name))?)
    }

    fn use_as_it_is(&mut self, link: &route::Link) -> Result<()> {
        let (gateway, prefix) = self.config.ipv4;
        let has = addresses(&mut self.socket, link)?;
        let ipv4: Vec<_> = has
            .iter()
            .filter(|(address, _)| address.is_ipv4())
            .collect();
        let listed = || {
            let all: Vec<String> = has
                .iter()
                .map(|(ip, prefix)| format!("{ip}/{prefix}"))
                .collect();
            match all.is_empty() {
                true => "no address".to_owned(),
                false => all.join(", "),
            }
        };
        let because = match &link.kind[..] {
            KIND if link.alias.starts_with(ALIAS) => {
                let alias = &link.alias;
                format!(
                    "it is a bridge of another instance, {alias:?}, with {}",
                    listed()
                )
            }
            KIND if ipv4 != [&(gateway.into(), prefix)] => {
                format!("it is a bridge that somebody else made, with {}", listed())
            }
            KIND if !link.up => "it is a bridge that somebody else made, and it is down".to_owned(),
            KIND => {
                let mac = <[u8; 6]>::try_from(&link.address[..]).unwrap_or_default();
                // One whose last port has gone has none, until it takes that of our first tap.
                self.mac = if mac == [0; 6] { GATEWAY_MAC } else { mac };
                (self.index, self.mtu) = (link.index, link.mtu);
                self.ipv6 = self.config.ipv6.is_some() && self.has_ipv6(link, &has)?;
                return Ok(());
            }
            "" => format!("it is a network card, with {}", listed()),
            kind => format!("it is of the kind {kind:?}, with {}", listed()),
        };
        Err(Error::Foreign {
            name: link.name.clone(),
            because,
            gateway: format!("{gateway}/{prefix}"),
        })
    }

    /// Whether it has what IPv6 needs, which we do not add.
    fn has_ipv6(&mut self, link: &route::Link, has: &[(IpAddr, u8)]) -> Result<bool> {
        let wanted = self
            .config
            .ipv6
            .map(|(address, prefix)| (address.into(), prefix));
        let has_own = wanted.is_some_and(|wanted| has.contains(&wanted));
        let gateway = route::has_link_local(&mut self.socket, link.index, GATEWAY6);
        Ok(has_own && gateway.map_err(kernel("list the addresses of", &link.name))?)
    }

    fn addresses(&self, machine: &Machine) -> Vec<IpAddr> {
        let mut all = vec![IpAddr::V4(machine.ipv4)];
        if self.ipv6 {
            all.extend([IpAddr::V6(machine.ipv6), machine.link_local.into()]);
        }
        all
    }

    fn forget(&mut self, address: IpAddr) -> Result<()> {
        forget(&mut self.socket, self.index, address, &self.config.name)
    }
}

/// What an instance has on bridges of this host: those that it made, and machines that any bridge was told of.
///
/// # Errors
/// The kernel refuses.
pub fn inventory(instance: &str, number: NonZeroU16) -> Result<Vec<Found>> {
    let what = "list";
    let mut socket = Socket::open(Protocol::Route).map_err(kernel(what, "bridges"))?;
    let links = route::links(&mut socket, "").map_err(kernel(what, "bridges"))?;
    let mut all = Vec::new();
    for link in links.into_iter().filter(|link| link.kind == KIND) {
        if link.alias == alias(instance) {
            all.push(Found::Bridge(link.name.clone()));
        }
        let known = neighbours(&mut socket, link.index, &link.name, number)?.into_iter();
        all.extend(known.map(|(address, _)| Found::Neighbour(link.name.clone(), address)));
    }
    Ok(all)
}

/// Removes what an instance without machines and without a server has on bridges of this host; bridges that it made stay
/// when others have ports in them. Returns whether there was anything to remove.
///
/// # Errors
/// The kernel refuses.
pub fn clear(instance: &str, number: NonZeroU16) -> Result<bool> {
    let what = "clear";
    let mut socket = Socket::open(Protocol::Route).map_err(kernel(what, "bridges"))?;
    let links = route::links(&mut socket, "").map_err(kernel(what, "bridges"))?;
    let mut any = false;
    for link in links.into_iter().filter(|link| link.kind == KIND) {
        let ours = link.alias == alias(instance);
        if ours && remove(&mut socket, link.index, &link.name)? {
            any = true;
            continue;
        }
        for (address, _) in neighbours(&mut socket, link.index, &link.name, number)? {
            forget(&mut socket, link.index, address, &link.name)?;
            any = true;
        }
    }
    Ok(any)
}

/// Removes a bridge, unless it has a port; returns whether it is gone.
fn remove(socket: &mut Socket, index: u32, name: &str) -> Result<bool> {
    let ports = bridge::ports(socket, index);
    if !ports.map_err(kernel("list the ports of", name))?.is_empty() {
        return Ok(false);
    }
    match socket.apply(&[route::delete(index)]) {
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(true),
        done => Ok(done.map(|()| true).map_err(kernel("remove", name))?),
    }
}

fn forget(socket: &mut Socket, bridge: u32, address: IpAddr, name: &str) -> Result<()> {
    match socket.apply(&[route::delete_neighbour(bridge, address)]) {
        Err(error) if error.errno() != Some(Errno::NOENT) => {
            Err(kernel("forget a neighbour of", name)(error).into())
        }
        _ => Ok(()),
    }
}

/// The MAC of a slot's machine, which no other one on the bridge has: the instance's number and the slot.
pub fn mac(number: NonZeroU16, slot: u16) -> [u8; 6] {
    let ([a, b], [c, d]) = (number.get().to_be_bytes(), slot.to_be_bytes());
    [2, 0x68, a, b, c, d]
}

/// A machine as it is on a bridge: with a MAC, and the link-local address that follows from it, of its own.
pub fn on_bridge(machine: Machine, number: NonZeroU16) -> Machine {
    let mac = mac(number, machine.slot);
    Machine {
        mac,
        link_local: link_local(mac),
        ..machine
    }
}

fn alias(instance: &str) -> String {
    let mut alias = format!("{ALIAS}{instance}");
    while alias.len() > ALIAS_MAX {
        alias.pop();
    }
    alias
}

fn gone(name: &str) -> Error {
    let gone = hutch_netlink::Error::Refused {
        what: "find a link",
        errno: Errno::NODEV,
        said: String::new(),
    };
    kernel("keep the bridge", name)(gone).into()
}

fn find(socket: &mut Socket, name: &str) -> Result<Option<route::Link>> {
    Ok(route::link(socket, name).map_err(kernel("look at", name))?)
}

fn addresses(socket: &mut Socket, link: &route::Link) -> Result<Vec<(IpAddr, u8)>> {
    let all = route::addresses(socket, link.index);
    Ok(all.map_err(kernel("list the addresses of", &link.name))?)
}

/// Addresses on a bridge that have MACs of an instance's machines.
fn neighbours(
    socket: &mut Socket,
    bridge: u32,
    name: &str,
    number: NonZeroU16,
) -> Result<Vec<(IpAddr, Vec<u8>)>> {
    let all = route::neighbours(socket, bridge);
    let mut all = all.map_err(kernel("list the neighbours of", name))?;
    let start = &mac(number, 0)[..4];
    all.retain(|(_, mac)| mac.starts_with(start) && mac[..] != GATEWAY_MAC);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_a_mac_of_its_own() {
        let number = NonZeroU16::new(0xab12).unwrap();
        assert_eq!(mac(number, 7), [2, 0x68, 0xab, 0x12, 0, 7]);
        assert_ne!(mac(number, 7), mac(number, 0x700));
        assert_ne!(mac(number, 7), mac(NonZeroU16::MIN, 7));
    }

    #[test]
    fn a_long_name_of_an_instance_is_cut_between_characters() {
        assert!(alias(&"ä".repeat(300)).len() <= ALIAS_MAX);
        assert_eq!(alias("one"), "hutch one");
    }
}
