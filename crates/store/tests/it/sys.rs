//! A disk whose fsync fails when asked to.
//!
//! The bundled SQLite calls the C function `fsync`; the linker takes the one of the program
//! before that of the C library.

#![expect(unsafe_code, reason = "takes the place of a function of the C library")]

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI64, Ordering};

/// Calls until the one that fails; never when negative.
static LEFT: AtomicI64 = AtomicI64::new(-1);

/// Lets the `nth` fsync from now on fail, once; the ones behind it succeed, as they do on Linux.
pub fn fail_fsync(nth: i64) {
    LEFT.store(nth, Ordering::SeqCst);
}

/// Whether the failure was used up.
pub fn has_failed() -> bool {
    LEFT.load(Ordering::SeqCst) <= 0
}

// SAFETY: same signature and meaning as the function of the C library, which is therefore not
// needed by anybody else in this program.
#[unsafe(no_mangle)]
extern "C" fn fsync(fd: i32) -> i32 {
    let fails = LEFT.fetch_sub(1, Ordering::SeqCst) == 1;
    // SAFETY: SQLite owns the descriptor and keeps it open during the call.
    let done = rustix::fs::fsync(unsafe { BorrowedFd::borrow_raw(fd) });
    if fails || done.is_err() {
        set_errno();
        return -1;
    }
    0
}

fn set_errno() {
    unsafe extern "C" {
        fn __errno_location() -> *mut i32;
    }
    // SAFETY: glibc and musl return a valid pointer to the calling thread's own errno.
    unsafe { *__errno_location() = rustix::io::Errno::IO.raw_os_error() };
}
