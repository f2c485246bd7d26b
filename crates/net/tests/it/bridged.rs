//! Machines on a bridge, beside others' ports, others' bridges, and other instances.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::process::Command;

use hutch_contract::error::Kind as ErrorKind;
use hutch_net::bridge::{self, Bridge, Found, mac, on_bridge};
use hutch_net::elements::{Machine, Peer};
use hutch_net::firewall::{Config, Firewall, Verified};
use hutch_net::rules::Link;
use hutch_netlink::bridge::{join, places, ports};
use hutch_netlink::nft::{Batch, Expression, Family, Nft, Table, Verdict};
use hutch_netlink::route::{self, Change, Kind};
use hutch_netlink::{Protocol, Socket};

use crate::bed::{
    BRIDGE, Bed, GATEWAY_MAC, GATEWAY6, NUMBER, PATIENCE, PUBLIC, PUBLIC6, Place, Wire,
    bridge_config, carries, datagram, foreign_port, in_each_place, in_own_network,
};
use crate::frame::{self, Arp};
use crate::sys;

const PLACE: Place = Place::Bridge { called: true };
const UP: Change = Change {
    up: Some(true),
    mtu: None,
    address: None,
    alias: None,
    no_own_ipv6: false,
};

fn peer(machine: &Machine) -> Peer {
    Peer {
        ipv4: machine.ipv4,
        ipv6: machine.ipv6,
    }
}

#[test]
fn machines_of_a_group_speak_through_the_host_and_hear_of_no_shorter_way() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let (mut one, mut two) = (place.machine(1), place.machine(2));
        one.policy.peers = vec![peer(&two)];
        two.policy.peers = vec![peer(&one)];
        let mut first = bed.machine(&one);
        let mut second = bed.machine(&two);
        for (to, back) in [
            (IpAddr::V4(two.ipv4), IpAddr::V4(one.ipv4)),
            (two.ipv6.into(), one.ipv6.into()),
        ] {
            first.send(&datagram(&one, to, b"hello"));
            let heard = second.until(PATIENCE, |frame| carries(frame, b"hello"));
            let heard = heard.unwrap();
            assert_eq!(
                (&heard[..6], &heard[6..12]),
                (&two.mac[..], &GATEWAY_MAC[..])
            );
            second.send(&datagram(&two, back, b"and you"));
            for frame in first.all_until(|frame| carries(frame, b"and you")) {
                let redirect = frame::read(&frame).is_some_and(|(.., protocol, l4)| {
                    (protocol == frame::ICMP && l4[0] == 5)
                        || (protocol == frame::ICMPV6 && l4[0] == 137)
                });
                assert!(!redirect, "{to}");
            }
        }
    });
}

#[test]
fn a_foreign_port_cannot_pass_for_a_machine() {
    for called in [false, true] {
        in_own_network(|| {
            let place = Place::Bridge { called };
            let Some(mut bed) = Bed::at(place, true) else {
                return;
            };
            let own = place.machine(1);
            let mut tap = bed.machine(&own);
            let mut foreign = bed.foreign_port();
            let stranger = [2, 0, 0, 0, 0, 7];
            let index = route::index(&mut bed.route, BRIDGE).unwrap();
            let table = |bed: &mut Bed| {
                let mut all = places(&mut bed.route, index).unwrap();
                all.retain(|place| place.mac[..] == own.mac);
                all
            };
            let before = table(&mut bed);
            assert!(before.len() == 1 && before[0].sticky, "{before:?}");
            let mut as_machine = own.clone();
            as_machine.mac = stranger;
            let ask = |mac, address| {
                let arp = Arp {
                    operation: 1,
                    sender: (mac, address),
                    target: ([0; 6], place.gateway()),
                };
                frame::arp([255; 6], mac, &arp)
            };
            let advertised =
                [&[0x60, 0, 0, 0][..], &own.ipv6.octets(), &[2, 1], &stranger].concat();
            let advertised = frame::icmp(136, &advertised);
            let (theirs, hosts) = ("fe80::7".parse().unwrap(), GATEWAY6.into());
            for mac in [stranger, own.mac] {
                as_machine.mac = mac;
                for to in [PUBLIC.into(), IpAddr::V6(PUBLIC6)] {
                    foreign.send(&datagram(&as_machine, to, b"lie"));
                }
                foreign.send(&ask(mac, own.ipv4));
                foreign.send(&frame::ip(
                    GATEWAY_MAC,
                    mac,
                    theirs,
                    hosts,
                    &advertised,
                    frame::ICMPV6,
                ));
            }
            // Straight to the machine.
            let mut neighbour = own.clone();
            neighbour.mac = stranger;
            neighbour.ipv4 = Ipv4Addr::new(172, 16, 9, 9);
            let udp = frame::udp(1, 2, b"lie");
            let from = neighbour.ipv4.into();
            let to = own.ipv4.into();
            for mac in [own.mac, [255; 6], GATEWAY_MAC] {
                foreign.send(&frame::ip(mac, stranger, from, to, &udp, frame::UDP));
            }
            // The host speaks to strangers, too, who are just not machines.
            foreign.send(&ask(stranger, neighbour.ipv4));
            let answers = foreign.all_until(|frame| frame[12..14] == [8, 6] && frame[21] == 2);
            let answer = answers.last().unwrap();
            assert_eq!(&answer[38..42], neighbour.ipv4.octets());
            let others = answers
                .iter()
                .filter(|frame| frame[12..14] == [8, 6])
                .count();
            assert_eq!(others, 1);
            tap.send(&datagram(&own, PUBLIC.into(), b"honest"));
            let seen = bed.world.all_until(|frame| carries(frame, b"honest"));
            assert!(!seen.iter().any(|frame| carries(frame, b"lie")));
            assert!(!tap.drain().iter().any(|frame| carries(frame, b"lie")));
            assert_eq!(table(&mut bed), before);
            let known = route::neighbours(&mut bed.route, index).unwrap();
            let strange = known.iter().filter(|(_, mac)| mac[..] == stranger);
            assert!(
                strange.clone().all(|(ip, _)| *ip == neighbour.ipv4),
                "{known:?}"
            );
        });
    }
}

/// What `ip` shows of a link, or nothing where there is no `ip`.
fn shown(name: &str) -> Option<String> {
    let mut all = String::new();
    for what in ["link", "addr"] {
        let done = Command::new("ip")
            .args(["-d", what, "show", "dev", name])
            .output();
        match done {
            Ok(done) => all.push_str(&String::from_utf8(done.stdout).unwrap()),
            Err(error) => {
                eprintln!("skipped: ip is not to be had: {error}");
                return None;
            }
        }
    }
    // Timers count down meanwhile.
    let timers = |word: &&str| !word.contains('.') || word.parse::<f64>().is_err();
    Some(
        all.split_whitespace()
            .filter(timers)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

fn foreign_bridge(socket: &mut Socket, addresses: &[(&str, u8)]) -> u32 {
    socket
        .apply(&[route::create(BRIDGE, Kind::Bridge)])
        .unwrap();
    let index = route::index(socket, BRIDGE).unwrap();
    for (address, prefix) in addresses {
        let add = route::add_address(index, address.parse().unwrap(), *prefix);
        socket.apply(&[add]).unwrap();
    }
    socket.apply(&[route::change(index, &UP)]).unwrap();
    index
}

#[test]
fn what_does_not_fit_is_refused_and_left_as_it_is() {
    type Make = fn(&mut Socket);
    let cases: [(&str, Make); 7] = [
        ("10.20.1.1/24", |socket| {
            foreign_bridge(socket, &[("10.20.1.1", 24)]);
        }),
        ("no address", |socket| {
            foreign_bridge(socket, &[]);
        }),
        ("172.16.0.1/24", |socket| {
            foreign_bridge(socket, &[("172.16.0.1", 24)]);
        }),
        ("172.16.0.1/16, 10.0.0.1/8", |socket| {
            foreign_bridge(socket, &[("172.16.0.1", 16), ("10.0.0.1", 8)]);
        }),
        ("down", |socket| {
            let index = foreign_bridge(socket, &[("172.16.0.1", 16)]);
            let down = Change {
                up: Some(false),
                ..UP
            };
            socket.apply(&[route::change(index, &down)]).unwrap();
        }),
        ("another instance", |socket| {
            let index = foreign_bridge(socket, &[("172.16.0.1", 16)]);
            let alias = Change {
                alias: Some("hutch other"),
                ..UP
            };
            socket.apply(&[route::change(index, &alias)]).unwrap();
        }),
        ("kind \"veth\"", |socket| {
            socket
                .apply(&[route::create(BRIDGE, Kind::Veth("far"))])
                .unwrap();
            let index = route::index(socket, BRIDGE).unwrap();
            let add = route::add_address(index, "172.16.0.1".parse().unwrap(), 16);
            socket.apply(&[add]).unwrap();
        }),
    ];
    for (says, make) in cases {
        in_own_network(|| {
            make(&mut Socket::open(Protocol::Route).unwrap());
            let before = shown(BRIDGE);
            let refused = Bridge::open(bridge_config(BRIDGE)).unwrap_err();
            assert!(
                matches!(refused, bridge::Error::Foreign { .. }),
                "{refused}"
            );
            assert_eq!(refused.kind(), ErrorKind::Conflict);
            assert!(refused.to_string().contains(says), "{refused}");
            let hint = refused.hint().unwrap();
            assert!(hint.contains("172.16.0.1/16"), "{hint}");
            assert_eq!(shown(BRIDGE), before);
            assert_eq!(bridge::inventory("test", NUMBER).unwrap(), []);
        });
    }
}

#[test]
fn a_foreign_bridge_that_fits_gets_ports_and_nothing_else() {
    for with_port in [true, false] {
        in_own_network(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let index = foreign_bridge(&mut socket, &[("172.16.0.1", 16), ("fd68::1", 64)]);
            let _port = with_port.then(|| foreign_port(&mut socket, index, "ext"));
            let looks = |socket: &mut Socket| {
                let link = route::link(socket, BRIDGE).unwrap().unwrap();
                let addresses = route::addresses(socket, index).unwrap();
                (link.address, link.mtu, link.alias, addresses)
            };
            let before = (shown(BRIDGE), looks(&mut socket));
            let mut opened = Bridge::open(bridge_config(BRIDGE)).unwrap();
            assert_eq!((shown(BRIDGE), looks(&mut socket)), before);
            assert!(!opened.is_ours());
            // It lacks fe80::1, which is not ours to add.
            assert!(!opened.ipv6());
            let mac = |bridge: &Bridge| match bridge.link() {
                Link::Bridge { mac, .. } => mac.to_vec(),
                Link::Taps => panic!("no bridge"),
            };
            assert_eq!(mac(&opened), before.1.0);
            let own = PLACE.machine(1);
            let Ok(tap) = sys::tap(&own.label) else {
                return eprintln!("skipped: no tap to be had");
            };
            opened.attach(&own, "mch-test").unwrap();
            assert_eq!(looks(&mut socket), before.1);
            let found = [Found::Neighbour(BRIDGE.into(), own.ipv4.into())];
            assert_eq!(bridge::inventory("test", NUMBER).unwrap(), found);
            drop(tap);
            opened.detach(&own).unwrap();
            assert_eq!(bridge::inventory("test", NUMBER).unwrap(), []);
            if with_port {
                assert_eq!(looks(&mut socket), before.1);
            }
            // The kernel takes the MAC of a bridge without ports away.
            let _tap = sys::tap(&own.label).unwrap();
            let mut opened = Bridge::open(bridge_config(BRIDGE)).unwrap();
            opened.attach(&own, "mch-test").unwrap();
            assert_eq!(looks(&mut socket).0, mac(&opened));
            assert!(!opened.remove().unwrap());
            assert!(route::link(&mut socket, BRIDGE).unwrap().is_some());
        });
    }
}

#[test]
fn our_bridge_is_made_kept_repaired_and_removed_when_it_is_empty() {
    in_own_network(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        // As one whose making was cut short.
        let made = hutch_netlink::bridge::create(BRIDGE, GATEWAY_MAC);
        socket.apply(&[made]).unwrap();
        assert!(Bridge::open(bridge_config(BRIDGE)).unwrap().is_ours());
        let index = route::index(&mut socket, BRIDGE).unwrap();
        let looks = |socket: &mut Socket| {
            let link = route::link(socket, BRIDGE).unwrap().unwrap();
            let mut addresses = route::addresses(socket, index).unwrap();
            addresses.sort();
            let gateway = route::has_link_local(socket, index, GATEWAY6).unwrap();
            (
                link.address,
                link.mtu,
                link.alias,
                link.up,
                addresses,
                gateway,
            )
        };
        let before = looks(&mut socket);
        assert_eq!(
            (&before.0[..], &before.2[..]),
            (&GATEWAY_MAC[..], "hutch test")
        );
        assert!(before.3 && before.4.len() == 2 && before.5, "{before:?}");
        // What somebody did to it.
        let damage = Change {
            up: Some(false),
            mtu: Some(1400),
            address: Some([2, 0, 0, 0, 0, 9]),
            ..UP
        };
        let delete = |address: IpAddr, prefix| route::delete_address(index, address, prefix);
        socket
            .apply(&[
                delete(Ipv4Addr::new(172, 16, 0, 1).into(), 16),
                delete(Ipv6Addr::new(0xfd68, 0, 0, 0, 0, 0, 0, 1).into(), 64),
                route::change(index, &damage),
            ])
            .unwrap();
        let mut opened = Bridge::open(bridge_config(BRIDGE)).unwrap();
        assert!(opened.is_ours() && opened.ipv6());
        assert_eq!(looks(&mut socket), before);
        let (one, two) = (PLACE.machine(1), PLACE.machine(2));
        let taps = [&one, &two].map(|machine| sys::tap(&machine.label));
        if taps.iter().any(Result::is_err) {
            return eprintln!("skipped: no tap to be had");
        }
        for machine in [&one, &two, &one] {
            opened.attach(machine, "mch-test").unwrap();
        }
        assert_eq!(looks(&mut socket), before);
        assert_eq!(bridge::inventory("test", NUMBER).unwrap().len(), 7);
        assert_eq!(bridge::inventory("other", NonZeroU16::MIN).unwrap(), []);
        opened.sweep(NUMBER, std::slice::from_ref(&one)).unwrap();
        let left = bridge::inventory("test", NUMBER).unwrap();
        assert!(
            left.contains(&Found::Bridge(BRIDGE.into())) && left.len() == 4,
            "{left:?}"
        );
        assert!(!opened.remove().unwrap());
        drop(taps);
        let opened = Bridge::open(bridge_config(BRIDGE)).unwrap();
        assert!(opened.remove().unwrap());
        assert_eq!(bridge::inventory("test", NUMBER).unwrap(), []);
    });
}

#[test]
fn what_an_instance_left_on_bridges_is_removed_without_it() {
    in_own_network(|| {
        let own = PLACE.machine(1);
        assert!(!bridge::clear("test", NUMBER).unwrap());
        let mut opened = Bridge::open(bridge_config(BRIDGE)).unwrap();
        let Ok(tap) = sys::tap(&own.label) else {
            return eprintln!("skipped: no tap to be had");
        };
        opened.attach(&own, "mch-test").unwrap();
        drop(opened);
        assert!(!bridge::clear("other", NonZeroU16::MIN).unwrap());
        assert_eq!(bridge::inventory("test", NUMBER).unwrap().len(), 4);
        // It stays as long as something is in it.
        assert!(bridge::clear("test", NUMBER).unwrap());
        let left = [Found::Bridge(BRIDGE.into())];
        assert_eq!(bridge::inventory("test", NUMBER).unwrap(), left);
        drop(tap);
        assert!(bridge::clear("test", NUMBER).unwrap());
        assert_eq!(bridge::inventory("test", NUMBER).unwrap(), []);
    });
}

fn instance(tag: &str, number: u16, rules: Link, gateway: Ipv4Addr) -> Config {
    let mut config = PLACE.config(false);
    config.rules.tag = tag.into();
    config.rules.link = rules;
    config.rules.gateway = gateway;
    config.number = NonZeroU16::new(number).unwrap();
    config
}

#[test]
fn instances_stand_beside_each_other() {
    in_own_network(|| {
        let Some(mut bed) = Bed::at(PLACE, false) else {
            return;
        };
        let first = PLACE.machine(1);
        let mut first_tap = bed.machine(&first);
        // Another one on another bridge.
        let number = NonZeroU16::new(0xcd34).unwrap();
        let gateway = Ipv4Addr::new(172, 31, 0, 1);
        let mut other = bridge_config("br1");
        (other.instance, other.ipv4) = ("other".into(), (gateway, 16));
        other.ipv6 = Some((Ipv6Addr::new(0xfd69, 0, 0, 0, 0, 0, 0, 1), 64));
        let mut other = Bridge::open(other).unwrap();
        let config = instance("cd34", 0xcd34, other.link(), gateway);
        let network = "172.31.0.0/16".parse().unwrap();
        let addresses = hutch_net::address::Addresses::new("cd34", network, [0x69, 0, 0, 0, 0]);
        let second = on_bridge(addresses.unwrap().machine(1).unwrap(), number);
        assert_eq!(second.mac, mac(number, 1));
        let mut second_wall = Firewall::open(config, vec![second.clone()]).unwrap();
        let mut second_tap = Wire::new(sys::tap(&second.label).unwrap());
        other.attach(&second, "mch-other").unwrap();
        crate::bed::until_running(&mut bed.route, &second.label);
        crate::bed::until_running(&mut bed.route, "br1");
        // And one without a bridge.
        let third = instance("ef56", 0xef56, Link::Taps, Ipv4Addr::new(169, 254, 0, 1));
        let mut third_wall = Firewall::open(third, Vec::new()).unwrap();
        let mut speak = |bed: &mut Bed| {
            let pairs = [(&first, &mut first_tap), (&second, &mut second_tap)];
            for (machine, tap) in pairs {
                for to in [PUBLIC.into(), IpAddr::V6(PUBLIC6)] {
                    tap.send(&datagram(machine, to, b"out"));
                    let out = bed.world.until(PATIENCE, |frame| carries(frame, b"out"));
                    assert!(out.is_some(), "{} to {to}", machine.label);
                }
            }
            first_tap.send(&datagram(&first, second.ipv4.into(), b"across"));
            first_tap.send(&datagram(&first, second.ipv6.into(), b"across"));
            first_tap.send(&datagram(&first, PUBLIC.into(), b"end"));
            let seen = bed.world.all_until(|frame| carries(frame, b"end"));
            assert!(!seen.iter().any(|frame| carries(frame, b"across")));
            assert!(
                !second_tap
                    .drain()
                    .iter()
                    .any(|frame| carries(frame, b"across"))
            );
        };
        speak(&mut bed);
        let mut nft = Nft::open().unwrap();
        let table = |family| Table {
            family,
            name: "hutch_ab12".into(),
        };
        let damage: [&dyn Fn(&mut Batch); 4] = [
            &|batch| {
                for family in [Family::Inet, Family::Arp, Family::Bridge] {
                    batch.delete_table(&table(family));
                }
            },
            &|batch| batch.delete_table(&table(Family::Bridge)),
            &|batch| batch.delete_rules(&table(Family::Bridge)),
            &|batch| {
                let opens = Expression::Verdict(Verdict::Accept);
                batch.rule(&table(Family::Bridge), "sane", &[opens]);
            },
        ];
        let mut events = bed.firewall.events().unwrap();
        for (number, damage) in damage.iter().enumerate() {
            let mut batch = Batch::default();
            damage(&mut batch);
            nft.commit(&batch, None).unwrap();
            assert!(events.wait(PATIENCE).unwrap(), "{number}");
            assert_eq!(
                bed.firewall.verify().unwrap(),
                Verified::Repaired,
                "{number}"
            );
            assert_eq!(second_wall.verify().unwrap(), Verified::Sound, "{number}");
            assert_eq!(third_wall.verify().unwrap(), Verified::Sound, "{number}");
            assert_eq!(bed.firewall.verify().unwrap(), Verified::Sound, "{number}");
            speak(&mut bed);
        }
    });
}

#[test]
fn the_next_server_takes_over_a_bridge_or_leaves_it() {
    in_own_network(|| {
        let machine = PLACE.machine(1);
        let config = PLACE.config(false);
        drop(Firewall::open(config.clone(), vec![machine.clone()]).unwrap());
        let mut nft = Nft::open().unwrap();
        let table = Table {
            family: Family::Bridge,
            name: "hutch_ab12".into(),
        };
        let macs = |nft: &mut Nft| nft.elements(&table, "macs").unwrap().len();
        assert_eq!(macs(&mut nft), 1);
        let mut firewall = Firewall::open(config, Vec::new()).unwrap();
        assert_eq!(macs(&mut nft), 0);
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
        for slot in 1..200 {
            firewall.add(PLACE.machine(slot)).unwrap();
        }
        assert_eq!(macs(&mut nft), 199);
        let mut twin = PLACE.machine(200);
        twin.mac = machine.mac;
        firewall.add(twin).unwrap_err();
        for slot in 1..200 {
            firewall.remove(&PLACE.machine(slot).label).unwrap();
        }
        assert_eq!(macs(&mut nft), 0);
        firewall.destroy().unwrap();
        assert_eq!(nft.tables(Family::Bridge).unwrap(), [""; 0]);
        drop(firewall);
        drop(Firewall::open(PLACE.config(false), Vec::new()).unwrap());
        // Without a bridge, the table at the ports goes.
        let mut firewall = Firewall::open(Place::Taps.config(false), Vec::new()).unwrap();
        assert_eq!(nft.table(&table).unwrap(), None);
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
    });
}

#[test]
fn a_tap_that_leaves_the_bridge_is_denied_everything() {
    in_own_network(|| {
        let Some(mut bed) = Bed::at(PLACE, false) else {
            return;
        };
        let (own, other) = (PLACE.machine(1), PLACE.machine(2));
        let mut tap = bed.machine(&own);
        let mut witness = bed.machine(&other);
        let bridge = route::index(&mut bed.route, BRIDGE).unwrap();
        assert_eq!(ports(&mut bed.route, bridge).unwrap().len(), 2);
        let port = route::index(&mut bed.route, &own.label).unwrap();
        bed.route.apply(&[join(port, 0)]).unwrap();
        assert_eq!(ports(&mut bed.route, bridge).unwrap().len(), 1);
        tap.send(&datagram(&own, PUBLIC.into(), b"lie"));
        witness.send(&datagram(&other, PUBLIC.into(), b"honest"));
        let seen = bed.world.all_until(|frame| carries(frame, b"honest"));
        assert!(!seen.iter().any(|frame| carries(frame, b"lie")));
        let counters = bed.firewall.counters().unwrap();
        assert_eq!(counters[&own.label].spoofed_packets, 1);
    });
}
