//! Links between a machine and passt, both played by the tests.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use proptest::prelude::*;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::super::frames::tests::{
    ADDRESS, GATEWAY, GATEWAY_MAC, MAC, datagram, filter, sent, syn, who_is_the_gateway,
};
use super::super::relay;
use super::*;
use crate::{UserNet, passt};

#[path = "../../../tests/it/world.rs"]
mod world;

use world::{ECHO, HOST, NEIGHBOURS, PUBLIC};

/// Far longer than anything takes here.
const GENEROUS: Duration = Duration::from_secs(30);
const PASST: &str = "/usr/bin/passt";

fn framed(frame: &[u8]) -> Vec<u8> {
    let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
    [&length[..], frame].concat()
}

/// Two connected sockets.
fn pair() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(GENEROUS)).unwrap();
    (ours.into(), theirs)
}

/// Lets frames with an odd first byte pass.
fn odd(frame: &[u8]) -> Verdict {
    match frame.first() {
        Some(first) if first % 2 == 1 => Verdict::Pass,
        _ => Verdict::Drop,
    }
}

/// Sends bytes in pieces of these sizes through a way, to a reader who now and then takes as many.
fn through(one_by_one: bool, bytes: &[u8], pieces: &[usize]) -> Vec<u8> {
    let (from, mut source) = pair();
    let (to, mut sink) = pair();
    sink.set_nonblocking(true).unwrap();
    let mut way = Way::new(one_by_one);
    let mut pieces = pieces.iter().copied().cycle();
    let (mut left, mut got) = (bytes, Vec::new());
    let mut idle = 0;
    while idle < 3 {
        let piece = pieces.next().unwrap().min(left.len());
        // Nobody else empties this socket, so what would block it waits for the next turn.
        source.set_nonblocking(true).unwrap();
        let sent = source.write(&left[..piece]).unwrap_or(0);
        left = &left[sent..];
        assert!(way.fill(&from).is_ok());
        assert_eq!(way.empty(&to, odd), Ok(()));
        let mut buffer = vec![0; pieces.next().unwrap()];
        let length = sink.read(&mut buffer).unwrap_or(0);
        got.extend(&buffer[..length]);
        idle = if sent + length == 0 { idle + 1 } else { 0 };
    }
    got
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_passes_arrives_whole_and_in_order(
        frames in prop::collection::vec((any::<u8>(), 0..3000_usize), 0..200),
        pieces in prop::collection::vec(1..70_000_usize, 2..9),
        one_by_one: bool,
    ) {
        let frames: Vec<_> = frames.iter().map(|(byte, length)| vec![*byte; *length]).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let passed = frames.iter().filter(|frame| odd(frame) == Verdict::Pass);
        let wanted: Vec<u8> = passed.flat_map(|frame| framed(frame)).collect();
        prop_assert!(through(one_by_one, &bytes, &pieces) == wanted);
    }
}

#[test]
fn the_longest_frames_pass_in_any_pieces() {
    let frames: Vec<_> = [1_u8, 3, 2, 5].map(|byte| vec![byte; LONGEST]).into();
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
    let wanted: Vec<u8> = [1_u8, 3, 5]
        .iter()
        .flat_map(|byte| framed(&vec![*byte; LONGEST]))
        .collect();
    for pieces in [[300, 1 << 20], [70_000, 1000], [1 << 20, 1 << 20]] {
        for one_by_one in [true, false] {
            assert!(through(one_by_one, &bytes, &pieces) == wanted, "{pieces:?}");
        }
    }
}

#[test]
fn nobody_is_read_from_while_the_other_does_not_take() {
    let (from, mut source) = pair();
    let (to, mut sink) = pair();
    let mut way = Way::new(true);
    let frame = framed(&[1; 1500]);
    source.set_nonblocking(true).unwrap();
    let mut written = 0;
    while source.write_all(&frame).is_ok() {
        written += 1;
        assert!(way.fill(&from).is_ok());
        assert_eq!(way.empty(&to, odd), Ok(()));
    }
    // Its socket is full, and so are that of the reader and the buffer between them.
    assert!(way.is_full());
    assert!(way.end <= ROOM);
    assert!(written < 1000, "{written}");
    let mut first = vec![0; frame.len()];
    sink.read_exact(&mut first).unwrap();
    assert_eq!(first, frame);
}

/// How many of a link's sides have something to be done now.
fn ready(link: &Link) -> usize {
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut link.waits_for(), Some(&now)).unwrap()
}

/// Writes until nothing is taken any more, and reads all of it.
fn stalls(link: &mut Link, from: &mut UnixStream, to: &mut UnixStream) {
    let all = [PollFlags::IN | PollFlags::OUT; 2];
    let frame = framed(&[1; 1500]);
    from.set_nonblocking(true).unwrap();
    to.set_nonblocking(true).unwrap();
    while from.write_all(&frame).is_ok() {
        link.copy(all).unwrap();
    }
    assert_eq!(ready(link), 0, "there is more, and nobody who takes it");
    let mut bytes = vec![0; 1 << 20];
    assert_ne!(to.read(&mut bytes).unwrap(), 0);
    assert_eq!(ready(link), 1);
    while ready(link) > 0 {
        link.copy(all).unwrap();
        while to.read(&mut bytes).is_ok() {}
    }
}

#[test]
fn a_link_that_can_do_nothing_waits() {
    let (vmm, mut card) = pair();
    let (ours, mut passt) = pair();
    let process = Command::new("sleep").arg("600").spawn().unwrap();
    let mut link = Link::new(vmm, ours, process, Policy::open());
    assert_eq!(ready(&link), 0);
    stalls(&mut link, &mut card, &mut passt);
    stalls(&mut link, &mut passt, &mut card);
}

#[test]
fn a_length_beyond_the_longest_ends_it() {
    for (length, ends) in [
        (LONGEST as u32, false),
        (LONGEST as u32 + 1, true),
        (u32::MAX, true),
    ] {
        let (from, mut source) = pair();
        let (to, _sink) = pair();
        let mut way = Way::new(true);
        source.write_all(&framed(&[1; 60])).unwrap();
        source.write_all(&length.to_be_bytes()).unwrap();
        assert!(way.fill(&from).is_ok());
        assert_eq!(way.empty(&to, odd) == Err(Stop::Length), ends, "{length}");
    }
}

#[test]
fn only_an_address_of_version_4_is_a_resolver() {
    assert!(has_resolver("search example.org\nnameserver 192.0.2.1\n"));
    assert!(has_resolver(
        "nameserver ::1\nnameserver\t127.0.0.53 # local"
    ));
    for without in [
        "",
        "nameserver",
        "nameserver fd00::1",
        "# nameserver 192.0.2.1",
        "options a",
    ] {
        assert!(!has_resolver(without), "{without:?}");
    }
}

#[test]
fn the_hosts_addresses_are_read() {
    isolated(|| {
        let all = sys::own_addresses().unwrap();
        assert!(
            all.contains(&Ipv4Addr::LOCALHOST) && all.contains(&HOST),
            "{all:?}"
        );
        assert!(!all.contains(&PUBLIC));
        world::ip("address add 192.0.2.77/32 dev lo");
        let all = sys::own_addresses().unwrap();
        assert!(all.contains(&Ipv4Addr::new(192, 0, 2, 77)), "{all:?}");
    });
}

/// Runs a test on a host of its own, or says why not.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let lacks = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !std::path::Path::new(PASST).exists() {
        PASST
    } else if Command::new("ip").arg("-Version").output().is_err() {
        "ip"
    } else {
        let thread = std::thread::spawn(|| {
            world::make(sys::own_network);
            test();
        });
        return thread.join().unwrap();
    };
    println!("skipped: a host in a network namespace, with passt, needs {lacks}");
}

/// A guest whose frames this test writes, on a real passt of an ordinary user. The VMM is a process that sleeps.
struct Guest {
    card: UnixStream,
    vmm: Child,
    passt: Pid,
    relay: Option<JoinHandle<()>>,
    next_port: u16,
}

impl Guest {
    fn new(policy: Policy) -> Self {
        let network = UserNet {
            program: PASST.into(),
            mac: MAC,
            address: ADDRESS,
            gateway: GATEWAY,
            gateway_mac: GATEWAY_MAC,
            dns: true,
            refuse: Vec::new(),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = sys::Child {
            join: Vec::new(),
            keep: Vec::new(),
            ids: Some((61_000, 61_000, Vec::new())),
            own_network: false,
            limits: Vec::new(),
            gains_privileges: false,
        };
        let argv = passt::arguments(PASST, &network);
        let passt = passt::spawn(&argv, &theirs.into(), Stdio::piped(), child).unwrap();
        let pid = Pid::from_child(&passt);
        let (frames, card) = pair();
        let mut link = Some(Link::new(frames, ours.into(), passt, policy));
        let vmm = Command::new("sleep").arg("600").spawn().unwrap();
        let process = Pid::from_child(&vmm);
        let process = rustix::process::pidfd_open(process, PidfdFlags::empty()).unwrap();
        let relay = std::thread::spawn(move || {
            relay::until_end(&mut [None, None, None], &mut link, &process);
        });
        let mut guest = Self {
            card,
            vmm,
            passt: pid,
            relay: Some(relay),
            next_port: 40_000,
        };
        guest.send(&who_is_the_gateway());
        let answer = guest.hear();
        assert_eq!(answer[6..14], [&GATEWAY_MAC[..], &[8, 6]].concat());
        guest
    }

    fn send(&mut self, frame: &[u8]) {
        self.card.write_all(&framed(frame)).unwrap();
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.card.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.card.read_exact(&mut frame)?;
        Ok(frame)
    }

    fn hear(&mut self) -> Vec<u8> {
        self.read().unwrap()
    }

    fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    /// Whether somebody takes a connection, before this has written thrice to somebody public and back.
    fn connects(&mut self, to: Ipv4Addr) -> bool {
        let port = self.port();
        self.send(&sent(to, 6, &syn(port, ECHO)));
        let heard = (0..3).flat_map(|_| self.writes_to_the_public());
        let heard: Vec<_> = heard.collect();
        heard.iter().any(|frame| accepts(frame, to, port))
    }

    /// Waits for the answer to a connection.
    fn is_taken_by(&mut self, to: Ipv4Addr) {
        let port = self.port();
        self.send(&sent(to, 6, &syn(port, ECHO)));
        while !accepts(&self.hear(), to, port) {}
    }

    /// Sends a datagram that comes back; says what else came until then.
    fn writes_to_the_public(&mut self) -> Vec<Vec<u8>> {
        let words = self.port().to_be_bytes();
        self.send(&sent(PUBLIC, 17, &datagram(40_000, ECHO, &words)));
        let mut others = Vec::new();
        loop {
            let frame = self.hear();
            if frame.ends_with(&words) && frame[23] == 17 && frame[26..30] == PUBLIC.octets() {
                return others;
            }
            others.push(frame);
        }
    }

    fn link_is_down(&mut self) {
        while self.read().is_ok() {}
        let is_alive = |pid: Pid| rustix::process::test_kill_process(pid).is_ok();
        while is_alive(self.passt) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(self.vmm.try_wait().unwrap().is_none(), "the VMM goes on");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.vmm.kill().unwrap();
        self.relay.take().unwrap().join().unwrap();
        self.vmm.wait().unwrap();
        assert!(rustix::process::test_kill_process(self.passt).is_err());
    }
}

/// Whether a frame is the answer to the beginning of a connection.
fn accepts(frame: &[u8], from: Ipv4Addr, port: u16) -> bool {
    let to_us = frame.len() >= 54 && frame[23] == 6 && frame[36..38] == port.to_be_bytes();
    to_us && frame[26..30] == from.octets() && frame[47] & 0x12 == 0x12
}

fn filtered() -> Policy {
    let refuse = world::REFUSED.to_vec();
    let addresses = sys::own_addresses().unwrap();
    Policy::new(
        &super::super::frames::Filter { refuse, ..filter() },
        &addresses,
    )
}

/// Those whom passt reaches and a guest must not.
fn forbidden() -> impl Iterator<Item = Ipv4Addr> {
    let loopback = [
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(127, 1, 2, 3),
        Ipv4Addr::UNSPECIFIED,
    ];
    loopback.into_iter().chain([HOST]).chain(NEIGHBOURS)
}

#[test]
fn without_the_filter_a_guest_reaches_the_host_and_its_neighbours() {
    isolated(|| {
        let mut guest = Guest::new(Policy::open());
        for address in forbidden().filter(|address| !address.is_unspecified()) {
            guest.is_taken_by(address);
        }
        let service = UdpSocket::bind("127.0.0.1:0").unwrap();
        service.set_read_timeout(Some(GENEROUS)).unwrap();
        let port = service.local_addr().unwrap().port();
        guest.send(&sent(
            Ipv4Addr::LOCALHOST,
            17,
            &datagram(40_000, port, b"it is me"),
        ));
        assert_eq!(service.recv(&mut [0; 64]).unwrap(), 8);
        // And so does the host it, by the port of its own that passt has bound.
        service.send_to(b"come in", ("127.0.0.1", 40_000)).unwrap();
        while !guest.hear().ends_with(b"come in") {}
    });
}

#[test]
fn with_the_filter_it_reaches_what_is_public_alone() {
    isolated(|| {
        let mut guest = Guest::new(filtered());
        guest.is_taken_by(PUBLIC);
        guest.writes_to_the_public();
        for address in forbidden() {
            assert!(!guest.connects(address), "{address}");
        }
        let service = UdpSocket::bind("127.0.0.1:0").unwrap();
        service.set_nonblocking(true).unwrap();
        let port = service.local_addr().unwrap().port();
        for address in [Ipv4Addr::LOCALHOST, HOST, Ipv4Addr::BROADCAST] {
            guest.send(&sent(address, 17, &datagram(40_000, port, b"it is me")));
        }
        guest.writes_to_the_public();
        let heard = service.recv(&mut [0; 64]).unwrap_err();
        assert_eq!(heard.kind(), io::ErrorKind::WouldBlock);
        for from in [Ipv4Addr::LOCALHOST, HOST] {
            let service = UdpSocket::bind((from, 0)).unwrap();
            service.send_to(b"come in", (from, 40_000)).unwrap();
        }
        for _ in 0..3 {
            let others = guest.writes_to_the_public();
            assert_eq!(others, Vec::<Vec<u8>>::new());
        }
    });
}

#[test]
fn a_flood_of_forbidden_frames_stops_nothing() {
    isolated(|| {
        let mut guest = Guest::new(filtered());
        let forbidden = sent(Ipv4Addr::LOCALHOST, 17, &datagram(40_000, 9, &[0; 1400]));
        for n in 0..20_000 {
            guest.send(&forbidden);
            if n % 1000 == 0 {
                guest.writes_to_the_public();
            }
        }
        guest.is_taken_by(PUBLIC);
    });
}

#[test]
fn a_liar_about_lengths_ends_its_network_and_nothing_else() {
    isolated(|| {
        let mut guest = Guest::new(filtered());
        guest.card.write_all(&u32::MAX.to_be_bytes()).unwrap();
        guest.link_is_down();
    });
}

#[test]
fn when_passt_dies_the_machine_goes_on_without_a_network() {
    isolated(|| {
        let mut guest = Guest::new(filtered());
        rustix::process::kill_process(guest.passt, Signal::KILL).unwrap();
        guest.link_is_down();
    });
}

#[test]
fn addresses_that_the_host_gets_are_noticed() {
    isolated(|| {
        let (vmm, _card) = pair();
        let (passt, _process) = pair();
        let process = Command::new("sleep").arg("600").spawn().unwrap();
        let mut link = Link::new(vmm, passt, process, filtered());
        let to_public = sent(PUBLIC, 6, &syn(40_000, 22));
        let judged = |link: &Link| verdict(Sender::Guest, &to_public, &link.policy);
        world::ip(&format!("address add {PUBLIC}/32 dev lo"));
        link.look_at_addresses();
        assert_eq!(judged(&link), Verdict::Pass, "it has looked just now");
        link.looked_at -= ADDRESSES_HOLD;
        link.look_at_addresses();
        assert_eq!(judged(&link), Verdict::Drop);
    });
}

#[test]
fn the_gateway_hands_on_questions_for_names() {
    isolated(|| {
        let conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let servers = conf
            .lines()
            .filter_map(|line| line.strip_prefix("nameserver "));
        let Some(server) = servers.filter_map(|one| one.trim().parse().ok()).next() else {
            println!("skipped: /etc/resolv.conf names no resolver by IPv4");
            return;
        };
        let server: Ipv4Addr = server;
        if !server.is_loopback() {
            world::ip(&format!("address add {server}/32 dev lo"));
        }
        let resolver = UdpSocket::bind((server, 53)).unwrap();
        resolver.set_read_timeout(Some(GENEROUS)).unwrap();
        let mut guest = Guest::new(filtered());
        guest.send(&sent(GATEWAY, 17, &datagram(40_000, 53, b"who?")));
        let mut question = [0; 64];
        let (length, from) = resolver.recv_from(&mut question).unwrap();
        assert_eq!(question[..length], *b"who?");
        resolver.send_to(b"me", from).unwrap();
        let answer = guest.hear();
        assert!(answer.ends_with(b"me"));
        assert_eq!(answer[26..30], GATEWAY.octets());
        // Not to be reached in any other way.
        assert!(!guest.connects(server) && !guest.connects(GATEWAY));
    });
}

#[test]
fn passt_takes_no_more_descriptors_than_it_may() {
    isolated(|| {
        let guest = Guest::new(filtered());
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", guest.passt)).unwrap();
        let files = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let files: Vec<_> = files.unwrap().split_whitespace().skip(3).take(2).collect();
        assert_eq!(files, ["4096", "4096"]);
    });
}
