//! What an interface is, asked by rtnetlink.

use std::io;

use hutch_netlink::{Protocol, Socket, route};

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
    let link = route::link(&mut Socket::open(Protocol::Route)?, name)?;
    Ok(link.map(|link| match link.tun {
        Some(tun) => Looks::Tun {
            is_tap: tun.is_tap,
            is_persistent: tun.is_persistent,
            owner: tun.owner,
        },
        None => Looks::Other { kind: link.kind },
    }))
}
