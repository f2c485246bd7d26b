//! A host with an uplink and the world behind it, each a network namespace: for tests of what a machine reaches.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::mpsc;

/// The host's address on its uplink.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Its router, which is everybody else.
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Somebody who counts as public.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Those behind the uplink that a host reaches and its machines must not.
pub const NEIGHBOURS: [Ipv4Addr; 6] = [
    ROUTER,
    Ipv4Addr::new(10, 9, 9, 9),
    Ipv4Addr::new(172, 20, 0, 7),
    Ipv4Addr::new(192, 168, 7, 7),
    Ipv4Addr::new(100, 64, 1, 1),
    Ipv4Addr::new(169, 254, 169, 254),
];
/// Where all of them, and the host, give back what they get by TCP; somebody public also by UDP.
pub const ECHO: u16 = 7;
/// The networks of neighbours.
pub const REFUSED: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
];

/// Runs `ip`, which must succeed.
pub fn ip(arguments: &str) -> String {
    let mut command = Command::new("ip");
    let output = command.args(arguments.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Makes this thread's network a host's, with a world behind it that lives as long as this process. `own_network` gives a
/// thread a network of its own.
pub fn make(own_network: fn() -> io::Result<()>) {
    own_network().unwrap();
    let (thread, made) = mpsc::channel();
    let (moved, uplink) = mpsc::channel();
    let (ready, up) = mpsc::channel();
    std::thread::spawn(move || {
        own_network().unwrap();
        thread.send(rustix::thread::gettid()).unwrap();
        uplink.recv().unwrap();
        ip("link set lo up");
        ip(&format!("address add {ROUTER}/24 dev world"));
        ip("link set world up");
        for address in NEIGHBOURS.iter().skip(1).chain([&PUBLIC]) {
            ip(&format!("address add {address}/32 dev lo"));
        }
        echo_streams();
        echo_datagrams(PUBLIC);
        ready.send(()).unwrap();
        loop {
            std::thread::park();
        }
    });
    let world = made.recv().unwrap();
    ip("link set lo up");
    ip("link add uplink type veth peer name world");
    ip(&format!("link set world netns {}", world.as_raw_pid()));
    ip(&format!("address add {HOST}/24 dev uplink"));
    ip("link set uplink up");
    ip(&format!("route add default via {ROUTER}"));
    moved.send(()).unwrap();
    up.recv().unwrap();
    echo_streams();
}

/// Echoes on all addresses of this thread's network, until the process ends. A connection ends with a line: a guest's
/// `nc` ends with that, and not with its own input.
fn echo_streams() {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    let written = stream.write_all(&bytes[..length]);
                    if written.is_err() || bytes[..length].ends_with(b"\n") {
                        return;
                    }
                }
            });
        }
    });
}

/// The same for datagrams to one address, which is also the sender of what comes back.
fn echo_datagrams(address: Ipv4Addr) {
    let socket = UdpSocket::bind((address, ECHO)).unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        loop {
            // The last answer may have found nobody.
            if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let _ = socket.send_to(&bytes[..length], from);
            }
        }
    });
}
