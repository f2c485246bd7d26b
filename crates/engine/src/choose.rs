//! Which runtime takes a new machine, and what is said when one cannot do what is asked of it.
//!
//! Pure over what the runtimes say of themselves.

use hutch_contract::machine::Isolation;
use hutch_contract::node::RuntimeInfo;

use crate::Error;

/// The runtime for a machine that asks for none: the first in the order of the table that can be used. Those that keep
/// machines apart by less than hardware need the switch, so that nothing weaker is taken by accident where others can
/// reach the API.
pub(crate) fn best(infos: &[RuntimeInfo], allow_emulation: bool) -> Result<&RuntimeInfo, Error> {
    let weak = |info: &RuntimeInfo| info.capabilities.isolation != Isolation::Hardware;
    let why_not = |info: &RuntimeInfo| match refusal(info, allow_emulation) {
        None if weak(info) && !allow_emulation => Some((
            "it is taken only by name where the server listens beyond this host".into(),
            Some(format!("ask for it: `--runtime {}`", info.name)),
        )),
        refused => refused,
    };
    if let Some(info) = infos.iter().find(|info| why_not(info).is_none()) {
        return Ok(info);
    }
    let refused: Vec<_> = infos
        .iter()
        .filter_map(|info| Some((info, why_not(info)?)))
        .collect();
    let reasons = refused
        .iter()
        .map(|(info, (reason, _))| format!("{}: {reason}", info.name));
    // What is installed already is nearest to being usable.
    let nearest = refused.iter().max_by_key(|(info, _)| info.usable);
    let hint = nearest.and_then(|(_, (_, hint))| hint.clone());
    Err(Error::NoRuntime {
        reasons: reasons.collect::<Vec<_>>().join("; "),
        hint: hint.or_else(|| Some("`hutch doctor` says how to get one".into())),
    })
}

/// Why a runtime that was asked for by name may not be used, and what to do about it.
pub(crate) fn refusal(
    info: &RuntimeInfo,
    allow_emulation: bool,
) -> Option<(String, Option<String>)> {
    if !info.usable {
        let reason = info
            .reason
            .clone()
            .unwrap_or_else(|| "it is not usable".into());
        return Some((reason, info.hint.clone()));
    }
    if info.capabilities.isolation == Isolation::Emulation && !allow_emulation {
        return Some((
            "it only emulates here, which is no security boundary, and the server listens beyond this host".into(),
            Some("set `allow_emulation = true` if you trust what runs in the machines".into()),
        ));
    }
    None
}

/// The refusal of something that a runtime cannot do, with the name of one that could: a usable one, else any.
pub(crate) fn unable<'a>(
    runtime: &str,
    what: &'static str,
    able: impl IntoIterator<Item = &'a RuntimeInfo>,
) -> Error {
    let able: Vec<_> = able.into_iter().collect();
    let could = able.iter().find(|info| info.usable).or(able.first());
    Error::Unable {
        runtime: runtime.to_owned(),
        what,
        could: could.map(|info| info.name.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hutch_contract::error::Kind;
    use hutch_contract::node::Capabilities;

    fn info(name: &str, usable: bool, isolation: Isolation) -> RuntimeInfo {
        RuntimeInfo {
            name: name.into(),
            usable,
            reason: (!usable).then(|| format!("{name} not found")),
            hint: (!usable).then(|| format!("install {name}")),
            version: None,
            path: None,
            acceleration: None,
            capabilities: Capabilities {
                isolation,
                pause: true,
                memory_snapshot: false,
                live_resize: false,
                network: false,
            },
        }
    }

    fn host(firecracker: bool, qemu: Option<Isolation>, docker: bool) -> Vec<RuntimeInfo> {
        vec![
            info("firecracker", firecracker, Isolation::Hardware),
            info("qemu", qemu.is_some(), qemu.unwrap_or(Isolation::Emulation)),
            info("docker", docker, Isolation::SharedKernel),
        ]
    }

    fn chosen(infos: &[RuntimeInfo], allow_emulation: bool) -> Result<String, Error> {
        best(infos, allow_emulation).map(|info| info.name.clone())
    }

    #[test]
    fn the_first_usable_of_the_table_is_taken() {
        use Isolation::{Emulation, Hardware};
        for (infos, allow, expected) in [
            (host(true, Some(Hardware), true), true, "firecracker"),
            (host(false, Some(Hardware), true), true, "qemu"),
            (host(false, Some(Hardware), true), false, "qemu"),
            (host(false, Some(Emulation), true), true, "qemu"),
            (host(false, None, true), true, "docker"),
        ] {
            assert_eq!(chosen(&infos, allow).unwrap(), expected);
        }
    }

    #[test]
    fn nothing_weaker_is_taken_by_accident_where_others_reach_the_api() {
        let infos = host(false, Some(Isolation::Emulation), true);
        let error = chosen(&infos, false).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        let text = error.to_string();
        for part in [
            "firecracker: firecracker not found",
            "qemu: it only",
            "docker: it is taken",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(refusal(&infos[2], false), None, "by name it may be used");
        assert!(refusal(&infos[1], false).is_some());
    }

    #[test]
    fn with_nothing_usable_each_is_named_with_its_reason() {
        let error = chosen(&host(false, None, false), true).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no runtime can be used here: firecracker: firecracker not found; qemu: qemu not found; docker: docker not found"
        );
        assert!(error.hint().is_some());
        assert!(chosen(&[], true).is_err());
    }

    #[test]
    fn a_refusal_names_a_runtime_that_could() {
        let infos = host(false, Some(Isolation::Emulation), true);
        let error = unable("docker", "boot a kernel of choice", &infos[..2]);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(
            error.to_string(),
            "runtime `docker` cannot boot a kernel of choice"
        );
        assert!(error.hint().unwrap().contains("`qemu`"), "the usable one");
        let error = unable("docker", "boot a kernel of choice", &infos[..1]);
        assert!(error.hint().unwrap().contains("`firecracker`"));
        assert_eq!(unable("docker", "fly", []).hint(), None);
    }
}
