//! Signals: sending any number, and waiting for them synchronously in PID 1.
#![expect(
    unsafe_code,
    reason = "rustix offers neither raw signal numbers nor sigtimedwait"
)]

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// Sends `signal` to a process, or with a negative `pid` to a process group; `-1` is everybody but the caller.
///
/// # Errors
/// The kernel's answer, `ESRCH` when there is none.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed; the kernel checks both numbers.
    check(unsafe { libc::kill(pid, signal) })
}

/// Lets every signal through to this thread, whatever its starter had blocked.
///
/// # Errors
/// None that a kernel has.
pub fn unblock_all() -> io::Result<()> {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is written by sigemptyset before it is read.
    unsafe {
        check(libc::sigemptyset(none.as_mut_ptr()))?;
        check(libc::pthread_sigmask(
            libc::SIG_SETMASK,
            none.as_ptr(),
            std::ptr::null_mut(),
        ))
    }
}

/// A set of signals that are blocked in this thread, to be taken one by one.
pub struct SignalSet(libc::sigset_t);

impl SignalSet {
    /// Blocks `signals` in the calling thread.
    ///
    /// # Errors
    /// An unknown signal number.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is valid for writes, and initialised by sigemptyset before it is read.
        let set = unsafe {
            check(libc::sigemptyset(set.as_mut_ptr()))?;
            let mut set = set.assume_init();
            for signal in signals {
                check(libc::sigaddset(&raw mut set, *signal))?;
            }
            check(libc::pthread_sigmask(
                libc::SIG_BLOCK,
                &raw const set,
                std::ptr::null_mut(),
            ))?;
            set
        };
        Ok(Self(set))
    }

    /// Takes the next pending signal of the set; `None` when `timeout` passed first.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<i32> {
        let timeout = timeout.map(|time| libc::timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set is initialised, the info pointer may be null, and `timeout` is null or a live timespec.
        let signal =
            unsafe { libc::sigtimedwait(&raw const self.0, std::ptr::null_mut(), timeout) };
        (signal > 0).then_some(signal)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
