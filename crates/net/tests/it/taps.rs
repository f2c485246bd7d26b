//! A machine's tap, brought up: what is there then, and that nothing of it stays.

use std::fs;
use std::num::NonZeroU16;

use hutch_net::address::{Addresses, CANDIDATES, GATEWAY_MAC};
use hutch_net::link::{Links, mtu};
use hutch_netlink::route;

use crate::bed::{Bed, config, in_own_network};

const OWNER: u32 = 0x7000_0001;

fn addresses() -> Addresses {
    Addresses::new("ab12", CANDIDATES[0], [1, 2, 3, 4, 5]).unwrap()
}

#[test]
fn a_tap_comes_up_with_all_it_needs_and_goes_without_a_trace() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(false)) else {
            return;
        };
        let mut links = Links::open().unwrap();
        assert!(links.forward().unwrap(), "nothing speaks against IPv6 here");
        let machine = addresses().machine(7).unwrap();
        bed.firewall.add(machine.clone()).unwrap();
        for _ in 0..2 {
            links.up(&machine, OWNER, 1400, "mch-7").unwrap();
        }
        let link = route::link(&mut bed.route, "hab12-7").unwrap().unwrap();
        assert_eq!((link.up, link.mtu, &link.alias[..]), (true, 1400, "mch-7"));
        assert_eq!(link.address, GATEWAY_MAC);
        assert_eq!(link.tun.unwrap().owner, Some(OWNER));
        let routes = route::routes(&mut bed.route, 0x68).unwrap();
        let mut to: Vec<_> = routes.iter().map(|route| route.to.0.to_string()).collect();
        to.sort();
        assert_eq!(to, [machine.ipv4.to_string(), machine.ipv6.to_string()]);
        let neighbours = route::neighbours(&mut bed.route, link.index).unwrap();
        assert_eq!(
            neighbours
                .iter()
                .filter(|(_, mac)| *mac == machine.mac)
                .count(),
            3
        );
        let setting = fs::read_to_string("/proc/sys/net/ipv4/conf/hab12-7/rp_filter").unwrap();
        assert_eq!(setting.trim(), "1");

        assert!(
            links.down("hab12-7", OWNER + 1).is_err(),
            "it is another user's"
        );
        for _ in 0..2 {
            links.down("hab12-7", OWNER).unwrap();
        }
        assert_eq!(links.names("hab12-").unwrap(), [""; 0]);
        assert_eq!(route::routes(&mut bed.route, 0x68).unwrap(), []);
    });
}

#[test]
fn instances_do_not_take_a_network_that_somebody_has() {
    in_own_network(|| {
        let Some(mut bed) = Bed::new(config(false)) else {
            return;
        };
        let up = route::index(&mut bed.route, "up0").unwrap();
        let lan = route::add_address(up, [172, 16, 9, 1].into(), 24);
        bed.route.apply(&[lan]).unwrap();
        let mut links = Links::open().unwrap();
        let [one, other] = [1, 2].map(|number| NonZeroU16::new(number).unwrap());
        let [_, second, third, ..] = CANDIDATES;
        assert_eq!(links.unused(&CANDIDATES, one).unwrap(), Some(second));
        for _ in 0..2 {
            assert!(links.claim(&second, one).unwrap(), "again after a crash");
        }
        let Ok(addresses) = Addresses::new("ab12", second, [1, 2, 3, 4, 5]) else {
            panic!("a good network");
        };
        links
            .up(&addresses.machine(1).unwrap(), OWNER, 1500, "")
            .unwrap();
        assert_eq!(links.users(&second, one).unwrap(), []);
        assert_eq!(links.users(&second, other).unwrap().len(), 2);
        assert!(!links.claim(&second, other).unwrap());
        assert_eq!(links.unused(&CANDIDATES, other).unwrap(), Some(third));
        links.down("hab12-1", OWNER).unwrap();
        for _ in 0..2 {
            links.give_up(&second, one).unwrap();
        }
        assert!(links.claim(&second, other).unwrap());
    });
}

#[test]
fn uplinks_are_where_default_routes_lead() {
    in_own_network(|| {
        let Some(_bed) = Bed::new(config(false)) else {
            return;
        };
        let uplinks = Links::open().unwrap().uplinks().unwrap();
        let [up] = &uplinks[..] else {
            panic!("{uplinks:?}");
        };
        assert_eq!(
            (&up.name[..], up.ipv4, up.ipv6, up.advertised),
            ("up0", true, true, false)
        );
        assert_eq!(mtu(&uplinks), 1500);
    });
}
