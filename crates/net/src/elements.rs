//! What a machine is in the firewall: elements of the sets of `rules.rs`. Pure.

mod bridge;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU16, NonZeroU32};

use hutch_netlink::nft::{Data, Element, Expression, Family, Verdict, concatenated};

use crate::cidr::{Cidr, without_nested};
use crate::domain::{Domain, Domains, Judgement};
use crate::private::{METADATA, is_private};
use crate::rules::octets;
pub(crate) use bridge::at_port;

/// What a machine reaches beside its peers, the resolver and what it is allowed by range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Egress {
    /// Everything but other machines, the host and metadata.
    Open,
    /// Public addresses.
    #[default]
    Public,
    /// Nothing.
    None,
}

/// Another machine of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Its unique local address.
    pub ipv6: Ipv6Addr,
}

/// Whom a machine may talk to. Answers always come back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Where nothing else says so.
    pub egress: Egress,
    /// Reachable in any case, except machines, the host and what `deny` holds. Metadata is reachable by this only.
    pub allow: Vec<Cidr>,
    /// Not reachable in any case.
    pub deny: Vec<Cidr>,
    /// Machines that it may talk to. They may talk to it if their policies say so.
    pub peers: Vec<Peer>,
    /// Names that it may, or may not, reach. With any, all its questions about names come to our resolver.
    pub domains: Domains,
}

/// What a machine may use up; `None` is without limit. What it did not use in the last second may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Connections at one time, to other hosts and machines; IPv4 and IPv6 each.
    pub connections: Option<u32>,
    /// Bytes a second from the machine; IPv4 and IPv6 each.
    pub out_bytes: Option<u64>,
    /// Bytes a second to the machine; IPv4 and IPv6 each.
    pub in_bytes: Option<u64>,
}

/// A machine as the firewall sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The name of its tap, which [`crate::label`] makes.
    pub label: String,
    /// Tells its connections from those of others.
    pub slot: u16,
    /// Of its network card.
    pub mac: [u8; 6],
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Its unique local address.
    pub ipv6: Ipv6Addr,
    /// Its address on the link, for neighbour discovery.
    pub link_local: Ipv6Addr,
    /// Whom it may talk to.
    pub policy: Policy,
    /// What it may use up.
    pub limits: Limits,
}

/// Ports where other resolvers are asked.
pub(crate) const RESOLVERS: [u16; 2] = [53, 853];

/// The kernel refuses rates whose second's bytes and burst do not fit into 64 bits when multiplied by a second's
/// nanoseconds.
const RATE_MAX: u64 = 16_000_000_000;

/// Elements by table and set.
pub type Elements = BTreeMap<(Family, String), BTreeSet<Element>>;

/// The mark of a machine's connections: the instance's number and the machine's slot.
pub fn mark(instance: NonZeroU16, slot: u16) -> NonZeroU32 {
    let upper_half = NonZeroU32::MIN.saturating_add(0xffff);
    NonZeroU32::from(instance).saturating_mul(upper_half) | u32::from(slot)
}

impl Policy {
    /// Whether a connection to an address that is no machine's and not the host's may be, as the rules decide it about
    /// an address of which no name is known.
    pub fn allows(&self, to: IpAddr, host_networks: &[Cidr]) -> bool {
        self.allows_by_name(to, Judgement::Unnamed, host_networks)
    }

    /// The same about an address that is known to the rules by a name.
    pub fn allows_by_name(&self, to: IpAddr, name: Judgement, host_networks: &[Cidr]) -> bool {
        let within = |ranges: &[Cidr]| ranges.iter().any(|range| range.contains(to));
        if METADATA.contains(&to) {
            return within(&self.allow);
        }
        if within(&self.deny) || name == Judgement::Denied {
            return false;
        }
        within(&self.allow)
            || name == Judgement::Allowed
            || match self.egress {
                Egress::Open => true,
                Egress::Public => !is_private(to) && !within(host_networks),
                Egress::None => false,
            }
    }

    /// Whether connections to this port go to our resolver or nowhere, unless a range allows them: with rules about
    /// names, nobody else is asked about names. 53 is DNS, 853 is DNS over TLS or QUIC.
    pub fn forbids_port(&self, to: IpAddr, port: u16) -> bool {
        let allowed = self.allow.iter().any(|range| range.contains(to));
        let redirected = port == 53 && to.is_ipv4();
        RESOLVERS.contains(&port) && !self.domains.is_empty() && (redirected || !allowed)
    }

    /// Whether a name may be asked for. Without egress, only names that are allowed.
    pub fn judge(&self, name: &Domain) -> Judgement {
        match self.domains.judge(name) {
            Judgement::Unnamed if self.egress == Egress::None => Judgement::Denied,
            judgement => judgement,
        }
    }

    /// Whether an address in an answer may be told to the machine, and opened because of its name. A name of somebody
    /// else's that leads to private addresses, metadata or the host's networks does not, unless the machine may reach
    /// these without any name.
    pub fn believes(&self, answer: IpAddr, host_networks: &[Cidr]) -> bool {
        let special = is_private(answer)
            || METADATA.contains(&answer)
            || host_networks.iter().any(|range| range.contains(answer));
        !special || self.allows(answer, host_networks)
    }

    /// Whether a connection to another machine may be.
    pub fn allows_machine(&self, to: IpAddr) -> bool {
        let mut peers = self.peers.iter();
        peers.any(|peer| to == IpAddr::V4(peer.ipv4) || to == IpAddr::V6(peer.ipv6))
    }

    /// The chain that decides.
    fn chain(&self) -> &'static str {
        let own = !(self.allow.is_empty() && self.deny.is_empty() && self.domains.is_empty());
        match (self.egress, own) {
            (Egress::Open, false) => "open",
            (Egress::Public, false) => "public",
            (Egress::None, false) => "none",
            (Egress::Open, true) => "c_open",
            (Egress::Public, true) => "c_public",
            (Egress::None, true) => "c_none",
        }
    }
}

/// All elements of a machine.
pub fn elements(machine: &Machine, instance: NonZeroU16) -> Elements {
    let mut all = Elements::new();
    let mut add = |family, set: String, element| {
        all.entry((family, set)).or_default().insert(element);
    };
    let name = padded(&machine.label);
    let sender = |address: &[u8]| Element::new(concatenated(&[&name, &machine.mac, address]));
    add(Family::Arp, "from".into(), sender(&machine.ipv4.octets()));
    add(Family::Inet, "from4".into(), sender(&machine.ipv4.octets()));
    for address in [machine.ipv6, machine.link_local] {
        add(Family::Inet, "from6".into(), sender(&address.octets()));
    }
    for family in [Family::Arp, Family::Inet] {
        add(family, "spoofed".into(), Element::new(name));
    }
    let mark = Data::Value(mark(instance, machine.slot).get().to_ne_bytes().into());
    let chain = Data::Verdict(Verdict::Goto(machine.policy.chain().into()));
    for (own, number) in [(IpAddr::V4(machine.ipv4), 4), (IpAddr::V6(machine.ipv6), 6)] {
        let own = octets(own);
        let key = || Element::new(own.clone());
        let mut add = |set: &str, element| add(Family::Inet, format!("{set}{number}"), element);
        for set in ["out", "in", "machines"] {
            add(set, key());
        }
        if !machine.policy.domains.is_empty() {
            add("dns_forced", key());
        }
        add("mark", key().with(mark.clone()));
        add("egress", key().with(chain.clone()));
        let limits = &machine.limits;
        for (set, rate) in [("rate_out", limits.out_bytes), ("rate_in", limits.in_bytes)] {
            if let Some(rate) = rate {
                add(set, key().evaluating(bytes_over(rate)));
            }
        }
        if let Some(count) = limits.connections {
            add(
                "conns",
                key().evaluating(Expression::ConnectionsOver(count)),
            );
        }
        for peer in &machine.policy.peers {
            let peer = match number {
                4 => octets(peer.ipv4.into()),
                _ => octets(peer.ipv6.into()),
            };
            add("peers", Element::new(concatenated(&[&own, &peer])));
        }
        for (set, ranges) in [
            ("allow", &machine.policy.allow),
            ("deny", &machine.policy.deny),
        ] {
            // The kernel takes ranges that are apart, and nothing else that overlaps.
            for range in without_nested(ranges) {
                if range.first().is_ipv4() == (number == 4) {
                    let first = Element::new(concatenated(&[&own, &octets(range.first())]));
                    let last = Some(concatenated(&[&own, &octets(range.last())]));
                    add(set, Element { last, ..first });
                }
            }
        }
    }
    all
}

/// What must be removed from `old`, and then added, to get `new`.
pub fn difference(old: &Elements, new: &Elements) -> (Elements, Elements) {
    (missing(old, new), missing(new, old))
}

fn missing(of: &Elements, from: &Elements) -> Elements {
    let none = BTreeSet::new();
    let mut all = Elements::new();
    for (place, elements) in of {
        let there = from.get(place).unwrap_or(&none);
        let gone: BTreeSet<_> = elements.difference(there).cloned().collect();
        if !gone.is_empty() {
            all.insert(place.clone(), gone);
        }
    }
    all
}

/// What finds packets beyond a rate. A bucket holds a second's bytes and the burst, which is no less than the largest
/// packet of a tap (`nft_limit_init` in the kernel's `net/netfilter/nft_limit.c`).
fn bytes_over(rate: u64) -> Expression {
    let rate = rate.clamp(1, RATE_MAX);
    let burst = u32::try_from(rate / 8).unwrap_or(u32::MAX);
    Expression::BytesOver(rate, burst.max(64 * 1024))
}

/// An interface's name as the kernel has it in registers.
pub(crate) fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    let length = name.len().min(15);
    padded[..length].copy_from_slice(&name.as_bytes()[..length]);
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn machine(slot: u16) -> Machine {
        let [high, low] = slot.to_be_bytes();
        Machine {
            label: crate::label("ab12", slot),
            slot,
            mac: [2, 0x68, 0x75, 0x74, 0x63, 2],
            ipv4: Ipv4Addr::new(172, 16, high, low),
            ipv6: Ipv6Addr::new(0xfd68, 0, 0, 0, 0, 0, 1, slot),
            link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
            policy: Policy::default(),
            limits: Limits::default(),
        }
    }

    fn count(elements: &Elements) -> usize {
        elements.values().map(BTreeSet::len).sum()
    }

    pub(crate) const INSTANCE: NonZeroU16 = NonZeroU16::new(0xab12).unwrap();

    #[test]
    fn marks_tell_instances_and_machines_apart() {
        assert_eq!(mark(INSTANCE, 7).get(), 0xab12_0007);
        assert_eq!(mark(NonZeroU16::MIN, 0).get(), 0x0001_0000);
    }

    #[test]
    fn an_ordinary_machine_is_sixteen_elements() {
        let plain = elements(&machine(7), INSTANCE);
        assert_eq!(count(&plain), 16);
        let (gone, new) = difference(&plain, &plain);
        assert_eq!((count(&gone), count(&new)), (0, 0));
    }

    #[test]
    fn another_policy_changes_only_what_it_says() {
        let before = machine(7);
        let mut after = before.clone();
        after.policy.egress = Egress::None;
        after.policy.allow = ["10.0.0.0/8", "10.1.0.0/16", "fc00::/7"]
            .map(|range| range.parse().unwrap())
            .into();
        let (before, after) = (elements(&before, INSTANCE), elements(&after, INSTANCE));
        let (gone, new) = difference(&before, &after);
        let sets = |elements: &Elements| -> Vec<String> {
            elements.keys().map(|(_, set)| set.clone()).collect()
        };
        assert_eq!(sets(&gone), ["egress4", "egress6"]);
        assert_eq!(sets(&new), ["allow4", "allow6", "egress4", "egress6"]);
        assert_eq!(count(&new), 4);
    }

    #[test]
    fn policies_judge_as_the_rules_do() {
        let ranges = |texts: &[&str]| -> Vec<Cidr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let judge = |egress, allow: &[&str], deny: &[&str], to: &str| {
            let policy = Policy {
                egress,
                allow: ranges(allow),
                deny: ranges(deny),
                ..Policy::default()
            };
            policy.allows(to.parse().unwrap(), &ranges(&["192.0.2.0/24"]))
        };
        use Egress::{None, Open, Public};
        assert!(judge(Public, &[], &[], "203.0.113.10"));
        assert!(!judge(Public, &[], &[], "10.0.0.1"));
        assert!(!judge(Public, &[], &[], "192.0.2.7"));
        assert!(!judge(Public, &[], &[], "fd00::1"));
        assert!(judge(Public, &["10.0.0.0/24"], &[], "10.0.0.1"));
        assert!(!judge(Public, &["10.0.0.0/24"], &["10.0.0.1"], "10.0.0.1"));
        assert!(!judge(Public, &[], &["203.0.113.0/24"], "203.0.113.10"));
        assert!(judge(Open, &[], &[], "10.0.0.1"));
        assert!(!judge(Open, &[], &[], "169.254.169.254"));
        assert!(judge(None, &["169.254.169.254"], &[], "169.254.169.254"));
        assert!(!judge(None, &[], &[], "203.0.113.10"));
        assert!(judge(None, &["203.0.113.0/24"], &[], "203.0.113.10"));
    }
}
