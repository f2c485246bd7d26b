//! Machines on a bridge that somebody else changes, in a world of the test's own.

use hutch_contract::network::NetworkMode;
use hutch_netlink::{Protocol, Socket, route};
use hutch_tests::world::{PUBLIC, World};
use hutch_tests::{Runtime, lab};

use crate::egress::{PORT, reaches};

#[tokio::test]
async fn a_foreign_bridge_that_changes_keeps_its_machines_with_qemu() {
    let Some(world) = World::new() else { return };
    world.serve(PUBLIC, PORT);
    let make = |mac: [u8; 6]| {
        world.on_host(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            if let Some(old) = route::link(&mut socket, "br0").unwrap() {
                socket.apply(&[route::delete(old.index)]).unwrap();
            }
            let make = route::create("br0", route::Kind::Bridge);
            socket.apply(&[make]).unwrap();
            let index = route::index(&mut socket, "br0").unwrap();
            let own = route::add_address(index, [172, 16, 0, 1].into(), 16);
            socket.apply(&[own, set(index, mac)]).unwrap();
        });
    };
    make([2, 0, 0, 0, 0, 0x51]);
    let lab = lab!(Runtime::Qemu).inside(&world);
    let lab = lab.env("NETWORK_BRIDGE", "br0").start().await;
    lab.busybox().await;
    let made = lab.create("one").await;
    assert_eq!(made.network.unwrap().mode, NetworkMode::Bridge);
    reaches(&lab, "one", PUBLIC, PORT).await;
    world.on_host(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let index = route::index(&mut socket, "br0").unwrap();
        socket.apply(&[set(index, [2, 0, 0, 0, 0, 0x52])]).unwrap();
    });
    // When it has asked again who the gateway is.
    lab.sh("one", "ip neigh flush dev eth0").await;
    reaches(&lab, "one", PUBLIC, PORT).await;
    make([2, 0, 0, 0, 0, 0x53]);
    lab.sh("one", "ip neigh flush dev eth0").await;
    reaches(&lab, "one", PUBLIC, PORT).await;
    lab.finish().await;
}

/// Brings a link up with this MAC.
fn set(index: u32, mac: [u8; 6]) -> hutch_netlink::Message {
    let change = route::Change {
        up: Some(true),
        address: Some(mac),
        ..route::Change::default()
    };
    route::change(index, &change)
}
