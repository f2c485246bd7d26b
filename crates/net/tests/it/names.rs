//! Resolver and firewall together: a machine asks through its tap, and reaches what it was told.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hutch_net::dns::{Asker, Config, Directory, Limits, NotRecorded, Server, Upstreams};
use hutch_net::domain::{Domain, Domains, Judgement};
use hutch_net::elements::{Egress, Machine, Policy, mark};
use hutch_net::firewall::Firewall;
use hutch_netlink::nft::{Family, Nft, Table};
use hutch_netlink::route::{self, Change};
use hutch_netlink::{Protocol, Socket, conntrack};
use tokio::sync::oneshot;

use crate::bed::{
    Bed, GATEWAY, GATEWAY_MAC, PATIENCE, PUBLIC, Wire, carries, config, datagram, in_own_network,
    machine,
};
use crate::dns::{A, NO_ERROR, REFUSED, Said, Upstream, example, question, read};
use crate::frame;

const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// A resolver that the machine would rather ask.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);

/// The machines of a firewall.
struct Machines(Mutex<Option<Firewall>>);

impl Machines {
    fn firewall<T>(&self, call: impl FnOnce(&mut Firewall) -> T) -> T {
        call(self.0.lock().unwrap().as_mut().unwrap())
    }
}

impl Directory for Machines {
    fn asker(&self, address: IpAddr) -> Option<Arc<Asker>> {
        self.firewall(|firewall| {
            let mut machines = firewall.machines().values();
            let machine = machines.find(|machine| IpAddr::V4(machine.ipv4) == address)?;
            Some(Arc::new(Asker {
                label: machine.label.clone(),
                policy: machine.policy.clone(),
            }))
        })
    }

    fn addresses(&self, _: &Asker, _: &str) -> Option<Vec<IpAddr>> {
        None
    }

    fn name(&self, _: &Asker, _: IpAddr) -> Option<String> {
        None
    }

    async fn record(
        &self,
        asker: &Asker,
        name: &Domain,
        addresses: Vec<IpAddr>,
        lifetime: Duration,
    ) -> Result<Judgement, NotRecorded> {
        let learn =
            |firewall: &mut Firewall| firewall.learn(&asker.label, name, &addresses, lifetime);
        Ok(self.firewall(learn)?)
    }
}

/// Runs resolver and upstream in this network until the sender is dropped; tells the port.
fn resolver(machines: Arc<Machines>) -> (u16, oneshot::Sender<()>) {
    let (port, ports) = mpsc::channel();
    let (running, end) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let upstream = Upstream::start(example).await;
            let config = Config {
                address: GATEWAY.into(),
                port: None,
                upstreams: Upstreams::Given(vec![upstream.address]),
                host_networks: Vec::new(),
                limits: Limits::default(),
            };
            let server = Server::start(config, machines).unwrap();
            port.send(server.port()).unwrap();
            let _ = end.await;
        });
    });
    (ports.recv().unwrap(), running)
}

fn allow(names: &[&str]) -> Policy {
    Policy {
        egress: Egress::None,
        domains: Domains {
            allow: names.iter().map(|name| name.parse().unwrap()).collect(),
            deny: Vec::new(),
        },
        ..Policy::default()
    }
}

/// Asks a resolver from a machine, and waits for what comes back from just there.
fn ask(tap: &mut Wire, own: &Machine, resolver: Ipv4Addr, about: &str) -> Said {
    let l4 = frame::udp(4053, 53, &question(7, about, A));
    let (source, to) = (own.ipv4.into(), resolver.into());
    tap.send(&frame::ip(
        GATEWAY_MAC,
        own.mac,
        source,
        to,
        &l4,
        frame::UDP,
    ));
    let answer = |frame: &[u8]| {
        frame::read(frame).is_some_and(|(from, _, protocol, l4)| {
            from == to && protocol == frame::UDP && l4[..4] == [0, 53, 0x0f, 0xd5]
        })
    };
    let answer = tap.until(PATIENCE, answer).expect("an answer");
    let (.., l4) = frame::read(&answer).unwrap();
    read(&l4[8..])
}

fn known(own: &Machine) -> Vec<[u8; 4]> {
    let table = Table {
        family: Family::Inet,
        name: "hutch_ab12".into(),
    };
    let found = Nft::open().unwrap().elements(&table, "names4").unwrap();
    let of_machine = found.iter().filter_map(|found| {
        let key = found.element.key.strip_prefix(&own.ipv4.octets())?;
        key.try_into().ok()
    });
    of_machine.collect()
}

fn connections(own: &Machine) -> Vec<IpAddr> {
    let mut socket = Socket::open(Protocol::Netfilter).unwrap();
    let mark = mark(config(true).number, own.slot);
    let all = conntrack::connections(&mut socket, mark).unwrap();
    let mut all: Vec<_> = all
        .iter()
        .filter(|connection| connection.port == Some(5000))
        .map(|connection| connection.destination)
        .collect();
    all.sort();
    all
}

#[test]
fn a_machine_reaches_what_its_allowed_names_lead_to_and_nothing_else() {
    in_own_network(|| {
        let mut route = Socket::open(Protocol::Route).unwrap();
        let up = Change {
            up: Some(true),
            ..Change::default()
        };
        let lo = route::index(&mut route, "lo").unwrap();
        route.apply(&[route::change(lo, &up)]).unwrap();
        let machines = Arc::new(Machines(Mutex::new(None)));
        // No interface has its address yet.
        let (port, _running) = resolver(machines.clone());
        let mut config = config(true);
        config.rules.dns_port = Some(port);
        let Some(mut bed) = Bed::new(config) else {
            return;
        };
        let mut own = machine(1);
        own.policy = allow(&["plain.example.com", "mixed.example.com"]);
        let mut tap = bed.machine(&own);
        let Bed {
            firewall,
            mut world,
            route: _route,
            ..
        } = bed;
        *machines.0.lock().unwrap() = Some(firewall);
        let mut reaches = |tap: &mut Wire, to: Ipv4Addr| {
            // The sentinel is what the machine was told last: frames keep their order.
            tap.send(&datagram(&own, to.into(), b"try"));
            tap.send(&datagram(&own, PUBLIC.into(), b"end"));
            let first = world.until(PATIENCE, |frame| {
                carries(frame, b"try") || carries(frame, b"end")
            });
            let tried = carries(&first.unwrap(), b"try");
            if tried {
                world
                    .until(PATIENCE, |frame| carries(frame, b"end"))
                    .unwrap();
            }
            tried
        };
        // Wherever it asks, it is us who answer, and the kernel knows first.
        for from in [ELSEWHERE, GATEWAY] {
            let said = ask(&mut tap, &own, from, "plain.example.com");
            assert_eq!((said.code, said.addresses()), (NO_ERROR, vec![PUBLIC]));
            assert_eq!(known(&own), [PUBLIC.octets()]);
        }
        let said = ask(&mut tap, &own, ELSEWHERE, "other.example.com");
        assert_eq!((said.code, said.answers.len()), (REFUSED, 0));
        let said = ask(&mut tap, &own, ELSEWHERE, "mixed.example.com");
        assert_eq!(said.addresses(), [Ipv4Addr::new(192, 0, 2, 7), PUBLIC]);
        assert_eq!(known(&own).len(), 2);
        assert!(reaches(&mut tap, PUBLIC));
        assert!(!reaches(&mut tap, OTHER));
        assert!(!reaches(&mut tap, Ipv4Addr::new(10, 0, 0, 1)));
        // Another policy: what it does not allow ends at once, and is not told any more.
        let more = allow(&["plain.example.com", "other.example.com"]);
        machines
            .firewall(|firewall| firewall.set_policy(&own.label, more))
            .unwrap();
        let said = ask(&mut tap, &own, GATEWAY, "other.example.com");
        assert_eq!(said.addresses(), [OTHER]);
        assert!(reaches(&mut tap, OTHER));
        assert_eq!(connections(&own), [IpAddr::V4(PUBLIC), OTHER.into()]);
        machines
            .firewall(|firewall| firewall.set_policy(&own.label, allow(&["plain.example.com"])))
            .unwrap();
        assert_eq!(connections(&own), [IpAddr::V4(PUBLIC)]);
        assert_eq!(known(&own), [PUBLIC.octets()]);
        assert!(!reaches(&mut tap, OTHER));
        let said = ask(&mut tap, &own, GATEWAY, "other.example.com");
        assert_eq!(said.code, REFUSED);
        // All of it is remembered, for the next policy.
        assert_eq!(
            machines.firewall(|firewall| firewall.learned(&own.label).len()),
            3
        );
    });
}
