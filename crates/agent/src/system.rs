//! What only a guest may do to itself. There is no implementation on a host: then there is no `System` at all, and
//! everything here is answered as unapplied.

pub mod guest;
mod host_keys;
mod netlink;

use std::io;

use hutch_guest::pb;

/// The guest's hostname, clock, random pool, network and file systems. All calls may block.
pub trait System: Send + Sync {
    /// Writes the machine's id where programs look for it, and gives a machine that had another one SSH host keys of its own,
    /// where it has any: a copy of a disk has those of its original.
    fn set_machine_id(&self, id: &str) -> io::Result<()>;
    /// Sets the hostname and lets it resolve.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// Sets the wall clock.
    fn set_clock(&self, unix_ms: i64) -> io::Result<()>;
    /// Mixes in entropy and forces a reseed.
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()>;
    /// Gives the named interfaces exactly these addresses, and their default routes.
    fn set_addresses(&self, addresses: &[pb::Address], mtu: u32) -> io::Result<()>;
    /// Writes the resolver's configuration.
    fn set_dns(&self, servers: &[String], search: &[String]) -> io::Result<()>;
    /// Lets these keys log in as root, beside those that may already.
    fn authorize_keys(&self, keys: &[String]) -> io::Result<()>;
    /// Grows the root file system to the size of its disk.
    fn grow_root(&self) -> io::Result<()>;
    /// Brings the root file system to rest, consistent on its disk.
    fn freeze_root(&self) -> io::Result<()>;
    /// Ends [`System::freeze_root`]; no error when it was not frozen.
    fn thaw_root(&self) -> io::Result<()>;
}
