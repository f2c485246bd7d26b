//! Copies what a VMM says into rings until it has ended. The VMM never waits for a reader that is not there.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::ring::RingWriter;

/// Bytes that a dead VMM's pipes can still hold: a pipe's greatest default size. More comes from somebody else.
const LEFT_IN_PIPE: usize = 1024 * 1024;

/// A descriptor and the ring that its bytes go to.
pub(super) struct Source {
    fd: OwnedFd,
    ring: RingWriter,
}

impl Source {
    pub(super) fn new(fd: OwnedFd, ring: RingWriter) -> Self {
        // Fails for no kind of descriptor that comes here; one that blocks would be read only when it is ready.
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        Self { fd, ring }
    }

    /// Records what is there. `None` when nothing will ever come again.
    fn record(&mut self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(0) => return None,
                Ok(length) => {
                    // A full disk costs the words, not the machine.
                    let _ = self.ring.append(&buffer[..length]);
                    return Some(length);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Some(0),
                Err(_) => return None,
            }
        }
    }

    fn drain(&mut self, buffer: &mut [u8]) {
        let mut left = LEFT_IN_PIPE;
        while left > 0 {
            match self.record(buffer) {
                None | Some(0) => return,
                Some(length) => left = left.saturating_sub(length),
            }
        }
    }
}

/// Records until `process` has ended and all that it said before is on file.
pub(super) fn until_end(sources: &mut [Option<Source>; 3], process: &OwnedFd) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut fds = vec![PollFd::new(process, PollFlags::IN)];
        let open = sources.iter().flatten();
        fds.extend(open.map(|source| PollFd::new(&source.fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            // Out of kernel memory: what was to be recorded is lost, the end is not.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            for source in sources.iter_mut().flatten() {
                source.drain(&mut buffer);
            }
            return;
        }
        let mut ready = ready[1..].iter();
        for slot in sources.iter_mut().filter(|slot| slot.is_some()) {
            let ready = ready.next().is_some_and(|ready| *ready);
            let ended = |source: &mut Source| source.record(&mut buffer).is_none();
            if ready && slot.as_mut().is_some_and(ended) {
                *slot = None;
            }
        }
    }
}
