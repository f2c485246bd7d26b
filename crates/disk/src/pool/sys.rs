//! Loop devices' and btrfs' requests, which rustix does not have. Everything `unsafe` of this crate is here.
#![expect(unsafe_code, reason = "these ioctls have no safe interface")]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};

/// `LO_FLAGS_READ_ONLY`, `linux/loop.h`.
pub(super) const READ_ONLY: u32 = 1;
/// `LO_FLAGS_AUTOCLEAR`: with its last user the device lets go of its file.
pub(super) const AUTOCLEAR: u32 = 4;
/// `LO_FLAGS_DIRECT_IO`: past the page cache, which the mounted filesystem fills already.
pub(super) const DIRECT_IO: u32 = 16;

const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_SET_CAPACITY: Opcode = 0x4C07;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
/// `_IOW(0x94, 3, struct btrfs_ioctl_vol_args)`, `linux/btrfs.h`.
const BTRFS_IOC_RESIZE: Opcode = 0x5000_9403;

/// `struct loop_info64`, `linux/loop.h`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct LoopInfo {
    /// The filesystem of the file behind the device, as `st_dev`.
    pub device: u64,
    /// The file behind it, as `st_ino`.
    pub inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    pub flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct VolumeArguments {
    fd: i64,
    name: [u8; 4088],
}

struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with the number alone.
unsafe impl Ioctl for GetFree {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(number: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        u32::try_from(number).map_err(|_| Errno::INVAL)
    }
}

/// The number of a loop device that nobody had a moment ago.
pub(super) fn free_loop(control: impl AsFd) -> rustix::io::Result<u32> {
    // SAFETY: as with the implementation of `Ioctl` above.
    unsafe { ioctl(control, GetFree) }
}

/// Puts `file` behind the loop device, with sectors of `block_size` bytes. `EBUSY`: somebody was faster. Linux 5.8.
pub(super) fn configure(
    device: impl AsFd,
    file: impl AsFd,
    block_size: u32,
    flags: u32,
) -> rustix::io::Result<()> {
    let config = LoopConfig {
        fd: file.as_fd().as_raw_fd().cast_unsigned(),
        block_size,
        info: LoopInfo {
            flags,
            ..LoopInfo::EMPTY
        },
        reserved: [0; 8],
    };
    // SAFETY: the argument has the kernel's layout and lives through the call, which only reads it.
    unsafe { ioctl(device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }
}

/// What is behind a loop device. `ENXIO`: nothing.
pub(super) fn status(device: impl AsFd) -> rustix::io::Result<LoopInfo> {
    // SAFETY: the kernel fills a structure of this layout, for which any bytes are valid.
    unsafe { ioctl(device, Getter::<LOOP_GET_STATUS64, LoopInfo>::new()) }
}

/// Lets a loop device see that its file has grown.
pub(super) fn set_capacity(device: impl AsFd) -> rustix::io::Result<()> {
    // SAFETY: this request takes no argument.
    unsafe { ioctl(device, NoArg::<LOOP_SET_CAPACITY>::new()) }
}

/// Lets a mounted btrfs of one device fill that device.
pub(super) fn fill_device(mounted: impl AsFd) -> rustix::io::Result<()> {
    let mut arguments = VolumeArguments {
        fd: 0,
        name: [0; 4088],
    };
    arguments.name[..3].copy_from_slice(b"max");
    // SAFETY: the argument has the kernel's layout, ends with a NUL and lives through the call, which only reads it.
    unsafe {
        ioctl(
            mounted,
            Setter::<BTRFS_IOC_RESIZE, VolumeArguments>::new(arguments),
        )
    }
}

impl LoopInfo {
    const EMPTY: LoopInfo = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// Gives the calling thread mounts of its own, which nobody else sees and which go with it.
#[cfg(test)]
pub(super) fn own_mounts() -> rustix::io::Result<()> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: shares and unshares no descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS)? };
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);
