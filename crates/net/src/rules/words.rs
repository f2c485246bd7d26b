//! The words that the rules are written in: each makes some expressions, and a rule is some of these in order.

use std::net::IpAddr;

use hutch_netlink::nft::{
    Address, Base, Compare, Conntrack, Element, Expression, Hook, Meta, REGISTER, Set, Type, Value,
    Verdict, register32,
};

use super::{Chain, Rule};
use crate::cidr::Cidr;

/// How the two families differ.
pub(super) struct Ip {
    pub(super) suffix: &'static str,
    /// `NFPROTO_…`
    pub(super) number: u8,
    pub(super) ethertype: [u8; 2],
    /// Offsets in the header, and length, of addresses.
    pub(super) source: u32,
    pub(super) destination: u32,
    pub(super) length: u32,
}

pub(super) const V4: Ip = Ip {
    suffix: "4",
    number: 2,
    ethertype: [8, 0],
    source: 12,
    destination: 16,
    length: 4,
};
pub(super) const V6: Ip = Ip {
    suffix: "6",
    number: 10,
    ethertype: [0x86, 0xdd],
    source: 8,
    destination: 24,
    length: 16,
};

pub(super) const PREROUTING: u32 = 0;
pub(super) const INPUT: u32 = 1;
pub(super) const FORWARD: u32 = 2;
pub(super) const OUTPUT: u32 = 3;
pub(super) const POSTROUTING: u32 = 4;
pub(super) const ARP_INPUT: u32 = 0;
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SOLICITATION: u8 = 135;
pub(super) const ADVERTISEMENT: u8 = 136;
pub(super) const BURST: u32 = 5;
/// Addresses of names that all machines together may have open.
pub(super) const NAMES_MAX: u32 = 262_144;
pub(crate) const NAME_IDLE_MS: u64 = 15 * 60 * 1000;

impl Ip {
    pub(super) fn named(&self, set: &str) -> String {
        format!("{set}{}", self.suffix)
    }

    pub(super) fn load_source(&self) -> Rule {
        [nfproto(self), load(Base::Network, self.source, self.length)].concat()
    }

    pub(super) fn load_destination(&self) -> Rule {
        [
            nfproto(self),
            load(Base::Network, self.destination, self.length),
        ]
        .concat()
    }

    pub(super) fn load_pair(&self) -> Rule {
        let second = register32(self.length);
        let destination = Expression::Payload(Base::Network, self.destination, self.length, second);
        [
            load(Base::Network, self.source, self.length),
            vec![destination],
        ]
        .concat()
    }

    pub(super) fn source_in(&self, set: &str) -> Rule {
        [self.load_source(), vec![lookup(&self.named(set))]].concat()
    }

    pub(super) fn destination_in(&self, set: &str) -> Rule {
        [self.load_destination(), vec![lookup(&self.named(set))]].concat()
    }

    pub(super) fn pair_in(&self, set: &str) -> Rule {
        let lookup = vec![lookup(&self.named(set))];
        [nfproto(self), self.load_pair(), lookup].concat()
    }

    pub(super) fn source_in_map(&self, map: &str) -> Rule {
        [self.load_source(), vec![find(&self.named(map))]].concat()
    }

    pub(super) fn destination_in_map(&self, map: &str) -> Rule {
        [self.load_destination(), vec![find(&self.named(map))]].concat()
    }

    pub(super) fn verdicts(&self, map: &str) -> Expression {
        Expression::VerdictMap(self.named(map), REGISTER)
    }
}

pub(super) fn both(rule: impl Fn(&Ip) -> Rule) -> Vec<Rule> {
    vec![rule(&V4), rule(&V6)]
}

pub(super) fn chain(name: &'static str, hook: Option<Hook>, rules: Vec<Rule>) -> Chain {
    Chain { name, hook, rules }
}

pub(super) fn hook(kind: &'static str, number: u32, priority: i32) -> Hook {
    Hook {
        kind,
        number,
        priority,
    }
}

pub(super) fn set(name: &str, key: &[Type]) -> Set {
    Set {
        name: name.to_owned(),
        key: key.to_vec(),
        value: None,
        interval: false,
        timeout: false,
        dynamic: None,
        counter: false,
    }
}

pub(super) fn one(name: &str, key: Type) -> Set {
    set(name, &[key])
}

pub(super) fn interval(name: &str, key: &[Type]) -> Set {
    Set {
        interval: true,
        ..set(name, key)
    }
}

pub(super) fn counting(name: &str, key: Type) -> Set {
    Set {
        counter: true,
        ..set(name, &[key])
    }
}

pub(super) fn map(name: &str, key: Type, value: Value) -> Set {
    Set {
        value: Some(value),
        ..set(name, &[key])
    }
}

pub(super) fn ranges(ranges: &[Cidr]) -> Vec<Element> {
    let range = |range: &Cidr| Element::range(octets(range.first()), range.end().map(octets));
    ranges.iter().flat_map(range).collect()
}

/// The bytes of an address.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn load(base: Base, offset: u32, length: u32) -> Rule {
    vec![Expression::Payload(base, offset, length, REGISTER)]
}

pub(super) fn equal(length: u32, base: Base, offset: u32, value: &[u8]) -> Rule {
    vec![
        Expression::Payload(base, offset, length, REGISTER),
        Expression::Cmp(REGISTER, Compare::Equal, value.to_vec()),
    ]
}

pub(super) fn meta(key: Meta, value: &[u8]) -> Rule {
    vec![
        Expression::Meta(key, REGISTER),
        Expression::Cmp(REGISTER, Compare::Equal, value.to_vec()),
    ]
}

pub(super) fn nfproto(ip: &Ip) -> Rule {
    meta(Meta::NfProtocol, &[ip.number])
}

pub(super) fn v4() -> Rule {
    nfproto(&V4)
}

pub(super) fn l4(protocol: u8) -> Rule {
    meta(Meta::L4Protocol, &[protocol])
}

/// The device has Ethernet frames, so that there is a MAC to look at.
pub(super) fn ethernet() -> Rule {
    let arphrd_ether: u16 = 1;
    meta(Meta::InputType, &arphrd_ether.to_ne_bytes())
}

/// Interface, MAC and address of whoever sent the packet, as `from4` and `from6` have them.
pub(super) fn whole_sender(ip: &Ip) -> Rule {
    let mut rule = [ethernet(), equal(2, Base::Link, 12, &ip.ethertype)].concat();
    rule.extend([
        Expression::Meta(Meta::InputName, REGISTER),
        Expression::Payload(Base::Link, 6, 6, register32(16)),
        Expression::Payload(Base::Network, ip.source, ip.length, register32(24)),
    ]);
    rule
}

/// Leaves an ICMPv6 packet's type in the register.
pub(super) fn icmpv6() -> Rule {
    [nfproto(&V6), l4(ICMPV6), load(Base::Transport, 0, 1)].concat()
}

pub(super) fn lookup(set: &str) -> Expression {
    Expression::Lookup(set.to_owned(), REGISTER)
}

pub(super) fn find(map: &str) -> Expression {
    Expression::Map(map.to_owned(), REGISTER, REGISTER)
}

/// Counts the packet as its machine's lie, and drops it.
pub(super) fn spoofed() -> Rule {
    let name = Expression::Meta(Meta::InputName, REGISTER);
    [vec![name, lookup("spoofed")], drop_it()].concat()
}

pub(super) fn bits(key: Conntrack, mask: u32) -> Rule {
    vec![
        Expression::Conntrack(key, REGISTER),
        Expression::And(REGISTER, mask.to_ne_bytes().to_vec()),
        Expression::Cmp(REGISTER, Compare::NotEqual, vec![0; 4]),
    ]
}

/// The packet is the first of its connection. State `new` has every one until an answer comes.
pub(super) fn begins() -> Rule {
    let confirmed = Conntrack::CONFIRMED.to_ne_bytes().to_vec();
    let none = vec![
        Expression::Conntrack(Conntrack::Status, REGISTER),
        Expression::And(REGISTER, confirmed),
        Expression::Cmp(REGISTER, Compare::Equal, vec![0; 4]),
    ];
    [state(Conntrack::NEW), none].concat()
}

pub(super) fn state(mask: u32) -> Rule {
    bits(Conntrack::State, mask)
}

/// Accepts packets to whoever began a connection.
pub(super) fn answers() -> Rule {
    let reply = vec![
        Expression::Conntrack(Conntrack::Direction, REGISTER),
        Expression::Cmp(REGISTER, Compare::Equal, vec![1]),
    ];
    let known = state(Conntrack::ESTABLISHED | Conntrack::RELATED);
    [known, reply, accept()].concat()
}

pub(super) fn set_mark() -> Rule {
    vec![Expression::SetMark(REGISTER)]
}

pub(super) fn destination_is(compare: Compare, address: Address) -> Rule {
    let kind = (address as u32).to_ne_bytes().to_vec();
    vec![
        Expression::DestinationType(REGISTER),
        Expression::Cmp(REGISTER, compare, kind),
    ]
}

/// SYN without RST.
pub(super) fn clamp_segments() -> Rule {
    let (syn, rst) = (2, 4);
    let mut rule = [l4(TCP), load(Base::Transport, 13, 1)].concat();
    rule.extend([
        Expression::And(REGISTER, vec![syn | rst]),
        Expression::Cmp(REGISTER, Compare::Equal, vec![syn]),
        Expression::RouteSegment(REGISTER),
        Expression::NetworkOrder(REGISTER),
        Expression::ClampSegment(REGISTER),
    ]);
    rule
}

pub(super) fn accept() -> Rule {
    vec![Expression::Verdict(Verdict::Accept)]
}

pub(super) fn drop_it() -> Rule {
    vec![Expression::Verdict(Verdict::Drop)]
}

pub(super) fn goto(chain: &str) -> Rule {
    vec![Expression::Verdict(Verdict::Goto(chain.to_owned()))]
}

pub(super) fn jump(chain: &str) -> Rule {
    vec![Expression::Verdict(Verdict::Jump(chain.to_owned()))]
}
