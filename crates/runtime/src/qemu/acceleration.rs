//! Whether a guest runs on the processor or is emulated.

use std::fs::File;
use std::path::Path;

/// The device of the kernel's virtual machines.
pub(super) const KVM: &str = "/dev/kvm";

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Acceleration {
    /// The processor.
    Kvm,
    /// QEMU.
    Tcg {
        /// Why not the processor.
        because: NoKvm,
    },
}

/// Why KVM is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoKvm {
    /// The configuration says so.
    Configured,
    /// No device.
    Missing,
    /// A device that may not be opened.
    Refused,
    /// A device that opens, on a processor without virtualization: software paging, on which stock kernels hang.
    Software,
}

impl Acceleration {
    /// The word for it in the API and in QEMU.
    pub(super) fn name(self) -> &'static str {
        match self {
            Acceleration::Kvm => "kvm",
            Acceleration::Tcg { .. } => "tcg",
        }
    }

    /// How machines could be made faster and safer here.
    pub(super) fn hint(self) -> Option<String> {
        let because = match self {
            Acceleration::Kvm => return None,
            Acceleration::Tcg { because } => because,
        };
        let why = match because {
            NoKvm::Configured => return None,
            NoKvm::Missing => {
                "there is no /dev/kvm: enable virtualization in the firmware, or take a host with it"
            }
            NoKvm::Refused => "/dev/kvm may not be opened: add the server's user to the group kvm",
            NoKvm::Software => {
                "/dev/kvm opens, but the processor shows neither vmx nor svm: stock kernels hang on such a KVM, so it \
                 is not used; `acceleration = \"kvm\"` uses it all the same"
            }
        };
        Some(format!(
            "machines are emulated, slow and not a security boundary; {why}"
        ))
    }
}

/// Takes what is configured, else what this host really has.
pub(super) fn choose(configured: Option<&str>) -> Result<Acceleration, String> {
    match configured {
        Some("kvm") => return Ok(Acceleration::Kvm),
        Some("tcg") => {
            return Ok(Acceleration::Tcg {
                because: NoKvm::Configured,
            });
        }
        Some(other) => return Err(format!("no acceleration {other:?}; there are kvm and tcg")),
        None => {}
    }
    let device = File::options().read(true).write(true).open(KVM);
    let exists = Path::new(KVM).exists();
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Ok(decide(exists, device.is_ok(), has_virtualization(&flags)))
}

fn decide(exists: bool, opens: bool, virtualization: bool) -> Acceleration {
    let because = match (exists, opens, virtualization) {
        (_, true, true) => return Acceleration::Kvm,
        (_, true, false) => NoKvm::Software,
        (true, false, _) => NoKvm::Refused,
        (false, false, _) => NoKvm::Missing,
    };
    Acceleration::Tcg { because }
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
        let emulated = |because| Acceleration::Tcg { because };
        assert_eq!(decide(true, true, true), Acceleration::Kvm);
        assert_eq!(decide(true, true, false), emulated(NoKvm::Software));
        assert_eq!(decide(true, false, true), emulated(NoKvm::Refused));
        assert_eq!(decide(false, false, true), emulated(NoKvm::Missing));
        let hint = emulated(NoKvm::Software).hint().unwrap();
        assert!(hint.contains("vmx nor svm"), "{hint}");
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

    #[test]
    fn the_configuration_decides_and_nonsense_is_refused() {
        assert_eq!(choose(Some("kvm")), Ok(Acceleration::Kvm));
        assert_eq!(choose(Some("tcg")).unwrap().name(), "tcg");
        assert!(choose(Some("hvf")).is_err());
    }
}
