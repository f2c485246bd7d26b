//! A host of a test's own, and a world around it: two network namespaces with a cable between them. Nothing in them
//! reaches the real host's network, and they go with the last process in them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use hutch_netlink::nft::Nft;
use hutch_netlink::route::{self, Change, Kind, Route};
use hutch_netlink::{Protocol, Socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// The host's address on its uplink.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// A host of the internet.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Another one.
pub const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// A host of a private network behind the same router.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
/// The metadata service of a cloud.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's address on its uplink, once the world has IPv6.
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
/// A host of the internet.
pub const PUBLIC6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10);
/// Another one.
pub const OTHER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x20);
/// A host of a private network behind the same router.
pub const PRIVATE6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 9);
/// The metadata service of a cloud.
pub const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// The two namespaces.
pub struct World {
    host: File,
    internet: File,
}

/// A server in the world, and what came to it.
#[derive(Clone, Default)]
pub struct Visits {
    connections: Arc<AtomicUsize>,
    lines: Arc<Mutex<Vec<String>>>,
    from: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Visits {
    /// How many connections there were.
    pub fn count(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The lines that came in on all of them.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Where they came from.
    pub fn from(&self) -> Vec<SocketAddr> {
        self.from.lock().unwrap().clone()
    }
}

impl World {
    /// Two namespaces; says why not where they cannot be had.
    pub fn new() -> Option<Arc<World>> {
        if !crate::is_root() {
            eprintln!("skipped: network namespaces take root");
            return None;
        }
        if let Err(error) = fs::metadata("/dev/net/tun") {
            eprintln!("skipped: no /dev/net/tun: {error}");
            return None;
        }
        let namespace = || {
            let made = std::thread::spawn(|| {
                sys::own_network()?;
                // A firewall is needed there.
                let asked = Nft::open().and_then(|mut nft| nft.generation());
                asked.map_err(std::io::Error::other)?;
                File::open("/proc/thread-self/ns/net")
            });
            made.join().unwrap()
        };
        let (host, internet) = match (namespace(), namespace()) {
            (Ok(host), Ok(internet)) => (host, internet),
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("skipped: no network namespace with a firewall is to be had: {error}");
                return None;
            }
        };
        let world = World { host, internet };
        inside(&world.internet, || {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let cable = route::create("up1", Kind::Veth("up0"));
            socket.apply(&[cable]).unwrap();
            let near = route::index(&mut socket, "up0").unwrap();
            let give = route::move_to(near, world.host.as_fd());
            socket.apply(&[give]).unwrap();
            let far = up(&mut socket, "up1");
            let loopback = up(&mut socket, "lo");
            let mut setup = vec![route::add_address(far, ROUTER.into(), 24)];
            for address in [PUBLIC, OTHER, PRIVATE, METADATA] {
                setup.push(route::add_address(loopback, address.into(), 32));
            }
            socket.apply(&setup).unwrap();
        });
        inside(&world.host, || {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            up(&mut socket, "lo");
            let near = up(&mut socket, "up0");
            let out = route::add_route(&Route {
                to: (Ipv4Addr::UNSPECIFIED.into(), 0),
                link: near,
                gateway: Some(ROUTER.into()),
                source: None,
                protocol: 4,
            });
            let own = route::add_address(near, HOST.into(), 24);
            socket.apply(&[own, out]).unwrap();
        });
        Some(Arc::new(world))
    }

    /// Gives host and world IPv6 beside IPv4; false, after saying so, where the kernel has none.
    pub fn has_ipv6(&self) -> bool {
        if !std::path::Path::new("/proc/sys/net/ipv6").exists() {
            eprintln!("skipped: this kernel has no IPv6");
            return false;
        }
        self.outside(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let [far, loopback] = ["up1", "lo"].map(|name| up(&mut socket, name));
            let mut setup = vec![route::add_address(far, ROUTER6.into(), 64)];
            for address in [PUBLIC6, OTHER6, PRIVATE6, METADATA6] {
                setup.push(route::add_address(loopback, address.into(), 128));
            }
            socket.apply(&setup).unwrap();
        });
        self.on_host(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let near = up(&mut socket, "up0");
            let out = route::add_route(&Route {
                to: (Ipv6Addr::UNSPECIFIED.into(), 0),
                link: near,
                gateway: Some(ROUTER6.into()),
                source: None,
                protocol: 4,
            });
            let own = route::add_address(near, HOST6.into(), 64);
            socket.apply(&[own, out]).unwrap();
        });
        true
    }

    /// Does something on the host, in a thread of its own.
    pub fn on_host<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        inside(&self.host, what)
    }

    /// Does something in the world around it.
    pub fn outside<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        inside(&self.internet, what)
    }

    /// A server on the host: says "hello" to whoever comes, and keeps the lines it is told.
    pub fn serve_on_host(&self, at: impl Into<IpAddr>, port: u16) -> Visits {
        let address = SocketAddr::new(at.into(), port);
        serve(self.on_host(|| TcpListener::bind(address).unwrap()))
    }

    /// The same in the world.
    pub fn serve(&self, at: impl Into<IpAddr>, port: u16) -> Visits {
        let address = SocketAddr::new(at.into(), port);
        serve(self.outside(|| TcpListener::bind(address).unwrap()))
    }

    /// A name server of the world, on port 53, which knows these names.
    pub fn name_server(&self, at: Ipv4Addr, names: &[(&str, IpAddr)]) {
        let socket = self.outside(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let loopback = route::index(&mut socket, "lo").unwrap();
            let own = route::add_address(loopback, at.into(), 32);
            socket.apply(&[own]).unwrap();
            UdpSocket::bind((at, 53)).unwrap()
        });
        let names: Vec<_> = names
            .iter()
            .map(|(name, address)| (wire_name(name), *address))
            .collect();
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                if let Some(answer) = answer(&buffer[..length], &names) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
    }
}

fn serve(listener: TcpListener) -> Visits {
    let visits = Visits::default();
    let seen = visits.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(mut stream), seen) = (stream, seen.clone()) else {
                continue;
            };
            seen.connections.fetch_add(1, Ordering::SeqCst);
            if let Ok(from) = stream.peer_addr() {
                seen.from.lock().unwrap().push(from);
            }
            std::thread::spawn(move || {
                let _ = stream.write_all(b"hello\n");
                for line in BufReader::new(&stream).lines() {
                    let Ok(line) = line else { break };
                    seen.lines.lock().unwrap().push(line);
                }
            });
        }
    });
    visits
}

/// A name as it stands in messages.
fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.') {
        wire.push(label.len() as u8);
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

/// The answer to a question about one address (RFC 1035, RFC 3596): the address, nothing for other types, "no such name".
fn answer(question: &[u8], names: &[(Vec<u8>, IpAddr)]) -> Option<Vec<u8>> {
    let asked = question.get(12..)?;
    let end = asked.iter().position(|byte| *byte == 0)? + 1;
    let (name, kind) = (
        asked.get(..end)?.to_ascii_lowercase(),
        asked.get(end..end + 2)?,
    );
    let mut found = names.iter().filter(|(known, _)| *known == name).peekable();
    let code = if found.peek().is_some() { 0 } else { 3 };
    let data = found.find_map(|(_, address)| match address {
        IpAddr::V4(address) => (kind == [0, 1]).then(|| address.octets().to_vec()),
        IpAddr::V6(address) => (kind == [0, 28]).then(|| address.octets().to_vec()),
    });
    let answers = u8::from(data.is_some());
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
    answer.extend(asked.get(..end + 4)?);
    if let Some(data) = data {
        answer.extend([0xc0, 12, kind[0], kind[1], 0, 1, 0, 0, 0, 60]);
        answer.extend([0, data.len() as u8]);
        answer.extend(data);
    }
    Some(answer)
}

fn up(socket: &mut Socket, name: &str) -> u32 {
    let index = route::index(socket, name).unwrap();
    let change = Change {
        up: Some(true),
        ..Change::default()
    };
    socket.apply(&[route::change(index, &change)]).unwrap();
    index
}

fn inside<T: Send>(namespace: &File, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).unwrap();
            what()
        });
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
