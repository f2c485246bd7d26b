//! The way of frames between a VMM and passt: two sockets, and the filter between them. Both speak QEMU's framing, a
//! length of four bytes, most significant first, and then the frame (`net/stream.c`; passt's `tap.c`).

#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::frames::{ETHERNET, Policy, Sender, Verdict, verdict};
use crate::sys;

/// The length before a frame, in bytes.
const PREFIX: usize = 4;
/// The longest frame. Who speaks of a longer one has lost count or lies.
const LONGEST: usize = 64 * 1024 + ETHERNET;
/// A whole frame and the most of a next one.
const ROOM: usize = 2 * (PREFIX + LONGEST);
/// How old what is known of the host's addresses may be when a frame is looked at.
const ADDRESSES_HOLD: Duration = Duration::from_secs(10);

/// Why no frames pass any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The VMM has closed its side: it ends.
    Vmm,
    /// passt has ended.
    Passt,
    /// The VMM or passt has spoken of a frame that is longer than any.
    Length(Sender),
}

impl End {
    /// For the VMM's log; nothing when nobody need be told.
    pub(super) fn in_words(self) -> Option<&'static str> {
        match self {
            Self::Vmm => None,
            Self::Passt => Some("the network has ended: passt has"),
            Self::Length(Sender::Guest) => Some("the network has ended: a frame too long for it"),
            Self::Length(Sender::World) => Some("the network has ended: passt sends no frames"),
        }
    }
}

/// A passt and a VMM that have each other for a neighbour. Ends passt when it is dropped.
pub(super) struct Link {
    vmm: OwnedFd,
    passt: OwnedFd,
    process: Child,
    policy: Policy,
    looked_at: Instant,
    out: Way,
    back: Way,
}

impl Link {
    /// `vmm` and `passt` are our ends of the connections to them, `process` is passt. The addresses of the host that
    /// the policy knows were read just now.
    pub(super) fn new(vmm: OwnedFd, passt: OwnedFd, process: Child, policy: Policy) -> Self {
        Self {
            vmm,
            passt,
            process,
            policy,
            looked_at: Instant::now(),
            // passt takes a length that comes in two pieces for none, so it gets each frame by one call.
            out: Way::new(true),
            back: Way::new(false),
        }
    }

    /// What is waited for: on the VMM's side and on that of passt. Nobody is read from whose last frames the other
    /// side has not taken yet.
    pub(super) fn waits_for(&self) -> [PollFd<'_>; 2] {
        let flags = |from: &Way, to: &Way| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !from.is_full());
            flags.set(PollFlags::OUT, to.is_full());
            flags
        };
        [
            PollFd::new(&self.vmm, flags(&self.out, &self.back)),
            PollFd::new(&self.passt, flags(&self.back, &self.out)),
        ]
    }

    /// Copies what is there: one read from each side, and all of it that the other side takes.
    ///
    /// # Errors
    /// The end of the link.
    pub(super) fn copy(&mut self, [vmm, passt]: [PollFlags; 2]) -> Result<(), End> {
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        if vmm.intersects(gone) {
            return Err(End::Vmm);
        }
        if passt.intersects(gone) {
            return Err(End::Passt);
        }
        if vmm.contains(PollFlags::IN) {
            self.look_at_addresses();
            self.out.fill(&self.vmm).map_err(|Closed| End::Vmm)?;
        }
        if passt.contains(PollFlags::IN) {
            self.back.fill(&self.passt).map_err(|Closed| End::Passt)?;
        }
        let Self { policy, .. } = self;
        let judge = |sender| {
            let policy = &*policy;
            move |frame: &[u8]| verdict(sender, frame, policy)
        };
        let end = |stop, sender, closed| match stop {
            Stop::Closed => closed,
            Stop::Length => End::Length(sender),
        };
        let out = self.out.empty(&self.passt, judge(Sender::Guest));
        out.map_err(|stop| end(stop, Sender::Guest, End::Passt))?;
        let back = self.back.empty(&self.vmm, judge(Sender::World));
        back.map_err(|stop| end(stop, Sender::World, End::Vmm))
    }

    fn look_at_addresses(&mut self) {
        if self.looked_at.elapsed() < ADDRESSES_HOLD {
            return;
        }
        self.looked_at = Instant::now();
        // Out of memory or descriptors: what was known is better than nothing.
        if let Ok(addresses) = sys::own_addresses() {
            self.policy.set_host(&addresses);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It may have ended by itself, and is waited for in either case.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The other side is gone.
struct Closed;

#[derive(Debug, PartialEq, Eq)]
enum Stop {
    Closed,
    /// There was a frame too long.
    Length,
}

/// Frames on their way in one direction: a bounded buffer, in which come first frames that pass and have not been
/// taken yet, then what has not been looked at.
struct Way {
    buffer: Box<[u8]>,
    /// Where what passes begins, and its end.
    start: usize,
    passed: usize,
    /// The end of all that was read.
    end: usize,
    one_by_one: bool,
}

impl Way {
    fn new(one_by_one: bool) -> Self {
        Self {
            buffer: vec![0; ROOM].into(),
            start: 0,
            passed: 0,
            end: 0,
            one_by_one,
        }
    }

    /// Whether something waits for being taken: then no more is read.
    fn is_full(&self) -> bool {
        self.start < self.passed
    }

    /// Reads once.
    fn fill(&mut self, from: &OwnedFd) -> Result<(), Closed> {
        if self.is_full() {
            return Ok(());
        }
        // At most an unfinished frame is left, so there is room for its rest.
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        (self.start, self.passed) = (0, 0);
        match rustix::net::recv(from, &mut self.buffer[self.end..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(Closed),
            Ok((length, _)) => {
                self.end += length;
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(Closed),
        }
    }

    /// Gives away what passes, for as long as it is taken.
    fn empty(&mut self, to: &OwnedFd, judge: impl Fn(&[u8]) -> Verdict) -> Result<(), Stop> {
        loop {
            if !self.is_full() {
                self.look(&judge)?;
            }
            if !self.is_full() {
                return Ok(());
            }
            let waiting = &self.buffer[self.start..self.passed];
            match rustix::net::send(to, waiting, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(length) => self.start += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Stop::Closed),
            }
        }
    }

    /// Looks at whole frames until one passes and, unless they go one by one, as far as more do.
    fn look(&mut self, judge: impl Fn(&[u8]) -> Verdict) -> Result<(), Stop> {
        while let Some((prefix, rest)) = self.buffer[self.passed..self.end].split_first_chunk() {
            let length = u32::from_be_bytes(*prefix) as usize;
            if length > LONGEST {
                return Err(Stop::Length);
            }
            let Some(frame) = rest.get(..length) else {
                return Ok(());
            };
            let next = self.passed + PREFIX + length;
            match judge(frame) {
                Verdict::Pass => {
                    self.passed = next;
                    if self.one_by_one {
                        return Ok(());
                    }
                }
                // Goes when those before it are gone.
                Verdict::Drop if self.is_full() => return Ok(()),
                Verdict::Drop => (self.start, self.passed) = (next, next),
            }
        }
        Ok(())
    }
}

/// Whether the host has a resolver for passt to hand questions to. Without one it hands them to this host's loopback.
pub(super) fn has_resolver(resolv_conf: &str) -> bool {
    resolv_conf.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("nameserver")
            && words
                .next()
                .is_some_and(|address| address.parse::<Ipv4Addr>().is_ok())
    })
}
