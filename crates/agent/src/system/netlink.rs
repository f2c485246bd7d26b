//! Interfaces, addresses and default routes by rtnetlink, as few messages as we need, written by hand.
//! Facts: `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_addr.h`, `linux/if_link.h`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hutch_guest::pb;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST_ACK: u16 = 0x1 | 0x4;
const REQUEST_DUMP: u16 = 0x1 | 0x300;
const REPLACE_CREATE: u16 = 0x100 | 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// An address that is used at once: nobody else has it, so nobody needs to be asked.
const IFA_F_NODAD: u32 = 0x02;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// The gateway is on this link, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;
const IFF_UP: u32 = 1;
/// `RTMGRP_LINK`: news about interfaces.
const GROUP_LINK: u32 = 1;
const HEADER: usize = 16;
/// Time for an interface to appear, or for the kernel to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Brings an interface up.
///
/// # Errors
/// There is none of that name, or the kernel refuses.
pub fn up(interface: &str) -> io::Result<()> {
    let mut socket = Socket::open(0)?;
    let index = index_of(interface).ok_or(Errno::NODEV)?;
    socket.up(index)
}

/// Gives each named interface exactly its addresses; an empty name is the first interface beside the loopback.
///
/// # Errors
/// A malformed address, an interface that does not appear, or the kernel's refusal.
pub fn configure(addresses: &[pb::Address]) -> io::Result<()> {
    let parsed: io::Result<Vec<Wanted>> = addresses.iter().map(Wanted::parse).collect();
    // By index, since one interface may be named in two ways.
    let mut wanted: BTreeMap<u32, Vec<Wanted>> = BTreeMap::new();
    for (address, parsed) in addresses.iter().zip(parsed?) {
        let index = wait_for(&address.interface)?;
        wanted.entry(index).or_default().push(parsed);
    }
    for (index, addresses) in wanted {
        let mut socket = Socket::open(0)?;
        socket.up(index)?;
        for old in socket.addresses(index)? {
            if !addresses.iter().any(|new| (new.address, new.prefix) == old) {
                socket.address(RTM_DELADDR, 0, index, old)?;
            }
        }
        for new in &addresses {
            let pair = (new.address, new.prefix);
            socket.address(RTM_NEWADDR, REPLACE_CREATE, index, pair)?;
        }
        for gateway in addresses.iter().filter_map(|new| new.gateway) {
            socket.default_route(index, gateway)?;
        }
    }
    Ok(())
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
    let news = Socket::open(GROUP_LINK)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(index) = index_of(interface) {
            return Ok(index);
        }
        news.wait(deadline).map_err(|_| {
            let text = format!("no interface {interface:?}");
            io::Error::new(io::ErrorKind::NotFound, text)
        })?;
        let mut ignored = [0; 8192];
        let _ = rustix::net::recv(&news.fd, &mut ignored, RecvFlags::DONTWAIT);
    }
}

struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    fn open(groups: u32) -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { fd, sequence: 0 })
    }

    fn wait(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut poll = [PollFd::new(&self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&left)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends one message and hands every answer (type, body) to `each` until the kernel says that it is done.
    fn call(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::new();
        let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(body);
        rustix::net::send(&self.fd, &message, SendFlags::empty())?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = vec![0; 32 * 1024];
        loop {
            self.wait(deadline)?;
            let (received, _) = rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT)?;
            for (kind, sequence, body) in messages(&buffer[..received]) {
                match kind {
                    _ if sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledged(body),
                    kind => each(kind, body),
                }
            }
        }
    }

    fn up(&mut self, index: u32) -> io::Result<()> {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        self.call(RTM_NEWLINK, REQUEST_ACK, &body, |_, _| {})
    }

    /// Addresses of an interface; link-local ones are the kernel's own.
    fn addresses(&mut self, index: u32) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut found = Vec::new();
        self.call(RTM_GETADDR, REQUEST_DUMP, &[0; 8], |kind, body| {
            let Some((header, rest)) = body.split_at_checked(8) else {
                return;
            };
            let scope_link = 253;
            let of = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            if kind != RTM_NEWADDR || of != index || header[3] == scope_link {
                return;
            }
            let attributes: BTreeMap<u16, &[u8]> = attributes(rest).collect();
            let address = attributes.get(&IFA_LOCAL).or(attributes.get(&IFA_ADDRESS));
            if let Some(address) = address.and_then(|bytes| ip(bytes)) {
                found.push((address, header[1]));
            }
        })?;
        Ok(found)
    }

    fn address(
        &mut self,
        kind: u16,
        flags: u16,
        index: u32,
        (address, prefix): (IpAddr, u8),
    ) -> io::Result<()> {
        let mut body = vec![family(address), prefix, 0, 0];
        body.extend(index.to_ne_bytes());
        attribute(&mut body, IFA_LOCAL, &octets(address));
        attribute(&mut body, IFA_ADDRESS, &octets(address));
        if address.is_ipv6() {
            attribute(&mut body, IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
        }
        self.call(kind, REQUEST_ACK | flags, &body, |_, _| {})
    }

    fn default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let (table_main, protocol_static, scope_universe, type_unicast) = (254, 4, 0, 1);
        let mut body = vec![family(gateway), 0, 0, 0];
        body.extend([table_main, protocol_static, scope_universe, type_unicast]);
        body.extend(RTNH_F_ONLINK.to_ne_bytes());
        attribute(&mut body, RTA_GATEWAY, &octets(gateway));
        attribute(&mut body, RTA_OIF, &index.to_ne_bytes());
        self.call(RTM_NEWROUTE, REQUEST_ACK | REPLACE_CREATE, &body, |_, _| {})
    }
}

fn acknowledged(body: &[u8]) -> io::Result<()> {
    let code = body
        .first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

/// Type, sequence and body of each message in a datagram.
fn messages(mut data: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = data.first_chunk()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let body = data.get(HEADER..length)?;
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, body))
    })
}

fn attributes(mut data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header: &[u8; 4] = data.first_chunk()?;
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = data.get(4..length)?;
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    Some(<[u8; 16]>::try_from(bytes).ok()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut body = Vec::new();
        attribute(&mut body, IFA_LOCAL, &[10, 0, 0, 1]);
        attribute(&mut body, 99, b"abcde");
        let read: Vec<_> = attributes(&body).collect();
        assert_eq!(read, [(IFA_LOCAL, &[10, 0, 0, 1][..]), (99, b"abcde")]);
    }

    #[test]
    fn broken_datagrams_end_early() {
        assert_eq!(messages(&[]).count(), 0);
        assert_eq!(messages(&[255; 64]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[1, 0, 0, 0, 1, 0, 0, 0]).count(), 0);
    }

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
