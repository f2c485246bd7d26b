//! A bridge that changes while machines are on it: what is noticed, and what holds then.

use std::net::IpAddr;
use std::time::Duration;

use hutch_net::bridge::{Error, Verified};
use hutch_net::elements::Machine;
use hutch_net::firewall;
use hutch_net::rules::Link;
use hutch_netlink::route::{self, Change, Events, Kind};
use hutch_netlink::{Protocol, Socket};

use crate::bed::{
    BRIDGE, Bed, GATEWAY_MAC, GATEWAY6, HOST, HOST6, PATIENCE, PUBLIC, PUBLIC6, Place, ROUTER_MAC,
    Wire, carries, datagram, in_own_network,
};
use crate::frame::{self, Mac};

const PLACE: Place = Place::Bridge { called: false };
const FIRST: Mac = [2, 0, 0, 0, 0, 0x51];
const SECOND: Mac = [2, 0, 0, 0, 0, 0x52];
const GATEWAY: (&str, u8) = ("172.16.0.1", 16);

fn change(socket: &mut Socket, change: &Change<'_>) {
    let index = route::index(socket, BRIDGE).unwrap();
    socket.apply(&[route::change(index, change)]).unwrap();
}

fn up(up: bool) -> Change<'static> {
    Change {
        up: Some(up),
        ..Change::default()
    }
}

fn mac(mac: Mac) -> Change<'static> {
    Change {
        address: Some(mac),
        ..Change::default()
    }
}

/// Somebody else's bridge that fits.
fn make(socket: &mut Socket, own: Mac) {
    socket
        .apply(&[route::create(BRIDGE, Kind::Bridge)])
        .unwrap();
    let set = Change {
        no_own_ipv6: true,
        ..mac(own)
    };
    change(socket, &set);
    let index = route::index(socket, BRIDGE).unwrap();
    let add = |address: IpAddr, prefix| route::add_address(index, address, prefix);
    socket
        .apply(&[
            add(GATEWAY.0.parse().unwrap(), GATEWAY.1),
            add("fd68::1".parse().unwrap(), 64),
            add(GATEWAY6.into(), 64),
        ])
        .unwrap();
    change(socket, &up(true));
}

/// A host with somebody else's bridge, on which the machine is.
fn bed(own: &Machine) -> Option<(Bed, Wire, Events)> {
    make(&mut Socket::open(Protocol::Route).unwrap(), FIRST);
    let mut config = PLACE.config(false);
    config.rules.link = Link::Bridge {
        name: BRIDGE.into(),
        mac: FIRST,
    };
    let mut bed = Bed::with(PLACE, config)?;
    let bridge = bed.bridge.as_ref().unwrap();
    assert!(!bridge.is_ours() && bridge.ipv6());
    let tap = bed.machine(own);
    let mut events = bed.bridge.as_ref().unwrap().events().unwrap();
    while events.wait(Duration::from_millis(50)).unwrap() {}
    Some((bed, tap, events))
}

/// What a server does when it is woken.
fn keep(bed: &mut Bed, machines: &[Machine]) -> Result<Verified, Error> {
    let bridge = bed.bridge.as_mut().unwrap();
    let verified = bridge.verify(machines)?;
    bed.firewall.relink(bridge.link()).unwrap();
    Ok(verified)
}

fn noticed(bed: &mut Bed, events: &mut Events, machines: &[Machine]) -> Result<Verified, Error> {
    while !events.wait(PATIENCE).unwrap() {}
    // Until the kernel has said all of it.
    let first = keep(bed, machines);
    while events.wait(Duration::from_millis(20)).unwrap() {
        keep(bed, machines)?;
    }
    first
}

/// Whether what a machine sends to this MAC leaves the host, in both families. `last` is the MAC of the bridge.
fn leaves(bed: &mut Bed, tap: &mut Wire, own: &Machine, to: Mac, last: Mac) -> bool {
    let mut send = |payload: &[u8], address: IpAddr, to: Mac| {
        let mut frame = datagram(own, address, payload);
        frame[..6].copy_from_slice(&to);
        tap.send(&frame);
    };
    send(b"try", PUBLIC.into(), to);
    send(b"try", PUBLIC6.into(), to);
    send(b"last", PUBLIC.into(), last);
    let frames = bed.world.all_until(|frame| carries(frame, b"last"));
    let count = frames.iter().filter(|frame| carries(frame, b"try")).count();
    assert!(count == 0 || count == 2, "{count}");
    count == 2
}

/// Whether answers come to the machine, in both families: the host knows where it is.
fn answered(bed: &mut Bed, tap: &mut Wire, own: &Machine, gateway: Mac) {
    let near = route::link(&mut bed.route, "up0").unwrap().unwrap();
    let near: Mac = near.address.try_into().unwrap();
    for (to, host) in [
        (IpAddr::V4(PUBLIC), IpAddr::V4(HOST)),
        (PUBLIC6.into(), HOST6.into()),
    ] {
        let mut question = datagram(own, to, b"question");
        question[..6].copy_from_slice(&gateway);
        tap.send(&question);
        let asked = bed
            .world
            .until(PATIENCE, |frame| carries(frame, b"question"));
        let asked = asked.unwrap();
        let (.., l4) = frame::read(&asked).unwrap();
        let l4 = frame::udp(5000, u16::from_be_bytes([l4[0], l4[1]]), b"answer");
        let answer = frame::ip(near, ROUTER_MAC, to, host, &l4, frame::UDP);
        bed.world.send(&answer);
        let answer = tap.until(PATIENCE, |frame| carries(frame, b"answer"));
        let answer = answer.unwrap();
        assert_eq!(
            (&answer[..6], &answer[6..12]),
            (&own.mac[..], &gateway[..]),
            "{to}"
        );
    }
}

#[test]
fn another_mac_of_the_bridge_is_noticed_and_holds() {
    in_own_network(|| {
        let own = PLACE.machine(1);
        let Some((mut bed, mut tap, mut events)) = bed(&own) else {
            return;
        };
        let machines = [own.clone()];
        answered(&mut bed, &mut tap, &own, FIRST);
        assert!(!leaves(&mut bed, &mut tap, &own, SECOND, FIRST));
        let before = bed.firewall.counters().unwrap();

        // What others do to other links wakes nobody.
        let cable = route::create("other", Kind::Veth("other-far"));
        bed.route.apply(&[cable]).unwrap();
        assert!(!events.wait(Duration::from_millis(50)).unwrap());
        assert_eq!(keep(&mut bed, &machines).unwrap(), Verified::Same);

        change(&mut bed.route, &mac(SECOND));
        let verified = noticed(&mut bed, &mut events, &machines).unwrap();
        assert_eq!(verified, Verified::Changed);
        answered(&mut bed, &mut tap, &own, SECOND);
        assert!(leaves(&mut bed, &mut tap, &own, SECOND, SECOND));
        assert!(!leaves(&mut bed, &mut tap, &own, FIRST, SECOND));
        let after = bed.firewall.counters().unwrap();
        assert!(after[&own.label].out_packets > before[&own.label].out_packets);
        assert_eq!(bed.firewall.verify().unwrap(), firewall::Verified::Sound);
        assert_eq!(keep(&mut bed, &machines).unwrap(), Verified::Same);
        eprintln!("the MAC {FIRST:02x?} is now {SECOND:02x?} for the rules and the machine");
    });
}

#[test]
fn a_bridge_that_no_longer_fits_is_told_and_one_that_does_again_is_taken() {
    in_own_network(|| {
        let own = PLACE.machine(1);
        let Some((mut bed, mut tap, mut events)) = bed(&own) else {
            return;
        };
        let machines = [own.clone()];
        let index = route::index(&mut bed.route, BRIDGE).unwrap();
        let gateway = GATEWAY.0.parse::<IpAddr>().unwrap();
        let other = "10.20.1.1".parse::<IpAddr>().unwrap();
        let away = route::delete_address(index, gateway, GATEWAY.1);
        let instead = route::add_address(index, other, 24);
        bed.route.apply(&[away, instead]).unwrap();
        let refused = noticed(&mut bed, &mut events, &machines).unwrap_err();
        eprintln!("{refused}");
        assert!(
            matches!(refused, Error::Foreign { .. }) && refused.to_string().contains("10.20.1.1")
        );
        let away = route::delete_address(index, other, 24);
        let back = route::add_address(index, gateway, GATEWAY.1);
        bed.route.apply(&[away, back]).unwrap();
        noticed(&mut bed, &mut events, &machines).unwrap();
        answered(&mut bed, &mut tap, &own, FIRST);

        // A bridge that goes down forgets its neighbours, and is as it was before when it is up again. What it had for
        // IPv6 is gone for good.
        change(&mut bed.route, &up(false));
        change(&mut bed.route, &up(true));
        let add = |address: IpAddr| route::add_address(index, address, 64);
        bed.route
            .apply(&[add("fd68::1".parse().unwrap()), add(GATEWAY6.into())])
            .unwrap();
        noticed(&mut bed, &mut events, &machines).unwrap();
        answered(&mut bed, &mut tap, &own, FIRST);
    });
}

#[test]
fn a_bridge_that_is_removed_is_told_and_machines_come_back_to_the_next_one() {
    in_own_network(|| {
        let (own, other) = (PLACE.machine(1), PLACE.machine(2));
        let Some((mut bed, mut tap, mut events)) = bed(&own) else {
            return;
        };
        // The other one has no tap now.
        let machines = [own.clone(), other];
        let index = route::index(&mut bed.route, BRIDGE).unwrap();
        bed.route.apply(&[route::delete(index)]).unwrap();
        let gone = noticed(&mut bed, &mut events, &machines).unwrap_err();
        eprintln!("{gone}; {}", gone.hint().unwrap());
        assert!(matches!(gone, Error::Gone { .. }));
        tap.send(&datagram(&own, PUBLIC.into(), b"lie"));

        make(&mut bed.route, SECOND);
        let verified = noticed(&mut bed, &mut events, &machines).unwrap();
        assert_eq!(verified, Verified::Changed);
        for link in [&own.label, BRIDGE] {
            crate::bed::until_running(&mut bed.route, link);
        }
        answered(&mut bed, &mut tap, &own, SECOND);
        assert!(!leaves(&mut bed, &mut tap, &own, FIRST, SECOND));
        let alias = route::link(&mut bed.route, &own.label).unwrap().unwrap();
        assert_eq!(alias.alias, "mch-test");
    });
}

#[test]
fn a_bridge_of_ours_that_is_removed_is_made_again() {
    in_own_network(|| {
        let own = PLACE.machine(1);
        let Some(mut bed) = Bed::at(PLACE, false) else {
            return;
        };
        let mut tap = bed.machine(&own);
        let machines = [own.clone()];
        let mut events = bed.bridge.as_ref().unwrap().events().unwrap();
        answered(&mut bed, &mut tap, &own, GATEWAY_MAC);
        for damage in ["removed", "changed"] {
            let index = route::index(&mut bed.route, BRIDGE).unwrap();
            match damage {
                "removed" => bed.route.apply(&[route::delete(index)]).unwrap(),
                _ => change(&mut bed.route, &mac(SECOND)),
            }
            let verified = noticed(&mut bed, &mut events, &machines).unwrap();
            assert_eq!(verified, Verified::Changed, "{damage}");
            for link in [&own.label, BRIDGE] {
                crate::bed::until_running(&mut bed.route, link);
            }
            answered(&mut bed, &mut tap, &own, GATEWAY_MAC);
            eprintln!("{damage}, and as it must be again");
        }
        assert!(bed.bridge.as_ref().unwrap().is_ours());
    });
}
