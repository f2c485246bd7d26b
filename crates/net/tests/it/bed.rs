//! A host in a network namespace: taps with machines that the test plays, and an uplink behind which it plays the world.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::process::Command;
use std::time::Duration;

use hutch_net::elements::{Limits, Machine, Policy};
use hutch_net::firewall::{Config, Firewall};
use hutch_net::rules::Rules;
use hutch_netlink::route::{self, Change, Kind, Route};
use hutch_netlink::{Protocol, Socket};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::frame::{self, Mac};
use crate::sys;

pub const TAG: &str = "ab12";
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
pub const GATEWAY_MAC: Mac = [2, 0x68, 0x75, 0x74, 0x63, 1];
pub const MACHINE_MAC: Mac = [2, 0x68, 0x75, 0x74, 0x63, 2];
/// The host's addresses on the uplink.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
/// The router behind the uplink, which is everywhere else.
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
pub const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 99];
/// Hosts that count as public.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const PUBLIC6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 10);

/// Runs a test in a network namespace of its own, or says why not.
pub fn in_own_network(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| match sys::own_network() {
            Ok(()) => test(),
            Err(error) => eprintln!("skipped: no network namespace to be had: {error}"),
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

pub fn config(own: bool) -> Config {
    Config {
        rules: Rules {
            tag: TAG.into(),
            gateway: GATEWAY,
            dns_port: None,
            host_networks: Vec::new(),
        },
        instance: "test".into(),
        number: NonZeroU16::new(0xab12).unwrap(),
        own,
    }
}

pub fn machine(slot: u16) -> Machine {
    let [high, low] = slot.to_be_bytes();
    Machine {
        label: hutch_net::label(TAG, slot),
        slot,
        mac: MACHINE_MAC,
        ipv4: Ipv4Addr::new(172, 16, high, low),
        ipv6: Ipv6Addr::new(0xfd68, 0, 0, 0, 0, 0, 1, slot),
        link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
        policy: Policy::default(),
        limits: Limits::default(),
    }
}

/// The standard output of `nft`; nothing when it is not installed.
pub fn nft(arguments: &[&str]) -> Option<String> {
    match Command::new("nft").args(arguments).output() {
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "nft {arguments:?}: {said}");
            Some(String::from_utf8(done.stdout).unwrap())
        }
        Err(error) => {
            eprintln!("skipped: nft is not to be had: {error}");
            None
        }
    }
}

/// Where frames come and go.
pub struct Wire(File);

impl Wire {
    pub fn send(&mut self, frame: &[u8]) {
        self.0.write_all(frame).unwrap();
    }

    /// The next frame for which `wanted` holds; others are passed over. None when nothing more comes for a while.
    pub fn until(&mut self, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        loop {
            match self.0.read(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => return Some(buffer[..length].to_vec()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let patience = Timespec::try_from(patience).unwrap();
                    let mut poll = [PollFd::new(&self.0, PollFlags::IN)];
                    if rustix::event::poll(&mut poll, Some(&patience)).unwrap() == 0 {
                        return None;
                    }
                }
                Err(error) => panic!("cannot read a frame: {error}"),
            }
        }
    }

    /// Every frame that is there now.
    pub fn drain(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.until(Duration::ZERO, |_| true)).collect()
    }
}

/// Time for a frame that must come; nothing is asserted about how long it takes.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Bed {
    pub firewall: Firewall,
    /// The far end of the uplink.
    pub world: Wire,
    pub route: Socket,
}

impl Bed {
    /// A host without machines. None, after saying so, where taps cannot be made.
    pub fn new(config: Config) -> Option<Self> {
        if let Err(error) = fs::metadata("/dev/net/tun") {
            eprintln!("skipped: no /dev/net/tun: {error}");
            return None;
        }
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
        }
        let mut route = Socket::open(Protocol::Route).unwrap();
        route
            .apply(&[route::create("up0", Kind::Veth("up1"))])
            .unwrap();
        let near = route::index(&mut route, "up0").unwrap();
        let far = route::index(&mut route, "up1").unwrap();
        let up = Change {
            up: Some(true),
            no_own_ipv6: true,
            ..Change::default()
        };
        let any = |any: IpAddr, gateway: IpAddr| Route {
            to: (any, 0),
            link: near,
            gateway: Some(gateway),
            source: None,
            protocol: 4,
        };
        route
            .apply(&[
                route::change(far, &up),
                route::change(near, &up),
                route::add_address(near, HOST.into(), 24),
                route::add_address(near, HOST6.into(), 64),
                route::add_neighbour(near, ROUTER.into(), ROUTER_MAC),
                route::add_neighbour(near, ROUTER6.into(), ROUTER_MAC),
                route::add_route(&any([0; 4].into(), ROUTER.into())),
                route::add_route(&any([0; 16].into(), ROUTER6.into())),
            ])
            .unwrap();
        Some(Self {
            firewall: Firewall::open(config, Vec::new()).unwrap(),
            world: Wire(sys::packets(far).unwrap()),
            route,
        })
    }

    /// A tap for a machine, which the firewall need not know.
    pub fn tap(&mut self, machine: &Machine) -> Wire {
        let tap = sys::tap(&machine.label).unwrap();
        let index = route::index(&mut self.route, &machine.label).unwrap();
        let change = Change {
            up: Some(true),
            address: Some(GATEWAY_MAC),
            no_own_ipv6: true,
            ..Change::default()
        };
        let to = |to: IpAddr, prefix, source| {
            route::add_route(&Route {
                to: (to, prefix),
                link: index,
                gateway: None,
                source,
                protocol: 0x68,
            })
        };
        let mac = machine.mac;
        self.route
            .apply(&[
                route::change(index, &change),
                route::add_address(index, GATEWAY.into(), 32),
                route::add_address(index, GATEWAY6.into(), 64),
                to(machine.ipv4.into(), 32, Some(GATEWAY.into())),
                to(machine.ipv6.into(), 128, None),
                route::add_neighbour(index, machine.ipv4.into(), mac),
                route::add_neighbour(index, machine.ipv6.into(), mac),
                route::add_neighbour(index, machine.link_local.into(), mac),
            ])
            .unwrap();
        Wire(tap)
    }

    /// Adds a machine, and then its tap.
    pub fn machine(&mut self, machine: &Machine) -> Wire {
        self.firewall.add(machine.clone()).unwrap();
        self.tap(machine)
    }
}

/// A datagram from a machine with this payload.
pub fn datagram(from: &Machine, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    let source = match to {
        IpAddr::V4(_) => from.ipv4.into(),
        IpAddr::V6(_) => from.ipv6.into(),
    };
    let l4 = frame::udp(4000, 5000, payload);
    frame::ip(GATEWAY_MAC, from.mac, source, to, &l4, frame::UDP)
}

/// Whether a frame is a UDP datagram with this payload.
pub fn carries(frame: &[u8], payload: &[u8]) -> bool {
    frame::read(frame).is_some_and(|(_, _, protocol, l4)| {
        protocol == frame::UDP && l4.get(8..).is_some_and(|rest| rest.starts_with(payload))
    })
}
