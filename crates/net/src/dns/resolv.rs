//! Which resolvers are asked: those that are configured, or the host's.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PORT: u16 = 53;
/// As many as the C library asks (`MAXNS` of resolv.conf(5)).
const MOST: usize = 3;
/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where questions go that are not ours to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstreams {
    /// To these, in this order.
    Given(Vec<SocketAddr>),
    /// To those in a file such as `/etc/resolv.conf`, which is read again when it has changed.
    File(PathBuf),
}

/// The resolvers as they are now.
#[derive(Debug)]
pub(super) struct Resolvers {
    upstreams: Upstreams,
    /// Ourselves; asking there would never end.
    own: IpAddr,
    read: Mutex<Read>,
}

#[derive(Debug, Default)]
struct Read {
    servers: Vec<SocketAddr>,
    looked: Option<Instant>,
    /// Device, inode, size and time of change of the file that was read.
    stamp: Option<[i128; 4]>,
}

impl Resolvers {
    pub(super) fn new(upstreams: Upstreams, own: IpAddr) -> Self {
        Self {
            upstreams,
            own,
            read: Mutex::default(),
        }
    }

    /// Whom to ask, first ones first. A file that cannot be read is as it was.
    pub(super) fn servers(&self) -> Vec<SocketAddr> {
        let file = match &self.upstreams {
            Upstreams::Given(servers) => return servers.clone(),
            Upstreams::File(file) => file,
        };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return read.servers.clone();
        }
        read.looked = Some(Instant::now());
        let stamp = fs::metadata(file).ok().map(|file| {
            let time = i128::from(file.mtime()) * 1_000_000_000 + i128::from(file.mtime_nsec());
            [
                file.dev().into(),
                file.ino().into(),
                file.size().into(),
                time,
            ]
        });
        if stamp.is_none() || stamp != read.stamp {
            if let Ok(text) = fs::read(file) {
                read.servers = parse(&String::from_utf8_lossy(&text));
                read.servers.retain(|server| server.ip() != self.own);
                read.stamp = stamp;
            } else if read.servers.is_empty() {
                read.servers = parse("");
            }
        }
        read.servers.clone()
    }
}

/// The servers of a text as resolv.conf(5) has it; where it names none, the one on this host. Link-local ones with the
/// name of an interface are passed over.
fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = (words.next()? == "nameserver").then(|| words.next())??;
        address.parse().ok().map(|ip| SocketAddr::new(ip, PORT))
    };
    let mut servers: Vec<_> = text.lines().filter_map(server).take(MOST).collect();
    if servers.is_empty() {
        servers.push((Ipv4Addr::LOCALHOST, PORT).into());
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_as_the_c_library_does() {
        let text = "# nameserver 192.0.2.1\n; nameserver 192.0.2.2\nsearch example.com\n\
            nameserver 192.0.2.3 # first\nnameserver\tfd00::53\nnameservers 192.0.2.4\n\
            nameserver fe80::1%eth0\nnameserver no\nnameserver 192.0.2.5\nnameserver 192.0.2.6\n";
        let servers = parse(text);
        let texts: Vec<_> = servers.iter().map(SocketAddr::to_string).collect();
        assert_eq!(texts, ["192.0.2.3:53", "[fd00::53]:53", "192.0.2.5:53"]);
        assert_eq!(parse("").len(), 1);
    }

    #[test]
    fn the_file_is_read_again_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        let own = IpAddr::from([169, 254, 0, 1]);
        let resolvers = Resolvers::new(Upstreams::File(file.clone()), own);
        let now = || {
            resolvers.read.lock().unwrap().looked = None;
            let servers = resolvers.servers();
            servers
                .iter()
                .map(|server| server.ip().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(now(), ["127.0.0.1"]);
        fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(now(), ["192.0.2.1"]);
        fs::write(&file, "nameserver 169.254.0.1\nnameserver 192.0.2.22\n").unwrap();
        assert_eq!(now(), ["192.0.2.22"]);
        fs::remove_file(&file).unwrap();
        assert_eq!(now(), ["192.0.2.22"]);
    }
}
