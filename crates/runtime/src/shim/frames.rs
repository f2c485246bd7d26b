//! Which frames pass between a guest and the user-mode network of its host: pure, and told nothing by the guest that it
//! believes.
//!
//! passt opens ordinary sockets of the host for whatever address a packet names, its loopback too, so what a machine
//! must not reach has to be stopped before. Formats: RFC 826 (ARP), 791 (IPv4), 768 (UDP), 792 (ICMP), 9293 (TCP).

#[cfg(test)]
pub(super) mod tests;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Destination, source and type.
pub(crate) const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Hardware and protocol of an ARP message about IPv4 on Ethernet, with the lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_LENGTH: usize = 28;
/// What fills a short message up to the least that Ethernet carries.
const ARP_PADDED: usize = 46;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;
/// Unreachable, time exceeded, parameter problem.
const ICMP_ERRORS: [u8; 3] = [3, 11, 12];
const DNS: u16 = 53;

/// The least port that a guest may send datagrams from. passt binds the same port of the host, on all its addresses,
/// for as long as they flow: so it is one of those that Linux gives out by itself
/// (`net.ipv4.ip_local_port_range`), in its guests and on the host, and not one that a service will want.
const LEAST_UDP_PORT: u16 = 32_768;

/// What no machine reaches, whatever it is told: this host, loopback, link-local with the clouds' metadata, multicast,
/// and all above with the broadcast address (RFC 6890).
const NEVER: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Who a guest is and whom it may reach, as a shim is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    /// The guest's address on its card.
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    /// The only neighbour it has.
    pub(crate) gateway: Ipv4Addr,
    /// Whether it may ask the gateway for names.
    pub(crate) dns: bool,
    /// Networks that it does not reach, each an address and the length of its prefix.
    pub(crate) refuse: Vec<(Ipv4Addr, u8)>,
}

/// The same, ready for looking at many frames.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    mac: [u8; 6],
    address: u32,
    gateway: u32,
    dns: bool,
    refused: Vec<Network>,
    /// The host's own addresses, which may change.
    host: Vec<u32>,
    /// Lets everything pass, so that tests can see what is stopped otherwise.
    #[cfg(test)]
    open: bool,
}

#[derive(Debug, Clone, Copy)]
struct Network {
    base: u32,
    mask: u32,
}

impl Network {
    fn new((base, prefix): (Ipv4Addr, u8)) -> Self {
        let host_bits = 32_u32.saturating_sub(prefix.into());
        let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
        Self {
            base: base.to_bits() & mask,
            mask,
        }
    }
}

impl Policy {
    /// `host`: all addresses that the host has now.
    pub(crate) fn new(filter: &Filter, host: &[Ipv4Addr]) -> Self {
        let refused = NEVER.iter().chain(&filter.refuse);
        let mut policy = Self {
            mac: filter.mac,
            address: filter.address.to_bits(),
            gateway: filter.gateway.to_bits(),
            dns: filter.dns,
            refused: refused.copied().map(Network::new).collect(),
            host: Vec::new(),
            #[cfg(test)]
            open: false,
        };
        policy.set_host(host);
        policy
    }

    /// The host has other addresses now.
    pub(crate) fn set_host(&mut self, addresses: &[Ipv4Addr]) {
        self.host.clear();
        self.host.extend(addresses.iter().map(|one| one.to_bits()));
    }

    /// Whether the guest and this address may speak to each other.
    fn reaches(&self, address: u32) -> bool {
        let refused = |network: &Network| address & network.mask == network.base;
        address != self.address
            && address != self.gateway
            && !self.host.contains(&address)
            && !self.refused.iter().any(refused)
    }
}

/// Who sends a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    Guest,
    /// The user-mode network.
    World,
}

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
}

/// Looks at one frame, without the length before it.
pub(crate) fn verdict(sender: Sender, frame: &[u8], policy: &Policy) -> Verdict {
    #[cfg(test)]
    if policy.open {
        return Verdict::Pass;
    }
    match passes(sender, frame, policy) {
        Some(true) => Verdict::Pass,
        Some(false) | None => Verdict::Drop,
    }
}

/// `None`: it is shorter than it must be.
fn passes(sender: Sender, frame: &[u8], policy: &Policy) -> Option<bool> {
    let (ethernet, payload) = frame.split_first_chunk::<ETHERNET>()?;
    let (to, from) = (&ethernet[..6], &ethernet[6..12]);
    let kind = u16_at(ethernet, 12)?;
    let is_arp = kind == ARP;
    let on_its_way = match sender {
        Sender::Guest => from == policy.mac,
        Sender::World => to == policy.mac || (is_arp && to == BROADCAST),
    };
    let passes = match (kind, sender) {
        (ARP, Sender::Guest) => Arp::read(payload)?.asks_for_the_gateway(policy),
        (ARP, Sender::World) => Arp::read(payload)?.is_of_the_gateway(policy),
        (IPV4, Sender::Guest) => Packet::read(payload)?.may_leave(policy)?,
        (IPV4, Sender::World) => Packet::read(payload)?.may_enter(policy)?,
        _ => false,
    };
    Some(on_its_way && passes)
}

/// A message of RFC 826.
struct Arp {
    operation: u16,
    sender_mac: [u8; 6],
    sender: u32,
    target: u32,
}

impl Arp {
    fn read(payload: &[u8]) -> Option<Self> {
        let good = payload.starts_with(&ARP_KIND) && payload.len() <= ARP_PADDED;
        let message = payload.first_chunk::<ARP_LENGTH>().filter(|_| good)?;
        Some(Self {
            operation: u16_at(message, 6)?,
            sender_mac: *message[8..].first_chunk()?,
            sender: u32_at(message, 14)?,
            target: u32_at(message, 24)?,
        })
    }

    fn asks_for_the_gateway(&self, policy: &Policy) -> bool {
        self.operation == REQUEST
            && self.sender_mac == policy.mac
            && self.sender == policy.address
            && self.target == policy.gateway
    }

    fn is_of_the_gateway(&self, policy: &Policy) -> bool {
        matches!(self.operation, REQUEST | REPLY)
            && self.sender == policy.gateway
            && self.target == policy.address
    }
}

/// A whole packet without options.
struct Packet<'a> {
    source: u32,
    destination: u32,
    protocol: u8,
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// `None` for one that is not what it says, in pieces, or with options: nobody needs them, and some choose routes.
    fn read(packet: &'a [u8]) -> Option<Self> {
        /// Version 4, five words of four bytes.
        const PLAIN: u8 = 0x45;
        /// All of the flags and the offset but "do not fragment".
        const IN_PIECES: u16 = 0xbfff;
        let (header, payload) = packet.split_first_chunk::<20>()?;
        let is_plain = header[0] == PLAIN
            && usize::from(u16_at(header, 2)?) == packet.len()
            && u16_at(header, 6)? & IN_PIECES == 0;
        is_plain.then_some(Self {
            source: u32_at(header, 12)?,
            destination: u32_at(header, 16)?,
            protocol: header[9],
            payload,
        })
    }

    fn may_leave(&self, policy: &Policy) -> Option<bool> {
        let mut to_the_gateway = false;
        let sane = match self.protocol {
            UDP => {
                let (from, to) = self.datagram()?;
                // Only datagrams: passt (2023) does not forward TCP here, but sends it to whoever has this address.
                to_the_gateway = policy.dns && self.destination == policy.gateway && to == DNS;
                from >= LEAST_UDP_PORT
            }
            TCP => self.is_segment()?,
            ICMP => self.icmp()? == ECHO,
            _ => false,
        };
        let reaches = to_the_gateway || policy.reaches(self.destination);
        Some(sane && self.source == policy.address && reaches)
    }

    fn may_enter(&self, policy: &Policy) -> Option<bool> {
        let mut of_the_gateway = false;
        let sane = match self.protocol {
            UDP => {
                let (from, _) = self.datagram()?;
                of_the_gateway = policy.dns && self.source == policy.gateway && from == DNS;
                true
            }
            TCP => self.is_segment()?,
            ICMP => {
                let kind = self.icmp()?;
                kind == ECHO_REPLY || ICMP_ERRORS.contains(&kind)
            }
            _ => false,
        };
        // The port that passt binds for a guest's datagrams is open to all: to those that it could not have written to
        // it does not answer either.
        let reached = of_the_gateway || policy.reaches(self.source);
        Some(sane && self.destination == policy.address && reached)
    }

    /// The ports of a datagram that is as long as it says.
    fn datagram(&self) -> Option<(u16, u16)> {
        let length = usize::from(u16_at(self.payload, 4)?);
        let whole = length == self.payload.len() && length >= 8;
        Some((u16_at(self.payload, 0)?, u16_at(self.payload, 2)?)).filter(|_| whole)
    }

    fn is_segment(&self) -> Option<bool> {
        let header = self.payload.first_chunk::<20>()?;
        let length = usize::from(header[12] >> 4) * 4;
        Some((20..=self.payload.len()).contains(&length))
    }

    fn icmp(&self) -> Option<u8> {
        self.payload.first_chunk::<8>().map(|header| header[0])
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}
