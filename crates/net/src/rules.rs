//! The rules: tables that never change while machines come and go. Machines are elements of their sets
//! (`elements.rs`). The same in the words of `nft` is `rules.nft`, and for machines on a bridge `rules-bridge.nft`, which
//! a test compares.
//!
//! A tap is known by its name's prefix, so it is denied everything from the moment it exists; elements only open things.

mod bridge;
mod words;

use std::net::Ipv4Addr;

use hutch_netlink::nft::{
    Address, Base, Batch, Compare, Conntrack, Data, Element, Expression, Family, Hook, Meta,
    REGISTER, Reject, Set, Table, Type, Value, register32,
};

use crate::cidr::{Cidr, without_nested};
use crate::elements::{RESOLVERS, padded};
use crate::private::{METADATA, PRIVATE4, PRIVATE6};
use words::*;
pub(crate) use words::{NAME_IDLE_MS, octets};

/// What the rules of one instance differ in from those of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Four characters; tables are `hutch_TAG`, and taps `hTAG-SLOT`.
    pub tag: String,
    /// The host's address on every tap.
    pub gateway: Ipv4Addr,
    /// The port where the resolver for machines listens on the gateway's address, if there is one.
    pub dns_port: Option<u16>,
    /// Networks beside the private ones that `public` machines do not reach.
    pub host_networks: Vec<Cidr>,
    /// Where packets of machines come in.
    pub link: Link,
}

/// Through which of the host's interfaces machines speak to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Each through its tap.
    Taps,
    /// All through a bridge whose ports their taps are; it may have others' ports, too.
    Bridge {
        /// Its name.
        name: String,
        /// The gateway's MAC, which is the bridge's own.
        mac: [u8; 6],
    },
}

/// One table: sets with what is always in them, and chains with their rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableRules {
    pub(crate) table: Table,
    pub(crate) sets: Vec<(Set, Vec<Element>)>,
    pub(crate) chains: Vec<Chain>,
}

type Rule = Vec<Expression>;

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: &'static str,
    hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// The name that all tables of an instance have.
pub(crate) fn table(tag: &str) -> String {
    format!("hutch_{tag}")
}

impl Rules {
    /// The name of the tables.
    pub fn table(&self) -> String {
        table(&self.tag)
    }

    /// How the names of taps begin.
    pub fn prefix(&self) -> String {
        crate::label_prefix(&self.tag)
    }

    pub(crate) fn tables(&self) -> Vec<TableRules> {
        let table = |family| Table {
            family,
            name: self.table(),
        };
        if let Link::Bridge { mac, .. } = self.link {
            return bridge::tables(self, mac);
        }
        vec![
            TableRules {
                table: table(Family::Inet),
                sets: self.inet_sets(),
                chains: self.inet_chains(),
            },
            TableRules {
                table: table(Family::Arp),
                sets: vec![
                    (
                        set("from", &[Type::Interface, Type::Ether, Type::Ipv4]),
                        vec![],
                    ),
                    (counting("spoofed", Type::Interface), vec![]),
                ],
                chains: self.arp_chains(),
            },
        ]
    }

    fn inet_sets(&self) -> Vec<(Set, Vec<Element>)> {
        use Type::{Ether, Icmpv6, Interface, Ipv4, Ipv6, Mark, Service};
        let numbers = |numbers: &[u8]| numbers.iter().map(|n| Element::new([*n])).collect();
        let ports = |ports: &[u16]| {
            let port = |port: &u16| Element::new(port.to_be_bytes());
            ports.iter().map(port).collect()
        };
        let metadata = |v4: bool| {
            let of_family = METADATA.iter().filter(|address| address.is_ipv4() == v4);
            of_family
                .map(|address| Element::new(octets(*address)))
                .collect()
        };
        let host = |v4: bool| {
            let of_family = self
                .host_networks
                .iter()
                .filter(|range| range.first().is_ipv4() == v4);
            let of_family: Vec<_> = of_family.copied().collect();
            ranges(&without_nested(&of_family))
        };
        let neighbours = [
            Element::range([130], Some(vec![138])),
            Element::range([143], Some(vec![144])),
        ];
        let port = self.dns_port.map(u16::to_be_bytes);
        let dns = port.map(|port| {
            let data = Data::Value(port.to_vec());
            Element::new(53u16.to_be_bytes()).with(data)
        });
        let mut sets = vec![
            (interval("private4", &[Ipv4]), ranges(&PRIVATE4)),
            (interval("private6", &[Ipv6]), ranges(&PRIVATE6)),
            (set("metadata4", &[Ipv4]), metadata(true)),
            (set("metadata6", &[Ipv6]), metadata(false)),
            (interval("hostnets4", &[Ipv4]), host(true)),
            (interval("hostnets6", &[Ipv6]), host(false)),
            (set("dhcp_servers", &[Service]), ports(&[67, 547])),
            // Listener queries, router advertisements, redirects, and what of the neighbours' is not as it should be.
            (
                set("routers_say", &[Icmpv6]),
                numbers(&[130, 134, 135, 136, 137]),
            ),
            // These, listeners' reports and router solicitations.
            (interval("neighbours_say", &[Icmpv6]), neighbours.concat()),
            (set("nd", &[Icmpv6]), numbers(&[135, 136])),
            // Where other resolvers are asked.
            (set("resolvers", &[Service]), ports(&RESOLVERS)),
            (
                map("dns", Service, Value::Of(Service)),
                dns.into_iter().collect(),
            ),
            (
                set("dns_ports", &[Service]),
                port.map(Element::new).into_iter().collect(),
            ),
            // Who may say he is whom.
            (set("from4", &[Interface, Ether, Ipv4]), vec![]),
            (set("from6", &[Interface, Ether, Ipv6]), vec![]),
            // What was refused since it lied, per machine.
            (counting("spoofed", Interface), vec![]),
        ];
        for (name, make) in [
            // What went out and came in.
            ("out", counting as fn(&str, Type) -> Set),
            ("in", counting),
            // Elements carry a limit of their own.
            ("rate_out", one),
            ("rate_in", one),
            ("conns", one),
            // Whose packets go out under the host's address.
            ("machines", one),
            // All of whose questions about names go to our resolver.
            ("dns_forced", one),
        ] {
            sets.push((make(&format!("{name}4"), Ipv4), vec![]));
            sets.push((make(&format!("{name}6"), Ipv6), vec![]));
        }
        for (number, kind) in [("4", Ipv4), ("6", Ipv6)] {
            let name = |name: &str| format!("{name}{number}");
            sets.push((map(&name("mark"), kind, Value::Of(Mark)), vec![]));
            // To the chain of the machine's policy.
            sets.push((map(&name("egress"), kind, Value::Verdict), vec![]));
            // Machines of a group: one element per ordered pair.
            sets.push((set(&name("peers"), &[kind, kind]), vec![]));
            // Machine and range: policies of their own.
            sets.push((interval(&name("allow"), &[kind, kind]), vec![]));
            sets.push((interval(&name("deny"), &[kind, kind]), vec![]));
            // Machine and what the resolver answered for names that it may, or may not, reach.
            let mut names = set(&name("names"), &[kind, kind]);
            (names.timeout, names.dynamic) = (true, Some(NAMES_MAX));
            sets.push((names, vec![]));
            let mut noname = set(&name("noname"), &[kind, kind]);
            noname.timeout = true;
            sets.push((noname, vec![]));
        }
        sets
    }

    fn inet_chains(&self) -> Vec<Chain> {
        let from_link = || self.link(Meta::InputName);
        let to_link = || self.link(Meta::OutputName);
        let gateway = || equal(4, Base::Network, V4.destination, &self.gateway.octets());
        let resolve = |protocol: u8, of: Rule| {
            let port = [load(Base::Transport, 2, 2), vec![find("dns")]].concat();
            let to = vec![Expression::Redirect(REGISTER)];
            [self.of_machines(&V4), of, l4(protocol), port, to].concat()
        };
        let asked_gateway = || [v4(), gateway()].concat();
        let forced = || V4.source_in("dns_forced");
        let dns_answer = |protocol: u8| {
            let translated = bits(Conntrack::Status, Conntrack::DESTINATION_TRANSLATED);
            let port = load(Base::Transport, 2, 2);
            [
                translated,
                l4(protocol),
                port,
                vec![lookup("dns_ports")],
                accept(),
            ]
            .concat()
        };
        let ping = || {
            let request = equal(1, Base::Transport, 0, &[8]);
            let some = vec![Expression::Limit(50, BURST)];
            [asked_gateway(), l4(ICMP), request, some, accept()].concat()
        };
        vec![
            // Before conntrack, so that lies cost no entry, and after defragmentation.
            chain(
                "spoof",
                Some(hook("filter", PREROUTING, -310)),
                match self.link {
                    Link::Taps => vec![[from_link(), goto("from_tap")].concat()],
                    Link::Bridge { .. } => bridge::senders(self),
                },
            ),
            chain(
                "from_tap",
                None,
                match self.link {
                    Link::Taps => vec![
                        [whole_sender(&V4), vec![lookup("from4")], goto("sane")].concat(),
                        [whole_sender(&V6), vec![lookup("from6")], goto("sane")].concat(),
                        spoofed(),
                        drop_it(),
                    ],
                    Link::Bridge { .. } => vec![spoofed(), drop_it()],
                },
            ),
            chain("sane", None, self.sane()),
            chain(
                "mark_from",
                Some(hook("filter", PREROUTING, -150)),
                both(|ip| {
                    [
                        from_link(),
                        state(Conntrack::NEW),
                        ip.source_in_map("mark"),
                        set_mark(),
                    ]
                    .concat()
                }),
            ),
            chain(
                "mark_to",
                Some(hook("filter", OUTPUT, -150)),
                both(|ip| {
                    [
                        to_link(),
                        state(Conntrack::NEW),
                        ip.destination_in_map("mark"),
                        set_mark(),
                    ]
                    .concat()
                }),
            ),
            chain(
                "resolve",
                Some(hook("nat", PREROUTING, -100)),
                vec![
                    resolve(TCP, asked_gateway()),
                    resolve(UDP, asked_gateway()),
                    resolve(TCP, forced()),
                    resolve(UDP, forced()),
                ],
            ),
            chain(
                "masquerading",
                Some(hook("nat", POSTROUTING, 100)),
                [
                    self.when_to_machines(&accept()),
                    both(|ip| [ip.source_in("machines"), vec![Expression::Masquerade]].concat()),
                ]
                .concat(),
            ),
            chain(
                "account",
                Some(hook("filter", POSTROUTING, 200)),
                vec![[to_link(), goto("to_tap")].concat()],
            ),
            chain(
                "to_tap",
                None,
                [
                    both(|ip| [ip.destination_in("rate_in"), drop_it()].concat()),
                    both(|ip| ip.destination_in("in")),
                ]
                .concat(),
            ),
            chain(
                "input",
                Some(hook("filter", INPUT, -10)),
                self.when_from_machines(&goto("to_host")),
            ),
            chain(
                "to_host",
                None,
                vec![
                    answers(),
                    [state(Conntrack::INVALID), drop_it()].concat(),
                    [icmpv6(), vec![lookup("nd")], accept()].concat(),
                    [destination_is(Compare::NotEqual, Address::Local), drop_it()].concat(),
                    // Redirected by us; what others redirect has other ports.
                    dns_answer(TCP),
                    dns_answer(UDP),
                    ping(),
                    goto("refused"),
                ],
            ),
            chain(
                "forward",
                Some(hook("filter", FORWARD, -10)),
                [
                    self.when_from_machines(&goto("from_machine")),
                    self.when_to_machines(&goto("to_machine")),
                ]
                .concat(),
            ),
            chain("to_machine", None, vec![answers(), drop_it()]),
            chain(
                "from_machine",
                None,
                [
                    vec![
                        [state(Conntrack::INVALID), drop_it()].concat(),
                        clamp_segments(),
                    ],
                    // Counted once each: what the kernel counts again would be refused with the one too many.
                    both(|ip| [begins(), ip.source_in("conns"), goto("refused")].concat()),
                    self.when_to_machines(&goto("between")),
                    // Only what is allowed by name of the address opens these.
                    both(|ip| [ip.destination_in("metadata"), goto("asked")].concat()),
                    both(|ip| [ip.load_source(), vec![ip.verdicts("egress")]].concat()),
                    vec![goto("refused")],
                ]
                .concat(),
            ),
            chain(
                "between",
                None,
                [
                    vec![answers()],
                    both(|ip| [ip.pair_in("peers"), accept()].concat()),
                    vec![goto("refused")],
                ]
                .concat(),
            ),
            chain("open", None, vec![accept()]),
            chain(
                "public",
                None,
                [
                    both(|ip| [ip.destination_in("private"), goto("refused")].concat()),
                    both(|ip| [ip.destination_in("hostnets"), goto("refused")].concat()),
                    vec![accept()],
                ]
                .concat(),
            ),
            chain("none", None, vec![goto("refused")]),
            chain(
                "asked",
                None,
                [
                    both(|ip| [ip.pair_in("allow"), accept()].concat()),
                    vec![goto("refused")],
                ]
                .concat(),
            ),
            chain(
                "common",
                None,
                [
                    both(|ip| [ip.pair_in("deny"), goto("refused")].concat()),
                    both(|ip| [ip.pair_in("noname"), goto("refused")].concat()),
                    both(|ip| [ip.pair_in("allow"), accept()].concat()),
                    // What was not redirected to our resolver.
                    both(|ip| asks_others(ip, TCP)),
                    both(|ip| asks_others(ip, UDP)),
                    // What is in use stays open, whatever the name's time to live.
                    both(|ip| {
                        let again = Expression::Update(ip.named("names"), REGISTER, NAME_IDLE_MS);
                        [ip.pair_in("names"), ip.load_pair(), vec![again], accept()].concat()
                    }),
                ]
                .concat(),
            ),
            chain("c_public", None, vec![jump("common"), goto("public")]),
            chain("c_open", None, vec![jump("common"), goto("open")]),
            chain("c_none", None, vec![jump("common"), goto("refused")]),
            chain(
                "refused",
                None,
                vec![
                    [l4(TCP), vec![Expression::Reject(Reject::Reset)]].concat(),
                    vec![
                        Expression::Limit(100, BURST),
                        Expression::Reject(Reject::Prohibited),
                    ],
                    drop_it(),
                ],
            ),
        ]
    }

    fn arp_chains(&self) -> Vec<Chain> {
        // Ethernet and IPv4, with addresses of their lengths.
        let form = [
            equal(4, Base::Network, 0, &[0, 1, 8, 0]),
            equal(2, Base::Network, 4, &[6, 4]),
            ethernet(),
        ]
        .concat();
        // The sender of the frame and the one in the message must both be the machine.
        let sender = |base, offset| {
            vec![
                Expression::Meta(Meta::InputName, REGISTER),
                Expression::Payload(base, offset, 6, register32(16)),
                Expression::Payload(Base::Network, 14, 4, register32(24)),
                lookup("from"),
            ]
        };
        let outer = sender(Base::Link, 6);
        let inner = sender(Base::Network, 8);
        let for_gateway = equal(4, Base::Network, 24, &self.gateway.octets());
        vec![
            chain(
                "input",
                Some(hook("filter", ARP_INPUT, 0)),
                vec![[self.tap(Meta::InputName), goto("from_tap")].concat()],
            ),
            chain(
                "from_tap",
                None,
                vec![
                    [form, outer, inner, goto("asked")].concat(),
                    spoofed(),
                    drop_it(),
                ],
            ),
            chain(
                "asked",
                None,
                vec![[for_gateway, accept()].concat(), drop_it()],
            ),
        ]
    }

    /// Packets of one family from machines.
    fn of_machines(&self, ip: &Ip) -> Rule {
        let from = self.link(Meta::InputName);
        match self.link {
            Link::Taps => from,
            // Others' ports may be there, too.
            Link::Bridge { .. } => [from, ip.source_in("machines")].concat(),
        }
    }

    fn when_from_machines(&self, then: &Rule) -> Vec<Rule> {
        match self.link {
            Link::Taps => vec![[self.link(Meta::InputName), then.clone()].concat()],
            Link::Bridge { .. } => both(|ip| [self.of_machines(ip), then.clone()].concat()),
        }
    }

    fn when_to_machines(&self, then: &Rule) -> Vec<Rule> {
        let to = self.link(Meta::OutputName);
        match self.link {
            Link::Taps => vec![[to, then.clone()].concat()],
            Link::Bridge { .. } => {
                both(|ip| [to.clone(), ip.destination_in("machines"), then.clone()].concat())
            }
        }
    }

    /// What comes in, or goes out, where machines are.
    fn link(&self, direction: Meta) -> Rule {
        match &self.link {
            Link::Taps => self.tap(direction),
            Link::Bridge { name, .. } => meta(direction, &padded(name)),
        }
    }

    fn tap(&self, direction: Meta) -> Rule {
        // Without its NUL, a name is compared as a prefix.
        let prefix = self.prefix().into_bytes();
        vec![
            Expression::Meta(direction, REGISTER),
            Expression::Cmp(REGISTER, Compare::Equal, prefix),
        ]
    }

    /// What of a machine's own packets is dropped although it does not lie about who it is.
    fn sane(&self) -> Vec<Rule> {
        let to = |address| [destination_is(Compare::Equal, address), drop_it()].concat();
        let mut rules = match self.link {
            Link::Taps => honest(),
            Link::Bridge { .. } => bridge::honest_again(),
        };
        rules.extend([Address::Broadcast, Address::Multicast, Address::Anycast].map(to));
        rules.extend(both(|ip| [ip.source_in("rate_out"), drop_it()].concat()));
        rules.extend(both(|ip| ip.source_in("out")));
        rules
    }
}

/// Refuses machines with rules about names other resolvers.
fn asks_others(ip: &Ip, protocol: u8) -> Rule {
    let port = [load(Base::Transport, 2, 2), vec![lookup("resolvers")]].concat();
    let forced = ip.source_in("dns_forced");
    [forced, l4(protocol), port, goto("refused")].concat()
}

/// What a tap's machine may say to neighbours, and what only others may.
fn honest() -> Vec<Rule> {
    // The address that it advertises must be its own.
    let target = vec![
        Expression::Meta(Meta::InputName, REGISTER),
        Expression::Payload(Base::Link, 6, 6, register32(16)),
        Expression::Payload(Base::Transport, 8, 16, register32(24)),
        lookup("from6"),
    ];
    let says = |set: &str| [icmpv6(), vec![lookup(set)]].concat();
    vec![
        [neighbour(SOLICITATION), accept()].concat(),
        [neighbour(ADVERTISEMENT), ethernet(), target, accept()].concat(),
        [says("routers_say"), spoofed()].concat(),
        [says("neighbours_say"), drop_it()].concat(),
        [dhcp_server(), spoofed()].concat(),
        [dhcp_server(), drop_it()].concat(),
    ]
}

/// Next header and hop limit: from this link, without extension headers.
fn neighbour(kind: u8) -> Rule {
    let plain = equal(2, Base::Network, 6, &[ICMPV6, 255]);
    [nfproto(&V6), plain, equal(1, Base::Transport, 0, &[kind])].concat()
}

fn dhcp_server() -> Rule {
    let port = load(Base::Transport, 0, 2);
    [l4(UDP), port, vec![lookup("dhcp_servers")]].concat()
}

impl TableRules {
    /// Makes the table with all of its rules, and with what is always in its sets.
    pub(crate) fn make(&self, batch: &mut Batch, flags: u32, comment: &str) {
        let table = &self.table;
        batch.table(table, flags, comment);
        for chain in &self.chains {
            batch.chain(table, chain.name, chain.hook);
        }
        for (set, elements) in &self.sets {
            batch.set(table, set);
            batch.add(table, &set.name, elements);
        }
        self.fill(batch);
    }

    /// Keeps the table, its sets and their elements, and replaces its rules.
    pub(crate) fn renew(&self, batch: &mut Batch, flags: u32, comment: &str) {
        batch.table(&self.table, flags, comment);
        batch.delete_rules(&self.table);
        self.fill(batch);
    }

    fn fill(&self, batch: &mut Batch) {
        for chain in &self.chains {
            for rule in &chain.rules {
                batch.rule(&self.table, chain.name, rule);
            }
        }
    }
}
