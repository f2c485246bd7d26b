//! Which server a command talks to, and with which key. What it says there is the commands' affair.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hutch_contract::client::{Client, Target};

use crate::error::Error;

/// Where a server listens unless told otherwise.
const DEFAULT_URL: &str = "http://127.0.0.1:8080";
const DEFAULT_PORT: u16 = 8080;

/// Says which server is meant.
#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub struct Place {
    /// http://HOST:PORT, https://HOST or unix:/path/hutch.sock [default: on this machine]
    #[arg(long, global = true, env = "HUTCH_URL", hide_env_values = true)]
    pub url: Option<String>,
    /// Data directory of the server on this machine
    #[arg(
        long,
        global = true,
        env = "HUTCH_DATA_DIR",
        hide_env_values = true,
        value_name = "DIR"
    )]
    pub data_dir: Option<PathBuf>,
}

impl Place {
    /// A client of the server that is meant.
    ///
    /// An explicit address gets HUTCH_TOKEN and no other key. The server on this machine is found by its socket, which
    /// needs no key, or else at the default address, with the administrator's key from the data directory.
    pub fn client(&self) -> Result<Client, Error> {
        let token = std::env::var("HUTCH_TOKEN")
            .ok()
            .filter(|token| !token.is_empty());
        let (target, token) = match self.url.as_deref().filter(|url| !url.is_empty()) {
            Some(url) => match url.strip_prefix("unix:") {
                Some(path) => (Target::Unix(path.into()), token),
                None => (Target::Url(url.to_owned()), token),
            },
            None => self.local(token)?,
        };
        let client = Client::new(target)?;
        Ok(match token {
            Some(token) => client.with_token(&token)?,
            None => client,
        })
    }

    /// The data directory of the server on this machine.
    pub fn data_dir(&self) -> Result<PathBuf, Error> {
        match self
            .data_dir
            .clone()
            .filter(|dir| !dir.as_os_str().is_empty())
        {
            Some(dir) => Ok(dir),
            None => default_data_dir().ok_or(Error::NoDataDir),
        }
    }

    fn local(&self, token: Option<String>) -> Result<(Target, Option<String>), Error> {
        let data_dir = self.data_dir()?;
        let socket = data_dir.join("hutch.sock");
        match UnixStream::connect(&socket) {
            Ok(_) => return Ok((Target::Unix(socket), token)),
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied && token.is_none() => {
                return Err(Error::Socket {
                    path: socket,
                    source,
                });
            }
            // No server, one that was killed, or a path too long for a socket's address.
            Err(_) => {}
        }
        let address = ([127, 0, 0, 1], DEFAULT_PORT).into();
        if TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            return Err(Error::NoServer {
                socket,
                url: DEFAULT_URL,
            });
        }
        let token = token.or_else(|| {
            trusted_listener(DEFAULT_PORT)
                .then(|| admin_key(&data_dir))
                .flatten()
        });
        Ok((Target::Url(DEFAULT_URL.to_owned()), token))
    }
}

/// Where a server of this user keeps its data unless told otherwise.
fn default_data_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/var/lib/hutch".into());
    }
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")));
    base.map(|base| base.join("hutch"))
}

fn admin_key(data_dir: &Path) -> Option<String> {
    let key = std::fs::read_to_string(data_dir.join("admin.key")).ok()?;
    Some(key.trim().to_owned()).filter(|key| !key.is_empty())
}

/// Whether only root and we ourselves listen on a port of this host. Without that, any user of the host could wait at
/// the default address for the administrator's key while our server is down.
fn trusted_listener(port: u16) -> bool {
    let table = ["/proc/net/tcp", "/proc/net/tcp6"]
        .map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let own = rustix::process::geteuid().as_raw();
    let mut uids = table
        .iter()
        .flat_map(|table| listeners(table, port))
        .peekable();
    uids.peek().is_some() && uids.all(|uid| uid == 0 || uid == own)
}

/// The owners of listening sockets on a port, from the text of `/proc/net/tcp` (Linux, `proc_net_tcp.rst`: local
/// address in the second column, state in the fourth, `0A` for listening, uid in the eighth).
fn listeners(table: &str, port: u16) -> impl Iterator<Item = u32> {
    table.lines().skip(1).filter_map(move |line| {
        let columns: Vec<_> = line.split_ascii_whitespace().collect();
        let (_, local_port) = columns.get(1)?.rsplit_once(':')?;
        let listens = *columns.get(3)? == "0A" && u16::from_str_radix(local_port, 16) == Ok(port);
        listens.then(|| columns.get(7)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_listening_port_is_known() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0\n   \
            1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000  1001        0 1 1 0 100 0 0 10 0\n   \
            2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1002        0 1 1 0 100 0 0 10 0\n";
        assert_eq!(listeners(table, 8080).collect::<Vec<_>>(), [1000]);
        assert_eq!(listeners(table, 8082).count(), 0);
    }

    #[test]
    fn a_listener_of_our_own_is_trusted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(trusted_listener(port));
        drop(listener);
        assert!(!trusted_listener(port), "nobody listens there");
    }
}
