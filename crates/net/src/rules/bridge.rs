//! The rules of machines whose taps are ports of a bridge.
//!
//! A third table stands at the ports: there alone is seen which one a frame came in by, and which MACs it has. It lets
//! through to the host what a machine says for itself, and nothing from one port to another; machines have the host as
//! their router, so the inet table decides about the rest. That one sees the bridge as where packets come in, and knows
//! machines by their addresses, which the table at the ports has proved.
//!
//! Only expressions that every kernel with this family has: no conntrack, reject or fib, and no bridge's name.

use hutch_netlink::nft::{
    Base, Compare, Element, Expression, Family, Meta, REGISTER, Table, Type, register32,
};

use super::words::*;
use super::{Rule, Rules, TableRules};

/// Offset and value of an Ethernet frame's type; a frame with a VLAN's tag has the tag's there.
const ETHERTYPE: u32 = 12;
const ARP: [u8; 2] = [8, 6];
const SOURCE: u32 = 6;
const DESTINATION: u32 = 0;
const ICMP_REDIRECT: u8 = 5;
const ICMPV6_REDIRECT: u8 = 137;
/// Sets of the inet table that are in the one at the ports instead.
const AT_PORTS: [&str; 3] = ["from4", "from6", "routers_say"];

pub(super) fn tables(rules: &Rules, mac: [u8; 6]) -> Vec<TableRules> {
    let table = |family| Table {
        family,
        name: rules.table(),
    };
    let mut sets = rules.inet_sets();
    let (at_ports, inet): (Vec<_>, Vec<_>) = sets
        .drain(..)
        .partition(|(set, _)| AT_PORTS.contains(&set.name.as_str()));
    let of_both = |name: &str| {
        let both = inet.iter().find(|(set, _)| set.name == name);
        both.cloned()
    };
    let at_ports = [
        at_ports,
        [
            "dhcp_servers",
            "neighbours_say",
            "spoofed",
            "machines4",
            "machines6",
        ]
        .into_iter()
        .filter_map(of_both)
        .collect(),
        vec![
            (set("macs", &[Type::Ether]), Vec::new()),
            // The bridge's own, which may change: an element, so that the rest stays then.
            (set("gateway", &[Type::Ether]), vec![Element::new(mac)]),
        ],
    ];
    let mut chains = rules.inet_chains();
    chains.push(chain(
        "redirects",
        Some(hook("filter", OUTPUT, -10)),
        no_redirects(rules),
    ));
    vec![
        TableRules {
            table: table(Family::Inet),
            sets: inet,
            chains,
        },
        TableRules {
            table: table(Family::Arp),
            sets: vec![(counting("spoofed", Type::Interface), vec![])],
            chains: vec![
                chain(
                    "input",
                    Some(hook("filter", ARP_INPUT, 0)),
                    vec![[rules.tap(Meta::InputName), goto("from_tap")].concat()],
                ),
                chain("from_tap", None, vec![spoofed(), drop_it()]),
            ],
        },
        TableRules {
            table: table(Family::Bridge),
            sets: at_ports.concat(),
            chains: port_chains(rules),
        },
    ]
}

/// Where the inet table tells machines from others. A packet that comes in by a tap itself has gone around the table at
/// the ports: the tap is no port now, or the frame went to a group of 01:80:c2:00:00:0x, which bridges do not pass on.
pub(super) fn senders(rules: &Rules) -> Vec<Rule> {
    let mut all = vec![[rules.tap(Meta::InputName), goto("from_tap")].concat()];
    all.extend(rules.when_from_machines(&goto("sane")));
    all
}

/// What the table at the ports has judged, and fragments hid from it. The host needs no advertisements: it has been told
/// where machines are.
pub(super) fn honest_again() -> Vec<Rule> {
    vec![
        [super::neighbour(SOLICITATION), accept()].concat(),
        [icmpv6(), vec![lookup("neighbours_say")], drop_it()].concat(),
        [super::dhcp_server(), drop_it()].concat(),
    ]
}

/// The host sends what goes from one machine to another out where it came in, and would tell the sender of a shorter way
/// that is closed. The setting for this, `send_redirects`, is off only where it is off for all links, and IPv6 has none.
fn no_redirects(rules: &Rules) -> Vec<Rule> {
    let to = |ip: &Ip, protocol, kind: u8| {
        [
            rules.link(Meta::OutputName),
            ip.destination_in("machines"),
            l4(protocol),
            equal(1, Base::Transport, 0, &[kind]),
            drop_it(),
        ]
        .concat()
    };
    vec![
        to(&V4, super::words::ICMP, ICMP_REDIRECT),
        to(&V6, ICMPV6, ICMPV6_REDIRECT),
    ]
}

fn port_chains(rules: &Rules) -> Vec<super::Chain> {
    let tap = |direction| rules.tap(direction);
    let asked = equal(4, Base::Network, 24, &rules.gateway.octets());
    let for_gateway = [ethertype(ARP), asked].concat();
    vec![
        chain(
            "pre",
            Some(hook("filter", PREROUTING, -300)),
            [
                vec![[tap(Meta::InputName), goto("port")].concat()],
                others(),
            ]
            .concat(),
        ),
        chain(
            "port",
            None,
            vec![
                [arp_sender(), goto("asked")].concat(),
                [sender(&V4), vec![lookup("from4")], goto("sane")].concat(),
                [sender(&V6), vec![lookup("from6")], goto("sane")].concat(),
                spoofed(),
                drop_it(),
            ],
        ),
        chain(
            "asked",
            None,
            vec![[for_gateway, accept()].concat(), drop_it()],
        ),
        chain("sane", None, honest()),
        chain(
            "forward",
            Some(hook("filter", FORWARD, -200)),
            vec![
                [tap(Meta::InputName), drop_it()].concat(),
                [tap(Meta::OutputName), drop_it()].concat(),
            ],
        ),
        // Ports that flood nothing still flood what the host itself sends.
        chain(
            "output",
            Some(hook("filter", OUTPUT, -200)),
            vec![[tap(Meta::OutputName), to_group(), drop_it()].concat()],
        ),
    ]
}

/// Frames of ports that are not ours must not have what is a machine's.
fn others() -> Vec<Rule> {
    let of = |name: &str, load: Rule| [load, vec![lookup(name)], drop_it()].concat();
    let address = |ip: &Ip| {
        [
            ethertype(ip.ethertype),
            load(Base::Network, ip.source, ip.length),
        ]
    };
    let arp = [ethertype(ARP), load(Base::Network, 14, 4)];
    let advertised = [
        ethertype(V6.ethertype),
        l4(ICMPV6),
        equal(1, Base::Transport, 0, &[ADVERTISEMENT]),
        load(Base::Transport, 8, 16),
    ];
    vec![
        of("macs", load(Base::Link, SOURCE, 6)),
        of("machines4", address(&V4).concat()),
        of("machines6", address(&V6).concat()),
        of("machines4", arp.concat()),
        of("machines6", advertised.concat()),
    ]
}

/// What a machine may say to the host.
fn honest() -> Vec<Rule> {
    let icmpv6 = || [ethertype(V6.ethertype), l4(ICMPV6)].concat();
    let neighbour = |kind: u8| {
        let plain = equal(2, Base::Network, 6, &[ICMPV6, 255]);
        let kind = equal(1, Base::Transport, 0, &[kind]);
        [ethertype(V6.ethertype), plain, kind].concat()
    };
    // The address that it advertises must be its own.
    let target = [
        whose(Base::Link, SOURCE, Base::Transport, 8, 16),
        vec![lookup("from6")],
    ];
    let says = |set: &str| [icmpv6(), load(Base::Transport, 0, 1), vec![lookup(set)]].concat();
    let gateway = [load(Base::Link, DESTINATION, 6), vec![lookup("gateway")]];
    // fe80::/10
    let prefix = |first: [u8; 2]| [&first[..], &[0; 14]].concat();
    let link_local = vec![
        Expression::Payload(Base::Network, V6.source, V6.length, REGISTER),
        Expression::And(REGISTER, prefix([0xff, 0xc0])),
        Expression::Cmp(REGISTER, Compare::Equal, prefix([0xfe, 0x80])),
    ];
    vec![
        [neighbour(SOLICITATION), accept()].concat(),
        [neighbour(ADVERTISEMENT), target.concat(), accept()].concat(),
        [says("routers_say"), spoofed()].concat(),
        [says("neighbours_say"), drop_it()].concat(),
        [super::dhcp_server(), spoofed()].concat(),
        [super::dhcp_server(), drop_it()].concat(),
        // The inet table knows machines by their other addresses.
        [ethertype(V6.ethertype), link_local, drop_it()].concat(),
        [gateway.concat(), accept()].concat(),
        drop_it(),
    ]
}

/// Broadcast or multicast, for which a machine has no use: the host knows all neighbours, and is who they ask.
fn to_group() -> Rule {
    let bit = vec![1, 0, 0, 0, 0, 0];
    vec![
        Expression::Payload(Base::Link, DESTINATION, 6, REGISTER),
        Expression::And(REGISTER, bit.clone()),
        Expression::Cmp(REGISTER, Compare::Equal, bit),
    ]
}

fn ethertype(kind: [u8; 2]) -> Rule {
    equal(2, Base::Link, ETHERTYPE, &kind)
}

/// Port, MAC and address, for `from4` and `from6`.
fn whose(of_mac: Base, mac: u32, of_address: Base, address: u32, length: u32) -> Rule {
    vec![
        Expression::Meta(Meta::InputName, REGISTER),
        Expression::Payload(of_mac, mac, 6, register32(16)),
        Expression::Payload(of_address, address, length, register32(24)),
    ]
}

fn sender(ip: &Ip) -> Rule {
    let whose = whose(Base::Link, SOURCE, Base::Network, ip.source, ip.length);
    [ethertype(ip.ethertype), whose].concat()
}

/// The sender of the frame and the one in the message must both be the machine.
fn arp_sender() -> Rule {
    let sender = |base, mac| {
        let whose = whose(base, mac, Base::Network, 14, 4);
        [whose, vec![lookup("from4")]].concat()
    };
    [
        ethertype(ARP),
        equal(4, Base::Network, 0, &[0, 1, 8, 0]),
        equal(2, Base::Network, 4, &[6, 4]),
        sender(Base::Link, SOURCE),
        sender(Base::Network, 8),
    ]
    .concat()
}
