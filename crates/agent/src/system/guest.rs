//! The real thing: this kernel is the guest's own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use hutch_guest::pb;
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};

use super::{System, host_keys, netlink};
use crate::accounts;
use crate::status;
use crate::sys;

/// `EXT4_SUPER_MAGIC` of `linux/magic.h`.
const EXT4_MAGIC: u64 = 0xef53;
/// See machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";
/// Marks the line of ours in `/etc/hosts`.
const MARK: &str = "# hutch";
/// Files of the image that we look into are read so far.
const LIMIT: u64 = 1024 * 1024;

/// This guest.
pub struct Guest {
    root: File,
}

impl Guest {
    /// Brings the loopback interface up, which every guest has.
    ///
    /// # Errors
    /// The root directory cannot be opened.
    pub fn new() -> io::Result<Self> {
        if let Err(error) = netlink::up("lo") {
            crate::error::say(&format!("bring lo up: {error}"));
        }
        Ok(Self {
            root: File::open("/")?,
        })
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Letters, digits, dots and hyphens: what a name in a hosts or resolver file may be made of.
fn check_name(name: &str) -> io::Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.is_empty() || name.len() > 253 || !name.bytes().all(fits) {
        return Err(invalid(format!("{name:?} is no host name")));
    }
    Ok(())
}

fn read(path: &str) -> String {
    let mut text = Vec::new();
    if let Ok(file) = File::open(path) {
        let _ = file.take(LIMIT).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Replaces a file of the image by rename, unless it says the same already.
fn replace(path: &str, text: &str) -> io::Result<()> {
    if read(path) == text {
        return Ok(());
    }
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = format!("{path}.hutch-new");
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)?;
    let written = file.write_all(text.as_bytes());
    written
        .and_then(|()| fs::rename(&temporary, path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
}

/// An id as machine-id(5) wants it: 32 hexadecimal digits. Ours is a prefix and a ULID, whose 26 characters of Crockford's
/// base 32 hold 128 bits.
fn machine_id(id: &str) -> Option<String> {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let (_, ulid) = id.split_once('-')?;
    let digits = ulid
        .bytes()
        .map(|byte| DIGITS.iter().position(|digit| *digit == byte));
    let digits: Option<Vec<_>> = digits.collect();
    let digits = digits.filter(|digits| digits.len() == 26)?;
    let number = digits
        .iter()
        .fold(0u128, |number, digit| (number << 5) | *digit as u128);
    Some(format!("{number:032x}"))
}

impl System for Guest {
    fn set_machine_id(&self, id: &str) -> io::Result<()> {
        let id = machine_id(id).ok_or_else(|| invalid(format!("{id:?} is no id of a machine")))?;
        let id = format!("{id}\n");
        // Somebody else until now: the image, or what this is a copy of. When this is broken off, it is done again.
        let renewed = match read(MACHINE_ID) == id {
            true => Ok(()),
            false => host_keys::renew(
                Path::new(host_keys::DIRECTORY),
                Path::new(host_keys::PROGRAM),
            ),
        };
        replace(MACHINE_ID, &id).and(renewed)
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        if name.len() > 64 {
            return Err(invalid(format!("{name:?} has more than 64 bytes")));
        }
        rustix::system::sethostname(name.as_bytes())?;
        // /etc/hostname is the image's: our PID 1 does not read it. Without a line in /etc/hosts the machine's own name
        // would be asked of name servers.
        let hosts = read("/etc/hosts");
        let mut lines: Vec<&str> = hosts.lines().filter(|line| !line.ends_with(MARK)).collect();
        if lines.is_empty() {
            lines = vec![
                "127.0.0.1 localhost",
                "::1 localhost ip6-localhost ip6-loopback",
            ];
        }
        let short = name.split('.').next().unwrap_or(name);
        let names = if short == name {
            name.to_owned()
        } else {
            format!("{name} {short}")
        };
        let own = format!("127.0.1.1 {names} {MARK}");
        lines.push(&own);
        let written = replace("/etc/hosts", &(lines.join("\n") + "\n"));
        let partly = |error| {
            invalid(format!(
                "set, but not in /etc/hosts: {}",
                status::text(&error)
            ))
        };
        written.map_err(partly)
    }

    fn set_clock(&self, unix_ms: i64) -> io::Result<()> {
        let time = Timespec {
            tv_sec: unix_ms.div_euclid(1000),
            tv_nsec: unix_ms.rem_euclid(1000) * 1_000_000,
        };
        Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
    }

    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        let random = OpenOptions::new().write(true).open("/dev/urandom")?;
        sys::fs::add_entropy(random, bytes)
    }

    fn set_addresses(&self, addresses: &[pb::Address], mtu: u32) -> io::Result<()> {
        netlink::configure(addresses, mtu)
    }

    fn set_dns(&self, servers: &[String], search: &[String]) -> io::Result<()> {
        let mut text = String::new();
        for domain in search {
            check_name(domain)?;
        }
        if !search.is_empty() {
            text += &format!("search {}\n", search.join(" "));
        }
        for server in servers {
            let address: IpAddr = server
                .parse()
                .map_err(|_| invalid(format!("{server:?} is no address")))?;
            text += &format!("nameserver {address}\n");
        }
        replace("/etc/resolv.conf", &text)
    }

    fn authorize_keys(&self, keys: &[String]) -> io::Result<()> {
        if let Some(bad) = keys.iter().find(|key| key.contains(['\n', '\r', '\0'])) {
            return Err(invalid(format!("{bad:?} is not one line")));
        }
        let home = accounts::of_uid(rustix::process::Uid::ROOT).home;
        let dir = Path::new(&home).join(".ssh");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        let path = dir.join("authorized_keys");
        let old = read(&path.to_string_lossy());
        let known: Vec<&str> = old.lines().map(str::trim).collect();
        let fresh: Vec<&str> = keys.iter().map(|key| key.trim()).collect();
        let fresh = fresh.into_iter().filter(|key| !known.contains(key));
        let mut text = fresh.fold(String::new(), |text, key| text + key + "\n");
        if !text.is_empty() && !old.is_empty() && !old.ends_with('\n') {
            text.insert(0, '\n');
        }
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(text.as_bytes())
    }

    fn grow_root(&self) -> io::Result<()> {
        let stat = rustix::fs::fstatfs(&self.root)?;
        if u64::try_from(stat.f_type) != Ok(EXT4_MAGIC) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the root is not ext4",
            ));
        }
        let device = self.root.metadata()?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let sectors = read(&format!("/sys/dev/block/{major}:{minor}/size"));
        let sectors: u64 = sectors
            .trim()
            .parse()
            .map_err(|_| invalid("no disk below /".into()))?;
        let block = u64::try_from(stat.f_bsize).unwrap_or(0).max(1024);
        let wanted = sectors.saturating_mul(512) / block;
        // The superblock's count, since statfs leaves out what the file system itself takes.
        let now = superblock_blocks(major, minor).unwrap_or(0);
        if wanted <= now {
            return Ok(());
        }
        Ok(rustix::fs::ext4_ioc_resize_fs(&self.root, wanted)?)
    }

    fn freeze_root(&self) -> io::Result<()> {
        rustix::fs::sync();
        match sys::fs::freeze(&self.root) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => Ok(()),
            result => result,
        }
    }

    fn thaw_root(&self) -> io::Result<()> {
        match sys::fs::thaw(&self.root) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Ok(()),
            result => result,
        }
    }
}

/// The size that the file system on a device says it has, in its blocks: `s_blocks_count_lo`, and `_hi` with the 64bit
/// feature, of the superblock at byte 1024 (kernel documentation, filesystems/ext4).
fn superblock_blocks(major: u32, minor: u32) -> Option<u64> {
    let uevent = read(&format!("/sys/dev/block/{major}:{minor}/uevent"));
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let mut disk = File::open(Path::new("/dev").join(name)).ok()?;
    disk.seek(SeekFrom::Start(1024)).ok()?;
    let mut block = [0; 1024];
    disk.read_exact(&mut block).ok()?;
    let word = |at: usize| {
        let bytes = block.get(at..at + 4)?.try_into().ok()?;
        Some(u64::from(u32::from_le_bytes(bytes)))
    };
    let is_64bit = word(0x60)? & 0x80 != 0;
    let high = if is_64bit { word(0x150)? } else { 0 };
    Some(word(0x4)? | (high << 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ulid_is_a_machine_id() {
        let id = |text| machine_id(text);
        let largest = "mch-7zzzzzzzzzzzzzzzzzzzzzzzzz";
        assert_eq!(id(largest), Some("f".repeat(32)));
        let one = "mch-00000000000000000000000001";
        assert_eq!(id(one), Some(format!("{}1", "0".repeat(31))));
        for text in ["", "mch", "mch-", "mch-1", "mch-0000000000000000000000000u"] {
            assert_eq!(id(text), None, "{text}");
        }
    }
}
