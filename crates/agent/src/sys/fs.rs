//! The ioctls of file systems and of the random pool.
//! Facts: `linux/fs.h` (FIFREEZE, FITHAW), `linux/random.h` (RNDADDENTROPY, RNDRESEEDCRNG).
#![expect(unsafe_code, reason = "rustix has these ioctls only in raw form")]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{IntegerSetter, NoArg, Setter, ioctl, opcode};

const FIFREEZE: u32 = opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: u32 = opcode::read_write::<libc::c_int>(b'X', 120);
/// Declared with two ints, though the payload follows them.
const RNDADDENTROPY: u32 = opcode::write::<[libc::c_int; 2]>(b'R', 3);
const RNDRESEEDCRNG: u32 = opcode::none(b'R', 7);

/// Most bytes of entropy taken at once; the kernel's pool holds 32.
const ENTROPY: usize = 512;

/// `struct rand_pool_info`: bits of credit, bytes, payload.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; ENTROPY],
}

/// Makes a file system writable by nobody and consistent on its disk.
///
/// # Errors
/// `EBUSY` when it is frozen already.
pub fn freeze(root: impl AsFd) -> io::Result<()> {
    // SAFETY: the argument is ignored by the kernel.
    Ok(unsafe { ioctl(root, IntegerSetter::<FIFREEZE>::new_usize(0)) }?)
}

/// Ends [`freeze`].
///
/// # Errors
/// `EINVAL` when it is not frozen.
pub fn thaw(root: impl AsFd) -> io::Result<()> {
    // SAFETY: the argument is ignored by the kernel.
    Ok(unsafe { ioctl(root, IntegerSetter::<FITHAW>::new_usize(0)) }?)
}

/// Mixes `bytes` (the first 512) into the kernel's pool with full credit and forces a reseed, so that a clone's random
/// numbers part from its parent's at once.
///
/// # Errors
/// No privilege for it.
pub fn add_entropy(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let bytes = &bytes[..bytes.len().min(ENTROPY)];
    let mut info = RandPoolInfo {
        entropy_bits: bytes.len() as libc::c_int * 8,
        size: bytes.len() as libc::c_int,
        bytes: [0; ENTROPY],
    };
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the kernel reads the two ints and then `size` bytes, all inside `info`.
    unsafe { ioctl(&random, Setter::<RNDADDENTROPY, _>::new(info)) }?;
    // SAFETY: takes no argument.
    Ok(unsafe { ioctl(&random, NoArg::<RNDRESEEDCRNG>::new()) }?)
}
