//! Whether this host's KVM can run stock kernels.

use std::fs::File;
use std::path::Path;

/// The device of the kernel's virtual machines.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// Why KVM is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoKvm {
    /// No device.
    Missing,
    /// A device that may not be opened.
    Refused,
    /// A device that opens, on a processor without virtualization: software paging, on which stock kernels hang.
    Software,
}

impl NoKvm {
    /// What is the case, and what to do about it.
    pub(crate) fn why(self) -> &'static str {
        match self {
            NoKvm::Missing => {
                "there is no /dev/kvm: enable virtualization in the firmware, or take a host with it"
            }
            NoKvm::Refused => "/dev/kvm may not be opened: add the server's user to the group kvm",
            NoKvm::Software => {
                "/dev/kvm opens, but the processor shows neither vmx nor svm: stock kernels hang on such a KVM, so it \
                 is not used; `acceleration = \"kvm\"` uses it all the same"
            }
        }
    }
}

/// Looks at the device and the processor.
pub(crate) fn usable() -> Result<(), NoKvm> {
    let opens = File::options().read(true).write(true).open(DEVICE).is_ok();
    let exists = Path::new(DEVICE).exists();
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(exists, opens, has_virtualization(&flags))
}

/// For a VMM that can do nothing else. What is configured decides; `Err` says in words why it cannot be used.
pub(crate) fn required(configured: Option<&str>) -> Result<(), String> {
    match configured {
        Some("kvm") => Ok(()),
        Some(other) => Err(format!("no acceleration {other:?}; there is only kvm")),
        None => usable().map_err(|because| because.why().to_owned()),
    }
}

fn decide(exists: bool, opens: bool, virtualization: bool) -> Result<(), NoKvm> {
    match (exists, opens, virtualization) {
        (_, true, true) => Ok(()),
        (_, true, false) => Err(NoKvm::Software),
        (true, false, _) => Err(NoKvm::Refused),
        (false, false, _) => Err(NoKvm::Missing),
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_ascii_whitespace()
                .any(|flag| matches!(flag, "vmx" | "svm"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_opens_is_not_enough() {
        assert_eq!(decide(true, true, true), Ok(()));
        assert_eq!(decide(true, true, false), Err(NoKvm::Software));
        assert_eq!(decide(true, false, true), Err(NoKvm::Refused));
        assert_eq!(decide(false, false, true), Err(NoKvm::Missing));
        let why = NoKvm::Software.why();
        assert!(why.contains("vmx nor svm"), "{why}");
    }

    #[test]
    fn only_whole_flags_count() {
        assert!(has_virtualization(
            "processor : 0\nflags\t\t: fpu vme svm sse\n"
        ));
        assert!(has_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization(
            "flags\t\t: fpu svm_lock vmxx\nvmx flags : vnmi\nmodel name : svm\n"
        ));
    }
}
