//! Copies what a VMM says into rings until it has ended. The VMM never waits for a reader that is not there. Some
//! words end it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Signal;

use super::link::Link;
use crate::ring::RingWriter;

/// Bytes that a dead VMM's pipes can still hold: a pipe's greatest default size. More comes from somebody else.
const LEFT_IN_PIPE: usize = 1024 * 1024;

/// How long nothing may follow last words.
const SETTLED: Duration = Duration::from_secs(1);

/// A descriptor and the ring that its bytes go to.
pub(super) struct Source {
    fd: OwnedFd,
    ring: RingWriter,
    ends_on: Option<Watchword>,
    last_words: Option<LastWords>,
}

impl Source {
    pub(super) fn new(fd: OwnedFd, ring: RingWriter) -> Self {
        // Fails for no kind of descriptor that comes here; one that blocks would be read only when it is ready.
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        Self {
            fd,
            ring,
            ends_on: None,
            last_words: None,
        }
    }

    /// The process is to be killed once it has said `word` here.
    pub(super) fn ending_on(mut self, word: Option<&str>) -> Self {
        self.ends_on = word.map(Watchword::new);
        self
    }

    /// The process is to be killed when a line that ends with `words` was the last here for a while.
    pub(super) fn ending_after(mut self, words: Option<&str>) -> Self {
        self.last_words = words.map(LastWords::new);
        self
    }

    fn is_final(&self) -> bool {
        self.ends_on.as_ref().is_some_and(|word| word.heard)
            || self.settles_in() == Some(Duration::ZERO)
    }

    /// How long nothing more may come until this is final.
    fn settles_in(&self) -> Option<Duration> {
        let since = self.last_words.as_ref()?.since?;
        Some(SETTLED.saturating_sub(since.elapsed()))
    }

    /// Records what is there. `None` when nothing will ever come again.
    fn record(&mut self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(0) => return None,
                Ok(length) => {
                    // A full disk costs the words, not the machine.
                    let _ = self.ring.append(&buffer[..length]);
                    if let Some(word) = &mut self.ends_on {
                        word.listen(&buffer[..length]);
                    }
                    if let Some(words) = &mut self.last_words {
                        words.listen(&buffer[..length]);
                    }
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

/// Bytes that are waited for in a stream.
struct Watchword {
    word: Vec<u8>,
    /// The end of what was said, for a word that comes in two pieces.
    last: Vec<u8>,
    heard: bool,
}

impl Watchword {
    fn new(word: &str) -> Self {
        Self {
            word: word.as_bytes().to_vec(),
            last: Vec::new(),
            heard: false,
        }
    }

    fn listen(&mut self, bytes: &[u8]) {
        self.last.extend_from_slice(bytes);
        let mut windows = self.last.windows(self.word.len().max(1));
        self.heard |= windows.any(|window| window == self.word);
        let kept = self.word.len().saturating_sub(1);
        self.last.drain(..self.last.len().saturating_sub(kept));
    }
}

/// Words that mean something when they are the last.
struct LastWords {
    words: Vec<u8>,
    /// The end of what was said, with room for a line's end.
    last: Vec<u8>,
    since: Option<Instant>,
}

impl LastWords {
    fn new(words: &str) -> Self {
        Self {
            words: words.as_bytes().to_vec(),
            last: Vec::new(),
            since: None,
        }
    }

    fn listen(&mut self, bytes: &[u8]) {
        self.last.extend_from_slice(bytes);
        let kept = self.words.len() + b"\r\n".len();
        self.last.drain(..self.last.len().saturating_sub(kept));
        let are_last = self.last.trim_ascii_end().ends_with(&self.words);
        self.since = are_last.then(Instant::now);
    }
}

/// Records until `process` has ended and all that it said before is on file, and copies its frames for as long as there
/// is a link for them.
pub(super) fn until_end(
    sources: &mut [Option<Source>; 3],
    link: &mut Option<Link>,
    process: &OwnedFd,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // With frames the loop is a busy place: no memory is asked for in it.
        let none = || PollFd::new(process, PollFlags::empty());
        let said = |n: usize| match &sources[n] {
            Some(source) => PollFd::new(&source.fd, PollFlags::IN),
            None => none(),
        };
        let waits_for = link.as_ref().map(Link::waits_for);
        let [vmm, passt] = waits_for.unwrap_or_else(|| [none(), none()]);
        let ended = PollFd::new(process, PollFlags::IN);
        let mut fds = [ended, said(0), said(1), said(2), vmm, passt];
        let settles = sources.iter().flatten().filter_map(Source::settles_in);
        let timeout = settles.min().map(|left| Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            // Out of kernel memory: what was to be recorded is lost, the end is not.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
        let [ended, out, err, events, vmm, passt] = fds.map(|fd| fd.revents());
        if !ended.is_empty() {
            for source in sources.iter_mut().flatten() {
                source.drain(&mut buffer);
            }
            return;
        }
        if let Some(Err(end)) = link.as_mut().map(|link| link.copy([vmm, passt])) {
            *link = None;
            if let Some((words, log)) = end.in_words().zip(sources[1].as_mut()) {
                let _ = log.ring.append(format!("hutch: {words}\n").as_bytes());
            }
        }
        for (slot, ready) in sources.iter_mut().zip([out, err, events]) {
            let ended = |source: &mut Source| source.record(&mut buffer).is_none();
            let over = !ready.is_empty() && slot.as_mut().is_some_and(ended);
            if let Some(source) = slot.as_mut().filter(|source| source.is_final()) {
                // What it said is on file before its end is. One that is gone already needs no signal.
                let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
                source.last_words = None;
            }
            if over {
                *slot = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_heard_in_pieces_too() {
        let text = b"{\n  \"event\": \"rebooting\"\n}";
        for at in 0..text.len() {
            let mut word = Watchword::new("\"rebooting\"");
            word.listen(&text[..at]);
            word.listen(&text[at..]);
            assert!(word.heard, "{at}");
            word.listen(b"more");
            assert!(word.heard);
        }
        let mut word = Watchword::new("\"rebooting\"");
        for _ in 0..3 {
            word.listen(b"\"rebooted\" rebooting");
        }
        assert!(!word.heard);
        assert!(word.last.len() < word.word.len());
    }

    #[test]
    fn last_words_are_the_last() {
        let mut words = LastWords::new("reboot: System halted");
        let mut are_last_after = |text: &str| {
            words.listen(text.as_bytes());
            words.since.is_some()
        };
        assert!(!are_last_after("[ 1.0] reboot: System"));
        assert!(are_last_after(" halted"));
        assert!(are_last_after("\r"));
        assert!(are_last_after("\n"));
        assert!(!are_last_after("# "), "somebody only read it to us");
        assert!(!are_last_after("reboot: System halted, and more\r\n"));
        assert!(are_last_after("[ 2.0] reboot: System halted\r\n"));
    }
}
