//! A machine can speak for nobody but itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hutch_netlink::{bridge, route};

use crate::bed::{
    BRIDGE, Bed, GATEWAY_MAC, GATEWAY6, HOST, PATIENCE, PUBLIC, PUBLIC6, Place, carries, datagram,
    in_each_place,
};
use crate::frame::{self, Arp, Mac};

const FRAMES: u32 = 10_000;
/// Bridges pass frames to these groups to nobody, and up to the host as what the port itself received.
const NEAREST: Mac = [1, 0x80, 0xc2, 0, 0, 3];

/// A small generator, so that a failure can be repeated (Marsaglia's xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[(self.roll() % all.len() as u64) as usize]
    }

    fn mac(&mut self) -> Mac {
        let bytes = self.roll().to_le_bytes();
        [2, bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]]
    }
}

#[test]
fn lies_reach_nobody_and_are_counted() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let (liar, victim) = (place.machine(1), place.machine(2));
        let mut from = bed.machine(&liar);
        let mut other = bed.machine(&victim);
        let mut names = vec!["up0", &liar.label, &victim.label];
        let mut host = vec!["up0", "up1"];
        let mut foreign = None;
        if place != Place::Taps {
            foreign = Some(bed.foreign_port());
            names.extend([BRIDGE, "ext"]);
            host.extend([BRIDGE, "ext", "ext-far"]);
        }
        // What is behind the other port says so sooner or later.
        let strangers = foreign.is_some().then(|| bed.macs(&["ext-far"]));
        let strangers = strangers.unwrap_or_default();
        let mut host = bed.macs(&host);
        host.push(GATEWAY_MAC.into());
        let mut known = || {
            let mut neighbours = Vec::new();
            let mut places = Vec::new();
            for name in &names {
                let link = route::index(&mut bed.route, name).unwrap();
                neighbours.extend(route::neighbours(&mut bed.route, link).unwrap());
                places.extend(bridge::places(&mut bed.route, link).unwrap());
            }
            // The host's own talk to groups, which it computes the MACs of.
            neighbours.retain(|(address, _)| !address.is_multicast());
            neighbours.sort();
            places.retain(|place| place.mac[0] & 1 == 0 && !strangers.contains(&place.mac));
            places.sort();
            (neighbours, places)
        };
        let before = known();
        let mut dice = Dice(0x5eed_1234_5678_9abc);
        let mut counted = 0;
        for _ in 0..FRAMES {
            let (frame, counts) = lie(&mut dice, place);
            from.send(&frame);
            counted += u64::from(counts);
        }
        // What is sent last arrives last.
        from.send(&datagram(&liar, PUBLIC.into(), b"honest"));
        let mut seen = bed.world.all_until(|frame| carries(frame, b"honest"));
        let at_other = other.drain();
        if let Some(foreign) = &mut foreign {
            seen.extend(foreign.drain());
            assert_eq!(at_other, [] as [Vec<u8>; 0]);
        }
        seen.extend(at_other);
        // Nor does the host answer.
        let answers: Vec<_> = from.drain();
        assert_eq!(answers.iter().find(|frame| is_of_liar(frame)), None);
        let bad = |frame: &&Vec<u8>| is_of_liar(frame) || !host.contains(&frame[6..12].to_vec());
        assert_eq!(seen.iter().find(bad), None);
        assert_eq!(known(), before);
        let counters = bed.firewall.counters().unwrap();
        assert_eq!(counters[&liar.label].spoofed_packets, counted);
        assert_eq!(counters[&victim.label].spoofed_packets, 0);
        assert_eq!(counters[&liar.label].out_packets, 1);
    });
}

/// Whether a frame has anything that only lies have.
fn is_of_liar(frame: &[u8]) -> bool {
    frame.windows(3).any(|bytes| bytes == b"lie")
}

/// A frame that the first machine must not send, and whether it is to be counted.
fn lie(dice: &mut Dice, place: Place) -> (Vec<u8>, bool) {
    let kinds = if place == Place::Taps { 12 } else { 18 };
    let kind = dice.roll() % kinds;
    if kind >= 12 {
        return lie_at_port(dice, place, kind);
    }
    let own = place.machine(1);
    let (own4, own6) = (own.ipv4, own.ipv6);
    let to = match place {
        Place::Taps => dice.of(&[GATEWAY_MAC, [255; 6]]),
        Place::Bridge { .. } => dice.of(&[
            GATEWAY_MAC,
            [255; 6],
            place.machine(2).mac,
            NEAREST,
            [0x33, 0x33, 0, 0, 0, 1],
        ]),
    };
    let random4 = Ipv4Addr::from_bits(dice.roll() as u32 & 0x7fff_ffff | 0x0100_0000);
    let random6 = Ipv6Addr::from_bits(0xfd68 << 112 | u128::from(dice.roll()) << 32);
    let others4 = [
        place.machine(2).ipv4,
        place.gateway(),
        HOST,
        PUBLIC,
        Ipv4Addr::UNSPECIFIED,
        random4,
    ];
    let others6 = [
        place.machine(2).ipv6,
        GATEWAY6,
        Ipv6Addr::UNSPECIFIED,
        random6,
    ];
    let others4 = dice.of(&others4);
    let others6 = dice.of(&others6);
    let to4 = dice.of(&[
        PUBLIC,
        place.machine(2).ipv4,
        place.gateway(),
        HOST,
        Ipv4Addr::BROADCAST,
    ]);
    let to6 = dice.of(&[PUBLIC6, place.machine(2).ipv6, GATEWAY6]);
    let udp = frame::udp(
        dice.roll() as u16 | 1024,
        dice.of(&[53, 67, 80, 547]),
        b"lie",
    );
    let v4 = |mac, source: Ipv4Addr, l4: &[u8], protocol| {
        frame::ip(to, mac, source.into(), to4.into(), l4, protocol)
    };
    let v6 = |mac, source: Ipv6Addr, to6: Ipv6Addr, l4: &[u8]| {
        let protocol = if l4[0] >= 128 {
            frame::ICMPV6
        } else {
            frame::UDP
        };
        frame::ip(to, mac, source.into(), IpAddr::V6(to6), l4, protocol)
    };
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // A port itself has no IPv6.
    let six = to != NEAREST;
    match kind {
        0 => (v4(dice.mac(), own4, &udp, frame::UDP), true),
        1 => (v4(own.mac, others4, &udp, frame::UDP), true),
        2 => {
            let syn = frame::tcp(1000, 80, dice.roll() as u32, 0, 2);
            (v4(own.mac, others4, &syn, frame::TCP), true)
        }
        3 => (v6(dice.mac(), own6, to6, &udp), six),
        4 => (v6(own.mac, others6, to6, &udp), six),
        5 => {
            // Another's address, MAC, or frame.
            let operation = dice.of(&[1, 2]);
            let (outer, mac, address) = match dice.roll() % 3 {
                0 => (own.mac, own.mac, others4),
                1 => (own.mac, dice.mac(), own4),
                _ => (dice.mac(), own.mac, own4),
            };
            let arp = Arp {
                operation,
                sender: (mac, address),
                target: (
                    [0; 6],
                    dice.of(&[place.gateway(), place.machine(2).ipv4, address]),
                ),
            };
            (frame::arp(to, outer, &arp), true)
        }
        6 => {
            // An advertisement for another's address, with the option that names a MAC.
            let rest = [
                &[0x60, 0, 0, 0][..],
                &others6.octets(),
                &[2, 1],
                &dice.mac(),
            ]
            .concat();
            let source = dice.of(&[own6, place.machine(1).link_local]);
            (
                v6(
                    own.mac,
                    source,
                    dice.of(&[GATEWAY6, all_nodes]),
                    &frame::icmp(136, &rest),
                ),
                six,
            )
        }
        7 => {
            // A router advertisement, or a redirect.
            let kind = dice.of(&[134, 137]);
            let rest = [64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 9];
            (
                v6(
                    own.mac,
                    place.machine(1).link_local,
                    all_nodes,
                    &frame::icmp(kind, &rest),
                ),
                six,
            )
        }
        8 => {
            let server = frame::udp(67, 68, b"lie: an offer");
            (v4(own.mac, own4, &server, frame::UDP), true)
        }
        9 => {
            let server = frame::udp(547, 546, b"lie: an offer");
            (v6(own.mac, own6, to6, &server), six)
        }
        10 => {
            // A VLAN other than none has no device here.
            let inner = v4(own.mac, others4, &udp, frame::UDP);
            let vlan = (dice.roll() as u16 % 4094 + 1).to_be_bytes();
            let tagged = [&vlan[..], &inner[12..]].concat();
            (
                frame::ethernet(to, own.mac, 0x8100, &tagged),
                place != Place::Taps && to != NEAREST,
            )
        }
        _ => {
            // Spanning tree, LLDP, PPPoE, EAPOL, and what nobody knows.
            let kind = dice.of(&[0x0027, 0x88cc, 0x8863, 0x888e, 0x1234]);
            let to = dice.of(&[[1, 0x80, 0xc2, 0, 0, 0], [255; 6], GATEWAY_MAC, NEAREST]);
            (
                frame::ethernet(to, dice.mac(), kind, b"lie: not IP at all, and long enough"),
                place != Place::Taps && to != NEAREST,
            )
        }
    }
}

/// A frame that only the port of a bridge can stop, and whether it is to be counted.
fn lie_at_port(dice: &mut Dice, place: Place, kind: u64) -> (Vec<u8>, bool) {
    let (own, other) = (place.machine(1), place.machine(2));
    let all_nodes = [0x33, 0x33, 0, 0, 0, 1];
    let udp = frame::udp(4000, 5000, b"lie");
    let ip = |mac, to: IpAddr| {
        let source = match to {
            IpAddr::V4(_) => own.ipv4.into(),
            IpAddr::V6(_) => own.ipv6.into(),
        };
        frame::ip(mac, own.mac, source, to, &udp, frame::UDP)
    };
    let to = dice.of(&[
        PUBLIC.into(),
        IpAddr::V6(PUBLIC6),
        other.ipv4.into(),
        other.ipv6.into(),
        Ipv4Addr::BROADCAST.into(),
    ]);
    match kind {
        // Past the host, which is the router.
        12 => {
            let nobody = dice.mac();
            (
                ip(dice.of(&[other.mac, [255; 6], all_nodes, nobody]), to),
                false,
            )
        }
        // Around the rules at the ports.
        13 => (ip(NEAREST, to), to.is_ipv4()),
        14 => {
            // Cut off before its sender's address.
            let mut cut = ip(GATEWAY_MAC, to);
            cut.truncate(14 + (dice.roll() % 12) as usize);
            // The kernel wants an Ethernet header, and no less.
            (cut, true)
        }
        15 => {
            // An honest sender, and a question or an answer that is nobody's here.
            let target = dice.of(&[other.ipv4, own.ipv4, HOST, PUBLIC]);
            let arp = Arp {
                operation: dice.of(&[1, 2]),
                sender: (own.mac, own.ipv4),
                target: (other.mac, target),
            };
            let mac = dice.of(&[[255; 6], other.mac, GATEWAY_MAC]);
            (frame::arp(mac, own.mac, &arp), false)
        }
        16 => {
            // A fragment in front hides what an advertisement says.
            let advertised = [
                &[0x60, 0, 0, 0][..],
                &other.ipv6.octets(),
                &[2, 1],
                &own.mac,
            ]
            .concat();
            let message = frame::icmp(136, &advertised);
            let source = dice.of(&[own.ipv6, own.link_local]).into();
            let to = GATEWAY6.into();
            let mut hidden = frame::ip(GATEWAY_MAC, own.mac, source, to, &message, frame::ICMPV6);
            let fragment = 44;
            hidden[14 + 5] += 8;
            hidden[14 + 6] = fragment;
            hidden.splice(54..54, [frame::ICMPV6, 0, 0, 0, 0, 0, 0, 7]);
            (hidden, true)
        }
        // The address that every machine has beside its own is for neighbour discovery only.
        _ => {
            let (source, to) = (own.link_local.into(), GATEWAY6.into());
            let udp = frame::ip(GATEWAY_MAC, own.mac, source, to, &udp, frame::UDP);
            (udp, false)
        }
    }
}

#[test]
fn a_machine_resolves_its_gateway() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let own = place.machine(1);
        let mut tap = bed.machine(&own);
        let question = Arp {
            operation: 1,
            sender: (own.mac, own.ipv4),
            target: ([0; 6], place.gateway()),
        };
        tap.send(&frame::arp([255; 6], own.mac, &question));
        let answer = tap.until(PATIENCE, |frame| frame[12..14] == [8, 6] && frame[21] == 2);
        assert_eq!(answer.unwrap()[22..28], GATEWAY_MAC);
        let solicited = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
        let rest = [&[0; 4][..], &GATEWAY6.octets(), &[1, 1], &own.mac].concat();
        let solicitation = frame::icmp(135, &rest);
        let mac = [0x33, 0x33, 0xff, 0, 0, 1];
        let (source, to) = (own.link_local.into(), solicited.into());
        let solicitation = frame::ip(mac, own.mac, source, to, &solicitation, frame::ICMPV6);
        let advertised = |frame: &[u8]| {
            frame::read(frame)
                .is_some_and(|(.., protocol, l4)| protocol == frame::ICMPV6 && l4[0] == 136)
        };
        // The host joins the group that this goes to some time after it has its address. Guests ask again, too.
        let answered = (0..20).any(|_| {
            tap.send(&solicitation);
            tap.until(PATIENCE / 20, advertised).is_some()
        });
        assert!(answered);
        let counters = bed.firewall.counters().unwrap();
        assert_eq!(counters[&own.label].spoofed_packets, 0);
    });
}

#[test]
fn a_tap_that_no_machine_has_is_denied_everything() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let (known, unknown) = (place.machine(1), place.machine(2));
        let mut honest = bed.machine(&known);
        let mut tap = bed.tap(&unknown);
        let mut same = unknown.clone();
        same.ipv4 = known.ipv4;
        for to in [
            PUBLIC.into(),
            PUBLIC6.into(),
            HOST.into(),
            known.ipv4.into(),
        ] {
            tap.send(&datagram(&unknown, to, b"lie"));
            if to.is_ipv4() {
                tap.send(&datagram(&same, to, b"lie"));
            }
        }
        honest.send(&datagram(&known, PUBLIC.into(), b"honest"));
        let seen = bed.world.until(PATIENCE, |frame| {
            carries(frame, b"honest") || is_of_liar(frame)
        });
        assert!(carries(&seen.unwrap(), b"honest"));
        // The host says not even that it refuses.
        assert!(!tap.drain().iter().any(|frame| is_of_liar(frame)));
        assert!(!honest.drain().iter().any(|frame| is_of_liar(frame)));
    });
}
