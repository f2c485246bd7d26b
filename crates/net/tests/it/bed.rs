//! A host in a network namespace: taps with machines that the test plays, and an uplink behind which it plays the world.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::process::Command;
use std::time::Duration;

use hutch_net::address::Addresses;
use hutch_net::bridge::{self, Bridge, on_bridge};
use hutch_net::elements::{Limits, Machine, Policy};
use hutch_net::firewall::{Config, Firewall};
use hutch_net::rules::{Link, Rules};
use hutch_netlink::bridge::join;
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

/// Where machines are, for what must hold everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Each behind a tap of its own.
    Taps,
    /// On a bridge.
    Bridge {
        /// Whether packets of bridges pass the IP tables, too (`bridge-nf-call-iptables`).
        called: bool,
    },
}

/// The bridge that [`Place::Bridge`] means.
pub const BRIDGE: &str = "br0";
pub const NUMBER: NonZeroU16 = NonZeroU16::new(0xab12).unwrap();

impl Place {
    pub const ALL: [Self; 3] = [
        Self::Taps,
        Self::Bridge { called: false },
        Self::Bridge { called: true },
    ];

    pub fn config(self, own: bool) -> Config {
        let mut config = config(own);
        if self != Self::Taps {
            config.rules.gateway = self.gateway();
            config.rules.link = Link::Bridge {
                name: BRIDGE.into(),
                mac: GATEWAY_MAC,
            };
        }
        config
    }

    pub fn gateway(self) -> Ipv4Addr {
        match self {
            Self::Taps => GATEWAY,
            Self::Bridge { .. } => Ipv4Addr::new(172, 16, 0, 1),
        }
    }

    pub fn machine(self, slot: u16) -> Machine {
        match self {
            Self::Taps => machine(slot),
            Self::Bridge { .. } => {
                let network = "172.16.0.0/16".parse().unwrap();
                let addresses = Addresses::new(TAG, network, [0x68, 0, 0, 0, 0]).unwrap();
                on_bridge(addresses.machine(slot).unwrap(), NUMBER)
            }
        }
    }
}

/// Runs a test in each place, in a network namespace of its own.
pub fn in_each_place(test: impl Fn(Place) + Sync) {
    for place in Place::ALL {
        in_own_network(|| {
            eprintln!("{place:?}");
            test(place);
        });
    }
}

/// What a bridge is to have.
pub fn bridge_config(name: &str) -> bridge::Config {
    bridge::Config {
        name: name.into(),
        instance: "test".into(),
        ipv4: (Ipv4Addr::new(172, 16, 0, 1), 16),
        ipv6: Some((Ipv6Addr::new(0xfd68, 0, 0, 0, 0, 0, 0, 1), 64)),
        mtu: 1500,
    }
}

pub fn config(own: bool) -> Config {
    Config {
        rules: Rules {
            tag: TAG.into(),
            gateway: GATEWAY,
            dns_port: None,
            host_networks: Vec::new(),
            link: Link::Taps,
        },
        instance: "test".into(),
        number: NUMBER,
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
    pub fn new(file: File) -> Self {
        Self(file)
    }

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

    /// All frames up to the one for which `wanted` holds, which must come.
    pub fn all_until(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while !all.last().is_some_and(|frame: &Vec<u8>| wanted(frame)) {
            let next = self.until(PATIENCE, |_| true);
            all.push(next.expect("a frame does not come"));
        }
        all
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
    pub bridge: Option<Bridge>,
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
        let bridge = match &config.rules.link {
            Link::Taps => None,
            Link::Bridge { name, .. } => Some(Bridge::open(bridge_config(name)).unwrap()),
        };
        Some(Self {
            firewall: Firewall::open(config, Vec::new()).unwrap(),
            world: Wire(sys::packets(far).unwrap()),
            route,
            bridge,
        })
    }

    /// A host in that place. None, after saying so, where there can be none.
    pub fn at(place: Place, own: bool) -> Option<Self> {
        Self::with(place, place.config(own))
    }

    pub fn with(place: Place, config: Config) -> Option<Self> {
        if let Place::Bridge { called } = place {
            for of in ["iptables", "ip6tables"] {
                let setting = format!("/proc/sys/net/bridge/bridge-nf-call-{of}");
                match fs::write(&setting, if called { "1" } else { "0" }) {
                    Err(error) if called => {
                        eprintln!("skipped: cannot set {setting}: {error}");
                        return None;
                    }
                    _ => {}
                }
            }
        }
        Self::new(config)
    }

    /// A port of the bridge that is not ours; what comes out of it, and goes in.
    pub fn foreign_port(&mut self) -> Wire {
        let bridge = route::index(&mut self.route, BRIDGE).unwrap();
        Wire(foreign_port(&mut self.route, bridge, "ext"))
    }

    /// A tap for a machine, which the firewall need not know.
    pub fn tap(&mut self, machine: &Machine) -> Wire {
        let tap = sys::tap(&machine.label).unwrap();
        if let Some(bridge) = &mut self.bridge {
            bridge.attach(machine, "mch-test").unwrap();
            for link in [&machine.label, BRIDGE] {
                until_running(&mut self.route, link);
            }
            return Wire(tap);
        }
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

    /// The MACs of these links.
    pub fn macs(&mut self, links: &[&str]) -> Vec<Vec<u8>> {
        let mac = |name: &&str| route::link(&mut self.route, name).unwrap().unwrap().address;
        links.iter().map(mac).collect()
    }

    /// Adds a machine, and then its tap.
    pub fn machine(&mut self, machine: &Machine) -> Wire {
        self.firewall.add(machine.clone()).unwrap();
        self.tap(machine)
    }
}

/// The kernel notices a carrier by and by.
pub fn until_running(socket: &mut Socket, name: &str) {
    let mut is_running = || route::link(socket, name).unwrap().unwrap().running;
    while !is_running() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Puts one end of a new cable into a bridge; the other one's frames.
pub fn foreign_port(socket: &mut Socket, bridge: u32, name: &str) -> File {
    let far = format!("{name}-far");
    let make = route::create(name, Kind::Veth(&far));
    socket.apply(&[make]).unwrap();
    let [near, far] = [name, &far].map(|name| route::index(socket, name).unwrap());
    let up = Change {
        up: Some(true),
        no_own_ipv6: true,
        ..Change::default()
    };
    socket
        .apply(&[
            join(near, bridge),
            route::change(near, &up),
            route::change(far, &up),
        ])
        .unwrap();
    until_running(socket, name);
    sys::packets(far).unwrap()
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
