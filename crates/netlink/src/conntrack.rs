//! Entries of conntrack that carry a mark: `linux/netfilter/nfnetlink_conntrack.h`.

use std::net::IpAddr;
use std::num::NonZeroU32;

use crate::attribute::{be32, find};
use crate::message::Message;
use crate::route::ip;
use crate::{Reply, Result, Socket};

const CTNETLINK: u16 = 1 << 8;
const GET: u16 = CTNETLINK | 1;
const DELETE: u16 = CTNETLINK | 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const NESTED: u16 = 0x8000;

/// A connection, as whoever began it sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Who began it.
    pub source: IpAddr,
    /// Whom it was addressed to, before any translation.
    pub destination: IpAddr,
    /// The IP protocol's number.
    pub protocol: u8,
    /// For protocols that have ports.
    pub port: Option<u16>,
    family: u8,
    tuple: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

/// Deletes every entry of a mark, of both families.
///
/// The mark cannot be zero and is compared as a whole: without a mark, the same message would delete all entries of
/// the host.
pub fn delete_all(mark: NonZeroU32) -> Message {
    let mut message = Message::new("forget connections", DELETE, 0, &header(0));
    put_mark(&mut message, mark);
    message
}

/// Every connection of a mark.
///
/// # Errors
/// The kernel's refusal.
pub fn connections(socket: &mut Socket, mark: NonZeroU32) -> Result<Vec<Connection>> {
    let mut message = Message::new("list connections", GET, 0, &header(0));
    put_mark(&mut message, mark);
    let replies = socket.dump(&message)?;
    // Kernels that do not filter show all.
    let ours = |reply: &&Reply| {
        let rest = reply.body.get(4..).unwrap_or_default();
        find(rest, CTA_MARK).and_then(be32) == Some(mark.get())
    };
    Ok(replies
        .iter()
        .filter(ours)
        .filter_map(Connection::read)
        .collect())
}

/// Deletes one connection, and not another one that has got its addresses and ports since.
pub fn delete(connection: &Connection) -> Message {
    let header = header(connection.family);
    let mut message = Message::new("forget a connection", DELETE, 0, &header);
    message.put(CTA_TUPLE_ORIG | NESTED, &connection.tuple);
    message.put(CTA_ID, &connection.id);
    if let Some(zone) = &connection.zone {
        message.put(CTA_ZONE, zone);
    }
    message
}

/// `struct nfgenmsg`; family 0 is every family.
fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

fn put_mark(message: &mut Message, mark: NonZeroU32) {
    message.be32(CTA_MARK, mark.get());
    message.be32(CTA_MARK_MASK, u32::MAX);
}

impl Connection {
    fn read(reply: &Reply) -> Option<Self> {
        let (header, rest) = reply.body.split_first_chunk::<4>()?;
        let tuple = find(rest, CTA_TUPLE_ORIG)?;
        let addresses = find(tuple, CTA_TUPLE_IP)?;
        let protocol = find(tuple, CTA_TUPLE_PROTO)?;
        // IPv4 source and destination are 1 and 2, IPv6 3 and 4.
        let address = |v4, v6| find(addresses, v4).or(find(addresses, v6)).and_then(ip);
        let port = |port: &[u8]| Some(u16::from_be_bytes(port.try_into().ok()?));
        Some(Self {
            source: address(1, 3)?,
            destination: address(2, 4)?,
            protocol: *find(protocol, 1)?.first()?,
            port: find(protocol, 3).and_then(port),
            family: header[0],
            tuple: tuple.to_vec(),
            id: find(rest, CTA_ID)?.to_vec(),
            zone: find(rest, CTA_ZONE).map(<[u8]>::to_vec),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_deleted_by_the_whole_of_a_mark() {
        let mark = NonZeroU32::new(0x1234_0007).unwrap();
        let mut bytes = Vec::new();
        delete_all(mark).write(0, 0, &mut bytes).unwrap();
        assert_eq!(
            bytes[16..],
            [
                0, 0, 0, 0, // every family
                8, 0, 8, 0, 0x12, 0x34, 0, 7, // the mark
                8, 0, 21, 0, 255, 255, 255, 255, // all of its bits
            ]
        );
    }
}
