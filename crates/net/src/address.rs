//! Which addresses the machine of a slot has: derived, never stored. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::cidr::Cidr;
use crate::elements::{Limits, Machine, Policy};

/// The host's address on every tap, which machines have as gateway and resolver.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
/// The same for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The host's MAC on every tap: a machine that goes on behind another tap finds the gateway that it knows.
pub const GATEWAY_MAC: [u8; 6] = [2, 0x68, 0x75, 0x74, 0x63, 1];
/// The MAC of every machine: no two are on one link, and a clone keeps what its memory says.
pub const MACHINE_MAC: [u8; 6] = [2, 0x68, 0x75, 0x74, 0x63, 2];

/// Networks that are tried in turn when none is configured: private ones that few others use.
pub const CANDIDATES: [Cidr; 6] = [
    network(172, 16),
    network(172, 31),
    network(10, 213),
    network(10, 187),
    network(172, 27),
    network(10, 241),
];

const fn network(a: u8, b: u8) -> Cidr {
    Cidr::new(IpAddr::V4(Ipv4Addr::new(a, b, 0, 0)), 16)
}

/// Where the addresses of an instance's machines come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    tag: String,
    ipv4: Cidr,
    ipv6: Cidr,
}

/// Why a network cannot have machines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{network} cannot be the network of machines: {because}")]
pub struct Unfit {
    /// What was given.
    pub network: Cidr,
    /// What is wrong with it.
    pub because: &'static str,
}

impl Addresses {
    /// The machines of the instance `tag` in `ipv4`, and in the unique local network (RFC 4193) of this global id.
    ///
    /// # Errors
    /// `ipv4` is none, or too large or small.
    pub fn new(tag: &str, ipv4: Cidr, global_id: [u8; 5]) -> Result<Self, Unfit> {
        let unfit = |because| Unfit {
            network: ipv4,
            because,
        };
        if !ipv4.first().is_ipv4() {
            return Err(unfit("it is not IPv4"));
        }
        let hosts = hosts(&ipv4);
        if hosts < 4 {
            return Err(unfit("it has room for no machine; a /29 has room for five"));
        }
        let [a, b, c, d, e] = global_id;
        let ipv6 = Ipv6Addr::from([0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        Ok(Self {
            tag: tag.to_owned(),
            ipv4,
            ipv6: Cidr::new(ipv6.into(), 64),
        })
    }

    /// The IPv4 network.
    pub fn ipv4(&self) -> Cidr {
        self.ipv4
    }

    /// The IPv6 network.
    pub fn ipv6(&self) -> Cidr {
        self.ipv6
    }

    /// The host's addresses on a bridge of machines: the first ones of the networks.
    pub fn on_the_bridge(&self) -> (Ipv4Addr, Ipv6Addr) {
        let ipv4 = match self.ipv4.first() {
            IpAddr::V4(first) => Ipv4Addr::from(u32::from(first) + 1),
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let ipv6 = match self.ipv6.first() {
            IpAddr::V6(first) => Ipv6Addr::from(u128::from(first) + 1),
            IpAddr::V4(_) => Ipv6Addr::UNSPECIFIED,
        };
        (ipv4, ipv6)
    }

    /// The highest slot that has addresses; the lowest is 1.
    pub fn last_slot(&self) -> u16 {
        // The first address is the network's, the second a bridge's, the last the broadcast address.
        u16::try_from(hosts(&self.ipv4).saturating_sub(3)).unwrap_or(u16::MAX - 1)
    }

    /// The machine of a slot, with the default policy and no limits; `None` where the network has no room for it.
    pub fn machine(&self, slot: u16) -> Option<Machine> {
        let (IpAddr::V4(first), IpAddr::V6(first6)) = (self.ipv4.first(), self.ipv6.first()) else {
            return None;
        };
        if !(1..=self.last_slot()).contains(&slot) {
            return None;
        }
        let host = u32::from(slot) + 1;
        Some(Machine {
            label: crate::label(&self.tag, slot),
            slot,
            mac: MACHINE_MAC,
            ipv4: Ipv4Addr::from(u32::from(first) + host),
            ipv6: Ipv6Addr::from(u128::from(first6) + u128::from(host)),
            link_local: link_local(MACHINE_MAC),
            policy: Policy::default(),
            limits: Limits::default(),
        })
    }
}

/// The address that a guest's kernel gives its card by itself: modified EUI-64 (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let low = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(u64::from_be_bytes(low)))
}

/// Addresses in an IPv4 network.
fn hosts(network: &Cidr) -> u64 {
    match (network.first(), network.last()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => u64::from(u32::from(last) - u32::from(first)) + 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn addresses(network: &str) -> Result<Addresses, Unfit> {
        Addresses::new("ab12", network.parse().unwrap(), [1, 2, 3, 4, 5])
    }

    #[test]
    fn a_slot_has_its_addresses_for_good() {
        let machine = addresses("172.16.0.0/16").unwrap().machine(7).unwrap();
        assert_eq!(machine.label, "hab12-7");
        assert_eq!(machine.ipv4.to_string(), "172.16.0.8");
        assert_eq!(machine.ipv6.to_string(), "fd01:203:405::8");
        assert_eq!(machine.link_local.to_string(), "fe80::68:75ff:fe74:6302");
    }

    #[test]
    fn all_addresses_are_in_the_network_and_no_two_alike() {
        for network in [
            "172.16.0.0/16",
            "10.1.2.0/24",
            "192.168.7.8/29",
            "10.0.0.0/8",
        ] {
            let all = addresses(network).unwrap();
            let range: Cidr = network.parse().unwrap();
            let mut seen = BTreeSet::new();
            for slot in 1..=all.last_slot() {
                let machine = all.machine(slot).unwrap();
                assert!(range.contains(machine.ipv4.into()) && seen.insert(machine.ipv4));
                assert!(IpAddr::V4(machine.ipv4) != range.last());
                assert!(all.ipv6().contains(machine.ipv6.into()));
            }
            assert_eq!(all.machine(0), None);
            assert_eq!(all.machine(all.last_slot() + 1), None);
        }
        assert_eq!(addresses("192.168.7.8/29").unwrap().last_slot(), 5);
        assert_eq!(addresses("172.16.0.0/16").unwrap().last_slot(), 65_533);
    }

    #[test]
    fn networks_without_room_are_refused() {
        assert!(addresses("10.0.0.0/31").is_err());
        assert!(addresses("10.0.0.1/32").is_err());
        assert!(addresses("fd00::/64").is_err());
    }
}
