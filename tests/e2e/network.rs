//! What machines reach, and what reaches them: in a world of the test's own.

use std::net::{IpAddr, Ipv4Addr};

use hutch_contract::machine::CreateMachine;
use hutch_contract::network::{Egress, NetworkMode, NetworkPolicy};
use hutch_tests::world::{HOST, METADATA, OTHER, PRIVATE, PUBLIC, World};
use hutch_tests::{Lab, Runtime, lab};

const PORT: u16 = 7000;
/// The host's address on the guest's link.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);

/// What a machine hears from a server, or nothing.
async fn hears(lab: &Lab, machine: &str, host: impl Into<IpAddr>, port: u16) -> bool {
    let host = host.into();
    let tried = lab
        .sh(machine, &format!("nc -w 3 {host} {port} </dev/null"))
        .await;
    tried.stdout == "hello\n"
}

/// Makes a machine with this policy.
async fn create(lab: &Lab, name: &str, policy: NetworkPolicy) -> Ipv4Addr {
    let request = CreateMachine {
        network: policy,
        ..lab.request(name)
    };
    let limit = std::time::Duration::from_secs(280);
    let created = lab.client().create(&request, None, Some(limit)).await;
    let machine = created.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()));
    let network = machine.network.unwrap();
    assert_eq!(network.mode, NetworkMode::Routed);
    assert_eq!(machine.unapplied, [""; 0], "{}", lab.log());
    network.ipv4.unwrap()
}

#[tokio::test]
async fn a_machine_reaches_the_internet_and_nothing_else_with_qemu() {
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
    let lab = lab!(Runtime::Qemu).inside(&world).start().await;
    lab.busybox().await;
    create(&lab, "one", NetworkPolicy::default()).await;
    let other = create(&lab, "two", NetworkPolicy::default()).await;

    assert!(hears(&lab, "one", PUBLIC, PORT).await, "{}", lab.log());
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
    assert!(
        hears(&lab, "two", Ipv4Addr::LOCALHOST, PORT).await,
        "its server works"
    );
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
    assert!(hears(&lab, "one", PRIVATE, PORT).await, "what is allowed");
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
    assert!(hears(&lab, "web", base, PORT).await, "{}", lab.log());
    lab.client()
        .set_network("web", &group("lone"))
        .await
        .unwrap();
    assert!(!hears(&lab, "web", base, PORT).await);
    lab.client()
        .set_network("web", &group("app"))
        .await
        .unwrap();
    assert!(hears(&lab, "web", base, PORT).await);
    lab.finish().await;
}
