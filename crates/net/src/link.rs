//! The host's side of routed machines: taps brought up with gateway, routes and neighbours; the network that they are
//! in, claimed; the uplinks behind which the world is.
//!
//! All of it belongs to the network namespace of the thread that opened [`Links`].

use std::fs;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use hutch_contract::error::Kind;
use hutch_netlink::route::{self, Change, Route};
use hutch_netlink::{Protocol, Socket};
use rustix::io::Errno;

use crate::address::{GATEWAY, GATEWAY_MAC, GATEWAY6};
use crate::cidr::Cidr;
use crate::elements::Machine;
use crate::tap::{self, Tap};

/// Our routes carry it (`rtm_protocol`), so that they are told from others'.
const PROTOCOL: u8 = 0x68;
/// Routes that router advertisements made (`RTPROT_RA` in `linux/rtnetlink.h`).
const FROM_ROUTERS: u8 = 9;
/// The smallest MTU that IPv6 goes with (RFC 8200).
const LEAST_MTU: u32 = 1280;
/// Of Ethernet.
const USUAL_MTU: u32 = 1500;

/// Why a machine's link is not as it was to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The tap itself.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// The kernel refused.
    #[error("cannot {what} {name}")]
    Kernel {
        /// A verb.
        what: &'static str,
        /// An interface, or a network.
        name: String,
        /// What the kernel said.
        #[source]
        source: hutch_netlink::Error,
    },
    /// A setting of the kernel's cannot be written.
    #[error("cannot write {path}")]
    Setting {
        /// Its file.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Tap(error) => error.kind(),
            Error::Kernel { source, .. } => match source.errno() {
                Some(Errno::PERM | Errno::ACCESS) => Kind::Denied,
                _ => Kind::Bug,
            },
            Error::Setting { .. } => Kind::Denied,
        }
    }
}

/// What every call here returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A way out of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The interface.
    pub name: String,
    /// Bytes of its largest packet.
    pub mtu: u32,
    /// Whether a default route for IPv4 leads there.
    pub ipv4: bool,
    /// Whether one for IPv6 does.
    pub ipv6: bool,
    /// Whether that one came from a router advertisement.
    pub advertised: bool,
}

/// The links of this network namespace. Blocking; a call takes about a millisecond, [`Links::down`] some twenty.
#[derive(Debug)]
pub struct Links {
    socket: Socket,
    ipv6: bool,
}

impl Links {
    /// Opens the way to the kernel.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> Result<Self> {
        let socket = Socket::open(Protocol::Route).map_err(kernel("speak to", "the kernel"))?;
        let ipv6 = ["all", "default"]
            .iter()
            .all(|of| read(&format!("ipv6/conf/{of}/disable_ipv6")).is_some_and(|off| off == "0"));
        Ok(Self { socket, ipv6 })
    }

    /// Whether machines can have IPv6 here.
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// Makes a machine's tap, owned by `owner`, and brings it up; repairs one that is there. The firewall must know the
    /// machine before. `alias` is for whoever finds the tap.
    ///
    /// # Errors
    /// Something else has its name, or the kernel refuses. What was made stays, and goes with [`Links::down`].
    pub fn up(&mut self, machine: &Machine, owner: u32, mtu: u32, alias: &str) -> Result<()> {
        let name = machine.label.as_str();
        Tap::new(name, owner)?.make()?;
        settings(name, self.ipv6)?;
        let index = route::index(&mut self.socket, name).map_err(kernel("find", name))?;
        let change = Change {
            up: Some(true),
            mtu: Some(mtu),
            address: Some(GATEWAY_MAC),
            alias: Some(alias),
            no_own_ipv6: self.ipv6,
        };
        let to = |to: IpAddr, prefix, source| {
            route::add_route(&Route {
                to: (to, prefix),
                link: index,
                gateway: None,
                source,
                protocol: PROTOCOL,
            })
        };
        let mut messages = vec![
            route::change(index, &change),
            route::add_address(index, GATEWAY.into(), 32),
            to(machine.ipv4.into(), 32, Some(GATEWAY.into())),
            route::add_neighbour(index, machine.ipv4.into(), machine.mac),
        ];
        if self.ipv6 {
            messages.extend([
                route::add_address(index, GATEWAY6.into(), 64),
                to(machine.ipv6.into(), 128, None),
                route::add_neighbour(index, machine.ipv6.into(), machine.mac),
                route::add_neighbour(index, machine.link_local.into(), machine.mac),
            ]);
        }
        let done = self.socket.apply(&messages);
        done.map_err(kernel("bring up the tap", name))
    }

    /// Removes a machine's tap, and with it its addresses, routes and neighbours, as [`Tap::remove`] does. One that is
    /// not there is gone already.
    ///
    /// # Errors
    /// It is no tap of that owner's, or a VMM has it open.
    pub fn down(&mut self, label: &str, owner: u32) -> Result<()> {
        Ok(Tap::new(label, owner)?.remove()?)
    }

    /// Names of interfaces that begin so.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn names(&mut self, prefix: &str) -> Result<Vec<String>> {
        let links = route::links(&mut self.socket, prefix);
        let links = links.map_err(kernel("list", "interfaces"))?;
        Ok(links.into_iter().map(|link| link.name).collect())
    }

    /// The interfaces that default routes lead to.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn uplinks(&mut self) -> Result<Vec<Uplink>> {
        let routes = self.destinations()?;
        let links = route::links(&mut self.socket, "");
        let links = links.map_err(kernel("list", "interfaces"))?;
        let uplinks = links.into_iter().filter_map(|link| {
            let here = |ipv4| {
                let mut routes = routes.iter();
                routes.find(move |route| {
                    let (to, prefix) = route.to;
                    prefix == 0 && to.is_ipv4() == ipv4 && route.link == Some(link.index)
                })
            };
            let (ipv4, ipv6) = (here(true), here(false));
            (ipv4.is_some() || ipv6.is_some()).then(|| Uplink {
                name: link.name.clone(),
                mtu: link.mtu,
                ipv4: ipv4.is_some(),
                ipv6: ipv6.is_some(),
                advertised: ipv6.is_some_and(|route| route.protocol == FROM_ROUTERS),
            })
        });
        Ok(uplinks.collect())
    }

    /// The first of `networks` that nobody on this host uses.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unused(&mut self, networks: &[Cidr], number: NonZeroU16) -> Result<Option<Cidr>> {
        for network in networks {
            if self.users(network, number)?.is_empty() {
                return Ok(Some(*network));
            }
        }
        Ok(None)
    }

    /// Networks of the host that overlap with this one, beside the claim and the machines of the instance `number`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn users(&mut self, network: &Cidr, number: NonZeroU16) -> Result<Vec<Cidr>> {
        let routes = self.destinations()?;
        let range = |route: &route::Destination| Cidr::new(route.to.0, route.to.1);
        let claimed_by = |number| {
            move |route: &&route::Destination| {
                route.protocol == PROTOCOL && route.priority == claim(number)
            }
        };
        let own: Vec<Cidr> = routes
            .iter()
            .filter(claimed_by(number))
            .map(range)
            .collect();
        let others = routes.iter().filter(|route| {
            let to = range(route);
            // Routes to machines have no priority: they are of whoever claims the network around them.
            let machine = route.protocol == PROTOCOL && route.priority == 0;
            let ours = claimed_by(number)(route)
                || (machine && own.iter().any(|network| network.covers(&to)));
            route.to.1 > 0 && !ours && (to.covers(network) || network.covers(&to))
        });
        Ok(others.map(range).collect())
    }

    /// Claims a network for the instance `number`: a route that refuses what is to no machine, so that it does not leave
    /// the host either. `false`, and nothing done: somebody else uses it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn claim(&mut self, network: &Cidr, number: NonZeroU16) -> Result<bool> {
        let (first, prefix) = (network.first(), network.prefix());
        let message = route::refuse_network(first, prefix, PROTOCOL, claim(number));
        match self.socket.apply(&[message]) {
            Err(error) if error.errno() != Some(Errno::EXIST) => {
                return Err(kernel("claim the network", &network.to_string())(error));
            }
            _ => {}
        }
        // After it is there: of two that claim at the same time, at least one sees the other.
        let alone = self.users(network, number)?.is_empty();
        if !alone {
            self.give_up(network, number)?;
        }
        Ok(alone)
    }

    /// The networks that the instance `number` claims here.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn claims(&mut self, number: NonZeroU16) -> Result<Vec<Cidr>> {
        let routes = self.destinations()?.into_iter();
        let claims = routes
            .filter(|route| route.protocol == PROTOCOL && route.priority == claim(number))
            .map(|route| Cidr::new(route.to.0, route.to.1));
        Ok(claims.collect())
    }

    /// Gives a network up. One that is not claimed is given up already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn give_up(&mut self, network: &Cidr, number: NonZeroU16) -> Result<()> {
        let (first, prefix) = (network.first(), network.prefix());
        let message = route::no_longer_refuse(first, prefix, PROTOCOL, claim(number));
        match self.socket.apply(&[message]) {
            Err(error) if error.errno() != Some(Errno::SRCH) => {
                Err(kernel("give up the network", &network.to_string())(error))
            }
            _ => Ok(()),
        }
    }

    /// Lets the host forward packets: IPv4 always; IPv6 unless that would cost the host its own default route, which the
    /// kernel drops when it came from a router advertisement and `accept_ra` is not 2. Returns whether IPv6 goes.
    ///
    /// # Errors
    /// A setting cannot be written.
    pub fn forward(&mut self) -> Result<bool> {
        ensure("ipv4/ip_forward", "1")?;
        if !self.ipv6 {
            return Ok(false);
        }
        if read("ipv6/conf/all/forwarding").as_deref() == Some("1") {
            return Ok(true);
        }
        let would_lose = self.uplinks()?.iter().any(|uplink| {
            let accepts = read(&format!("ipv6/conf/{}/accept_ra", uplink.name));
            uplink.advertised && accepts.as_deref() != Some("2")
        });
        if would_lose {
            return Ok(false);
        }
        ensure("ipv6/conf/all/forwarding", "1")?;
        Ok(true)
    }

    fn destinations(&mut self) -> Result<Vec<route::Destination>> {
        route::destinations(&mut self.socket).map_err(kernel("list", "routes"))
    }
}

/// What the kernel must not do by itself on a link that machines are behind.
pub(crate) fn settings(name: &str, ipv6: bool) -> Result<()> {
    for (setting, value) in [
        ("rp_filter", "1"),
        ("arp_ignore", "1"),
        ("send_redirects", "0"),
        ("accept_redirects", "0"),
        ("forwarding", "1"),
    ] {
        ensure(&format!("ipv4/conf/{name}/{setting}"), value)?;
    }
    if ipv6 {
        for setting in ["accept_ra", "autoconf", "accept_redirects"] {
            ensure(&format!("ipv6/conf/{name}/{setting}"), "0")?;
        }
    }
    Ok(())
}

/// The MTU of machines behind these: what fits through each of them.
pub fn mtu(uplinks: &[Uplink]) -> u32 {
    let least = uplinks.iter().map(|uplink| uplink.mtu).min();
    least.unwrap_or(USUAL_MTU).clamp(LEAST_MTU, 65_535)
}

/// The priority of an instance's claims: it tells them from those of others, and lets every other route go before.
fn claim(number: NonZeroU16) -> u32 {
    0x6875_0000 | u32::from(number.get())
}

fn path(setting: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(setting)
}

pub(crate) fn read(setting: &str) -> Option<String> {
    let text = fs::read_to_string(path(setting)).ok()?;
    Some(text.trim().to_owned())
}

/// Writes a setting unless it is so: in containers they may be right and read-only.
pub(crate) fn ensure(setting: &str, value: &str) -> Result<()> {
    if read(setting).as_deref() == Some(value) {
        return Ok(());
    }
    let path = path(setting);
    fs::write(&path, value).map_err(|source| Error::Setting {
        path: path.display().to_string(),
        source,
    })
}

pub(crate) fn kernel<'a>(
    what: &'static str,
    name: &'a str,
) -> impl FnOnce(hutch_netlink::Error) -> Error + use<'a> {
    move |source| Error::Kernel {
        what,
        name: name.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(mtu: u32) -> Uplink {
        Uplink {
            name: "up0".into(),
            mtu,
            ipv4: true,
            ipv6: false,
            advertised: false,
        }
    }

    #[test]
    fn what_leaves_a_machine_fits_through_every_uplink() {
        assert_eq!(mtu(&[]), 1500);
        assert_eq!(mtu(&[uplink(9000), uplink(1420)]), 1420);
        assert_eq!(mtu(&[uplink(576)]), 1280);
        assert_eq!(mtu(&[uplink(65_536)]), 65_535);
    }
}
