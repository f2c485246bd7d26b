//! Interfaces, addresses and default routes of the guest, by rtnetlink.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use hutch_guest::pb;
use hutch_netlink::route::{self, Change, Route};
use hutch_netlink::{Protocol, Socket};
use rustix::io::Errno;

/// Time for an interface to appear.
const PATIENCE: Duration = Duration::from_secs(5);
/// `RTPROT_STATIC`: an administrator's route.
const STATIC: u8 = 4;
const UP: Change<'_> = Change {
    up: Some(true),
    mtu: None,
    address: None,
    alias: None,
    no_own_ipv6: false,
};

/// Brings an interface up.
///
/// # Errors
/// There is none of that name, or the kernel refuses.
pub fn up(interface: &str) -> io::Result<()> {
    let index = index_of(interface).ok_or(Errno::NODEV)?;
    Socket::open(Protocol::Route)?.apply(&[route::change(index, &UP)])?;
    Ok(())
}

/// Gives each named interface exactly its addresses, and the MTU unless that is zero; an empty name is the first
/// interface beside the loopback.
///
/// # Errors
/// A malformed address, an interface that does not appear, or the kernel's refusal.
pub fn configure(addresses: &[pb::Address], mtu: u32) -> io::Result<()> {
    let parsed: io::Result<Vec<Wanted>> = addresses.iter().map(Wanted::parse).collect();
    // By index, since one interface may be named in two ways.
    let mut wanted: BTreeMap<u32, Vec<Wanted>> = BTreeMap::new();
    for (address, parsed) in addresses.iter().zip(parsed?) {
        let index = wait_for(&address.interface)?;
        wanted.entry(index).or_default().push(parsed);
    }
    for (index, addresses) in wanted {
        let mut socket = Socket::open(Protocol::Route)?;
        let up = Change {
            mtu: (mtu > 0).then_some(mtu),
            ..UP
        };
        socket.apply(&[route::change(index, &up)])?;
        let mut changes = Vec::new();
        for (address, prefix) in route::addresses(&mut socket, index)? {
            let wanted = |new: &Wanted| (new.address, new.prefix) == (address, prefix);
            if !addresses.iter().any(wanted) {
                changes.push(route::delete_address(index, address, prefix));
            }
        }
        for new in &addresses {
            changes.push(route::add_address(index, new.address, new.prefix));
        }
        for gateway in addresses.iter().filter_map(|new| new.gateway) {
            changes.push(route::add_route(&default_route(index, gateway)));
        }
        socket.apply(&changes)?;
    }
    Ok(())
}

fn default_route(index: u32, gateway: IpAddr) -> Route {
    let all = match gateway {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    Route {
        to: (all, 0),
        link: index,
        gateway: Some(gateway),
        source: None,
        protocol: STATIC,
    }
}

struct Wanted {
    address: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
}

impl Wanted {
    fn parse(address: &pb::Address) -> io::Result<Self> {
        let invalid = |text: &str| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{text:?} is no address"),
            )
        };
        let (ip, prefix) = address
            .cidr
            .split_once('/')
            .ok_or_else(|| invalid(&address.cidr))?;
        let ip: IpAddr = ip.parse().map_err(|_| invalid(&address.cidr))?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= longest);
        let gateway = match address.gateway.as_str() {
            "" => None,
            text => {
                let gateway: IpAddr = text.parse().map_err(|_| invalid(text))?;
                if gateway.is_ipv4() != ip.is_ipv4() {
                    return Err(invalid(text));
                }
                Some(gateway)
            }
        };
        Ok(Self {
            address: ip,
            prefix: prefix.ok_or_else(|| invalid(&address.cidr))?,
            gateway,
        })
    }
}

fn index_of(interface: &str) -> Option<u32> {
    let name = match interface {
        "" => {
            let names = fs::read_dir("/sys/class/net").ok()?.flatten();
            let names = names.filter_map(|entry| entry.file_name().into_string().ok());
            names.filter(|name| name != "lo").min()?
        }
        name if name.contains('/') || name.starts_with('.') => return None,
        name => name.to_owned(),
    };
    let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
    index.trim().parse().ok()
}

/// The index of an interface, which may appear a little later than we do.
fn wait_for(interface: &str) -> io::Result<u32> {
    // Listening before looking: what comes in between is in the queue.
    let mut news = Socket::listening(Protocol::Route, route::LINK_EVENTS)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(index) = index_of(interface) {
            return Ok(index);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("no interface {interface:?}");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        news.wait(left)?;
        news.discard();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_is_done() {
        let parse = |cidr: &str, gateway: &str| {
            let address = pb::Address {
                interface: "eth0".into(),
                cidr: cidr.into(),
                gateway: gateway.into(),
            };
            Wanted::parse(&address).is_ok()
        };
        assert!(parse("172.16.0.7/32", "169.254.0.1"));
        assert!(parse("fd00::7/128", "fe80::1"));
        assert!(parse("10.0.0.1/0", ""));
        for (cidr, gateway) in [
            ("10.0.0.1", ""),
            ("10.0.0.1/33", ""),
            ("x/8", ""),
            ("10.0.0.1/8", "fe80::1"),
            ("fd00::7/129", ""),
            ("10.0.0.1/8", "gw"),
        ] {
            assert!(!parse(cidr, gateway), "{cidr} {gateway}");
        }
    }
}
