//! Whom a machine reaches.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use hutch_net::elements::{Egress, Machine, Peer, Policy, mark};
use hutch_netlink::{Protocol, Socket, conntrack};

use crate::bed::{
    Bed, GATEWAY_MAC, HOST, HOST6, PATIENCE, PUBLIC, PUBLIC6, Place, ROUTER_MAC, Wire, carries,
    datagram, in_each_place,
};
use crate::frame;

const PRIVATE: [&str; 8] = [
    "10.1.2.3",
    "100.64.0.1",
    "172.31.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "fd00::1",
    "64:ff9b::a00:1",
    "::ffff:10.0.0.1",
];
const METADATA: [&str; 5] = [
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "fd00:ec2::254",
];

/// What every machine of these tests reaches.
const LAST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// Which of some addresses beyond the uplink a machine reaches now. Frames are dealt with in their order, so the last
/// one, which always passes, tells that the others did not.
pub fn reached(
    bed: &mut Bed,
    place: Place,
    tap: &mut Wire,
    own: &Machine,
    all: &[IpAddr],
) -> Vec<IpAddr> {
    let sentinel = place.machine(999);
    let mut last = bed.machine(&sentinel);
    for (number, to) in all.iter().enumerate() {
        let payload = format!("try {number}.");
        tap.send(&datagram(own, *to, payload.as_bytes()));
    }
    last.send(&datagram(&sentinel, LAST.into(), b"last"));
    let mut seen = Vec::new();
    while let Some(frame) = bed.world.until(PATIENCE, |_| true) {
        if carries(&frame, b"last") {
            break;
        }
        for (number, to) in all.iter().enumerate() {
            if carries(&frame, format!("try {number}.").as_bytes()) {
                let (source, destination, ..) = frame::read(&frame).unwrap();
                assert_eq!(destination, *to);
                let host = if to.is_ipv4() {
                    HOST.into()
                } else {
                    IpAddr::V6(HOST6)
                };
                assert_eq!(source, host, "leaves under the host's address");
                seen.push(*to);
            }
        }
    }
    bed.firewall.remove(&sentinel.label).unwrap();
    seen
}

#[test]
fn egress_is_what_the_policy_says() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        let public = vec![IpAddr::V4(PUBLIC), IpAddr::V6(PUBLIC6)];
        // The kernel itself forwards no mapped addresses.
        let private: Vec<IpAddr> = addresses(&PRIVATE[..7]);
        let metadata = addresses(&METADATA);
        let all: Vec<_> = [&public[..], &private, &metadata].concat();
        assert_eq!(reached(&mut bed, place, &mut tap, &own, &all), public);
        let mut set = |bed: &mut Bed, egress, allow: &[&str], deny: &[&str]| {
            let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
            let policy = Policy {
                egress,
                allow: ranges(allow),
                deny: ranges(deny),
                ..Policy::default()
            };
            bed.firewall.set_policy(&own.label, policy).unwrap();
            reached(bed, place, &mut tap, &own, &all)
        };
        let none: &[IpAddr] = &[];
        assert_eq!(set(&mut bed, Egress::None, &[], &[]), none);
        let open = [&public[..], &private].concat();
        assert_eq!(set(&mut bed, Egress::Open, &[], &[]), open);
        let allowed = addresses(&["10.1.2.3", "169.254.169.254"]);
        let some = ["10.0.0.0/8", "10.1.0.0/16", "169.254.169.254"];
        assert_eq!(
            set(&mut bed, Egress::None, &some, &["10.2.0.0/16"]),
            allowed
        );
        let denied = ["203.0.113.0/24"];
        assert_eq!(set(&mut bed, Egress::Public, &[], &denied), public[1..]);
        let both = set(&mut bed, Egress::Public, &["203.0.113.10"], &denied);
        assert_eq!(both, public[1..]);
        assert_eq!(set(&mut bed, Egress::Public, &[], &[]), public);
    });
}

#[test]
fn networks_of_the_host_are_not_public() {
    in_each_place(|place| {
        let mut config = place.config(true);
        config.rules.host_networks = vec!["203.0.113.0/24".parse().unwrap()];
        let Some(mut bed) = Bed::with(place, config) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        let elsewhere = Ipv4Addr::new(192, 0, 2, 77).into();
        let reached = reached(&mut bed, place, &mut tap, &own, &[PUBLIC.into(), elsewhere]);
        assert_eq!(reached, [elsewhere]);
    });
}

#[test]
fn answers_come_back_through_the_masquerade() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        for (to, host) in [
            (IpAddr::V4(PUBLIC), IpAddr::V4(HOST)),
            (PUBLIC6.into(), HOST6.into()),
        ] {
            tap.send(&datagram(&own, to, b"question"));
            let question = bed
                .world
                .until(PATIENCE, |frame| carries(frame, b"question"));
            let question = question.unwrap();
            let (source, destination, _, l4) = frame::read(&question).unwrap();
            assert_eq!((source, destination), (host, to));
            let port = u16::from_be_bytes([l4[0], l4[1]]);
            let near: [u8; 6] = question[6..12].try_into().unwrap();
            let answer = |from: IpAddr, port, payload: &[u8]| {
                let l4 = frame::udp(5000, port, payload);
                frame::ip(near, ROUTER_MAC, from, host, &l4, frame::UDP)
            };
            bed.world.send(&answer(to, port, b"answer"));
            let answer = tap.until(PATIENCE, |frame| carries(frame, b"answer"));
            let answer = answer.unwrap();
            let (source, destination, ..) = frame::read(&answer).unwrap();
            let inside = if to.is_ipv4() {
                own.ipv4.into()
            } else {
                IpAddr::V6(own.ipv6)
            };
            assert_eq!((source, destination), (to, inside));
        }
        let counters = bed.firewall.counters().unwrap()[&own.label];
        assert_eq!((counters.out_packets, counters.in_packets), (2, 2));
        assert_eq!(
            (counters.out_bytes, counters.in_bytes),
            (28 + 8 + 48 + 8, 28 + 6 + 48 + 6)
        );
    });
}

#[test]
fn nobody_outside_begins_a_connection_to_a_machine() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        let near = hutch_netlink::route::link(&mut bed.route, "up0")
            .unwrap()
            .unwrap();
        let near: [u8; 6] = near.address.try_into().unwrap();
        for (from, to) in [
            (IpAddr::V4(PUBLIC), IpAddr::V4(own.ipv4)),
            (PUBLIC6.into(), own.ipv6.into()),
        ] {
            let l4 = frame::udp(5000, 4000, b"intrusion");
            bed.world
                .send(&frame::ip(near, ROUTER_MAC, from, to, &l4, frame::UDP));
        }
        // The host may.
        let host = UdpSocket::bind((place.gateway(), 0)).unwrap();
        host.send_to(b"from the host", (own.ipv4, 4000)).unwrap();
        let first = tap.until(PATIENCE, |frame| {
            carries(frame, b"intrusion") || carries(frame, b"from the host")
        });
        assert!(carries(&first.unwrap(), b"from the host"));
    });
}

#[test]
fn machines_do_not_reach_each_other_unless_both_are_of_a_group() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let (mut one, two) = (place.machine(1), place.machine(2));
        one.policy.egress = Egress::Open;
        let mut first = bed.machine(&one);
        let mut second = bed.machine(&two);
        let two_addresses = [IpAddr::V4(two.ipv4), IpAddr::V6(two.ipv6)];
        let mut talk = |bed: &mut Bed| -> Vec<bool> {
            let host = UdpSocket::bind((place.gateway(), 0)).unwrap();
            let talk = two_addresses.iter().map(|to| {
                first.send(&datagram(&one, *to, b"hello"));
                host.send_to(b"end", (two.ipv4, 4000)).unwrap();
                let seen = second.until(PATIENCE, |frame| {
                    carries(frame, b"hello") || carries(frame, b"end")
                });
                let heard = carries(&seen.unwrap(), b"hello");
                if heard {
                    second
                        .until(PATIENCE, |frame| carries(frame, b"end"))
                        .unwrap();
                }
                heard
            });
            let heard = talk.collect();
            let _ = bed.world.drain();
            heard
        };
        assert_eq!(talk(&mut bed), [false, false]);
        let mut policy = one.policy.clone();
        let peer = |machine: &Machine| Peer {
            ipv4: machine.ipv4,
            ipv6: machine.ipv6,
        };
        policy.peers = vec![peer(&two)];
        bed.firewall.set_policy(&one.label, policy).unwrap();
        assert_eq!(talk(&mut bed), [true, true]);
        // Whoever gets the address next is no peer.
        bed.firewall.remove(&two.label).unwrap();
        bed.firewall.add(two.clone()).unwrap();
        assert_eq!(talk(&mut bed), [false, false]);
    });
}

#[test]
fn the_host_is_closed_but_for_echo_and_its_resolver() {
    in_each_place(|place| {
        let mut config = place.config(true);
        let resolver = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = resolver.local_addr().unwrap().port();
        config.rules.dns_port = Some(port);
        let Some(mut bed) = Bed::with(place, config) else {
            return;
        };
        let own = place.machine(1);
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
        // The resolver listens on all addresses, and none of these leads to it.
        for to in [HOST.into(), place.gateway().into(), IpAddr::V6(HOST6)] {
            send(&mut tap, to, port, b"not here");
        }
        send(&mut tap, HOST.into(), 53, b"not here");
        send(&mut tap, Ipv4Addr::LOCALHOST.into(), port, b"not here");
        send(&mut tap, place.gateway().into(), 53, b"what is");
        resolver.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 100];
        let (length, asker) = resolver.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"what is");
        assert_eq!(asker.ip(), IpAddr::V4(own.ipv4));
        resolver.send_to(b"it is", asker).unwrap();
        let answer = tap
            .until(PATIENCE, |frame| carries(frame, b"it is"))
            .unwrap();
        let (source, _, _, l4) = frame::read(&answer).unwrap();
        assert_eq!(
            (source, &l4[..2]),
            (place.gateway().into(), &53u16.to_be_bytes()[..])
        );
        let ping = frame::icmp(8, b"\x00\x01\x00\x01echo");
        tap.send(&frame::ip(
            GATEWAY_MAC,
            own.mac,
            own.ipv4.into(),
            place.gateway().into(),
            &ping,
            frame::ICMP,
        ));
        let pong = |frame: &[u8]| {
            frame::read(frame)
                .is_some_and(|(.., protocol, l4)| protocol == frame::ICMP && l4[0] == 0)
        };
        assert!(tap.until(PATIENCE, pong).is_some());
        // TCP learns of it at once.
        let syn = frame::tcp(4001, 22, 1, 0, 2);
        tap.send(&frame::ip(
            GATEWAY_MAC,
            own.mac,
            own.ipv4.into(),
            HOST.into(),
            &syn,
            frame::TCP,
        ));
        let reset = |frame: &[u8]| {
            frame::read(frame)
                .is_some_and(|(.., protocol, l4)| protocol == frame::TCP && l4[13] & 4 != 0)
        };
        assert!(tap.until(PATIENCE, reset).is_some());
    });
}

#[test]
fn connections_carry_the_machines_mark_and_are_cut_by_it() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let (one, two) = (place.machine(1), place.machine(2));
        let mut first = bed.machine(&one);
        let mut second = bed.machine(&two);
        let other = Ipv4Addr::new(203, 0, 113, 11);
        first.send(&datagram(&one, PUBLIC.into(), b"a"));
        first.send(&datagram(&one, other.into(), b"b"));
        first.send(&datagram(&one, PUBLIC6.into(), b"c"));
        second.send(&datagram(&two, PUBLIC.into(), b"d"));
        bed.world
            .until(PATIENCE, |frame| carries(frame, b"d"))
            .unwrap();
        let mut socket = Socket::open(Protocol::Netfilter).unwrap();
        let number = place.config(true).number;
        let mut destinations = |machine: &Machine| -> Vec<IpAddr> {
            let mark = mark(number, machine.slot);
            let all = conntrack::connections(&mut socket, mark).unwrap();
            let mut all: Vec<_> = all
                .iter()
                .map(|connection| connection.destination)
                .collect();
            all.sort();
            all
        };
        let [a, b, c] = [PUBLIC.into(), IpAddr::V4(other), PUBLIC6.into()];
        assert_eq!(destinations(&one), [a, b, c]);
        assert_eq!(destinations(&two), [a]);
        let policy = Policy {
            deny: vec!["203.0.113.11".parse().unwrap()],
            ..Policy::default()
        };
        bed.firewall.set_policy(&one.label, policy).unwrap();
        assert_eq!(destinations(&one), [a, c]);
        bed.firewall.remove(&one.label).unwrap();
        assert_eq!(destinations(&one), [] as [IpAddr; 0]);
        assert_eq!(destinations(&two), [a]);
    });
}

#[test]
fn segments_fit_the_narrowest_link() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        let near = hutch_netlink::route::index(&mut bed.route, "up0").unwrap();
        let narrow = hutch_netlink::route::Change {
            mtu: Some(1400),
            ..Default::default()
        };
        bed.route
            .apply(&[hutch_netlink::route::change(near, &narrow)])
            .unwrap();
        let syn = frame::tcp(4001, 80, 1, 0, 2);
        tap.send(&frame::ip(
            GATEWAY_MAC,
            own.mac,
            own.ipv4.into(),
            PUBLIC.into(),
            &syn,
            frame::TCP,
        ));
        let seen = bed.world.until(PATIENCE, |frame| {
            frame::read(frame).is_some_and(|(.., protocol, _)| protocol == frame::TCP)
        });
        let seen = seen.unwrap();
        let (.., l4) = frame::read(&seen).unwrap();
        assert_eq!(l4[20..24], [2, 4, 0x05, 0x50]);
    });
}
