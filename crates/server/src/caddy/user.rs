//! Whose process a Caddy is, and how that user gets to open a socket of ours.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use hutch_gateway::caddy::Admin;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// The other end of a connection.
pub(super) enum Peer {
    /// The user who listens at a socket.
    User(u32),
    /// Where somebody listens by TCP.
    Address(SocketAddr),
}

/// Connects to an admin API, and says nothing there.
pub(super) async fn connect(admin: &Admin, within: Duration) -> io::Result<Peer> {
    let connecting = async {
        match admin {
            // Of a socket that listens the kernel remembers who began that (SO_PEERCRED, unix(7)).
            Admin::Unix(path) => Ok(Peer::User(
                UnixStream::connect(path).await?.peer_cred()?.uid(),
            )),
            Admin::Tcp(address) => Ok(Peer::Address(
                TcpStream::connect(address).await?.peer_addr()?,
            )),
        }
    };
    timeout(within, connecting).await?
}

/// The user of the Caddy there.
///
/// # Errors
/// `NotFound`: it is there, but not as a process of this host.
pub(super) async fn of(admin: &Admin, within: Duration) -> io::Result<u32> {
    let address = match connect(admin, within).await {
        Ok(Peer::User(uid)) => return Ok(uid),
        Ok(Peer::Address(address)) => address,
        // That is another one than ours, which has the same word.
        Err(error) => return Err(io::Error::other(error)),
    };
    let mut listeners = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // There is none of IPv6 when it is switched off.
        listeners.extend(
            fs::read_to_string(table)
                .iter()
                .flat_map(|text| text.lines())
                .filter_map(listener),
        );
    }
    let is_at = |ip: IpAddr| {
        let found = listeners
            .iter()
            .find(|(at, _)| *at == SocketAddr::new(ip, address.port()));
        found.map(|(_, uid)| *uid)
    };
    is_at(address.ip())
        .or_else(|| is_at(Ipv4Addr::UNSPECIFIED.into()))
        .or_else(|| is_at(Ipv6Addr::UNSPECIFIED.into()))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "whose process it is cannot be seen",
            )
        })
}

/// A line of `/proc/net/tcp` (proc_net_tcp(5)) about a socket that listens: where, and whose it is.
fn listener(line: &str) -> Option<(SocketAddr, u32)> {
    let mut words = line.split_ascii_whitespace();
    let (local, state) = (words.nth(1)?, words.nth(1)?);
    let uid = words.nth(3)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits in the host's order.
    let word = |at: usize| {
        u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16)
            .ok()
            .map(u32::to_ne_bytes)
    };
    let ip = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            IpAddr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    // TCP_LISTEN
    (state == "0A").then_some((SocketAddr::new(ip, port), uid))
}

/// Lets this user open the socket, and besides them only us and root.
pub(super) fn let_in(uid: u32, socket: &Path) -> io::Result<()> {
    let us = rustix::process::geteuid();
    if uid == 0 || uid == us.as_raw() {
        return Ok(());
    }
    if us.is_root() {
        return chown(socket, Some(uid), None);
    }
    let text = fs::read_to_string("/etc/passwd")? + &fs::read_to_string("/etc/group")?;
    let group = own_group(&text, uid)
        .ok_or_else(|| io::Error::other(format!("user {uid} has no group of their own")))?;
    chown(socket, None, Some(group))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o660))
}

/// The group of this user that is called as they are, thus has nobody else in it by default: from the lines of passwd(5)
/// and group(5).
fn own_group(text: &str, uid: u32) -> Option<u32> {
    let lines = || text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let user = lines().find(|line| line.len() == 7 && line[2].parse() == Ok(uid))?;
    let group = lines().find(|line| line.len() == 4 && line[0] == user[0] && line[2] == user[3])?;
    group[2].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_read_as_the_kernel_writes_it() {
        let line = "   0: 0100007F:07E3 00000000:0000 0A 00000000:00000000 00:00000000 00000000   998        0 21 1 0 100 0";
        let at = "127.0.0.1:2019".parse().unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(listener(line), Some((at, 998)));
        }
        assert_eq!(
            listener(&line.replace(" 0A ", " 01 ")),
            None,
            "a connection"
        );
        assert_eq!(
            listener("  sl  local_address rem_address   st tx_queue rx_queue"),
            None
        );
        let v6 = line.replace("0100007F", "00000000000000000000000001000000");
        if cfg!(target_endian = "little") {
            assert_eq!(listener(&v6), Some(("[::1]:2019".parse().unwrap(), 998)));
        }
    }

    #[test]
    fn a_group_is_a_user_s_own_when_it_is_called_like_them() {
        let text = "caddy:x:998:997:Caddy:/var/lib/caddy:/usr/sbin/nologin\n\
            web:x:33:100::/:/bin/sh\ncaddy:x:997:\nusers:x:100:\n";
        assert_eq!(own_group(text, 998), Some(997));
        assert_eq!((own_group(text, 33), own_group(text, 5)), (None, None));
    }

    #[tokio::test]
    async fn who_listens_is_found_by_socket_and_by_port() {
        let us = rustix::process::geteuid().as_raw();
        let within = Duration::from_secs(10);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let absent = of(&Admin::Unix(path.clone()), within).await.unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::Other);
        let _unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(of(&Admin::Unix(path), within).await.unwrap(), us);
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = Admin::Tcp(tcp.local_addr().unwrap().to_string());
        assert_eq!(of(&admin, within).await.unwrap(), us);
    }
}
