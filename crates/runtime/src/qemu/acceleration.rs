//! Whether a guest runs on the processor or is emulated.

use crate::kvm::{self, NoKvm};

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Acceleration {
    /// The processor.
    Kvm,
    /// QEMU.
    Tcg {
        /// Why not the processor; `None`: the configuration says so.
        because: Option<NoKvm>,
    },
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
        match self {
            Acceleration::Kvm | Acceleration::Tcg { because: None } => None,
            Acceleration::Tcg {
                because: Some(because),
            } => Some(format!(
                "machines are emulated, slow and not a security boundary; {}",
                because.why()
            )),
        }
    }
}

/// Takes what is configured, else what this host really has.
pub(super) fn choose(configured: Option<&str>) -> Result<Acceleration, String> {
    match configured {
        Some("kvm") => Ok(Acceleration::Kvm),
        Some("tcg") => Ok(Acceleration::Tcg { because: None }),
        Some(other) => Err(format!("no acceleration {other:?}; there are kvm and tcg")),
        None => Ok(match kvm::usable() {
            Ok(()) => Acceleration::Kvm,
            Err(because) => Acceleration::Tcg {
                because: Some(because),
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_decides_and_nonsense_is_refused() {
        assert_eq!(choose(Some("kvm")), Ok(Acceleration::Kvm));
        assert_eq!(choose(Some("tcg")).unwrap().name(), "tcg");
        assert_eq!(choose(Some("tcg")).unwrap().hint(), None);
        assert!(choose(Some("hvf")).is_err());
    }
}
