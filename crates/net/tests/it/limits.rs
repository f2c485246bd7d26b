//! What a machine may use up, with traffic, beside one without limits.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use hutch_net::elements::{Limits, Machine};
use hutch_net::firewall::{Counters, Firewall, Verified};
use hutch_netlink::nft::{Expression, Family, Nft, Table};

use crate::bed::{
    Bed, GATEWAY_MAC, HOST, HOST6, PATIENCE, PUBLIC, PUBLIC6, Place, ROUTER_MAC, Wire, carries,
    config, datagram, in_each_place, in_own_network, machine,
};
use crate::frame;

/// Bytes a second: the least that the configuration takes.
const RATE: u64 = 65_536;
/// What the kernel lets pass at once: a second's bytes and the burst, which is 64 KiB at such rates.
const BUCKET: u64 = RATE + 65_536;
/// Datagrams to or from each machine: four times what the bucket holds.
const ROUNDS: u64 = 26;
const AT_ONCE: u64 = 20;
const PAYLOAD: usize = 1000;

/// Bytes of such a datagram as an IP packet.
fn size(to: IpAddr) -> u64 {
    let header = if to.is_ipv4() { 20 } else { 40 };
    header + 8 + PAYLOAD as u64
}

fn payload(start: &[u8]) -> Vec<u8> {
    let mut payload = start.to_vec();
    payload.resize(PAYLOAD, b'.');
    payload
}

fn slowed(place: Place, limits: Limits) -> Machine {
    Machine {
        limits,
        ..place.machine(1)
    }
}

fn counters(bed: &mut Bed, machine: &Machine) -> Counters {
    bed.firewall.counters().unwrap()[&machine.label]
}

/// Says what came through, of what was sent since `start`, and that this is about the bucket and what has dripped into
/// it: never more, and no less than the bucket without its last packet.
fn judge(what: &str, passed: u64, packet: u64, start: Instant) {
    let sent = ROUNDS * AT_ONCE * packet;
    let dripped = (start.elapsed().as_secs_f64() * RATE as f64) as u64;
    eprintln!("{what}: {passed} of {sent} bytes; bucket {BUCKET}, dripped {dripped}");
    assert!(sent > 4 * BUCKET, "{what}: too little to tell");
    assert!(passed <= BUCKET + dripped, "{what}: more than the rate");
    assert!(passed + packet > BUCKET, "{what}: less than the bucket");
}

#[test]
fn a_machine_sends_no_faster_than_it_may_and_others_do() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let slow = slowed(
            place,
            Limits {
                out_bytes: Some(RATE),
                ..Limits::default()
            },
        );
        let free = place.machine(2);
        let (mut first, mut second) = (bed.machine(&slow), bed.machine(&free));
        for to in [IpAddr::V4(PUBLIC), IpAddr::V6(PUBLIC6)] {
            let before = [&slow, &free].map(|machine| counters(&mut bed, machine).out_bytes);
            let start = Instant::now();
            let mut seen = [0, 0];
            for round in 0..ROUNDS {
                for _ in 0..AT_ONCE {
                    first.send(&datagram(&slow, to, &payload(b"slow")));
                    second.send(&datagram(&free, to, &payload(b"free")));
                }
                let end = format!("end {to} {round}.");
                second.send(&datagram(&free, to, end.as_bytes()));
                let frames = bed.world.all_until(|frame| carries(frame, end.as_bytes()));
                for (seen, of) in seen.iter_mut().zip([b"slow", b"free"]) {
                    *seen += frames.iter().filter(|frame| carries(frame, of)).count() as u64;
                }
            }
            let packet = size(to);
            judge(&format!("out to {to}"), seen[0] * packet, packet, start);
            assert_eq!(seen[1], ROUNDS * AT_ONCE, "the other one is not limited");
            let after = [&slow, &free].map(|machine| counters(&mut bed, machine).out_bytes);
            assert_eq!(after[0] - before[0], seen[0] * packet);
            assert!(after[1] - before[1] > seen[1] * packet);
        }
    });
}

#[test]
fn a_machine_gets_no_faster_than_it_may_and_others_do() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let slow = slowed(
            place,
            Limits {
                in_bytes: Some(RATE),
                ..Limits::default()
            },
        );
        let free = place.machine(2);
        let (mut first, mut second) = (bed.machine(&slow), bed.machine(&free));
        for (to, host) in [
            (IpAddr::V4(PUBLIC), IpAddr::V4(HOST)),
            (PUBLIC6.into(), HOST6.into()),
        ] {
            let ask = |bed: &mut Bed, tap: &mut Wire, machine: &Machine| {
                let question = format!("{} asks {to}.", machine.label);
                tap.send(&datagram(machine, to, question.as_bytes()));
                let came = |frame: &[u8]| carries(frame, question.as_bytes());
                let asked = bed.world.until(PATIENCE, came).unwrap();
                let (.., l4) = frame::read(&asked).unwrap();
                let near: [u8; 6] = asked[6..12].try_into().unwrap();
                (near, u16::from_be_bytes([l4[0], l4[1]]))
            };
            let slow_asked = ask(&mut bed, &mut first, &slow);
            let free_asked = ask(&mut bed, &mut second, &free);
            let before = [&slow, &free].map(|machine| counters(&mut bed, machine).in_bytes);
            let start = Instant::now();
            let mut seen = [0, 0];
            for round in 0..ROUNDS {
                let mut answer = |(near, port): ([u8; 6], u16), payload: &[u8]| {
                    let l4 = frame::udp(5000, port, payload);
                    let answer = frame::ip(near, ROUTER_MAC, to, host, &l4, frame::UDP);
                    bed.world.send(&answer);
                };
                for _ in 0..AT_ONCE {
                    answer(slow_asked, &payload(b"slow"));
                    answer(free_asked, &payload(b"free"));
                }
                let end = format!("end {to} {round}.");
                answer(free_asked, end.as_bytes());
                let frames = second.all_until(|frame| carries(frame, end.as_bytes()));
                let count = |frames: &[Vec<u8>], of| {
                    frames.iter().filter(|frame| carries(frame, of)).count() as u64
                };
                seen[1] += count(&frames, b"free");
                // What went to the other machine before has come by now, too.
                seen[0] += count(&first.drain(), b"slow");
                // The far end hears itself not, but what the host says besides.
                let _ = bed.world.drain();
            }
            let packet = size(to);
            judge(&format!("in from {to}"), seen[0] * packet, packet, start);
            assert_eq!(seen[1], ROUNDS * AT_ONCE, "the other one is not limited");
            let after = [&slow, &free].map(|machine| counters(&mut bed, machine).in_bytes);
            assert_eq!(after[0] - before[0], seen[0] * packet);
            assert!(after[1] - before[1] > seen[1] * packet);
        }
    });
}

/// A machine and where its frames come and go.
type Plugged<'a> = (&'a Machine, &'a mut Wire);

fn syn(own: &Machine, to: IpAddr, port: u16) -> Vec<u8> {
    let source = match to {
        IpAddr::V4(_) => own.ipv4.into(),
        IpAddr::V6(_) => IpAddr::V6(own.ipv6),
    };
    let syn = frame::tcp(port, 80, 1, 0, 2);
    frame::ip(GATEWAY_MAC, own.mac, source, to, &syn, frame::TCP)
}

fn is_tcp(frame: &[u8], flag: u8) -> bool {
    frame::read(frame)
        .is_some_and(|(.., protocol, l4)| protocol == frame::TCP && l4[13] & flag != 0)
}

/// Whether a connection begins; else it must be refused at once. `after` is who tells that what does not come has had
/// its time.
fn begins(
    bed: &mut Bed,
    (own, tap): Plugged<'_>,
    after: Plugged<'_>,
    to: IpAddr,
    port: u16,
) -> bool {
    tap.send(&syn(own, to, port));
    let end = format!("after {to} {port}.");
    after
        .1
        .send(&datagram(after.0, LAST.into(), end.as_bytes()));
    let frames = bed.world.all_until(|frame| carries(frame, end.as_bytes()));
    let begins = frames.iter().any(|frame| is_tcp(frame, 2));
    if !begins {
        let reset = tap.until(PATIENCE, |frame| is_tcp(frame, 4));
        assert!(reset.is_some(), "{to} {port} is not refused");
    }
    begins
}

/// Where the machine sends that only says when the other one's time is over.
const LAST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);

#[test]
fn one_connection_more_is_refused_and_others_may_have_more() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let few = slowed(
            place,
            Limits {
                connections: Some(5),
                ..Limits::default()
            },
        );
        let [free, last] = [2, 3].map(|slot| place.machine(slot));
        let mut taps = [&few, &free, &last].map(|machine| bed.machine(machine));
        let [first, second, end] = &mut taps;
        for to in [IpAddr::V4(PUBLIC), IpAddr::V6(PUBLIC6)] {
            for port in 4001..=4010 {
                let may = begins(&mut bed, (&few, first), (&last, end), to, port);
                assert_eq!(may, port <= 4005, "{to} {port}");
                // Said again since no answer came, it is the same connection.
                let again = begins(&mut bed, (&few, first), (&last, end), to, 4001);
                assert!(again, "{to} {port}");
                let other = begins(&mut bed, (&free, second), (&last, end), to, port);
                assert!(other, "{to} {port}");
            }
            eprintln!("{to}: 5 of 10 connections; the other machine has 10");
        }
        // When these have ended, there may be others.
        bed.firewall.forget_connections(few.slot).unwrap();
        let to = PUBLIC.into();
        let mut tries = 5000..;
        while !begins(
            &mut bed,
            (&few, first),
            (&last, end),
            to,
            tries.next().unwrap(),
        ) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert!(tries.start < 6000, "connections that ended still count");
    });
}

#[test]
fn datagrams_without_an_answer_are_one_connection() {
    in_each_place(|place| {
        let Some(mut bed) = Bed::at(place, true) else {
            return;
        };
        let few = slowed(
            place,
            Limits {
                connections: Some(5),
                ..Limits::default()
            },
        );
        let last = place.machine(3);
        let mut tap = bed.machine(&few);
        let mut end = bed.machine(&last);
        let hosts = (1..=8).map(|host| Ipv4Addr::new(203, 0, 113, host));
        for host in hosts {
            for _ in 0..50 {
                tap.send(&datagram(&few, host.into(), b"again"));
            }
        }
        end.send(&datagram(&last, LAST.into(), b"last"));
        let frames = bed.world.all_until(|frame| carries(frame, b"last"));
        let came = |host: u8| {
            let to = IpAddr::from([203, 0, 113, host]);
            let of = |frame: &&Vec<u8>| frame::read(frame).is_some_and(|(_, at, ..)| at == to);
            frames.iter().filter(of).count()
        };
        let all: Vec<_> = (1..=8).map(came).collect();
        eprintln!("of 50 datagrams to each of 8 hosts came {all:?}");
        assert_eq!(all, [50, 50, 50, 50, 50, 0, 0, 0]);
    });
}

#[test]
fn a_server_with_other_limits_applies_them_to_machines_that_are_there() {
    in_own_network(|| {
        let with = |limits| {
            vec![Machine {
                limits,
                ..machine(1)
            }]
        };
        let limits = |rate, connections| Limits {
            connections: Some(connections),
            out_bytes: Some(rate),
            in_bytes: Some(rate),
        };
        let listed = |firewall: &mut Firewall| {
            assert_eq!(firewall.verify().unwrap(), Verified::Sound);
            limits_there()
        };
        let mut firewall = Firewall::open(config(false), with(limits(RATE, 5))).unwrap();
        let before = listed(&mut firewall);
        drop(firewall);
        let mut firewall = Firewall::open(config(false), with(limits(2 * RATE, 6))).unwrap();
        let after = listed(&mut firewall);
        assert_ne!(before, after);
        assert_eq!(after[0], Expression::BytesOver(2 * RATE, 65_536));
        assert_eq!(after[5], Expression::ConnectionsOver(6));
        drop(firewall);
        // The most that the configuration takes is more than the kernel counts.
        let most = limits(1 << 40, 1 << 24);
        let mut firewall = Firewall::open(config(false), with(most)).unwrap();
        assert_ne!(listed(&mut firewall), after);
    });
}

/// The limits that are in the kernel.
fn limits_there() -> Vec<Expression> {
    let mut nft = Nft::open().unwrap();
    let table = Table {
        family: Family::Inet,
        name: "hutch_ab12".into(),
    };
    let sets = [
        "rate_out4",
        "rate_out6",
        "rate_in4",
        "rate_in6",
        "conns4",
        "conns6",
    ];
    let found = sets.map(|set| nft.elements(&table, set).unwrap());
    let found: Vec<_> = found.into_iter().flatten().collect();
    assert_eq!(found.len(), sets.len());
    found
        .into_iter()
        .flat_map(|found| found.element.expressions)
        .collect()
}
