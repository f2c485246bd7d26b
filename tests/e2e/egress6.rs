//! What machines reach by IPv6, in a world of the test's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hutch_contract::network::{Egress, NetworkPolicy};
use hutch_tests::world::{HOST6, METADATA6, OTHER, OTHER6, PRIVATE6, PUBLIC6, World};
use hutch_tests::{Runtime, lab};

use crate::egress::{LIMIT, PORT, create, hears, reaches};

#[tokio::test]
async fn by_ipv6_a_machine_reaches_the_internet_and_nothing_else_with_qemu() {
    let Some(world) = World::new() else { return };
    if !world.has_ipv6() {
        return;
    }
    let resolver = Ipv4Addr::new(203, 0, 113, 53);
    let names = [
        ("six.example.com", PUBLIC6.into()),
        ("both.example.com", OTHER.into()),
        ("both.example.com", OTHER6.into()),
    ];
    world.name_server(resolver, &names);
    let public = world.serve(PUBLIC6, PORT);
    world.serve(OTHER6, PORT);
    let on_host = world.serve_on_host(Ipv6Addr::UNSPECIFIED, 7001);
    let hidden = [
        (PRIVATE6, world.serve(PRIVATE6, PORT)),
        (METADATA6, world.serve(METADATA6, PORT)),
        (HOST6, world.serve_on_host(HOST6, PORT)),
    ];
    let lab = lab!(Runtime::Qemu)
        .inside(&world)
        .env("HUTCH_NETWORK_DNS", &resolver.to_string())
        .start()
        .await;
    lab.busybox().await;
    create(&lab, "one", NetworkPolicy::default()).await;
    let two = lab.create("two").await.network.unwrap().ipv6.unwrap();

    reaches(&lab, "one", PUBLIC6, PORT).await;
    assert_eq!(public.from()[0].ip(), IpAddr::from(HOST6), "by NAT66");
    let by_name = async |name: &str| {
        let script = format!("nc -w 3 {name} {PORT} </dev/null");
        lab.sh("one", &script).await.stdout == "hello\n"
    };
    hutch_tests::wait_until("a name of IPv6 only leads there", LIMIT, async || {
        by_name("six.example.com").await
    })
    .await;
    // A guest on a busy host may give up on one of its two questions.
    hutch_tests::wait_until("a name of both has both", LIMIT, async || {
        let asked = lab.sh("one", "nslookup both.example.com").await.stdout;
        asked.contains(&OTHER.to_string()) && asked.contains(&OTHER6.to_string())
    })
    .await;

    let listen = "(while true; do echo hello | nc -l -p 7000; done) >/dev/null 2>&1 & sleep 1";
    lab.sh("two", listen).await;
    reaches(&lab, "two", Ipv6Addr::LOCALHOST, PORT).await;
    reaches(&lab, "two", two, PORT).await;
    assert!(!hears(&lab, "one", two, PORT).await, "another machine");
    for (host, visits) in &hidden {
        for port in [PORT, 7001] {
            assert!(!hears(&lab, "one", *host, port).await, "{host}:{port}");
        }
        assert_eq!(visits.count(), 0, "{host}");
    }
    // The host's addresses of this link, and one of another of its links.
    let of_uplink = world.on_host(|| link_local("up0"));
    for address in ["fe80::1".to_owned(), of_uplink] {
        let script = format!("nc -w 3 {address}%eth0 7001 </dev/null");
        let tried = lab.sh("one", &script).await;
        assert_eq!(tried.stdout, "", "{address}: {tried:?}");
        assert!(!tried.stderr.contains("bad address"), "{tried:?}");
        eprintln!("{address}: {}", tried.stderr.trim());
    }
    assert_eq!(on_host.count(), 0, "the host's listener");

    // What is allowed is the very same way.
    let group = NetworkPolicy {
        allow: vec!["fd99::/16".into()],
        groups: vec!["app".parse().unwrap()],
        ..NetworkPolicy::default()
    };
    for name in ["one", "two"] {
        lab.client().set_network(name, &group).await.unwrap();
    }
    reaches(&lab, "one", PRIVATE6, PORT).await;
    reaches(&lab, "one", two, PORT).await;

    // The same by name, for one who may reach nothing else.
    let only = NetworkPolicy {
        egress: Egress::None,
        allow: vec!["six.example.com".into()],
        ..NetworkPolicy::default()
    };
    lab.client().set_network("one", &only).await.unwrap();
    hutch_tests::wait_until("the name leads there", LIMIT, async || {
        by_name("six.example.com").await
    })
    .await;
    reaches(&lab, "one", PUBLIC6, PORT).await;
    assert!(!hears(&lab, "one", OTHER6, PORT).await);
    lab.finish().await;
}

/// The link-local address of a link that has one.
fn link_local(name: &str) -> String {
    let all = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let line = all
        .lines()
        .find(|line| line.starts_with("fe80") && line.ends_with(name));
    let digits = u128::from_str_radix(&line.unwrap()[..32], 16).unwrap();
    Ipv6Addr::from(digits).to_string()
}
