//! Addresses that the resolver tells machines, in the firewall.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hutch_net::domain::{Domain, Domains, Judgement};
use hutch_net::elements::{Egress, Machine, Policy, mark};
use hutch_net::firewall::{Error, Firewall, Verified};
use hutch_netlink::nft::{Batch, Element, Family, Nft, Table};
use hutch_netlink::{Protocol, Socket, conntrack};

use crate::bed::{
    Bed, GATEWAY_MAC, PATIENCE, PUBLIC, PUBLIC6, Place, Wire, carries, config, datagram,
    in_own_network, machine,
};
use crate::frame;
use crate::policy::reached;

const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
const MINUTE: Duration = Duration::from_secs(60);

fn domain(text: &str) -> Domain {
    text.parse().unwrap()
}

fn policy(egress: Egress, allow: &[&str], deny: &[&str]) -> Policy {
    let patterns = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy {
        egress,
        domains: Domains {
            allow: patterns(allow),
            deny: patterns(deny),
        },
        ..Policy::default()
    }
}

fn inet() -> Table {
    Table {
        family: Family::Inet,
        name: "hutch_ab12".into(),
    }
}

/// What is in a set: keys, and how long each stays.
fn elements(set: &str) -> Vec<(Vec<u8>, Option<u64>)> {
    let found = Nft::open().unwrap().elements(&inet(), set).unwrap();
    let mut found: Vec<_> = found
        .into_iter()
        .map(|found| (found.element.key, found.expires))
        .collect();
    found.sort();
    found
}

fn keys(set: &str) -> Vec<Vec<u8>> {
    elements(set).into_iter().map(|(key, _)| key).collect()
}

fn pair(machine: &Machine, to: Ipv4Addr) -> Vec<u8> {
    [machine.ipv4.octets(), to.octets()].concat()
}

/// Where the connections of a machine lead, as conntrack has them.
fn connections(machine: &Machine) -> Vec<(IpAddr, u16)> {
    let mut socket = Socket::open(Protocol::Netfilter).unwrap();
    let mark = mark(config(true).number, machine.slot);
    let all = conntrack::connections(&mut socket, mark).unwrap();
    let mut all: Vec<_> = all
        .iter()
        .map(|connection| (connection.destination, connection.port.unwrap_or(0)))
        .collect();
    all.sort();
    all
}

#[test]
fn a_machine_without_egress_reaches_what_an_allowed_name_led_to() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(true)) else {
            return;
        };
        let mut own = machine(1);
        own.policy = policy(Egress::None, &["example.com"], &[]);
        let mut tap = bed.machine(&own);
        let all = [PUBLIC.into(), OTHER.into(), IpAddr::V6(PUBLIC6)];
        assert_eq!(
            reached(&mut bed, Place::Taps, &mut tap, &own, &all),
            [] as [IpAddr; 0]
        );
        let learn = |bed: &mut Bed, name: &str, addresses: &[IpAddr]| {
            let name = domain(name);
            bed.firewall
                .learn(&own.label, &name, addresses, MINUTE)
                .unwrap()
        };
        let said = learn(&mut bed, "example.com", &[PUBLIC.into(), PUBLIC6.into()]);
        assert_eq!(said, Judgement::Allowed);
        let said = learn(&mut bed, "example.org", &[OTHER.into()]);
        assert_eq!(said, Judgement::Denied);
        let names = [PUBLIC.into(), IpAddr::V6(PUBLIC6)];
        assert_eq!(reached(&mut bed, Place::Taps, &mut tap, &own, &all), names);
        // Nobody else does, and no name opens what is not public.
        let mut two = machine(2);
        two.policy = own.policy.clone();
        let mut second = bed.machine(&two);
        assert_eq!(
            reached(&mut bed, Place::Taps, &mut second, &two, &all),
            [] as [IpAddr; 0]
        );
        let private = ["10.1.2.3", "169.254.169.254"].map(|text| text.parse().unwrap());
        learn(&mut bed, "example.com", &private);
        assert_eq!(
            reached(&mut bed, Place::Taps, &mut tap, &own, &private),
            [] as [IpAddr; 0]
        );
        assert_eq!(keys("names4"), [pair(&own, PUBLIC)]);
        assert_eq!(bed.firewall.verify().unwrap(), Verified::Sound);
    });
}

#[test]
fn an_address_stays_as_long_as_its_name_and_use() {
    in_own_network(|| {
        let mut own = machine(1);
        own.policy = policy(Egress::None, &["*.example.com"], &[]);
        let mut firewall = Firewall::open(config(true), vec![own.clone()]).unwrap();
        let mut learn = |name: &str, lifetime: Duration| {
            let addresses = [IpAddr::V4(PUBLIC)];
            firewall
                .learn(&own.label, &domain(name), &addresses, lifetime)
                .unwrap();
            elements("names4")
        };
        let found = learn("a.example.com", Duration::from_millis(300));
        assert!(found[0].1.unwrap() <= 300, "{found:?}");
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(elements("names4"), []);
        // Again, after it has gone by itself.
        let found = learn("a.example.com", MINUTE);
        let left = found[0].1.unwrap();
        assert!((30_000..=60_000).contains(&left), "{found:?}");
        // Again, while it may be in use: it is not cut short.
        let found = learn("b.example.com", MINUTE);
        let left = found[0].1.unwrap();
        assert!((800_000..=900_000).contains(&left), "{found:?}");
        let found = learn("b.example.com", MINUTE * 60);
        let left = found[0].1.unwrap();
        assert!((3_500_000..=3_600_000).contains(&left), "{found:?}");
        assert_eq!(found.len(), 1);
        let learned = firewall.learned(&own.label);
        let names: Vec<_> = learned[&IpAddr::V4(PUBLIC)].iter().collect();
        assert_eq!(names, [&domain("a.example.com"), &domain("b.example.com")]);
    });
}

#[test]
fn another_policy_ends_connections_to_what_its_names_do_not_allow() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(true)) else {
            return;
        };
        let mut own = machine(1);
        own.policy = policy(Egress::None, &["example.com", "example.org"], &[]);
        let mut tap = bed.machine(&own);
        for (name, address) in [("example.com", PUBLIC), ("example.org", OTHER)] {
            let addresses = [address.into()];
            bed.firewall
                .learn(&own.label, &domain(name), &addresses, MINUTE)
                .unwrap();
        }
        tap.send(&datagram(&own, PUBLIC.into(), b"a"));
        tap.send(&datagram(&own, OTHER.into(), b"b"));
        let both = [(PUBLIC.into(), 5000), (IpAddr::V4(OTHER), 5000)];
        bed.world
            .until(PATIENCE, |frame| carries(frame, b"b"))
            .unwrap();
        assert_eq!(connections(&own), both);
        let less = policy(Egress::None, &["example.org"], &[]);
        bed.firewall.set_policy(&own.label, less).unwrap();
        assert_eq!(connections(&own), both[1..]);
        assert_eq!(keys("names4"), [pair(&own, OTHER)]);
        let all = [PUBLIC.into(), OTHER.into()];
        assert_eq!(
            reached(&mut bed, Place::Taps, &mut tap, &own, &all),
            all[1..]
        );
        assert_eq!(bed.firewall.verify().unwrap(), Verified::Sound);
    });
}

#[test]
fn a_name_that_is_denied_later_closes_what_it_led_to() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(true)) else {
            return;
        };
        let own = machine(1);
        let mut tap = bed.machine(&own);
        let generation = Nft::open().unwrap().generation().unwrap();
        for (name, address) in [("example.com", PUBLIC), ("example.org", OTHER)] {
            let said = bed
                .firewall
                .learn(&own.label, &domain(name), &[address.into()], MINUTE);
            assert_eq!(said.unwrap(), Judgement::Unnamed);
        }
        // What needs no name costs the kernel nothing.
        assert_eq!(Nft::open().unwrap().generation().unwrap(), generation);
        tap.send(&datagram(&own, PUBLIC.into(), b"a"));
        tap.send(&datagram(&own, OTHER.into(), b"b"));
        bed.world
            .until(PATIENCE, |frame| carries(frame, b"b"))
            .unwrap();
        let denied = policy(Egress::Public, &[], &["example.com"]);
        bed.firewall.set_policy(&own.label, denied).unwrap();
        assert_eq!(connections(&own), [(OTHER.into(), 5000)]);
        let all = [PUBLIC.into(), OTHER.into()];
        assert_eq!(
            reached(&mut bed, Place::Taps, &mut tap, &own, &all),
            all[1..]
        );
        assert_eq!(keys("noname4"), [pair(&own, PUBLIC)]);
        // One allowed name opens what others share with it; without rules, all is as it was.
        let mut shared = policy(Egress::Public, &["www.example.com"], &["example.com"]);
        bed.firewall.set_policy(&own.label, shared.clone()).unwrap();
        let name = domain("www.example.com");
        bed.firewall
            .learn(&own.label, &name, &[PUBLIC.into()], MINUTE)
            .unwrap();
        assert_eq!(reached(&mut bed, Place::Taps, &mut tap, &own, &all), all);
        assert_eq!((keys("noname4").len(), keys("names4").len()), (0, 1));
        shared.domains = Domains::default();
        bed.firewall.set_policy(&own.label, shared).unwrap();
        assert_eq!((keys("noname4").len(), keys("names4").len()), (0, 0));
        assert_eq!(reached(&mut bed, Place::Taps, &mut tap, &own, &all), all);
    });
}

#[test]
fn what_somebody_flushes_comes_back() {
    in_own_network(|| {
        let mut own = machine(1);
        own.policy = policy(Egress::None, &["example.com"], &[]);
        let mut firewall = Firewall::open(config(false), vec![own.clone()]).unwrap();
        let name = domain("example.com");
        let addresses = [PUBLIC.into(), IpAddr::V6(PUBLIC6)];
        firewall
            .learn(&own.label, &name, &addresses, MINUTE)
            .unwrap();
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
        let mut nft = Nft::open().unwrap();
        let damage: [&dyn Fn(&mut Batch); 3] = [
            &|batch| batch.delete_table(&inet()),
            &|batch| batch.delete(&inet(), "names4", &[Element::new(pair(&own, PUBLIC))]),
            &|batch| {
                let mut element = Element::new(pair(&own, OTHER));
                element.timeout = Some(60_000);
                batch.add(&inet(), "names4", &[element]);
            },
        ];
        for (number, damage) in damage.iter().enumerate() {
            let mut batch = Batch::default();
            damage(&mut batch);
            nft.commit(&batch, None).unwrap();
            assert_eq!(firewall.verify().unwrap(), Verified::Repaired, "{number}");
            assert_eq!(keys("names4"), [pair(&own, PUBLIC)], "{number}");
            assert_eq!(keys("names6").len(), 1, "{number}");
            assert!(elements("names4")[0].1.unwrap() <= 60_000, "{number}");
            assert_eq!(firewall.verify().unwrap(), Verified::Sound, "{number}");
        }
    });
}

#[test]
fn the_next_server_keeps_what_machines_learned() {
    for port in [None, Some(5353)] {
        in_own_network(move || {
            let (mut own, mut other) = (machine(1), machine(2));
            own.policy = policy(Egress::None, &["example.com"], &[]);
            other.policy = own.policy.clone();
            let name = domain("example.com");
            let machines = vec![own.clone(), other.clone()];
            let mut firewall = Firewall::open(config(true), machines).unwrap();
            for label in [&own.label, &other.label] {
                firewall
                    .learn(label, &name, &[PUBLIC.into()], MINUTE)
                    .unwrap();
            }
            drop(firewall);
            // With another port, its rules are another version.
            let mut config = config(true);
            config.rules.dns_port = port;
            let mut firewall = Firewall::open(config, vec![own.clone()]).unwrap();
            assert_eq!(keys("names4"), [pair(&own, PUBLIC)]);
            assert_eq!(firewall.verify().unwrap(), Verified::Sound);
            // Of these no name is known, so another policy cannot judge them.
            firewall
                .learn(&own.label, &name, &[OTHER.into()], MINUTE)
                .unwrap();
            let peers = Policy {
                peers: Vec::new(),
                ..own.policy.clone()
            };
            firewall.set_policy(&own.label, peers).unwrap();
            assert_eq!(keys("names4").len(), 2);
            let more = policy(Egress::None, &["example.com", "example.org"], &[]);
            firewall.set_policy(&own.label, more).unwrap();
            assert_eq!(keys("names4"), [pair(&own, OTHER)]);
        });
    }
}

#[test]
fn who_gets_the_address_next_gets_nothing_that_was_learned() {
    in_own_network(|| {
        let mut own = machine(1);
        own.policy = policy(Egress::None, &["example.com"], &["example.org"]);
        let mut firewall = Firewall::open(config(true), vec![own.clone()]).unwrap();
        let name = domain("example.com");
        for (name, address) in [("example.com", PUBLIC), ("example.org", OTHER)] {
            firewall
                .learn(&own.label, &domain(name), &[address.into()], MINUTE)
                .unwrap();
        }
        assert_eq!((keys("names4").len(), keys("noname4").len()), (1, 1));
        firewall.remove(&own.label).unwrap();
        assert_eq!((keys("names4").len(), keys("noname4").len()), (0, 0));
        assert!(firewall.learned(&own.label).is_empty());
        let unknown = firewall.learn(&own.label, &name, &[PUBLIC.into()], MINUTE);
        assert!(matches!(unknown, Err(Error::Unknown { .. })));
        // The same label with another address.
        firewall.add(own.clone()).unwrap();
        firewall
            .learn(&own.label, &name, &[PUBLIC.into()], MINUTE)
            .unwrap();
        own.ipv4 = Ipv4Addr::new(172, 16, 7, 7);
        firewall.add(own.clone()).unwrap();
        assert_eq!(keys("names4").len(), 0);
    });
}

#[test]
fn a_machine_cannot_learn_without_end() {
    in_own_network(|| {
        let (mut own, plain) = (machine(1), machine(2));
        own.policy = policy(Egress::None, &["*.example.com"], &[]);
        let mut firewall = Firewall::open(config(true), vec![own.clone(), plain.clone()]).unwrap();
        let mut learn = |machine: &Machine, number: u32| {
            let name = domain(&format!("n{number}.example.com"));
            let start = u32::from(Ipv4Addr::new(203, 0, 0, 0)) + number * 64;
            let addresses: Vec<IpAddr> = (start..start + 64)
                .map(|bits| Ipv4Addr::from(bits).into())
                .collect();
            firewall.learn(&machine.label, &name, &addresses, MINUTE)
        };
        for number in 0..64 {
            learn(&own, number).unwrap();
        }
        assert!(matches!(learn(&own, 64), Err(Error::Crowded { .. })));
        // What is only remembered goes when there is more.
        for number in 0..200 {
            learn(&plain, number).unwrap();
        }
        assert_eq!(keys("names4").len(), 4096);
        assert!(firewall.learned(&plain.label).len() <= 4096);
    });
}

#[test]
fn machines_with_rules_about_names_ask_nobody_else() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(true)) else {
            return;
        };
        let own = machine(1);
        let mut tap = bed.machine(&own);
        let send = |tap: &mut Wire, to: IpAddr, port: u16, payload: &[u8]| {
            let source = if to.is_ipv4() {
                own.ipv4.into()
            } else {
                IpAddr::V6(own.ipv6)
            };
            let l4 = frame::udp(4000, port, payload);
            tap.send(&frame::ip(
                GATEWAY_MAC,
                own.mac,
                source,
                to,
                &l4,
                frame::UDP,
            ));
        };
        let mut passed = |bed: &mut Bed| -> Vec<(IpAddr, u16)> {
            let all = [
                (PUBLIC.into(), 853),
                (PUBLIC6.into(), 53),
                (PUBLIC6.into(), 853),
                (IpAddr::V6(PUBLIC6), 54),
            ];
            for (to, port) in all {
                send(&mut tap, to, port, format!("port {port}").as_bytes());
            }
            let mut seen = Vec::new();
            while seen.last() != all.last() {
                let frame = bed
                    .world
                    .until(PATIENCE, |frame| carries(frame, b"port"))
                    .unwrap();
                let (_, to, _, l4) = frame::read(&frame).unwrap();
                seen.push((to, u16::from_be_bytes([l4[2], l4[3]])));
            }
            seen
        };
        assert_eq!(passed(&mut bed).len(), 4);
        assert_eq!(connections(&own).len(), 4);
        let denied = policy(Egress::Public, &[], &["example.com"]);
        bed.firewall.set_policy(&own.label, denied.clone()).unwrap();
        assert_eq!(connections(&own), [(PUBLIC6.into(), 54)]);
        assert_eq!(passed(&mut bed), [(PUBLIC6.into(), 54)]);
        let ranges = Policy {
            allow: vec!["2001:db8:2::a".parse().unwrap()],
            ..denied
        };
        bed.firewall.set_policy(&own.label, ranges).unwrap();
        assert_eq!(passed(&mut bed).len(), 3);
    });
}
