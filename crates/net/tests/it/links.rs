//! What is said about links by rtnetlink is what the kernel then shows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hutch_netlink::route::{self, Change, Kind, Route};
use hutch_netlink::{Protocol, Socket};

use crate::bed::in_own_network;

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
const HOST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

#[test]
fn links_addresses_routes_and_neighbours_read_back() {
    in_own_network(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let make = route::create("hab12-1", Kind::Veth("other"));
        socket
            .apply(&[make.clone(), route::create("br7", Kind::Bridge)])
            .unwrap();
        let twice = socket.apply(&[make]).unwrap_err();
        assert_eq!(twice.errno(), Some(rustix::io::Errno::EXIST), "{twice}");
        let index = route::index(&mut socket, "hab12-1").unwrap();
        let change = Change {
            up: Some(true),
            mtu: Some(1400),
            address: Some([2, 0, 0, 0, 0, 7]),
            alias: Some("mch-7"),
            no_own_ipv6: true,
        };
        socket.apply(&[route::change(index, &change)]).unwrap();
        let [link] = &route::links(&mut socket, "hab12-").unwrap()[..] else {
            panic!("not one link");
        };
        assert_eq!((link.index, link.up, link.mtu), (index, true, 1400));
        assert_eq!(
            (&link.alias[..], &link.address[..]),
            ("mch-7", &[2, 0, 0, 0, 0, 7][..])
        );

        let own = [(HOST, 24), (HOST6, 64)];
        let add = own.map(|(address, prefix)| route::add_address(index, address, prefix));
        // Once more changes nothing.
        socket.apply(&add).unwrap();
        socket.apply(&add).unwrap();
        assert_eq!(route::addresses(&mut socket, index).unwrap(), own);

        let guest = Route {
            to: (Ipv4Addr::new(172, 16, 0, 7).into(), 32),
            link: index,
            gateway: None,
            source: Some(HOST),
            protocol: 0x68,
        };
        let all = Route {
            to: (Ipv4Addr::UNSPECIFIED.into(), 0),
            gateway: Some(Ipv4Addr::new(169, 254, 0, 1).into()),
            source: None,
            ..guest
        };
        let neighbour = route::add_neighbour(index, guest.to.0, [2, 0, 0, 0, 0, 9]);
        socket
            .apply(&[route::add_route(&guest), route::add_route(&all), neighbour])
            .unwrap();
        let mut routes = route::routes(&mut socket, 0x68).unwrap();
        routes.sort_by_key(|route| route.to);
        assert_eq!(routes, [all, guest]);
        let known = route::neighbours(&mut socket, index).unwrap();
        assert!(
            known.contains(&(guest.to.0, vec![2, 0, 0, 0, 0, 9])),
            "{known:?}"
        );

        socket
            .apply(&[
                route::delete_route(&guest),
                route::delete_address(index, HOST6, 64),
            ])
            .unwrap();
        assert_eq!(route::routes(&mut socket, 0x68).unwrap(), [all]);
        assert_eq!(route::addresses(&mut socket, index).unwrap(), own[..1]);
        socket.apply(&[route::delete(index)]).unwrap();
        assert_eq!(route::link(&mut socket, "hab12-1").unwrap(), None);
        assert!(route::routes(&mut socket, 0x68).unwrap().is_empty());
    });
}
