//! What neither std nor rustix offers safely: the steps between fork and exec, signal dispositions, the time stamp counter,
//! taps, this host's addresses and Landlock's version. Everything `unsafe` of this crate is here.
#![expect(
    unsafe_code,
    reason = "fork, signal dispositions, rdtsc and taps have no safe interface"
)]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::FdFlags;
use rustix::process::{Gid, PTracer, Pid, Resource, Rlimit, Signal, Uid};
use rustix::thread::{CapabilitySet, UnshareFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The signals that would end a shim whose session or server is being stopped.
const STOPPING: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT];

/// Ignores what a terminal or a service manager sends to end a group of processes, and writes to closed pipes.
pub(crate) fn ignore_stopping_signals() {
    for signal in STOPPING.into_iter().chain([libc::SIGPIPE]) {
        // SAFETY: SIG_IGN installs no code, and all of these may be ignored.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Closes every descriptor above the standard three but these. Only for a process that has opened none of its own yet.
pub(crate) fn close_inherited_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<_> = kept
        .iter()
        .filter_map(|fd| libc::c_uint::try_from(*fd).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 3;
    let last = libc::c_uint::MAX;
    for (from, to) in kept
        .into_iter()
        .map(|fd| (fd, fd.saturating_sub(1)))
        .chain([(last, last)])
    {
        // SAFETY: closes numbers that no value of this process owns, as the caller promises.
        if first <= to && unsafe { libc::close_range(first, to, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        first = from.saturating_add(1).max(first);
    }
    Ok(())
}

/// Lets the child of `command` inherit these under their present numbers. They stay open until it is spawned.
pub(crate) fn hand_over(command: &mut Command, fds: Vec<RawFd>) {
    let inherit = move || {
        for fd in &fds {
            // SAFETY: the caller holds these descriptors open until after the spawn.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes plain system calls on data that was allocated before the fork.
    unsafe { command.pre_exec(inherit) };
}

/// What a child does to itself between fork and exec.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    /// Files that a process joins a cgroup by.
    pub(crate) join: Vec<RawFd>,
    /// Descriptors that it keeps, under their present numbers.
    pub(crate) keep: Vec<RawFd>,
    /// User, group and further groups, when they change.
    pub(crate) ids: Option<(u32, u32, Vec<u32>)>,
    /// Whether it gets a network namespace of its own, with nothing in it: for that it must begin as root.
    pub(crate) own_network: bool,
    /// Soft and hard limit alike.
    pub(crate) limits: Vec<(Resource, u64)>,
    /// Whether a later exec may give it privileges.
    pub(crate) gains_privileges: bool,
}

/// Makes the child of `command` set itself up as `child` says, gain no privileges by exec unless it says so, and die with this
/// thread: until an exec that gives it privileges, at which the kernel forgets that.
pub(crate) fn set_up(command: &mut Command, child: Child) {
    let parent = rustix::process::getpid();
    let groups: Vec<Gid> = child
        .ids
        .iter()
        .flat_map(|(_, _, groups)| groups.iter().map(|gid| Gid::from_raw(*gid)))
        .collect();
    // SAFETY: the closure makes plain system calls on data that was allocated before the fork.
    unsafe { command.pre_exec(move || between_fork_and_exec(&child, &groups, parent)) };
}

fn between_fork_and_exec(child: &Child, groups: &[Gid], parent: Pid) -> io::Result<()> {
    for signal in STOPPING {
        // SAFETY: SIG_DFL installs no code.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    for fd in &child.join {
        // SAFETY: the caller of `set_up` holds these descriptors open until after the spawn.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        // First, while it may: `0` is whoever writes. Whether it worked is looked at from outside.
        let _ = rustix::io::write(fd, b"0");
    }
    for fd in &child.keep {
        // SAFETY: the caller of `set_up` holds these descriptors open until after the spawn.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
    }
    for (resource, limit) in &child.limits {
        let limit = Some(*limit);
        rustix::process::setrlimit(
            *resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )?;
    }
    if child.own_network {
        // SAFETY: shares and unshares no descriptors.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    }
    if let Some((uid, gid, _)) = &child.ids {
        let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
        // So that it may open it again by name, for VMMs that write their own words to files only.
        rustix::fs::fchown(rustix::stdio::stderr(), Some(uid), Some(gid))?;
        drop_bounding_set();
        // After fork there is one thread, so that of the thread is that of the process.
        rustix::thread::set_thread_groups(groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    if child.ids.is_none() {
        // So that the next server too, which is no ancestor, may read a guest's memory. Only Yama has to be told.
        let _ = rustix::process::set_ptracer(PTracer::Any);
    }
    if !child.gains_privileges {
        rustix::thread::set_no_new_privs(true)?;
    }
    // After the change of user, which clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        // The parent died before the signal was armed.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// A tap whose packets have a `virtio_net_hdr` and nothing else before them: what every VMM expects.
const TAP: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// It stays when nobody has it open (`IFF_PERSIST` in `linux/if_tun.h`, without a name here).
const PERSISTENT: libc::c_int = 0x0800;

/// Makes `tun`, an open `/dev/net/tun`, the way into the tap `name` (`TUNSETIFF`), which may be no longer than 15 bytes. A
/// missing one is made, where the calling thread may make it, and is gone with `tun` again.
pub(crate) fn attach_tap(tun: impl AsFd, name: &str) -> io::Result<()> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let last = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..last].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = TAP as libc::c_short;
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: the request outlives the call, which reads and writes no more than it.
    match unsafe { libc::ioctl(tun, libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the tap that `tun` is attached to stays without it (`TUNGETIFF`).
pub(crate) fn tap_stays(tun: impl AsFd) -> io::Result<bool> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: the request outlives the call, which writes no more than it.
    if unsafe { libc::ioctl(tun, libc::TUNGETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this member is the one that the call has written.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(flags & PERSISTENT != 0)
}

/// The IPv4 addresses of all interfaces of this host, as the calling thread sees it.
pub(crate) fn own_addresses() -> io::Result<Vec<Ipv4Addr>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the call writes one pointer.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut all = Vec::new();
    let mut next = first;
    // SAFETY: what the call has made is a list of these that ends with a null pointer, and stays until it is freed.
    while let Some(one) = unsafe { next.as_ref() } {
        next = one.ifa_next;
        // SAFETY: the address is null or one of the family that it begins with.
        let family = unsafe { one.ifa_addr.as_ref() }.map(|address| address.sa_family);
        if family == Some(libc::AF_INET as libc::sa_family_t) {
            // SAFETY: of this family it is a sockaddr_in, for which it is aligned.
            let address = unsafe { &*one.ifa_addr.cast::<libc::sockaddr_in>() };
            all.push(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()));
        }
    }
    // SAFETY: it came from the call above, and nothing refers to it any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(all)
}

/// Gives the calling thread, and what it starts, a network of its own.
#[cfg(test)]
pub(crate) fn own_network() -> io::Result<()> {
    // SAFETY: shares and unshares no descriptors.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// The version of the kernel's Landlock interface; 0 where there is none or it is switched off.
pub(crate) fn landlock_abi() -> i32 {
    const VERSION: libc::c_uint = 1;
    let nothing: *const libc::c_void = std::ptr::null();
    // SAFETY: with this flag the call takes no memory of ours, makes nothing and only returns a number.
    let abi =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, VERSION) };
    i32::try_from(abi).unwrap_or(0).max(0)
}

/// Lets exec give none of root's capabilities. Where even this is forbidden (a container), `no_new_privs` sees to that.
fn drop_bounding_set() {
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if rustix::thread::remove_capability_from_bounding_set(one).is_err() {
            // It may not, or there are no more.
            return;
        }
    }
}

/// Lets tasks wait until a descriptor is readable. Within a tokio runtime.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives, and the AsyncFd owns it and never gives it out mutably.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? })
}

/// Takes over a descriptor that this process inherited under a number agreed with its parent.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: F_GETFD reads a flag of a number and fails on one that is not open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nothing else in this process owns a number that only the parent knew.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Listens on a vsock port of this guest.
#[cfg(feature = "stub")]
pub(crate) fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let (family, flags) = (AddressFamily::VSOCK, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: pointer and size describe `address`, which outlives the call.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => rustix::net::listen(&socket, 8)?,
        _ => return Err(io::Error::last_os_error()),
    }
    Ok(socket)
}

/// The rate of the time stamp counter in kHz, measured once against the raw monotonic clock.
#[cfg(target_arch = "x86_64")]
pub(crate) fn tsc_khz() -> u64 {
    use std::sync::OnceLock;
    use std::time::Duration;

    static RATE: OnceLock<u64> = OnceLock::new();
    /// Reads both clocks together: the pair whose clock reading took the fewest ticks was disturbed the least.
    fn both() -> (u64, u64) {
        let one = || {
            // SAFETY: rdtsc is part of the x86-64 baseline; Linux leaves it enabled.
            let before = unsafe { core::arch::x86_64::_rdtsc() };
            let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
            // SAFETY: as above.
            let after = unsafe { core::arch::x86_64::_rdtsc() };
            let ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
            (after - before, before + (after - before) / 2, ns)
        };
        let best = (0..16).map(|_| one()).min_by_key(|(took, ..)| *took);
        let (_, ticks, ns) = best.expect("sixteen readings have a least one");
        (ticks, ns)
    }
    *RATE.get_or_init(|| {
        let (ticks, ns) = both();
        std::thread::sleep(Duration::from_millis(20));
        let (later_ticks, later_ns) = both();
        let (ticks, ns) = (later_ticks - ticks, (later_ns - ns).max(1));
        (u128::from(ticks) * 1_000_000 / u128::from(ns)) as u64
    })
}

/// Memory of this process that is mapped as a VMM maps its guest's. Stays until the process ends.
#[cfg(test)]
pub(crate) struct Mapped {
    at: *mut u8,
    size: usize,
}

#[cfg(test)]
impl Mapped {
    /// Of a file, privately, or of nothing.
    pub(crate) fn new(size: usize, of: Option<&std::fs::File>) -> io::Result<Self> {
        let (flags, fd) = match of {
            Some(file) => (libc::MAP_PRIVATE, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where nothing is yet.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, fd, 0) };
        match at == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Self {
                at: at.cast(),
                size,
            }),
        }
    }

    /// Its address and size.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.at as u64, self.size as u64)
    }

    pub(crate) fn write(&self, at: usize, byte: u8) {
        assert!(at < self.size);
        // SAFETY: within the mapping, which nothing else refers to.
        unsafe { self.at.add(at).write_volatile(byte) };
    }

    pub(crate) fn read(&self, at: usize) -> u8 {
        assert!(at < self.size);
        // SAFETY: as above.
        unsafe { self.at.add(at).read_volatile() }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_counter_has_a_plausible_and_stable_rate() {
        let khz = super::tsc_khz();
        assert!((100_000..20_000_000).contains(&khz), "{khz} kHz");
        assert_eq!(super::tsc_khz(), khz);
    }
}
