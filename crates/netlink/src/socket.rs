//! A blocking socket: requests with their acknowledgements, dumps, batches and events.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use crate::message::{ACK, DUMP, Message, REQUEST, Received, messages, verdict};
use crate::{Error, Result, sys};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const DUMP_INTERRUPTED: u16 = 0x10;
/// The kernel's datagrams stay below 32 KiB.
const BUFFER: usize = 64 * 1024;
/// Answers are queued here until we read them; the kernel grants this to `CAP_NET_ADMIN`.
const QUEUE: usize = 8 << 20;
/// A dump that ends is smaller.
const DUMP_LIMIT: usize = 512 << 20;
/// How often a dump begins again because something changed meanwhile.
const DUMPS: usize = 20;
/// Time for the kernel to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a socket talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours.
    Route,
    /// nf_tables and conntrack.
    Netfilter,
}

/// One message of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The type of the message.
    pub kind: u16,
    /// The header of its kind and its attributes.
    pub body: Vec<u8>,
}

/// A socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket for requests.
    ///
    /// # Errors
    /// The kernel has no such protocol, or descriptors have run out.
    pub fn open(protocol: Protocol) -> Result<Self> {
        Self::listening(protocol, 0)
    }

    /// Opens a socket that gets events of `groups`, a mask whose lowest bit is group 1.
    ///
    /// # Errors
    /// As [`Socket::open`]; the groups of netfilter need `CAP_NET_ADMIN`.
    pub fn listening(protocol: Protocol, groups: u32) -> Result<Self> {
        let protocol = match protocol {
            // NETLINK_ROUTE is protocol 0.
            Protocol::Route => None,
            Protocol::Netfilter => Some(rustix::net::netlink::NETFILTER),
        };
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )
        .map_err(Error::Socket)?;
        sys::explain_refusals(&fd).map_err(Error::Socket)?;
        // Without privilege the usual queue must do.
        let _ = sockopt::set_socket_recv_buffer_size_force(&fd, QUEUE);
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups)).map_err(Error::Socket)?;
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// The number by which the kernel tells this socket's changes from others' in events.
    ///
    /// # Errors
    /// None that has been seen.
    pub fn port(&self) -> Result<u32> {
        let address = rustix::net::getsockname(&self.fd).map_err(Error::Socket)?;
        let address = SocketAddrNetlink::try_from(address).map_err(Error::Socket)?;
        Ok(address.pid())
    }

    /// Sends all messages at once and waits until the kernel has dealt with each; it goes on after one that it refuses.
    ///
    /// # Errors
    /// The first refusal.
    pub fn apply(&mut self, messages: &[Message]) -> Result<()> {
        let Some(last) = messages.last() else {
            return Ok(());
        };
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.write(self.sequence, REQUEST | ACK, &mut bytes)?;
        }
        self.send(&bytes)?;
        let mut left = messages.len();
        let mut refusal = None;
        while left > 0 {
            self.each(last.what, |received| {
                let index = received.sequence.wrapping_sub(first) as usize;
                let (Some(message), NLMSG_ERROR) = (messages.get(index), received.kind) else {
                    return;
                };
                left = left.saturating_sub(1);
                if let Err(error) = acknowledged(message.what, received) {
                    refusal.get_or_insert(error);
                }
            })?;
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Asks for one object, or by [`Socket::dump`] for all; `None` when the kernel says that there is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn get(&mut self, message: &Message) -> Result<Option<Reply>> {
        match self.ask(message, ACK) {
            Ok((mut replies, _)) => Ok(replies.pop()),
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::NODEV)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks for all objects of a kind, and asks again when they changed meanwhile.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Reply>> {
        for _ in 0..DUMPS {
            if let (replies, false) = self.ask(message, DUMP)? {
                return Ok(replies);
            }
        }
        Err(Error::Lost)
    }

    fn ask(&mut self, message: &Message, flags: u16) -> Result<(Vec<Reply>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut bytes = Vec::new();
        message.write(sequence, REQUEST | flags, &mut bytes)?;
        self.send(&bytes)?;
        let (mut replies, mut size, mut interrupted) = (Vec::new(), 0, false);
        let mut end = None;
        while end.is_none() {
            self.each(message.what, |received| {
                if received.sequence != sequence || end.is_some() {
                    return;
                }
                interrupted |= received.flags & DUMP_INTERRUPTED != 0;
                match received.kind {
                    // A dump that breaks off says why in its last message.
                    NLMSG_ERROR | NLMSG_DONE => end = Some(acknowledged(message.what, received)),
                    kind => {
                        size += received.body.len();
                        let body = received.body.to_vec();
                        replies.push(Reply { kind, body });
                    }
                }
            })?;
            if size > DUMP_LIMIT {
                return Err(Error::Malformed(message.what));
            }
        }
        end.unwrap_or(Ok(()))?;
        Ok((replies, interrupted))
    }

    /// Sends messages as one datagram, and reads all that the kernel says: it deals with a datagram of netfilter
    /// before `send` returns. Only the last message is acknowledged.
    pub(crate) fn batch(&mut self, messages: &[Message]) -> Result<()> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let acknowledged_one = messages.len().saturating_sub(2);
        for (index, message) in messages.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let flags = if index == acknowledged_one { ACK } else { 0 };
            message.write(self.sequence, REQUEST | flags, &mut bytes)?;
        }
        self.discard();
        self.send(&bytes)?;
        let (mut refusal, mut done) = (None, false);
        self.drain(|received| {
            let index = received.sequence.wrapping_sub(first) as usize;
            let (Some(message), NLMSG_ERROR) = (messages.get(index), received.kind) else {
                return;
            };
            match acknowledged(message.what, received) {
                Ok(()) => done |= index == acknowledged_one,
                Err(error) => {
                    refusal.get_or_insert(error);
                }
            }
        })?;
        match refusal {
            Some(error) => Err(error),
            None if done => Ok(()),
            None => Err(Error::Lost),
        }
    }

    /// Hands on everything that is queued.
    ///
    /// # Errors
    /// [`Error::Lost`] when the queue was too short.
    pub(crate) fn drain(&mut self, mut each: impl FnMut(&Received<'_>)) -> Result<()> {
        while let Some(length) = self.receive()? {
            messages(&self.buffer[..length]).for_each(|received| each(&received));
        }
        Ok(())
    }

    /// Passes over everything that is queued: who only wants to be woken by events has nothing to read in them.
    pub fn discard(&mut self) {
        while !matches!(self.receive(), Ok(None) | Err(Error::Socket(_))) {}
    }

    /// Waits until there is something to read; false after `patience`, or when a signal came.
    ///
    /// # Errors
    /// None that has been seen.
    pub fn wait(&self, patience: Duration) -> Result<bool> {
        let patience = Timespec::try_from(patience).unwrap_or_default();
        let mut poll = [PollFd::new(&self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&patience)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(Error::Socket(errno)),
        }
    }

    /// Waits for a datagram and hands on its messages.
    fn each(&mut self, what: &'static str, mut each: impl FnMut(&Received<'_>)) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(length) = self.receive()? {
                let mut none = true;
                messages(&self.buffer[..length]).for_each(|received| {
                    none = false;
                    each(&received);
                });
                return if none {
                    Err(Error::Malformed(what))
                } else {
                    Ok(())
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Silent(what));
            }
            self.wait(left)?;
        }
    }

    fn receive(&mut self) -> Result<Option<usize>> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        loop {
            return match rustix::net::recv(&self.fd, &mut *self.buffer, flags) {
                Ok((received, whole)) if received == whole => Ok(Some(received)),
                Ok(_) | Err(Errno::NOBUFS) => Err(Error::Lost),
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => Err(Error::Socket(errno)),
            };
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let room = sockopt::socket_send_buffer_size(&self.fd).map_err(Error::Socket)?;
        if bytes.len() + 64 > room {
            sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len() + 64)
                .map_err(Error::Socket)?;
        }
        loop {
            return match rustix::net::send(&self.fd, bytes, SendFlags::empty()) {
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => Err(Error::Socket(errno)),
            };
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn acknowledged(what: &'static str, received: &Received<'_>) -> Result<()> {
    let (code, said) = verdict(received).unwrap_or_default();
    if code == 0 {
        return Ok(());
    }
    let errno = Errno::from_raw_os_error(code.saturating_neg().clamp(1, 4095));
    Err(Error::Refused { what, errno, said })
}
