//! Ethernet frames, written by hand.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub type Mac = [u8; 6];

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An Ethernet frame with an IP packet of either family.
pub fn ip(
    to: Mac,
    from: Mac,
    source: IpAddr,
    destination: IpAddr,
    l4: &[u8],
    protocol: u8,
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet(to, from, 0x0800, &ipv4(source, destination, protocol, l4))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet(to, from, 0x86dd, &ipv6(source, destination, protocol, l4))
        }
        _ => panic!("{source} and {destination} are of two families"),
    }
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, l4: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + l4.len()).unwrap().to_be_bytes();
    let mut header = vec![
        0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0,
    ];
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    let pseudo = pseudo(&source.octets(), &destination.octets(), protocol, l4);
    header.extend(summed(&pseudo, protocol, l4));
    header
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, l4: &[u8]) -> Vec<u8> {
    let length = u16::try_from(l4.len()).unwrap().to_be_bytes();
    // Neighbours believe only what no router has passed on.
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 255];
    header.extend(source.octets());
    header.extend(destination.octets());
    let pseudo = pseudo(&source.octets(), &destination.octets(), protocol, l4);
    header.extend(summed(&pseudo, protocol, l4));
    header
}

fn pseudo(source: &[u8], destination: &[u8], protocol: u8, l4: &[u8]) -> Vec<u8> {
    if protocol == ICMP {
        return Vec::new();
    }
    let length = u32::try_from(l4.len()).unwrap().to_be_bytes();
    [source, destination, &length, &[0, 0, 0, protocol]].concat()
}

/// The payload with its checksum filled in.
fn summed(pseudo: &[u8], protocol: u8, l4: &[u8]) -> Vec<u8> {
    let at = match protocol {
        TCP => 16,
        UDP => 6,
        _ => 2,
    };
    let mut l4 = l4.to_vec();
    l4[at..at + 2].fill(0);
    let sum = checksum(&[pseudo, &l4].concat()).to_be_bytes();
    l4[at..at + 2].copy_from_slice(&sum);
    l4
}

fn checksum(data: &[u8]) -> u16 {
    let pairs = data.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut l4 = Vec::new();
    for field in [source, destination, length, 0] {
        l4.extend(field.to_be_bytes());
    }
    l4.extend(payload);
    l4
}

/// A segment without payload; flags: SYN 2, ACK 16. SYNs announce segments of 1460 bytes.
pub fn tcp(source: u16, destination: u16, sequence: u32, acknowledged: u32, flags: u8) -> Vec<u8> {
    let option: &[u8] = if flags & 2 == 0 {
        &[]
    } else {
        &[2, 4, 5, 0xb4]
    };
    let mut l4 = Vec::new();
    l4.extend(source.to_be_bytes());
    l4.extend(destination.to_be_bytes());
    l4.extend(sequence.to_be_bytes());
    l4.extend(acknowledged.to_be_bytes());
    let words = 5 + u8::try_from(option.len() / 4).unwrap();
    l4.extend([words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    l4.extend(option);
    l4
}

/// ICMP or ICMPv6: type, code, checksum, and the rest.
pub fn icmp(kind: u8, rest: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0], rest].concat()
}

pub struct Arp {
    pub operation: u16,
    pub sender: (Mac, Ipv4Addr),
    pub target: (Mac, Ipv4Addr),
}

pub fn arp(to: Mac, from: Mac, arp: &Arp) -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4];
    payload.extend(arp.operation.to_be_bytes());
    for (mac, address) in [arp.sender, arp.target] {
        payload.extend(mac);
        payload.extend(address.octets());
    }
    ethernet(to, from, 0x0806, &payload)
}

/// What a frame says, if it is IP of either family: sender, receiver, protocol and what follows.
pub fn read(frame: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(14..)?;
    match kind {
        0x0800 => {
            let address = |at: usize| -> Option<IpAddr> {
                Some(IpAddr::from(
                    <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?,
                ))
            };
            let header = usize::from(packet.first()? & 15) * 4;
            Some((
                address(12)?,
                address(16)?,
                *packet.get(9)?,
                packet.get(header..)?,
            ))
        }
        0x86dd => {
            let address = |at: usize| -> Option<IpAddr> {
                Some(IpAddr::from(
                    <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?,
                ))
            };
            Some((
                address(8)?,
                address(24)?,
                *packet.get(6)?,
                packet.get(40..)?,
            ))
        }
        _ => None,
    }
}
