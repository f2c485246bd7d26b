//! What machines reach, and what reaches them: in a world of the test's own.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::Duration;

use hutch_contract::expose::{Access, PortKind, PublishPort};
use hutch_contract::machine::CreateMachine;
use hutch_contract::network::{Egress, NetworkMode, NetworkPolicy};
use hutch_netlink::nft::{Batch, Family, Nft, Table};
use hutch_netlink::{Protocol, Socket, route};
use hutch_store::{SqliteStore, Store};
use hutch_tests::world::{HOST, METADATA, OTHER, PRIVATE, PUBLIC, World};
use hutch_tests::{Lab, Runtime, lab};

pub const LIMIT: Duration = Duration::from_secs(120);
pub const PORT: u16 = 7000;
/// The host's address on the guest's link.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);

/// What a machine hears from a server, or nothing.
pub async fn hears(lab: &Lab, machine: &str, host: impl Into<IpAddr>, port: u16) -> bool {
    let host = host.into();
    let tried = lab
        .sh(
            machine,
            &format!("timeout 15 nc -w 3 {host} {port} </dev/null"),
        )
        .await;
    tried.stdout == "hello\n"
}

/// Waits until it hears it: a guest on a busy host is slow.
pub async fn reaches(lab: &Lab, machine: &str, host: impl Into<IpAddr>, port: u16) {
    let host = host.into();
    let what = format!("{machine} reaches {host}\n{}", lab.log());
    hutch_tests::wait_until(&what, LIMIT, async || hears(lab, machine, host, port).await).await;
}

/// Makes a machine with this policy.
pub async fn create(lab: &Lab, name: &str, policy: NetworkPolicy) -> Ipv4Addr {
    let request = CreateMachine {
        network: policy,
        ..lab.request(name)
    };
    let created = lab.client().create(&request, None, Some(LIMIT)).await;
    let machine = created.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    let network = machine.network.unwrap();
    assert_eq!(network.mode, NetworkMode::Routed);
    assert_eq!(machine.unapplied, [""; 0], "{}", lab.log());
    network.ipv4.unwrap()
}

#[tokio::test]
async fn a_machine_reaches_the_internet_and_nothing_else_with_qemu() {
    the_internet_and_nothing_else(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn a_machine_reaches_the_internet_and_nothing_else_with_firecracker() {
    the_internet_and_nothing_else(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn a_machine_reaches_the_internet_and_nothing_else_with_cloud_hypervisor() {
    the_internet_and_nothing_else(lab!(Runtime::CloudHypervisor)).await;
}

async fn the_internet_and_nothing_else(lab: Lab) {
    let Some(world) = World::new() else { return };
    let public = world.serve(PUBLIC, PORT);
    let hidden = [
        (IpAddr::from(PRIVATE), world.serve(PRIVATE, PORT)),
        (METADATA.into(), world.serve(METADATA, PORT)),
        (HOST.into(), world.serve_on_host(HOST, PORT)),
        (
            GATEWAY.into(),
            world.serve_on_host(Ipv4Addr::UNSPECIFIED, 7001),
        ),
    ];
    let lab = lab.inside(&world).start().await;
    lab.busybox().await;
    create(&lab, "one", NetworkPolicy::default()).await;
    let other = create(&lab, "two", NetworkPolicy::default()).await;

    reaches(&lab, "one", PUBLIC, PORT).await;
    assert_eq!(
        public.from()[0].ip(),
        IpAddr::from(HOST),
        "it is masqueraded"
    );
    for (host, visits) in &hidden {
        for port in [PORT, 7001] {
            assert!(!hears(&lab, "one", *host, port).await, "{host}:{port}");
        }
        assert_eq!(visits.count(), 0, "{host}");
    }
    let listen = "(while true; do echo hello | nc -l -p 7000; done) >/dev/null 2>&1 & sleep 1";
    lab.sh("two", listen).await;
    reaches(&lab, "two", Ipv4Addr::LOCALHOST, PORT).await;
    assert!(!hears(&lab, "one", other, PORT).await);
    lab.finish().await;
}

#[tokio::test]
async fn a_policy_changes_while_a_machine_runs_with_qemu() {
    let Some(world) = World::new() else { return };
    let lines = world.serve(PUBLIC, PORT);
    world.serve(PRIVATE, PORT);
    world.serve(OTHER, PORT);
    let lab = lab!(Runtime::Qemu).inside(&world).start().await;
    lab.busybox().await;
    create(&lab, "one", NetworkPolicy::default()).await;
    // A connection that would go on for ever.
    let talk = format!(
        "(while true; do echo line; sleep 0.1; done | nc {PUBLIC} {PORT}) >/dev/null 2>&1 &"
    );
    lab.sh("one", &talk).await;
    hutch_tests::wait_until(
        "lines come",
        std::time::Duration::from_secs(60),
        async || lines.lines().len() > 3,
    )
    .await;

    let policy = NetworkPolicy {
        egress: Egress::None,
        allow: vec!["10.0.0.0/8".into()],
        ..NetworkPolicy::default()
    };
    lab.client().set_network("one", &policy).await.unwrap();
    reaches(&lab, "one", PRIVATE, PORT).await;
    assert!(!hears(&lab, "one", OTHER, PORT).await, "what is not");
    // Whatever was on its way has arrived by now.
    let then = lines.lines().len();
    lab.sh("one", "sleep 2").await;
    assert_eq!(lines.lines().len(), then, "the old connection is cut");
    lab.finish().await;
}

#[tokio::test]
async fn machines_of_a_group_find_each_other_with_qemu() {
    let Some(world) = World::new() else { return };
    let lab = lab!(Runtime::Qemu).inside(&world).start().await;
    lab.busybox().await;
    let group = |name: &str| NetworkPolicy {
        egress: Egress::None,
        groups: vec![name.parse().unwrap()],
        ..NetworkPolicy::default()
    };
    create(&lab, "web", group("app")).await;
    let base = create(&lab, "base", group("app")).await;
    let listen = "(while true; do echo hello | nc -l -p 7000; done) >/dev/null 2>&1 & sleep 1";
    lab.sh("base", listen).await;
    reaches(&lab, "web", base, PORT).await;
    let by_name = lab
        .sh("web", "nc -w 3 base.hutch.internal 7000 </dev/null")
        .await;
    assert_eq!(by_name.stdout, "hello\n", "{by_name:?}");
    lab.client()
        .set_network("web", &group("lone"))
        .await
        .unwrap();
    assert!(!hears(&lab, "web", base, PORT).await);
    lab.client()
        .set_network("web", &group("app"))
        .await
        .unwrap();
    reaches(&lab, "web", base, PORT).await;
    lab.finish().await;
}

/// What nf_tables of the world's host holds of ours, and its taps.
fn ours(world: &World) -> Vec<String> {
    world.on_host(|| {
        let mut nft = Nft::open().unwrap();
        let tables = [Family::Inet, Family::Arp].map(|family| nft.tables(family).unwrap());
        let mut route = Socket::open(Protocol::Route).unwrap();
        let taps = route::links(&mut route, "h").unwrap();
        let routes = route::destinations(&mut route).unwrap().into_iter();
        let routes = routes.filter(|route| route.protocol == 0x68);
        let mut all = tables.concat();
        all.extend(taps.into_iter().map(|link| link.name));
        all.extend(routes.map(|route| format!("{:?}", route.to)));
        all
    })
}

#[tokio::test]
async fn two_hundred_rounds_leave_nothing() {
    let Some(world) = World::new() else { return };
    let lab = lab!(Runtime::Stub).inside(&world);
    // All ports of the world's host are the lab's own.
    let (first, last) = (20_001, 20_100);
    let lab = lab.env("PORT_MIN", &first.to_string());
    let mut lab = lab.env("PORT_MAX", &last.to_string()).start().await;
    lab.busybox().await;
    let before = ours(&world);
    let bound = || {
        world.on_host(|| {
            let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
            (first..=last).filter(|port| !free(port)).count()
        })
    };
    for round in 0..10 {
        let names: Vec<_> = (0..20).map(|n| format!("m{round}-{n}")).collect();
        let client = lab.client();
        let made = names.iter().map(|name| {
            let request = CreateMachine {
                ports: vec![PublishPort {
                    guest_port: PORT,
                    host_port: None,
                    bind: None,
                }],
                ssh: true,
                access: Access::Public,
                ..lab.request(name)
            };
            let client = client.clone();
            async move { client.create(&request, None, Some(LIMIT)).await.unwrap() }
        });
        let mut labels = Vec::new();
        for machine in futures::future::join_all(made).await {
            let network = machine.network.unwrap();
            assert!(network.ipv4.is_some(), "{network:?}");
            let kinds: Vec<_> = machine.ports.iter().map(|port| port.kind).collect();
            assert_eq!(kinds, [PortKind::Ssh, PortKind::Tcp]);
            let url = machine.url.unwrap();
            let host = url.strip_prefix("http://").unwrap();
            labels.push(host.to_owned());
        }
        assert_eq!(
            ours(&world).len(),
            before.len() + 3 * 20,
            "taps and their routes"
        );
        assert_eq!(bound(), 2 * 20, "ports of the host");
        // Machines of the stub have nothing that listens.
        assert_eq!(status(&world, &lab, &labels[0]), 502);
        let gone = names.iter().map(|name| client.delete(name, Some(LIMIT)));
        for gone in futures::future::join_all(gone).await {
            gone.unwrap();
        }
        assert_eq!(ours(&world), before);
        assert_eq!(status(&world, &lab, &labels[0]), 404);
        hutch_tests::wait_until("no port is bound", LIMIT, async || bound() == 0).await;
    }
    let table = world.on_host(|| elements(&world_table(&before)));
    assert_eq!(table, 0, "elements of machines that are gone");
    lab.stop().await;
    assert_eq!(
        ours(&world),
        [""; 0],
        "a server without machines takes its network along"
    );
    assert_eq!(reserved(&lab).await, [""; 0], "in the store");
    lab.finish().await;
}

/// The status of an answer that comes by name.
fn status(world: &World, lab: &Lab, host: &str) -> u16 {
    world.on_host(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", lab.gateway())).unwrap();
        let ask = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse().unwrap()
    })
}

/// What the store of a server that has ended has for machines: slots that rest are nobody's.
async fn reserved(lab: &Lab) -> Vec<String> {
    let store = SqliteStore::open(lab.data_dir().join("hutch.db")).unwrap();
    let mut all = Vec::new();
    for prefix in ["machine/", "port/", "host/", "slot/"] {
        let rows = store.list(prefix, None, 10_000).await.unwrap().into_iter();
        let rows = rows.map(|row| format!("{:?} {}", row.key, String::from_utf8_lossy(&row.value)));
        all.extend(rows.filter(|row| !row.contains("\"resting\"")));
    }
    all
}

/// What `inventory()` lists of the network.
fn network_of(lab: &Lab) -> Vec<String> {
    let mut all = lab.inventory();
    all.retain(|item| !item.starts_with("image directory"));
    let kind = |item: String| item.split(' ').next().unwrap().to_owned();
    all.into_iter().map(kind).collect()
}

#[tokio::test]
async fn a_server_without_machines_leaves_no_network_behind() {
    for (bridge, its) in [
        (None, "claimed firewall firewall"),
        (Some("br0"), "bridge firewall firewall firewall"),
    ] {
        let its: Vec<_> = its.split(' ').collect();
        let Some(world) = World::new() else { return };
        let mut lab = lab!(Runtime::Stub).inside(&world);
        if let Some(bridge) = bridge {
            lab = lab.env("NETWORK_BRIDGE", bridge);
        }
        let mut lab = lab.start().await;
        assert_eq!(network_of(&lab), its);
        lab.stop().await;
        assert_eq!(lab.inventory(), [""; 0]);

        // A crash leaves it, and the next server takes it over.
        lab.restart().await;
        lab.kill().await;
        assert_eq!(network_of(&lab), its);
        lab.restart().await;
        lab.stop().await;
        assert_eq!(lab.inventory(), [""; 0]);

        // With a machine, all stays, for its connections go on.
        lab.restart().await;
        lab.busybox().await;
        lab.create("one").await;
        let with_one = network_of(&lab);
        assert!(with_one.contains(&"tap".to_owned()), "{with_one:?}");
        lab.stop().await;
        assert_eq!(network_of(&lab), with_one);
        assert_ne!(ours(&world), [""; 0]);
        lab.restart().await;
        lab.client().delete("one", Some(LIMIT)).await.unwrap();
        hutch_tests::wait_until("its network is gone", LIMIT, async || {
            network_of(&lab) == its
        })
        .await;

        // A server that is told to have no network takes away what one that was killed had.
        lab.kill().await;
        assert_eq!(network_of(&lab), its);
        let mut lab = lab.env("HUTCH_NETWORK_MODE", "none");
        lab.restart().await;
        assert_eq!(network_of(&lab), [""; 0]);
        lab.finish().await;
        assert_eq!(ours(&world), [""; 0]);
    }
}

fn world_table(all: &[String]) -> String {
    let table = all.iter().find(|name| name.starts_with("hutch_"));
    table.expect("the firewall is there").clone()
}

/// Elements of the sets that machines are in.
fn elements(name: &str) -> usize {
    let mut nft = Nft::open().unwrap();
    let table = Table {
        family: Family::Inet,
        name: name.to_owned(),
    };
    let sets = [
        "from4",
        "from6",
        "machines4",
        "mark4",
        "egress4",
        "in4",
        "out4",
        "spoofed",
    ];
    let count = sets.map(|set| nft.elements(&table, set).unwrap().len());
    count.into_iter().sum()
}

#[tokio::test]
async fn what_somebody_flushed_comes_back() {
    let Some(world) = World::new() else { return };
    let lab = lab!(Runtime::Stub).inside(&world).start().await;
    lab.busybox().await;
    lab.create("one").await;
    let before = ours(&world);
    let table = world_table(&before);
    // As another program would: the kernel lets nobody but the owner (Linux 6.9), and then it must not be needed.
    let flushed = world.on_host(|| {
        let mut batch = Batch::default();
        for family in [Family::Inet, Family::Arp] {
            batch.delete_table(&Table {
                family,
                name: table.clone(),
            });
        }
        Nft::open().unwrap().commit(&batch, None)
    });
    if let Err(error) = flushed {
        assert_eq!(error.errno(), Some(rustix::io::Errno::PERM), "{error}");
    }
    hutch_tests::wait_until("the rules are back", LIMIT, async || {
        ours(&world) == before && world.on_host(|| elements(&table)) >= 8
    })
    .await;
    lab.finish().await;
}

#[tokio::test]
async fn connections_outlive_a_crash_of_the_server_with_qemu() {
    let Some(world) = World::new() else { return };
    let public = world.serve(PUBLIC, PORT);
    let mut lab = lab!(Runtime::Qemu).inside(&world).start().await;
    lab.busybox().await;
    create(&lab, "one", NetworkPolicy::default()).await;
    let talk = format!(
        "(while true; do echo line; sleep 0.1; done | nc {PUBLIC} {PORT}) >/dev/null 2>&1 &"
    );
    lab.sh("one", &talk).await;
    let more = async |than: usize| {
        hutch_tests::wait_until("lines come", LIMIT, async || {
            public.lines().len() > than + 3
        })
        .await;
    };
    more(0).await;
    let before = ours(&world);
    lab.kill().await;
    more(public.lines().len()).await;
    lab.restart().await;
    more(public.lines().len()).await;
    assert_eq!(public.count(), 1, "it is one connection");
    assert_eq!(ours(&world), before);
    reaches(&lab, "one", PUBLIC, PORT).await;
    world.serve(PRIVATE, PORT);
    assert!(
        !hears(&lab, "one", PRIVATE, PORT).await,
        "the policy is as before"
    );
    lab.finish().await;
}

#[tokio::test]
async fn one_name_is_allowed_and_the_rest_denied_with_qemu() {
    let Some(world) = World::new() else { return };
    let resolver = Ipv4Addr::new(203, 0, 113, 53);
    let names = [
        ("good.example.com", PUBLIC.into()),
        ("bad.example.com", OTHER.into()),
    ];
    world.name_server(resolver, &names);
    let good = world.serve(PUBLIC, PORT);
    let bad = world.serve(OTHER, PORT);
    let lab = lab!(Runtime::Qemu)
        .inside(&world)
        .env("HUTCH_NETWORK_DNS", &resolver.to_string())
        .start()
        .await;
    lab.busybox().await;
    let only = |name: &str| NetworkPolicy {
        egress: Egress::None,
        allow: vec![name.into()],
        ..NetworkPolicy::default()
    };
    create(&lab, "one", only("good.example.com")).await;
    let asks = async |name: &str| {
        let script = format!("nc -w 3 {name} {PORT} </dev/null");
        lab.sh("one", &script).await.stdout == "hello\n"
    };
    assert!(
        !hears(&lab, "one", PUBLIC, PORT).await,
        "nobody asked for its name yet"
    );
    hutch_tests::wait_until("the good name leads there", LIMIT, async || {
        asks("good.example.com").await
    })
    .await;
    reaches(&lab, "one", PUBLIC, PORT).await;
    assert!(!asks("bad.example.com").await);
    assert!(!hears(&lab, "one", OTHER, PORT).await);

    let talk =
        "(while true; do echo line; sleep 0.1; done | nc good.example.com 7000) >/dev/null 2>&1 &";
    lab.sh("one", talk).await;
    hutch_tests::wait_until("lines come", LIMIT, async || good.lines().len() > 3).await;
    lab.client()
        .set_network("one", &only("*.example.org"))
        .await
        .unwrap();
    // Whatever was on its way has arrived when this has.
    assert!(!asks("good.example.com").await);
    let then = good.lines().len();
    lab.sh("one", "sleep 2").await;
    assert_eq!(good.lines().len(), then, "the live connection is cut");
    assert!(!hears(&lab, "one", PUBLIC, PORT).await);
    assert_eq!(bad.count(), 0);
    lab.finish().await;
}

/// Nobody's number on any distribution.
const SOMEBODY: u32 = 54_321;

#[tokio::test]
async fn without_root_a_machine_reaches_the_internet_and_nothing_else_with_qemu() {
    let Some(world) = World::new() else { return };
    if !std::path::Path::new("/usr/bin/passt").exists() {
        hutch_tests::skip!("passt is not installed");
    }
    let public = world.serve(PUBLIC, PORT);
    let hidden = [
        (IpAddr::from(PRIVATE), world.serve(PRIVATE, PORT)),
        (METADATA.into(), world.serve(METADATA, PORT)),
        (HOST.into(), world.serve_on_host(HOST, PORT)),
        (
            GATEWAY.into(),
            world.serve_on_host(Ipv4Addr::LOCALHOST, 7001),
        ),
    ];
    let lab = lab!(Runtime::Qemu).inside(&world).user(SOMEBODY);
    let lab = lab.env("HUTCH_NETWORK_MODE", "auto").start().await;
    lab.busybox().await;
    if let Some(why) = lab
        .log()
        .lines()
        .find(|line| line.contains("no network of their own"))
    {
        hutch_tests::skip!("passt does not work here: {why}");
    }
    let machine = lab.create("one").await;
    assert_eq!(machine.network.unwrap().mode, NetworkMode::User);
    reaches(&lab, "one", PUBLIC, PORT).await;
    assert_ne!(public.count(), 0);
    for (host, visits) in &hidden {
        for port in [PORT, 7001] {
            assert!(!hears(&lab, "one", *host, port).await, "{host}:{port}");
        }
        assert_eq!(visits.count(), 0, "{host}");
    }
    // Through what leads anywhere, its own loopback aside.
    let routed = "ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via 169.254.0.1 dev eth0 onlink; \
                  nc -w 3 127.0.0.1 7001 </dev/null";
    let tried = lab.sh("one", routed).await;
    assert_eq!(tried.stdout, "", "{tried:?}");
    assert_eq!(hidden[3].1.count(), 0, "the host's loopback");
    lab.finish().await;
}

#[tokio::test]
async fn on_a_bridge_a_machine_reaches_the_same_with_qemu() {
    let Some(world) = World::new() else { return };
    world.serve(PUBLIC, PORT);
    let hidden = [
        (IpAddr::from(PRIVATE), world.serve(PRIVATE, PORT)),
        (HOST.into(), world.serve_on_host(HOST, PORT)),
        (
            IpAddr::from([172, 16, 0, 1]),
            world.serve_on_host(Ipv4Addr::UNSPECIFIED, 7001),
        ),
    ];
    let lab = lab!(Runtime::Qemu).inside(&world);
    let mut lab = lab.env("NETWORK_BRIDGE", "br0").start().await;
    lab.busybox().await;
    let group = NetworkPolicy {
        groups: vec!["app".parse().unwrap()],
        ..NetworkPolicy::default()
    };
    let made = lab.create("one").await;
    assert_eq!(made.network.unwrap().mode, NetworkMode::Bridge);
    let peer = CreateMachine {
        network: group.clone(),
        ..lab.request("two")
    };
    let peer = lab.client().create(&peer, None, Some(LIMIT)).await.unwrap();
    let peer = peer.network.unwrap().ipv4.unwrap();
    let listen = "(while true; do echo hello | nc -l -p 7000; done) >/dev/null 2>&1 & sleep 1";
    lab.sh("two", listen).await;

    // Also when another server has taken it over.
    for _ in 0..2 {
        reaches(&lab, "one", PUBLIC, PORT).await;
        for (host, visits) in &hidden {
            for port in [PORT, 7001] {
                assert!(!hears(&lab, "one", *host, port).await, "{host}:{port}");
            }
            assert_eq!(visits.count(), 0, "{host}");
        }
        assert!(!hears(&lab, "one", peer, PORT).await);
        lab.kill().await;
        lab.restart().await;
    }
    lab.client().set_network("one", &group).await.unwrap();
    reaches(&lab, "one", peer, PORT).await;
    lab.finish().await;
    assert_eq!(ours(&world), [""; 0]);
}

#[tokio::test]
async fn a_bridge_of_somebody_else_is_refused_and_left_alone() {
    let Some(world) = World::new() else { return };
    let dump = || {
        world.on_host(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let link = route::link(&mut socket, "br0").unwrap().unwrap();
            let addresses = route::addresses(&mut socket, link.index).unwrap();
            (link.address, link.alias, link.mtu, addresses)
        })
    };
    world.on_host(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let make = route::create("br0", route::Kind::Bridge);
        socket.apply(&[make]).unwrap();
        let index = route::index(&mut socket, "br0").unwrap();
        let own = route::add_address(index, [10, 20, 1, 1].into(), 24);
        socket.apply(&[own]).unwrap();
    });
    let before = dump();
    let lab = lab!(Runtime::Stub).inside(&world);
    let lab = lab.env("NETWORK_BRIDGE", "br0");
    let said = lab.refused().await;
    assert!(
        said.contains("br0") && said.contains("10.20.1.1/24"),
        "{said}"
    );
    assert!(said.contains("hint"), "{said}");
    assert_eq!(dump(), before);
    assert_eq!(ours(&world).len(), 0, "nothing was made beside it");
}
