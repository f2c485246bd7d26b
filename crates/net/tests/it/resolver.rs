//! The resolver on the loopback, without a firewall: machines are 127.0.1.1, 127.0.1.2 …

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hutch_net::dns::{Asker, Config, Directory, Limits, NotRecorded, Server, Upstreams};
use hutch_net::domain::{Domain, Domains, Judgement};
use hutch_net::elements::{Egress, Policy};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::bed::PATIENCE;
use crate::dns::{
    A, AAAA, FAILED, HTTPS, NO_ERROR, NO_NAME, PTR, REFUSED, Said, Upstream, example, name,
    question, read, receive, send,
};

const TEN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// What a directory was asked to record.
type Recorded = (String, String, Vec<IpAddr>, u64);

/// Machines with policies; a group of two that know each other's names.
#[derive(Default)]
struct Machines {
    policies: Mutex<BTreeMap<IpAddr, Policy>>,
    recorded: Mutex<Vec<Recorded>>,
    /// How recording ends, and how long it takes.
    outcome: Mutex<Option<Judgement>>,
    takes: Duration,
    recording: AtomicUsize,
}

impl Machines {
    fn add(&self, number: u8, policy: Policy) {
        let mut policies = self.policies.lock().unwrap();
        policies.insert(machine(number), policy);
    }
}

impl Directory for Machines {
    fn asker(&self, address: IpAddr) -> Option<Arc<Asker>> {
        let policy = self.policies.lock().unwrap().get(&address)?.clone();
        let label = address.to_string();
        Some(Arc::new(Asker { label, policy }))
    }

    fn addresses(&self, asker: &Asker, name: &str) -> Option<Vec<IpAddr>> {
        let known = asker.label == machine(1).to_string() && name == "web";
        known.then(|| vec![Ipv4Addr::new(172, 16, 0, 2).into()])
    }

    fn name(&self, asker: &Asker, address: IpAddr) -> Option<String> {
        let web = self.addresses(asker, "web")?.contains(&address);
        web.then(|| "web".to_owned())
    }

    async fn record(
        &self,
        asker: &Asker,
        name: &Domain,
        addresses: Vec<IpAddr>,
        lifetime: Duration,
    ) -> Result<Judgement, NotRecorded> {
        self.recording.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(self.takes).await;
        let recorded = (
            asker.label.clone(),
            name.to_string(),
            addresses,
            lifetime.as_secs(),
        );
        self.recorded.lock().unwrap().push(recorded);
        let outcome = *self.outcome.lock().unwrap();
        outcome.ok_or_else(|| "the kernel says no".into())
    }
}

fn machine(number: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 1, number).into()
}

fn policy(egress: Egress, allow: &[&str], deny: &[&str]) -> Policy {
    let patterns = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy {
        egress,
        domains: Domains {
            allow: patterns(allow),
            deny: patterns(deny),
        },
        ..Policy::default()
    }
}

struct Resolver {
    server: Server,
    machines: Arc<Machines>,
    upstream: Upstream,
}

impl Resolver {
    async fn with(limits: Limits, machines: Machines) -> Self {
        let upstream = Upstream::start(example).await;
        let machines = Arc::new(machines);
        machines
            .outcome
            .lock()
            .unwrap()
            .get_or_insert(Judgement::Unnamed);
        let config = config(limits, vec![upstream.address]);
        let server = Server::start(config, machines.clone()).unwrap();
        Self {
            server,
            machines,
            upstream,
        }
    }

    /// One machine with a policy.
    async fn new(policy: Policy) -> Self {
        let machines = Machines::default();
        machines.add(1, policy);
        Self::with(Limits::default(), machines).await
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.server.port()).into()
    }

    async fn ask(&self, about: &str, kind: u16) -> Said {
        let client = Client::new(machine(1), self.address()).await;
        client.send(&question(4711, about, kind)).await;
        let said = client.hear(PATIENCE).await.expect("an answer");
        assert_eq!((said.id, &said.name[..], said.kind), (4711, about, kind));
        said
    }

    fn recorded(&self) -> Vec<Recorded> {
        std::mem::take(&mut self.machines.recorded.lock().unwrap())
    }
}

fn config(limits: Limits, upstreams: Vec<SocketAddr>) -> Config {
    Config {
        address: Ipv4Addr::LOCALHOST.into(),
        port: None,
        upstreams: Upstreams::Given(upstreams),
        host_networks: vec!["192.0.2.0/24".parse().unwrap()],
        limits,
    }
}

struct Client(UdpSocket);

impl Client {
    async fn new(from: IpAddr, to: SocketAddr) -> Self {
        let socket = UdpSocket::bind((from, 0)).await.unwrap();
        socket.connect(to).await.unwrap();
        Self(socket)
    }

    async fn send(&self, message: &[u8]) {
        self.0.send(message).await.unwrap();
    }

    async fn hear(&self, patience: Duration) -> Option<Said> {
        let mut buffer = vec![0; 65_535];
        let length = timeout(patience, self.0.recv(&mut buffer)).await.ok()?;
        Some(read(&buffer[..length.unwrap()]))
    }
}

#[tokio::test]
async fn an_answer_is_recorded_before_it_is_told() {
    let machines = Machines {
        takes: Duration::from_millis(50),
        ..Machines::default()
    };
    machines.add(1, Policy::default());
    let resolver = Resolver::with(Limits::default(), machines).await;
    let said = resolver.ask("Plain.Example.com", A).await;
    assert_eq!((said.code, said.addresses()), (NO_ERROR, vec![TEN]));
    let own = machine(1).to_string();
    let recorded = |name: &str, seconds| (own.clone(), name.to_owned(), vec![TEN.into()], seconds);
    assert_eq!(resolver.recorded(), [recorded("plain.example.com", 360)]);
    // What nobody may forget so soon, and a chain that is as good as its weakest part.
    let said = resolver.ask("short.example.com", A).await;
    assert_eq!(said.answers[0].2, 1);
    assert_eq!(resolver.recorded(), [recorded("short.example.com", 90)]);
    let said = resolver.ask("alias.example.com", A).await;
    assert_eq!(said.addresses(), [TEN]);
    let ttls: Vec<u32> = said.answers.iter().map(|(_, _, ttl, _)| *ttl).collect();
    assert_eq!(ttls, [20; 3]);
    assert_eq!(resolver.recorded(), [recorded("alias.example.com", 90)]);
    // What has no address is not.
    let said = resolver.ask("missing.example.com", A).await;
    assert_eq!((said.code, resolver.recorded().len()), (NO_NAME, 0));
    // What cannot be recorded is not told.
    *resolver.machines.outcome.lock().unwrap() = None;
    let said = resolver.ask("plain.example.com", A).await;
    assert_eq!((said.code, said.answers.len()), (FAILED, 0));
    // The policy has changed while others were asked.
    *resolver.machines.outcome.lock().unwrap() = Some(Judgement::Denied);
    let said = resolver.ask("plain.example.com", A).await;
    assert_eq!((said.code, said.answers.len()), (REFUSED, 0));
}

#[tokio::test]
async fn a_denied_name_is_refused_and_nobody_is_asked() {
    let denied = policy(Egress::Public, &[], &["plain.example.com"]);
    let resolver = Resolver::new(denied).await;
    for name in ["plain.example.com", "PLAIN.example.com"] {
        let said = resolver.ask(name, A).await;
        assert_eq!((said.code, said.answers.len()), (REFUSED, 0));
    }
    assert_eq!(resolver.upstream.times("plain.example.com"), 0);
    let said = resolver.ask("other.example.com", A).await;
    assert_eq!(said.addresses().len(), 1);
    // Hints for addresses would be recorded by nobody.
    let said = resolver.ask("service.example.com", HTTPS).await;
    assert_eq!((said.code, said.answers.len()), (NO_ERROR, 0));
}

#[tokio::test]
async fn without_egress_only_allowed_names_are_answered() {
    let resolver = Resolver::new(policy(Egress::None, &["plain.example.com"], &[])).await;
    assert_eq!(
        resolver.ask("plain.example.com", A).await.addresses(),
        [TEN]
    );
    for name in [
        "other.example.com",
        "example.com",
        "10.113.0.203.in-addr.arpa",
    ] {
        assert_eq!(resolver.ask(name, A).await.code, REFUSED, "{name}");
    }
    assert_eq!(resolver.upstream.asked.lock().unwrap().len(), 1);
    let resolver = Resolver::new(policy(Egress::None, &[], &[])).await;
    assert_eq!(resolver.ask("plain.example.com", A).await.code, REFUSED);
    let said = resolver.ask("web.hutch.internal", A).await;
    assert_eq!(said.addresses().len(), 1);
    assert_eq!(resolver.upstream.asked.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn own_names_are_ours_alone() {
    let resolver = Resolver::new(Policy::default()).await;
    let machines = &resolver.machines;
    let said = resolver.ask("web.hutch.internal", A).await;
    assert_eq!((said.code, said.answers[0].2), (NO_ERROR, 5));
    assert_eq!(said.addresses(), [Ipv4Addr::new(172, 16, 0, 2)]);
    let said = resolver.ask("web.hutch.internal", AAAA).await;
    assert_eq!((said.code, said.answers.len()), (NO_ERROR, 0));
    let said = resolver.ask("2.0.16.172.in-addr.arpa", PTR).await;
    assert_eq!(said.answers[0].3, name("web.hutch.internal"));
    for (name, code) in [
        ("db.hutch.internal", NO_NAME),
        ("a.web.hutch.internal", NO_NAME),
        ("hutch.internal", NO_ERROR),
        ("3.0.16.172.in-addr.arpa", NO_NAME),
        ("10.in-addr.arpa", NO_NAME),
        ("7.2.0.192.in-addr.arpa", NO_NAME),
        ("localhost", NO_NAME),
        ("printer.local", NO_NAME),
    ] {
        assert_eq!(resolver.ask(name, A).await.code, code, "{name}");
    }
    assert_eq!(resolver.upstream.asked.lock().unwrap().len(), 0);
    // Another machine does not see it.
    machines.add(2, Policy::default());
    let client = Client::new(machine(2), resolver.address()).await;
    client.send(&question(1, "web.hutch.internal", A)).await;
    assert_eq!(client.hear(PATIENCE).await.unwrap().code, NO_NAME);
}

#[tokio::test]
async fn names_of_others_lead_to_no_private_address() {
    let resolver = Resolver::new(Policy::default()).await;
    let said = resolver.ask("mixed.example.com", A).await;
    assert_eq!(said.addresses(), [TEN]);
    assert_eq!(resolver.recorded()[0].2, [IpAddr::V4(TEN)]);
    let said = resolver.ask("private.example.com", A).await;
    assert_eq!((said.code, said.answers.len()), (NO_ERROR, 0));
    assert_eq!(resolver.recorded(), []);
    // Unless a range allows it.
    let mut ranges = policy(Egress::None, &["mixed.example.com"], &[]);
    ranges.allow = vec!["10.0.0.0/8".parse().unwrap()];
    let resolver = Resolver::new(ranges).await;
    let said = resolver.ask("mixed.example.com", A).await;
    assert_eq!(said.addresses(), [Ipv4Addr::new(10, 0, 0, 1), TEN]);
}

#[tokio::test]
async fn lies_of_strangers_are_passed_over() {
    let machines = Machines::default();
    machines.add(1, Policy::default());
    let limits = Limits {
        server: Duration::from_millis(100),
        ..Limits::default()
    };
    let resolver = Resolver::with(limits, machines).await;
    let said = resolver.ask("forged.example.com", A).await;
    assert_eq!((said.code, said.addresses()), (NO_ERROR, vec![TEN]));
    for name in [
        "lies.example.com",
        "silent.example.com",
        "broken.example.com",
        "circle.example.com",
    ] {
        let said = resolver.ask(name, A).await;
        assert_eq!((said.code, said.answers.len()), (FAILED, 0), "{name}");
        assert_eq!(resolver.upstream.times(name), 2, "asked again");
    }
    assert_eq!(resolver.recorded().len(), 1);
}

#[tokio::test]
async fn the_next_server_answers_when_the_first_does_not() {
    let (silent, good) = (
        Upstream::start(|_, _| vec![]).await,
        Upstream::start(example).await,
    );
    let machines = Arc::new(Machines::default());
    *machines.outcome.lock().unwrap() = Some(Judgement::Unnamed);
    machines.add(1, Policy::default());
    // Nobody is at the first one at all.
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nowhere = nobody.local_addr().unwrap();
    drop(nobody);
    let limits = Limits {
        server: Duration::from_millis(100),
        ..Limits::default()
    };
    let config = config(limits, vec![nowhere, silent.address, good.address]);
    let server = Server::start(config, machines.clone()).unwrap();
    let client = Client::new(machine(1), (Ipv4Addr::LOCALHOST, server.port()).into()).await;
    client.send(&question(1, "plain.example.com", A)).await;
    assert_eq!(client.hear(PATIENCE).await.unwrap().addresses(), [TEN]);
    assert_eq!(silent.times("plain.example.com"), 1);
}

#[tokio::test]
async fn what_does_not_fit_comes_by_tcp_on_both_sides() {
    let resolver = Resolver::new(Policy::default()).await;
    let said = resolver.ask("large.example.com", A).await;
    assert!(said.truncated && said.answers.is_empty());
    assert_eq!(resolver.upstream.times("large.example.com"), 2);
    let mut stream = connect(&resolver, 1).await;
    for id in [1, 2] {
        send(&mut stream, &question(id, "large.example.com", A)).await;
        let said = read(&receive(&mut stream).await.unwrap());
        assert_eq!((said.id, said.addresses().len()), (id, 60));
        assert!(!said.truncated);
    }
    // Who speaks no DNS is not spoken to.
    send(&mut stream, &[0; 5]).await;
    assert_eq!(receive(&mut stream).await, None);
}

#[tokio::test]
async fn a_machine_gets_its_share_and_strangers_get_nothing() {
    let machines = Machines {
        takes: Duration::from_secs(3600),
        ..Machines::default()
    };
    for number in [1, 2] {
        machines.add(number, Policy::default());
    }
    let limits = Limits {
        in_flight: 3,
        deadline: Duration::from_secs(3600),
        ..Limits::default()
    };
    let resolver = Resolver::with(limits, machines).await;
    let client = Client::new(machine(1), resolver.address()).await;
    for id in 0..20 {
        client.send(&question(id, "plain.example.com", A)).await;
    }
    // Datagrams are dealt with in their order: what another machine asks now comes after all of these.
    let other = Client::new(machine(2), resolver.address()).await;
    other.send(&question(1, "web.hutch.internal", A)).await;
    assert_eq!(other.hear(PATIENCE).await.unwrap().code, NO_NAME);
    let recording = || resolver.machines.recording.load(Ordering::SeqCst);
    let all = async {
        while recording() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, all).await.unwrap();
    assert_eq!(resolver.upstream.times("plain.example.com"), 3);
    let stranger = Client::new(machine(9), resolver.address()).await;
    stranger.send(&question(1, "plain.example.com", A)).await;
    other.send(&question(2, "web.hutch.internal", A)).await;
    assert_eq!(other.hear(PATIENCE).await.unwrap().id, 2);
    assert!(stranger.hear(Duration::from_millis(50)).await.is_none());
    assert_eq!(resolver.upstream.times("plain.example.com"), 3);
}

/// A connection of a machine.
async fn connect(resolver: &Resolver, number: u8) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((machine(number), 0).into()).unwrap();
    socket.connect(resolver.address()).await.unwrap()
}

#[tokio::test]
async fn a_machine_has_few_connections() {
    let machines = Machines::default();
    machines.add(1, Policy::default());
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let resolver = Resolver::with(limits, machines).await;
    let mut open = [connect(&resolver, 1).await, connect(&resolver, 1).await];
    for stream in &mut open {
        send(stream, &question(1, "web.hutch.internal", A)).await;
        assert!(receive(stream).await.is_some());
    }
    for number in [1, 9] {
        let mut stream = connect(&resolver, number).await;
        send(&mut stream, &question(1, "web.hutch.internal", A)).await;
        assert_eq!(receive(&mut stream).await, None, "{number}");
    }
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_said_ends() {
    let machines = Machines::default();
    machines.add(1, Policy::default());
    let limits = Limits {
        idle: Duration::from_millis(50),
        ..Limits::default()
    };
    let resolver = Resolver::with(limits, machines).await;
    let mut silent = connect(&resolver, 1).await;
    // Half a question is no question.
    let mut slow = connect(&resolver, 1).await;
    tokio::io::AsyncWriteExt::write_all(&mut slow, &[0])
        .await
        .unwrap();
    for stream in [&mut silent, &mut slow] {
        let end = timeout(PATIENCE, receive(stream)).await;
        assert_eq!(end.expect("it ends"), None);
    }
}

#[tokio::test]
async fn the_next_server_gets_the_port_of_the_one_before() {
    let machines = Arc::new(Machines::default());
    let config = config(Limits::default(), Vec::new());
    let first = Server::start(config.clone(), machines.clone()).unwrap();
    let wished = Config {
        port: Some(first.port()),
        ..config
    };
    // It is still there.
    let second = Server::start(wished.clone(), machines.clone()).unwrap();
    assert_ne!(second.port(), first.port());
    let port = first.port();
    drop((first, second));
    // The tasks of the first one end in their own time. Few tries, lest chance gives the same port.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let server = Server::start(wished.clone(), machines.clone()).unwrap();
        if server.port() == port {
            return;
        }
    }
    panic!("another port, although {port} is free");
}
