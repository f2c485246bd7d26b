//! What an interface is, asked by rtnetlink. Facts: `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h`.

use std::io;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_PERSIST: u16 = 6;
/// The driver's word for a tap, beside 1 for a tun (`IFF_TAP`).
const TYPE_TAP: u8 = 2;
/// `struct nlmsghdr` and `struct ifinfomsg`.
const HEADERS: usize = 16 + 16;
/// More than the kernel says about one interface.
const ANSWER: usize = 32 * 1024;

/// What an interface looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Looks {
    /// A tap or a tun.
    Tun {
        is_tap: bool,
        is_persistent: bool,
        owner: Option<u32>,
    },
    /// Something else, by the kernel's word for it; hardware has none.
    Other { kind: String },
}

/// Looks at the interface `name` of this thread's network namespace. `None` when there is none.
pub(super) fn look(name: &str) -> io::Result<Option<Looks>> {
    let flags = SocketFlags::CLOEXEC;
    // Without a protocol it is that of routes.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &question(name), SendFlags::empty(), &kernel)?;
    let mut answer = vec![0; ANSWER];
    loop {
        match rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty()) {
            Ok((length, _)) => return read(&answer[..length]),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn question(name: &str) -> Vec<u8> {
    let attribute = 4 + name.len() + 1;
    let length = HEADERS + attribute.next_multiple_of(4);
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(RTM_GETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.resize(HEADERS, 0);
    message.extend((attribute as u16).to_ne_bytes());
    message.extend(IFLA_IFNAME.to_ne_bytes());
    message.extend(name.bytes());
    message.resize(length, 0);
    message
}

fn read(answer: &[u8]) -> io::Result<Option<Looks>> {
    let kind = answer.get(4..6).and_then(u16_of);
    match kind {
        Some(NLMSG_ERROR) => {
            let errno = answer.get(16..20).and_then(i32_of).unwrap_or(0);
            match io::Error::from_raw_os_error(errno.wrapping_neg()) {
                error if Errno::from_io_error(&error) == Some(Errno::NODEV) => Ok(None),
                error => Err(error),
            }
        }
        Some(RTM_NEWLINK) => Ok(Some(looks(answer.get(HEADERS..).unwrap_or_default()))),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn looks(attributes: &[u8]) -> Looks {
    let info = find(attributes, IFLA_LINKINFO).unwrap_or_default();
    let kind = find(info, IFLA_INFO_KIND).unwrap_or_default();
    let kind = kind.split(|byte| *byte == 0).next().unwrap_or_default();
    if kind != b"tun" {
        return Looks::Other {
            kind: String::from_utf8_lossy(kind).into_owned(),
        };
    }
    let data = find(info, IFLA_INFO_DATA).unwrap_or_default();
    let byte = |number| find(data, number).and_then(|value| value.first().copied());
    Looks::Tun {
        is_tap: byte(IFLA_TUN_TYPE) == Some(TYPE_TAP),
        is_persistent: byte(IFLA_TUN_PERSIST) == Some(1),
        owner: find(data, IFLA_TUN_OWNER).and_then(u32_of),
    }
}

/// The value of the first attribute of that number. `struct rtattr`: length with itself, type, value, padding to 4.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(attributes.get(..2).and_then(u16_of)?);
        let number = attributes.get(2..4).and_then(u16_of)?;
        let value = attributes.get(4..length)?;
        // Without the mark of nested ones (`NLA_F_NESTED`).
        if number & 0x3fff == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_of(bytes: &[u8]) -> Option<u16> {
    bytes.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_of(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn i32_of(bytes: &[u8]) -> Option<i32> {
    bytes.try_into().ok().map(i32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_cut_off_says_less_and_breaks_nothing() {
        let attribute = |number: u16, value: &[u8]| {
            let mut all = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
            all.extend(number.to_ne_bytes());
            all.extend(value);
            all.resize(all.len().next_multiple_of(4), 0);
            all
        };
        let data = [
            attribute(IFLA_TUN_OWNER, &7_u32.to_ne_bytes()),
            attribute(IFLA_TUN_TYPE, &[TYPE_TAP]),
            attribute(IFLA_TUN_PERSIST, &[1]),
        ];
        let info = [
            attribute(IFLA_INFO_KIND, b"tun\0"),
            attribute(IFLA_INFO_DATA, &data.concat()),
        ];
        let all = attribute(IFLA_LINKINFO, &info.concat());
        let tap = Looks::Tun {
            is_tap: true,
            is_persistent: true,
            owner: Some(7),
        };
        assert_eq!(looks(&all), tap);
        for end in 0..all.len() {
            assert_ne!(looks(&all[..end]), tap);
        }
        assert!(read(&[]).is_err());
    }
}
