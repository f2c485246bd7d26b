//! Links, addresses, routes and neighbours: `linux/rtnetlink.h`, `linux/if_link.h`, `linux/if_addr.h`,
//! `linux/neighbour.h`.
//!
//! Functions make messages, so that several go to the kernel in one [`Socket::apply`].

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::attribute::{attributes, find, ne32, text};
use crate::message::{CREATE, EXCLUSIVE, REPLACE};
use crate::{Error, Message, Reply, Result, Socket};

mod event;

pub use event::Events;

pub(crate) const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(crate) const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
pub(crate) const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
pub(crate) const RTM_GETNEIGH: u16 = 30;

pub(crate) const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
pub(crate) const IFLA_LINKINFO: u16 = 18;
pub(crate) const IFLA_INFO_KIND: u16 = 1;
pub(crate) const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_PERSIST: u16 = 6;
/// `IFF_TAP`, beside 1 for a tun.
const TYPE_TAP: u8 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFF_UP: u32 = 1;
const IFF_RUNNING: u32 = 0x40;
const IFNAMSIZ: usize = 16;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// An address that is used at once: nobody else has it, so nobody needs to be asked.
const IFA_F_NODAD: u32 = 0x02;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTN_UNICAST: u8 = 1;
const RTN_UNREACHABLE: u8 = 7;
const RT_TABLE_MAIN: u8 = 254;
/// The gateway is on this link, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const AF_INET6: u16 = 10;

/// The group of [`Socket::listening`] that tells of links.
pub const LINK_EVENTS: u32 = 1;

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Its number in this network namespace.
    pub index: u32,
    /// At most 15 bytes.
    pub name: String,
    /// Free text that whoever made it left, or nothing.
    pub alias: String,
    /// Whether it has been brought up; it may have no carrier.
    pub up: bool,
    /// Whether packets pass: it is up and has a carrier, and the kernel has dealt with that.
    pub running: bool,
    /// The driver's word for what it is; hardware has none.
    pub kind: String,
    /// For those of the tun driver.
    pub tun: Option<Tun>,
    /// Bytes of the largest packet.
    pub mtu: u32,
    /// Six bytes where it is an Ethernet device.
    pub address: Vec<u8>,
    /// Since it was made, as the host counts: what a tap receives, its machine sent.
    pub counters: Counters,
}

/// An interface whose packets a program reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tun {
    /// Whether it has Ethernet frames, and not only IP packets.
    pub is_tap: bool,
    /// Whether it stays when nobody has it open.
    pub is_persistent: bool,
    /// The user who may open it without privilege.
    pub owner: Option<u32>,
}

/// Packets and bytes in both directions, seen from the host (`struct rtnl_link_stats64`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Counters {
    pub received_packets: u64,
    pub sent_packets: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// What changes about a link; `None` leaves it as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change<'a> {
    /// Up or down, after all else.
    pub up: Option<bool>,
    /// Bytes of the largest packet.
    pub mtu: Option<u32>,
    /// Its own MAC.
    pub address: Option<[u8; 6]>,
    /// Free text.
    pub alias: Option<&'a str>,
    /// Whether it gives itself no IPv6 link-local address.
    pub no_own_ipv6: bool,
}

/// Of which kind a new link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A bridge without spanning tree.
    Bridge,
    /// One end of a cable whose other end has this name.
    Veth(&'a str),
}

/// Makes a link. Taps are made by ioctl, not here.
pub fn create(name: &str, kind: Kind<'_>) -> Message {
    let flags = CREATE | EXCLUSIVE;
    let mut message = Message::new("make a link", RTM_NEWLINK, flags, &link_header(0, 0, 0));
    message.text(IFLA_IFNAME, name);
    message.nest(IFLA_LINKINFO, |info| match kind {
        Kind::Bridge => {
            info.text(IFLA_INFO_KIND, "bridge");
        }
        Kind::Veth(peer) => {
            info.text(IFLA_INFO_KIND, "veth");
            info.nest(IFLA_INFO_DATA, |data| {
                let mut other = link_header(0, 0, 0).to_vec();
                let mut name = Message::new("", 0, 0, &[]);
                name.text(IFLA_IFNAME, peer);
                other.extend(name.body());
                data.put(VETH_INFO_PEER, &other);
            });
        }
    });
    message
}

/// Changes a link.
pub fn change(index: u32, change: &Change<'_>) -> Message {
    let up = change.up.map_or(0, |up| if up { IFF_UP } else { 0 });
    let mask = change.up.map_or(0, |_| IFF_UP);
    let mut message = Message::new(
        "change a link",
        RTM_NEWLINK,
        0,
        &link_header(index, up, mask),
    );
    if let Some(address) = change.address {
        message.put(IFLA_ADDRESS, &address);
    }
    if let Some(mtu) = change.mtu {
        message.ne32(IFLA_MTU, mtu);
    }
    if let Some(alias) = change.alias {
        message.put(IFLA_IFALIAS, alias.as_bytes());
    }
    if change.no_own_ipv6 {
        message.nest(IFLA_AF_SPEC, |families| {
            families.nest(AF_INET6, |ipv6| {
                ipv6.put(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
            });
        });
    }
    message
}

/// Moves a link into the network namespace that `namespace` is open on.
pub fn move_to(index: u32, namespace: BorrowedFd<'_>) -> Message {
    let what = "move a link to another namespace";
    let mut message = Message::new(what, RTM_NEWLINK, 0, &link_header(index, 0, 0));
    message.ne32(IFLA_NET_NS_FD, namespace.as_raw_fd().cast_unsigned());
    message
}

/// Removes a link, and with it its addresses, routes and neighbours.
pub fn delete(index: u32) -> Message {
    Message::new("remove a link", RTM_DELLINK, 0, &link_header(index, 0, 0))
}

/// The link of a name.
///
/// # Errors
/// The kernel's refusal.
pub fn link(socket: &mut Socket, name: &str) -> Result<Option<Link>> {
    if name.len() >= IFNAMSIZ {
        return Ok(None);
    }
    let mut message = Message::new("find a link", RTM_GETLINK, 0, &link_header(0, 0, 0));
    message.text(IFLA_IFNAME, name);
    let reply = socket.get(&message)?;
    Ok(reply.and_then(|reply| Link::read(&reply)))
}

/// All links whose names begin so, with their counters.
///
/// # Errors
/// The kernel's refusal.
pub fn links(socket: &mut Socket, prefix: &str) -> Result<Vec<Link>> {
    let message = Message::new("list links", RTM_GETLINK, 0, &link_header(0, 0, 0));
    let links = socket.dump(&message)?;
    let links = links.iter().filter_map(Link::read);
    Ok(links.filter(|link| link.name.starts_with(prefix)).collect())
}

/// Adds an address, or keeps it; it may be used at once (no duplicate address detection).
pub fn add_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let header = address_header(index, address, prefix);
    let flags = CREATE | REPLACE;
    let mut message = Message::new("add an address", RTM_NEWADDR, flags, &header);
    put_address(&mut message, address);
    if address.is_ipv6() {
        message.ne32(IFA_FLAGS, IFA_F_NODAD);
    }
    message
}

/// Removes an address.
pub fn delete_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let header = address_header(index, address, prefix);
    let mut message = Message::new("remove an address", RTM_DELADDR, 0, &header);
    put_address(&mut message, address);
    message
}

/// Addresses and prefix lengths of a link, without link-local ones.
///
/// # Errors
/// The kernel's refusal.
pub fn addresses(socket: &mut Socket, index: u32) -> Result<Vec<(IpAddr, u8)>> {
    let mut all = all_addresses(socket, index)?;
    all.retain(|(_, scope)| *scope != SCOPE_LINK);
    Ok(all.into_iter().map(|(address, _)| address).collect())
}

/// Whether a link has an IPv6 address that counts on that link only.
///
/// # Errors
/// The kernel's refusal.
pub fn has_link_local(socket: &mut Socket, index: u32, address: Ipv6Addr) -> Result<bool> {
    let all = all_addresses(socket, index)?;
    Ok(all
        .iter()
        .any(|((found, _), scope)| *found == address && *scope == SCOPE_LINK))
}

fn all_addresses(socket: &mut Socket, index: u32) -> Result<Vec<((IpAddr, u8), u8)>> {
    let message = Message::new("list addresses", RTM_GETADDR, 0, &[0; 8]);
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let (header, rest) = reply.body.split_first_chunk::<8>()?;
        let of = ne32(&header[4..])?;
        if reply.kind != RTM_NEWADDR || of != index {
            return None;
        }
        let address = find(rest, IFA_LOCAL).or(find(rest, IFA_ADDRESS))?;
        Some(((ip(address)?, header[1]), header[3]))
    };
    Ok(replies.iter().filter_map(read).collect())
}

/// A route of the main table to what is on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Where to, and how many of its bits count.
    pub to: (IpAddr, u8),
    /// The link behind which it is.
    pub link: u32,
    /// Whom to hand packets to; without one, the destination itself is on the link.
    pub gateway: Option<IpAddr>,
    /// The address that the host's own packets come from.
    pub source: Option<IpAddr>,
    /// Who made it (`rtm_protocol`): ours are told from others' by it.
    pub protocol: u8,
}

/// Adds a route, or replaces one to the same destination. The link must be up.
pub fn add_route(route: &Route) -> Message {
    route_message("add a route", RTM_NEWROUTE, CREATE | REPLACE, route)
}

/// Answers packets to a network, where no narrower route takes them, with "unreachable". Refused (`EEXIST`) where the
/// host has a route to the same network with this priority already; of several the one with the least number counts.
pub fn refuse_network(to: IpAddr, prefix: u8, protocol: u8, priority: u32) -> Message {
    let flags = CREATE | EXCLUSIVE;
    let mut message = unreachable(
        "refuse a network",
        RTM_NEWROUTE,
        flags,
        (to, prefix),
        protocol,
    );
    message.ne32(RTA_PRIORITY, priority);
    message
}

/// Takes [`refuse_network`] back.
pub fn no_longer_refuse(to: IpAddr, prefix: u8, protocol: u8, priority: u32) -> Message {
    let what = "no longer refuse a network";
    let mut message = unreachable(what, RTM_DELROUTE, 0, (to, prefix), protocol);
    message.ne32(RTA_PRIORITY, priority);
    message
}

/// Removes a route.
pub fn delete_route(route: &Route) -> Message {
    route_message("remove a route", RTM_DELROUTE, 0, route)
}

/// Routes of the main table that carry a protocol number.
///
/// # Errors
/// The kernel's refusal.
pub fn routes(socket: &mut Socket, protocol: u8) -> Result<Vec<Route>> {
    let message = Message::new("list routes", RTM_GETROUTE, 0, &[0; 12]);
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let (header, rest) = reply.body.split_first_chunk::<12>()?;
        if reply.kind != RTM_NEWROUTE || header[4] != RT_TABLE_MAIN || header[5] != protocol {
            return None;
        }
        let any = match header[0] {
            2 => IpAddr::from([0; 4]),
            _ => IpAddr::from([0; 16]),
        };
        Some(Route {
            to: (find(rest, RTA_DST).map_or(Some(any), ip)?, header[1]),
            link: ne32(find(rest, RTA_OIF)?)?,
            gateway: find(rest, RTA_GATEWAY).and_then(ip),
            source: find(rest, RTA_PREFSRC).and_then(ip),
            protocol,
        })
    };
    Ok(replies.iter().filter_map(read).collect())
}

/// Networks that a route of the main table leads to, default routes with zero bits among them, with what said so
/// (`rtm_protocol`) and the link, where there is one.
///
/// # Errors
/// The kernel's refusal.
pub fn destinations(socket: &mut Socket) -> Result<Vec<Destination>> {
    let message = Message::new("list routes", RTM_GETROUTE, 0, &[0; 12]);
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let (header, rest) = reply.body.split_first_chunk::<12>()?;
        if reply.kind != RTM_NEWROUTE || header[4] != RT_TABLE_MAIN {
            return None;
        }
        let any = match header[0] {
            2 => IpAddr::from([0; 4]),
            10 => IpAddr::from([0; 16]),
            _ => return None,
        };
        Some(Destination {
            to: (find(rest, RTA_DST).map_or(Some(any), ip)?, header[1]),
            link: find(rest, RTA_OIF).and_then(ne32),
            protocol: header[5],
            priority: find(rest, RTA_PRIORITY).and_then(ne32).unwrap_or(0),
        })
    };
    Ok(replies.iter().filter_map(read).collect())
}

/// Where a route of somebody's leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// The network, and how many of its bits count.
    pub to: (IpAddr, u8),
    /// The link behind which it is; none where there are several or packets are refused.
    pub link: Option<u32>,
    /// Who made the route.
    pub protocol: u8,
    /// Of several to the same network the one with the least number counts.
    pub priority: u32,
}

/// Says for good which MAC an address on a link has; no packet changes it.
pub fn add_neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Message {
    let header = neighbour_header(index, address);
    let flags = CREATE | REPLACE;
    let mut message = Message::new("add a neighbour", RTM_NEWNEIGH, flags, &header);
    message.put(NDA_DST, &octets(address)).put(NDA_LLADDR, &mac);
    message
}

/// Forgets the MAC of an address on a link.
pub fn delete_neighbour(index: u32, address: IpAddr) -> Message {
    let header = neighbour_header(index, address);
    let mut message = Message::new("remove a neighbour", RTM_DELNEIGH, 0, &header);
    message.put(NDA_DST, &octets(address));
    message
}

fn neighbour_header(index: u32, address: IpAddr) -> Vec<u8> {
    let mut header = vec![family(address), 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(NUD_PERMANENT.to_ne_bytes());
    header.extend([0, RTN_UNICAST]);
    header
}

/// Addresses on a link whose MAC the host knows, in no order, learned ones too.
///
/// # Errors
/// The kernel's refusal.
pub fn neighbours(socket: &mut Socket, index: u32) -> Result<Vec<(IpAddr, Vec<u8>)>> {
    let message = Message::new("list neighbours", RTM_GETNEIGH, 0, &[0; 12]);
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let (header, rest) = reply.body.split_first_chunk::<12>()?;
        let ours = reply.kind == RTM_NEWNEIGH && ne32(&header[4..8])? == index;
        let mac = find(rest, NDA_LLADDR)?.to_vec();
        ours.then_some((ip(find(rest, NDA_DST)?)?, mac))
    };
    Ok(replies.iter().filter_map(read).collect())
}

impl Link {
    pub(crate) fn read(reply: &Reply) -> Option<Self> {
        let (header, rest) = reply.body.split_first_chunk::<16>()?;
        if reply.kind != RTM_NEWLINK {
            return None;
        }
        let flags = ne32(&header[8..12])?;
        let mut link = Self {
            index: ne32(&header[4..8])?,
            up: flags & IFF_UP != 0,
            running: flags & IFF_RUNNING != 0,
            ..Self::default()
        };
        for (kind, value) in attributes(rest) {
            match kind {
                IFLA_IFNAME => link.name = text(value),
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_LINKINFO => {
                    link.kind = text(find(value, IFLA_INFO_KIND).unwrap_or_default());
                    link.tun = (link.kind == "tun").then(|| Tun::read(value));
                }
                IFLA_MTU => link.mtu = ne32(value)?,
                IFLA_ADDRESS => link.address = value.to_vec(),
                IFLA_STATS64 => link.counters = Counters::read(value)?,
                _ => {}
            }
        }
        Some(link)
    }
}

impl Tun {
    fn read(info: &[u8]) -> Self {
        let data = find(info, IFLA_INFO_DATA).unwrap_or_default();
        let byte = |kind| find(data, kind).and_then(|value| value.first().copied());
        Self {
            is_tap: byte(IFLA_TUN_TYPE) == Some(TYPE_TAP),
            is_persistent: byte(IFLA_TUN_PERSIST) == Some(1),
            owner: find(data, IFLA_TUN_OWNER).and_then(ne32),
        }
    }
}

impl Counters {
    fn read(value: &[u8]) -> Option<Self> {
        let number = |index: usize| {
            let bytes = value.get(index * 8..)?.first_chunk()?;
            Some(u64::from_ne_bytes(*bytes))
        };
        Some(Self {
            received_packets: number(0)?,
            sent_packets: number(1)?,
            received_bytes: number(2)?,
            sent_bytes: number(3)?,
        })
    }
}

pub(crate) fn link_header(index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&mask.to_ne_bytes());
    header
}

fn address_header(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let scope = if local { SCOPE_LINK } else { SCOPE_UNIVERSE };
    let mut header = vec![family(address), prefix, 0, scope];
    header.extend(index.to_ne_bytes());
    header
}

fn put_address(message: &mut Message, address: IpAddr) {
    message.put(IFA_LOCAL, &octets(address));
    message.put(IFA_ADDRESS, &octets(address));
}

fn route_message(what: &'static str, kind: u16, flags: u16, route: &Route) -> Message {
    let (to, prefix) = route.to;
    let scope = match (to, route.gateway) {
        (IpAddr::V4(_), None) => SCOPE_LINK,
        _ => SCOPE_UNIVERSE,
    };
    let mut header = vec![family(to), prefix, 0, 0];
    header.extend([RT_TABLE_MAIN, route.protocol, scope, RTN_UNICAST]);
    let onlink = route.gateway.map_or(0, |_| RTNH_F_ONLINK);
    header.extend(onlink.to_ne_bytes());
    let mut message = Message::new(what, kind, flags, &header);
    if prefix > 0 {
        message.put(RTA_DST, &octets(to));
    }
    message.ne32(RTA_OIF, route.link);
    if let Some(gateway) = route.gateway {
        message.put(RTA_GATEWAY, &octets(gateway));
    }
    if let Some(source) = route.source {
        message.put(RTA_PREFSRC, &octets(source));
    }
    message
}

fn unreachable(
    what: &'static str,
    kind: u16,
    flags: u16,
    (to, prefix): (IpAddr, u8),
    protocol: u8,
) -> Message {
    let mut header = vec![family(to), prefix, 0, 0];
    header.extend([RT_TABLE_MAIN, protocol, SCOPE_UNIVERSE, RTN_UNREACHABLE]);
    header.extend([0; 4]);
    let mut message = Message::new(what, kind, flags, &header);
    message.put(RTA_DST, &octets(to));
    message
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    Some(<[u8; 16]>::try_from(bytes).ok()?.into())
}

/// The number of the link of a name.
///
/// # Errors
/// There is none (`ENODEV`), or the kernel's refusal.
pub fn index(socket: &mut Socket, name: &str) -> Result<u32> {
    let none = || Error::Refused {
        what: "find a link",
        errno: rustix::io::Errno::NODEV,
        said: name.to_owned(),
    };
    link(socket, name)?.map(|link| link.index).ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_that_is_cut_off_says_less_and_breaks_nothing() {
        let mut message = Message::new("", RTM_NEWLINK, 0, &link_header(7, IFF_UP, 0));
        message.text(IFLA_IFNAME, "tap7");
        message.nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "tun");
            info.nest(IFLA_INFO_DATA, |data| {
                data.ne32(IFLA_TUN_OWNER, 7).put(IFLA_TUN_TYPE, &[TYPE_TAP]);
                data.put(IFLA_TUN_PERSIST, &[1]);
            });
        });
        let read = |length: usize| {
            let body = message.body()[..length].to_vec();
            Link::read(&Reply {
                kind: RTM_NEWLINK,
                body,
            })
        };
        let whole = message.body().len();
        let tap = Tun {
            is_tap: true,
            is_persistent: true,
            owner: Some(7),
        };
        let link = read(whole).unwrap();
        assert_eq!(
            (link.index, &link.name[..], link.tun),
            (7, "tap7", Some(tap))
        );
        // Four bytes of padding and what is before them are the last value.
        for end in 0..whole - 4 {
            assert_ne!(read(end).and_then(|link| link.tun), Some(tap), "{end}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read(body: Vec<u8>) {
            let _ = Link::read(&Reply { kind: RTM_NEWLINK, body });
        }
    }
}
