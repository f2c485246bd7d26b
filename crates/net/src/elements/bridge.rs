//! What of a machine's elements is at the ports of a bridge.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hutch_netlink::nft::{Element, Family, concatenated};

use super::{Elements, Machine, padded};
use crate::rules::octets;

/// The elements of a machine behind a tap of its own, with those that tell who it is moved to where its tap is a port.
pub(crate) fn at_port(mut all: Elements, machine: &Machine) -> Elements {
    for (family, set) in [
        (Family::Arp, "from"),
        (Family::Inet, "from4"),
        (Family::Inet, "from6"),
    ] {
        all.remove(&(family, set.to_owned()));
    }
    let name = padded(&machine.label);
    let sender =
        |address: IpAddr| Element::new(concatenated(&[&name, &machine.mac, &octets(address)]));
    let mut add = |set: &str, elements: Vec<Element>| {
        let elements = BTreeSet::from_iter(elements);
        all.insert((Family::Bridge, set.to_owned()), elements);
    };
    let (ipv4, ipv6) = (machine.ipv4.into(), machine.ipv6.into());
    add("from4", vec![sender(ipv4)]);
    add(
        "from6",
        vec![sender(ipv6), sender(machine.link_local.into())],
    );
    add("spoofed", vec![Element::new(name)]);
    add("macs", vec![Element::new(machine.mac)]);
    add("machines4", vec![Element::new(octets(ipv4))]);
    add("machines6", vec![Element::new(octets(ipv6))]);
    all
}

#[cfg(test)]
mod tests {
    use super::super::tests::{INSTANCE, machine};
    use super::*;

    #[test]
    fn who_a_machine_is_is_known_at_its_port_only() {
        let machine = machine(7);
        let all = at_port(super::super::elements(&machine, INSTANCE), &machine);
        let of = |family| {
            let sets = all.keys().filter(move |(of, _)| *of == family);
            sets.map(|(_, set)| set.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(of(Family::Arp), ["spoofed"]);
        assert!(!of(Family::Inet).contains(&"from4"));
        let at_port = [
            "from4",
            "from6",
            "machines4",
            "machines6",
            "macs",
            "spoofed",
        ];
        assert_eq!(of(Family::Bridge), at_port);
    }
}
