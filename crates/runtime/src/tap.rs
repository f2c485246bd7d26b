//! Taps of the host that VMMs use: which they may, and how a shim gets them.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Uid};
use serde::{Deserialize, Serialize};

use crate::{Error, MachineSpec, Nic, passt, sys};

/// Where all taps come from.
const DEVICE: &str = "/dev/net/tun";
/// The longest name of an interface: `IFNAMSIZ` in `linux/if.h` without its NUL.
const LONGEST: usize = 15;

/// A tap that a VMM uses, as its shim is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaunchTap {
    pub(crate) name: String,
    /// The number under which the VMM finds it; without one it opens it by name.
    #[serde(default)]
    pub(crate) fd: Option<i32>,
}

impl LaunchTap {
    /// The tap of a machine whose VMM finds it under that number, if it has one.
    ///
    /// # Errors
    /// [`Error::Setting`] for what is no name of an interface, or a pattern of names to the kernel.
    pub(crate) fn of(
        runtime: &'static str,
        spec: &MachineSpec,
        fd: Option<i32>,
    ) -> Result<Vec<Self>, Error> {
        let Nic::Tap { name, .. } = &spec.nic else {
            return Ok(Vec::new());
        };
        let good = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        match (1..=LONGEST).contains(&name.len()) && name.bytes().all(good) {
            true => Ok(vec![Self {
                name: name.clone(),
                fd,
            }]),
            false => Err(Error::Setting {
                runtime,
                setting: "tap",
                value: name.clone(),
            }),
        }
    }
}

/// For runtimes whose machines have no tap, and no passt either.
///
/// # Errors
/// [`Error::Unsupported`] for a machine that is to have one.
pub(crate) fn refuse(runtime: &'static str, spec: &MachineSpec) -> Result<(), Error> {
    match spec.nic {
        Nic::None | Nic::Restricted => Ok(()),
        Nic::Filtered(_) => passt::refuse(runtime, spec),
        Nic::Tap { .. } => Err(Error::Unsupported {
            runtime,
            what: "use a tap",
        }),
    }
}

/// The address of a card in words.
pub(crate) fn mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Opens a tap as the VMM's user may: the kernel lets that one have no missing tap and nobody else's, whoever opened
/// the device. Without a user, as who we are. Only for a process without threads of others.
pub(crate) fn open(name: &str, user: Option<u32>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let tun = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("{DEVICE}: {error}"))
    })?;
    let attach = || -> io::Result<()> {
        if let Some(uid) = user.map(Uid::from_raw) {
            // Of this thread alone, which loses all capabilities with that and ends here.
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        }
        sys::attach_tap(&tun, name)
    };
    let attached = std::thread::scope(|scope| scope.spawn(attach).join());
    // It has changed for the whole process with the thread's user.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
    attached
        .expect("attaching does not panic")
        .map_err(in_words)?;
    match sys::tap_stays(&tun)? {
        true => Ok(tun),
        // We have made it by attaching to it.
        false => Err(io::Error::other("it is missing")),
    }
}

fn in_words(error: io::Error) -> io::Error {
    let words = match Errno::from_io_error(&error) {
        Some(Errno::PERM) => "it is missing or belongs to another user",
        Some(Errno::INVAL) => "an interface of another kind has its name",
        Some(Errno::BUSY) => "it is in use",
        _ => return error,
    };
    io::Error::other(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_has_a_plain_name() {
        let of = |name: &str| {
            let spec = MachineSpec {
                id: "mch-1".into(),
                label: "hab12-7".into(),
                vcpu: 1,
                memory_mib: 128,
                kernel_args: Vec::new(),
                nic: Nic::Tap {
                    name: name.to_owned(),
                    mac: [6, 0, 0, 0, 0, 1],
                },
                user: None,
            };
            LaunchTap::of("qemu", &spec, Some(6))
        };
        assert_eq!(of("hab12-65535").unwrap()[0].name, "hab12-65535");
        for name in ["", "h%d", "a,b", "a/b", "a b", "0123456789abcdef"] {
            assert!(matches!(of(name), Err(Error::Setting { .. })), "{name:?}");
        }
    }
}
