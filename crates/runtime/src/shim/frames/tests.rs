//! The filter against a table of hostile frames, and against a second judge.

use proptest::prelude::*;

use super::*;

pub(in crate::shim) const MAC: [u8; 6] = [2, 0x68, 0x75, 0x74, 0x63, 2];
pub(in crate::shim) const GATEWAY_MAC: [u8; 6] = [2, 0x68, 0x75, 0x74, 0x63, 1];
pub(in crate::shim) const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 5);
pub(in crate::shim) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
const OTHERS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The host's, and public like that of a server.
const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

const PRIVATE: [(Ipv4Addr, u8); 4] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
];

impl Policy {
    /// Nothing is stopped.
    pub(in crate::shim) fn open() -> Self {
        Self {
            open: true,
            ..policy()
        }
    }
}

pub(in crate::shim) fn filter() -> Filter {
    Filter {
        mac: MAC,
        address: ADDRESS,
        gateway: GATEWAY,
        dns: true,
        refuse: PRIVATE.to_vec(),
    }
}

fn policy() -> Policy {
    Policy::new(&filter(), &[HOST, Ipv4Addr::LOCALHOST])
}

fn leaves(frame: &[u8]) -> bool {
    verdict(Sender::Guest, frame, &policy()) == Verdict::Pass
}

fn enters(frame: &[u8]) -> bool {
    verdict(Sender::World, frame, &policy()) == Verdict::Pass
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

pub(in crate::shim) fn packet(
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0];
    let length = u16::try_from(20 + payload.len()).unwrap();
    header[2..4].copy_from_slice(&length.to_be_bytes());
    [&header[..], &from.octets(), &to.octets(), payload].concat()
}

/// From the guest to somebody.
pub(in crate::shim) fn sent(to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let packet = packet(ADDRESS, to, protocol, payload);
    ethernet(GATEWAY_MAC, MAC, IPV4, &packet)
}

/// From somebody to the guest.
fn received(from: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let packet = packet(from, ADDRESS, protocol, payload);
    ethernet(MAC, GATEWAY_MAC, IPV4, &packet)
}

pub(in crate::shim) fn datagram(from: u16, to: u16, words: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + words.len()).unwrap();
    let header = [from, to, length, 0].map(u16::to_be_bytes);
    [&header.concat(), words].concat()
}

/// The beginning of a connection.
pub(in crate::shim) fn syn(from: u16, to: u16) -> Vec<u8> {
    let ports = [from, to].map(u16::to_be_bytes).concat();
    let rest = [0, 0, 1, 0, 0, 0, 0, 0, 0x50, 2, 0xfa, 0xf0, 0, 0, 0, 0];
    [&ports[..], &rest].concat()
}

fn echo(kind: u8) -> Vec<u8> {
    vec![kind, 0, 0, 0, 0, 1, 0, 1, b'?']
}

fn arp(operation: u16, mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let (operation, sender, target) = (operation.to_be_bytes(), sender.octets(), target.octets());
    [&ARP_KIND[..], &operation, &mac, &sender, &[0; 6], &target].concat()
}

pub(in crate::shim) fn who_is_the_gateway() -> Vec<u8> {
    ethernet(BROADCAST, MAC, ARP, &arp(REQUEST, MAC, ADDRESS, GATEWAY))
}

/// The frame with some bytes of its packet replaced.
fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[ETHERNET + at..][..bytes.len()].copy_from_slice(bytes);
    frame
}

/// Frames that a guest with nothing evil in mind sends.
fn good() -> Vec<Vec<u8>> {
    vec![
        who_is_the_gateway(),
        ethernet(GATEWAY_MAC, MAC, ARP, &arp(REQUEST, MAC, ADDRESS, GATEWAY)),
        sent(PUBLIC, TCP, &syn(40_000, 443)),
        sent(PUBLIC, TCP, &syn(443, 40_000)),
        sent(PUBLIC, UDP, &datagram(40_000, 443, b"hello")),
        sent(PUBLIC, UDP, &datagram(40_000, 53, b"")),
        sent(GATEWAY, UDP, &datagram(40_000, 53, b"who is example.org?")),
        sent(PUBLIC, ICMP, &echo(ECHO)),
        sent(PUBLIC, UDP, &datagram(40_000, 443, &[0; 65_000])),
    ]
}

#[test]
fn what_guests_need_passes() {
    for frame in good() {
        assert!(leaves(&frame), "{frame:02x?}");
    }
    for frame in [
        ethernet(
            MAC,
            GATEWAY_MAC,
            ARP,
            &arp(REPLY, GATEWAY_MAC, GATEWAY, ADDRESS),
        ),
        ethernet(
            BROADCAST,
            GATEWAY_MAC,
            ARP,
            &arp(REQUEST, GATEWAY_MAC, GATEWAY, ADDRESS),
        ),
        received(PUBLIC, TCP, &syn(443, 40_000)),
        received(PUBLIC, UDP, &datagram(443, 40_000, b"hello")),
        received(GATEWAY, UDP, &datagram(53, 40_000, b"it is 203.0.113.10")),
        received(PUBLIC, ICMP, &echo(ECHO_REPLY)),
        received(PUBLIC, ICMP, &echo(3)),
    ] {
        assert!(enters(&frame), "{frame:02x?}");
    }
}

/// Each is one step away from a frame that passes.
#[test]
fn what_a_hostile_guest_sends_is_dropped() {
    let to_public = || sent(PUBLIC, UDP, &datagram(40_000, 443, b"hello"));
    let connect = || sent(PUBLIC, TCP, &syn(40_000, 443));
    let plain = |packet: &[u8]| ethernet(GATEWAY_MAC, MAC, IPV4, packet);
    let from =
        |address, protocol, payload: &[u8]| plain(&packet(address, PUBLIC, protocol, payload));
    let options = |option: &[u8]| {
        let mut packet = packet(ADDRESS, PUBLIC, UDP, &datagram(40_000, 443, b"hello"));
        packet.splice(20..20, option.iter().copied());
        packet[0] = 0x45 + u8::try_from(option.len() / 4).unwrap();
        let length = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        plain(&packet)
    };
    let asks = |frame: Vec<u8>| ethernet(BROADCAST, MAC, ARP, &frame);
    let padded = |mut frame: Vec<u8>| {
        frame.push(0);
        frame
    };
    let table = [
        ("nothing", Vec::new()),
        ("half a header of Ethernet", connect()[..13].to_vec()),
        ("no packet", connect()[..14].to_vec()),
        ("half a header of IPv4", connect()[..30].to_vec()),
        (
            "half a header of TCP",
            plain(&packet(ADDRESS, PUBLIC, TCP, &syn(1, 2)[..19])),
        ),
        (
            "half a header of UDP",
            plain(&packet(ADDRESS, PUBLIC, UDP, &[0; 7])),
        ),
        (
            "half a header of ICMP",
            plain(&packet(ADDRESS, PUBLIC, ICMP, &[8; 7])),
        ),
        (
            "another's MAC address",
            ethernet(GATEWAY_MAC, OTHERS_MAC, IPV4, &connect()[14..]),
        ),
        (
            "the gateway's MAC address",
            ethernet(MAC, GATEWAY_MAC, IPV4, &connect()[14..]),
        ),
        (
            "VLAN",
            ethernet(
                GATEWAY_MAC,
                MAC,
                0x8100,
                &[&[0, 1, 8, 0], &connect()[14..]].concat(),
            ),
        ),
        ("IPv6", ethernet(GATEWAY_MAC, MAC, 0x86dd, &connect()[14..])),
        ("LLC", ethernet(GATEWAY_MAC, MAC, 46, &connect()[14..])),
        ("version 6 under the type of 4", with(connect(), 0, &[0x65])),
        ("version 0", with(connect(), 0, &[0x05])),
        ("a header of 16 bytes", with(connect(), 0, &[0x44])),
        ("a header of no bytes", with(connect(), 0, &[0x40])),
        ("a header into the payload", with(connect(), 0, &[0x46])),
        ("a header beyond the end", with(connect(), 0, &[0x4f])),
        ("a length that is too short", with(connect(), 2, &[0, 39])),
        ("a length that is too long", with(connect(), 2, &[0, 41])),
        ("no length", with(connect(), 2, &[0, 0])),
        ("something behind the packet", padded(connect())),
        ("the first fragment", with(to_public(), 6, &[0x20, 0])),
        ("a middle fragment", with(to_public(), 6, &[0x20, 1])),
        ("the last fragment", with(to_public(), 6, &[0, 0xff])),
        (
            "a flag that means nothing",
            with(to_public(), 6, &[0x80, 0]),
        ),
        ("loose source route", options(&[131, 7, 4, 10, 0, 0, 1, 0])),
        ("strict source route", options(&[137, 7, 4, 10, 0, 0, 1, 0])),
        ("record route", options(&[7, 7, 4, 0, 0, 0, 0, 0])),
        ("no operation", options(&[1, 1, 1, 0])),
        (
            "another's address",
            from(Ipv4Addr::new(172, 16, 0, 6), TCP, &syn(40_000, 443)),
        ),
        ("a public address", from(PUBLIC, TCP, &syn(40_000, 443))),
        (
            "no address",
            from(Ipv4Addr::UNSPECIFIED, TCP, &syn(40_000, 443)),
        ),
        (
            "loopback's address",
            from(Ipv4Addr::LOCALHOST, TCP, &syn(40_000, 443)),
        ),
        (
            "a low port of the host",
            sent(PUBLIC, UDP, &datagram(5353, 443, b"hello")),
        ),
        (
            "the last such",
            sent(PUBLIC, UDP, &datagram(32_767, 443, b"hello")),
        ),
        (
            "a DHCP client",
            from(ADDRESS, UDP, &datagram(68, 67, &[0; 240])),
        ),
        (
            "a DHCP server",
            sent(PUBLIC, UDP, &datagram(67, 68, &[0; 240])),
        ),
        (
            "a datagram that is too long",
            with(to_public(), 24, &[0, 14]),
        ),
        (
            "a datagram that is too short",
            with(to_public(), 24, &[0, 12]),
        ),
        ("a datagram of no length", with(to_public(), 24, &[0, 0])),
        (
            "a segment whose header is too short",
            with(connect(), 32, &[0x40]),
        ),
        (
            "a segment whose header is too long",
            with(connect(), 32, &[0x60]),
        ),
        (
            "an answer to nobody's echo",
            sent(PUBLIC, ICMP, &echo(ECHO_REPLY)),
        ),
        ("a redirect", sent(PUBLIC, ICMP, &echo(5))),
        ("an error", sent(PUBLIC, ICMP, &echo(3))),
        ("IGMP", sent(PUBLIC, 2, &[0x16; 8])),
        ("IPv6 in IPv4", sent(PUBLIC, 41, &[0x60; 40])),
        ("GRE", sent(PUBLIC, 47, &[0; 8])),
        ("SCTP", sent(PUBLIC, 132, &[0; 12])),
        ("the gateway itself", sent(GATEWAY, TCP, &syn(40_000, 80))),
        (
            "the gateway's resolver by TCP",
            sent(GATEWAY, TCP, &syn(40_000, 53)),
        ),
        (
            "another service of the gateway",
            sent(GATEWAY, UDP, &datagram(40_000, 67, b"?")),
        ),
        ("the gateway, echoed", sent(GATEWAY, ICMP, &echo(ECHO))),
        ("an answer to ARP", asks(arp(REPLY, MAC, ADDRESS, GATEWAY))),
        ("gratuitous ARP", asks(arp(REQUEST, MAC, ADDRESS, ADDRESS))),
        (
            "gratuitous ARP for the gateway",
            asks(arp(REQUEST, MAC, GATEWAY, GATEWAY)),
        ),
        ("ARP for another", asks(arp(REQUEST, MAC, ADDRESS, PUBLIC))),
        (
            "ARP as another",
            asks(arp(REQUEST, OTHERS_MAC, ADDRESS, GATEWAY)),
        ),
        (
            "ARP as another address",
            asks(arp(REQUEST, MAC, PUBLIC, GATEWAY)),
        ),
        (
            "ARP as nobody",
            asks(arp(REQUEST, MAC, Ipv4Addr::UNSPECIFIED, GATEWAY)),
        ),
        ("reverse ARP", asks(arp(3, MAC, ADDRESS, GATEWAY))),
        ("ARP of other kinds", with(who_is_the_gateway(), 0, &[0, 6])),
        (
            "ARP with other lengths",
            with(who_is_the_gateway(), 4, &[4, 6]),
        ),
        ("half of ARP", who_is_the_gateway()[..41].to_vec()),
        (
            "ARP and much more",
            [who_is_the_gateway(), vec![0; 19]].concat(),
        ),
    ];
    for (what, frame) in table {
        assert!(!leaves(&frame), "{what}: {frame:02x?}");
    }
}

const UNREACHED: [[u8; 4]; 27] = [
    [0, 0, 0, 0],
    [0, 1, 2, 3],
    [10, 0, 0, 1],
    [10, 255, 255, 255],
    [100, 64, 0, 1],
    [100, 127, 255, 254],
    [127, 0, 0, 1],
    [127, 0, 0, 53],
    [127, 255, 255, 254],
    [169, 254, 0, 2],
    [169, 254, 169, 254],
    [169, 254, 255, 255],
    [172, 16, 0, 1],
    [172, 16, 0, 5],
    [172, 31, 255, 255],
    [192, 168, 0, 1],
    [192, 168, 255, 255],
    [198, 51, 100, 2],
    [224, 0, 0, 1],
    [224, 0, 0, 251],
    [239, 255, 255, 250],
    [239, 255, 255, 255],
    [240, 0, 0, 1],
    [250, 1, 1, 1],
    [255, 0, 0, 0],
    [255, 255, 255, 254],
    [255, 255, 255, 255],
];

#[test]
fn addresses_that_are_not_public_are_not_reached() {
    for address in UNREACHED.map(Ipv4Addr::from) {
        for (protocol, payload) in [
            (TCP, syn(40_000, 53)),
            (UDP, datagram(40_000, 53, b"?")),
            (ICMP, echo(ECHO)),
        ] {
            assert!(!leaves(&sent(address, protocol, &payload)), "{address}");
        }
        for (protocol, payload) in [
            (TCP, syn(53, 40_000)),
            (UDP, datagram(53, 40_000, b"!")),
            (ICMP, echo(ECHO_REPLY)),
        ] {
            assert!(!enters(&received(address, protocol, &payload)), "{address}");
        }
    }
    for address in [
        [9, 255, 255, 255],
        [11, 0, 0, 0],
        [100, 63, 255, 255],
        [100, 128, 0, 0],
    ] {
        assert!(leaves(&sent(address.into(), TCP, &syn(40_000, 443))));
    }
}

#[test]
fn what_only_the_host_may_send_is_dropped() {
    let reply = arp(REPLY, GATEWAY_MAC, GATEWAY, ADDRESS);
    let to_guest = || received(PUBLIC, UDP, &datagram(443, 40_000, b"hello"));
    let other = Ipv4Addr::new(172, 16, 0, 6);
    for (what, frame) in [
        (
            "for another card",
            ethernet(OTHERS_MAC, GATEWAY_MAC, ARP, &reply),
        ),
        (
            "a packet for all cards",
            ethernet(BROADCAST, GATEWAY_MAC, IPV4, &to_guest()[14..]),
        ),
        (
            "about another",
            ethernet(
                MAC,
                GATEWAY_MAC,
                ARP,
                &arp(REPLY, OTHERS_MAC, PUBLIC, ADDRESS),
            ),
        ),
        (
            "for another",
            ethernet(
                MAC,
                GATEWAY_MAC,
                ARP,
                &arp(REPLY, GATEWAY_MAC, GATEWAY, other),
            ),
        ),
        (
            "to another",
            ethernet(
                MAC,
                GATEWAY_MAC,
                IPV4,
                &packet(PUBLIC, other, TCP, &syn(1, 2)),
            ),
        ),
        (
            "IPv6",
            ethernet(MAC, GATEWAY_MAC, 0x86dd, &to_guest()[14..]),
        ),
        ("a fragment", with(to_guest(), 6, &[0x20, 0])),
        ("a short one", to_guest()[..to_guest().len() - 1].to_vec()),
        ("a question", received(PUBLIC, ICMP, &echo(ECHO))),
        ("a redirect", received(PUBLIC, ICMP, &echo(5))),
        (
            "the gateway's own words",
            received(GATEWAY, UDP, &datagram(67, 68, b"!")),
        ),
    ] {
        assert!(!enters(&frame), "{what}: {frame:02x?}");
    }
}

#[test]
fn a_resolver_is_reached_only_where_it_is_allowed() {
    let question = sent(GATEWAY, UDP, &datagram(40_000, 53, b"?"));
    let answer = received(GATEWAY, UDP, &datagram(53, 40_000, b"!"));
    let without = Policy::new(
        &Filter {
            dns: false,
            ..filter()
        },
        &[],
    );
    assert!(leaves(&question) && enters(&answer));
    assert_eq!(verdict(Sender::Guest, &question, &without), Verdict::Drop);
    assert_eq!(verdict(Sender::World, &answer, &without), Verdict::Drop);
}

#[test]
fn addresses_that_the_host_gets_are_refused_from_then_on() {
    let mut policy = policy();
    let to = |address: Ipv4Addr| sent(address, TCP, &syn(40_000, 22));
    assert_eq!(verdict(Sender::Guest, &to(PUBLIC), &policy), Verdict::Pass);
    policy.set_host(&[PUBLIC]);
    assert_eq!(verdict(Sender::Guest, &to(PUBLIC), &policy), Verdict::Drop);
    assert_eq!(verdict(Sender::Guest, &to(HOST), &policy), Verdict::Pass);
}

#[test]
fn networks_of_any_size_are_refused() {
    for (network, prefix, inside, outside) in [
        ([0, 0, 0, 0], 0, [8, 8, 8, 8], None),
        ([8, 8, 8, 8], 32, [8, 8, 8, 8], Some([8, 8, 8, 9])),
        ([8, 8, 8, 8], 40, [8, 8, 8, 8], Some([8, 8, 8, 9])),
        // With bits of the host in it.
        ([8, 8, 8, 77], 24, [8, 8, 8, 1], Some([8, 8, 9, 1])),
        ([128, 0, 0, 0], 1, [200, 1, 1, 1], Some([8, 8, 8, 8])),
    ] {
        let refuse = vec![(network.into(), prefix)];
        let policy = Policy::new(&Filter { refuse, ..filter() }, &[]);
        let judged = |to: [u8; 4]| {
            let frame = sent(to.into(), TCP, &syn(40_000, 443));
            verdict(Sender::Guest, &frame, &policy)
        };
        assert_eq!(judged(inside), Verdict::Drop, "{network:?}/{prefix}");
        if let Some(outside) = outside {
            assert_eq!(judged(outside), Verdict::Pass, "{network:?}/{prefix}");
        }
    }
}

/// What must be true of a frame that leaves, told another way than the filter does.
fn is_harmless(frame: &[u8]) -> bool {
    let four = |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
    if frame[6..12] != MAC {
        return false;
    }
    match frame[12..14] {
        [8, 6] => frame[20..22] == [0, 1] && four(28) == ADDRESS && four(38) == GATEWAY,
        [8, 0] => {
            let (from, to, protocol) = (four(26), four(30), frame[23]);
            let port = u16::from_be_bytes([frame[36], frame[37]]);
            let asks = to == GATEWAY && protocol == 17 && port == 53;
            let shared = to.octets()[0] == 100 && to.octets()[1] & 0xc0 == 64;
            let own = to.is_private() || to.is_loopback() || to.is_link_local() || shared;
            let odd = to.is_multicast() || to.octets()[0] >= 240 || to.octets()[0] == 0;
            frame.len() == 14 + usize::from(frame[16]) * 256 + usize::from(frame[17])
                && frame[14] == 0x45
                && from == ADDRESS
                && (asks || !(own || odd || to == HOST))
        }
        _ => false,
    }
}

fn changed() -> impl Strategy<Value = Vec<u8>> {
    let good = good();
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (0..good.len() - 1, changes, 0..3_usize).prop_map(move |(which, changes, cut)| {
        let mut frame = good[which].clone();
        for (at, byte) in changes {
            let at = at.index(frame.len().min(54));
            frame[at] = byte;
        }
        frame.truncate(frame.len() - cut / 2);
        frame
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn what_leaves_is_harmless(frame in changed()) {
        prop_assert!(!leaves(&frame) || is_harmless(&frame), "{frame:02x?}");
    }

    #[test]
    fn any_address_is_reached_if_it_is_harmless(to in any::<u32>(), protocol in 0..3_usize) {
        let to = Ipv4Addr::from_bits(to);
        let payloads = [(TCP, syn(40_000, 53)), (UDP, datagram(40_000, 53, b"?")), (ICMP, echo(ECHO))];
        let (protocol, payload) = &payloads[protocol];
        let frame = sent(to, *protocol, payload);
        prop_assert_eq!(leaves(&frame), is_harmless(&frame), "{}", to);
    }

    #[test]
    fn garbage_leaves_and_enters_nowhere(frame in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(!leaves(&frame));
        prop_assert!(!enters(&frame));
    }

    #[test]
    fn a_frame_that_is_cut_short_is_dropped(which in 0..8_usize, at in any::<prop::sample::Index>()) {
        let whole = &good()[which];
        prop_assert!(!leaves(&whole[..at.index(whole.len())]));
    }
}
