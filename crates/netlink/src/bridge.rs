//! Bridges and their ports: `linux/if_bridge.h`, `linux/if_link.h`, `linux/neighbour.h`.

use crate::attribute::{attributes, find, ne32};
use crate::message::{CREATE, Message, REPLACE};
use crate::route::{
    self, IFLA_ADDRESS, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, Link, RTM_GETLINK,
    RTM_GETNEIGH, RTM_NEWLINK, RTM_NEWNEIGH, link_header,
};
use crate::{Reply, Result, Socket};

const RTM_SETLINK: u16 = 19;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_BR_STP_STATE: u16 = 5;

const GUARD: u16 = 5;
const LEARNING: u16 = 8;
const UNICAST_FLOOD: u16 = 9;
const MULTICAST_FLOOD: u16 = 27;
const BROADCAST_FLOOD: u16 = 30;
const ISOLATED: u16 = 33;

const AF_BRIDGE: u8 = 7;
const NDA_LLADDR: u16 = 2;
const NDA_MASTER: u16 = 9;
/// The entry is the bridge's, not the device's.
const NTF_MASTER: u8 = 4;
/// It stays at its port, whatever other ports send. Kernel 4.20.
const NTF_STICKY: u8 = 0x40;
/// `bridge` calls it static: it does not age.
const NUD_NOARP: u16 = 0x40;

/// A place in a bridge's table: where frames to a MAC go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Whose.
    pub mac: Vec<u8>,
    /// The port, or the bridge itself.
    pub link: u32,
    /// `NUD_…`: 0x40 for one that somebody set, 0x80 for a device's own.
    pub state: u16,
    /// Whether no frame moves it to another port.
    pub sticky: bool,
}

/// Makes a bridge with this MAC, down and without addresses, whose spanning tree is off.
pub fn create(name: &str, mac: [u8; 6]) -> Message {
    let mut message = route::create(name, route::Kind::Bridge);
    message.put(IFLA_ADDRESS, &mac);
    message
}

/// Makes a link a port of a bridge.
pub fn join(port: u32, bridge: u32) -> Message {
    let header = link_header(port, 0, 0);
    let mut message = Message::new("add a port to a bridge", RTM_NEWLINK, 0, &header);
    message.ne32(IFLA_MASTER, bridge);
    message
}

/// Lets a port talk to the host only: to no port that is confined too, and only what is for its MAC comes out of it.
/// What it sends teaches the bridge nothing; spanning tree messages close it, where the bridge knows these at all.
pub fn confine(port: u32) -> Message {
    let mut header = link_header(port, 0, 0);
    header[0] = AF_BRIDGE;
    let mut message = Message::new("confine a bridge's port", RTM_SETLINK, 0, &header);
    message.nest(IFLA_PROTINFO, |port| {
        for (setting, on) in [
            (ISOLATED, true),
            (GUARD, true),
            (LEARNING, false),
            (UNICAST_FLOOD, false),
            (MULTICAST_FLOOD, false),
            (BROADCAST_FLOOD, false),
        ] {
            port.put(setting, &[u8::from(on)]);
        }
    });
    message
}

/// Says for good behind which port a MAC is.
pub fn add_place(port: u32, mac: [u8; 6]) -> Message {
    let mut header = vec![AF_BRIDGE, 0, 0, 0];
    header.extend(port.to_ne_bytes());
    header.extend(NUD_NOARP.to_ne_bytes());
    header.extend([NTF_MASTER | NTF_STICKY, 0]);
    let flags = CREATE | REPLACE;
    let mut message = Message::new("place a MAC at a port", RTM_NEWNEIGH, flags, &header);
    message.put(NDA_LLADDR, &mac);
    message
}

/// The table of a bridge, in no order.
///
/// # Errors
/// The kernel's refusal.
pub fn places(socket: &mut Socket, bridge: u32) -> Result<Vec<Place>> {
    let mut header = [0; 12];
    header[0] = AF_BRIDGE;
    let message = Message::new("list a bridge's table", RTM_GETNEIGH, 0, &header);
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let (header, rest) = reply.body.split_first_chunk::<12>()?;
        let link = ne32(&header[4..8])?;
        let master = find(rest, NDA_MASTER).and_then(ne32);
        let ours = reply.kind == RTM_NEWNEIGH && (master == Some(bridge) || link == bridge);
        ours.then_some(())?;
        Some(Place {
            mac: find(rest, NDA_LLADDR)?.to_vec(),
            link,
            state: u16::from_ne_bytes([header[8], header[9]]),
            sticky: header[10] & NTF_STICKY != 0,
        })
    };
    Ok(replies.iter().filter_map(read).collect())
}

/// The ports of a bridge.
///
/// # Errors
/// The kernel's refusal.
pub fn ports(socket: &mut Socket, bridge: u32) -> Result<Vec<Link>> {
    let message = Message::new("list links", RTM_GETLINK, 0, &link_header(0, 0, 0));
    let replies = socket.dump(&message)?;
    let read = |reply: &Reply| {
        let mut rest = attributes(reply.body.get(16..)?);
        let is_port = rest.any(|(kind, value)| kind == IFLA_MASTER && ne32(value) == Some(bridge));
        is_port.then(|| Link::read(reply))?
    };
    Ok(replies.iter().filter_map(read).collect())
}

/// Turns spanning tree off: nobody's frames decide then which ports of a bridge pass any.
pub fn no_spanning_tree(bridge: u32) -> Message {
    let header = link_header(bridge, 0, 0);
    let mut message = Message::new("turn spanning tree off", RTM_NEWLINK, 0, &header);
    message.nest(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, "bridge");
        info.nest(IFLA_INFO_DATA, |data| {
            data.ne32(IFLA_BR_STP_STATE, 0);
        });
    });
    message
}
