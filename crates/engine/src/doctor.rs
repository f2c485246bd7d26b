//! What this host can do for machines, and how to get more out of it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hutch_contract::machine::Isolation;
use hutch_contract::node::{Finding, Level, RuntimeInfo};
use hutch_runtime::table::Runtimes;
use hutch_runtime::{RuntimeConfig, cgroup};

use crate::engine::{images_dir, machines_dir};
use crate::{EngineConfig, Mode, admission, network, pool};

/// The runtimes, configured.
#[allow(
    clippy::needless_update,
    reason = "a runtime may have a setting before the configuration does"
)]
pub(crate) fn runtimes(config: &EngineConfig) -> Runtimes {
    Runtimes::new(|name| RuntimeConfig {
        launcher: config.launcher.clone(),
        program: config.runtime_programs.get(name).cloned(),
        programs_dir: Some(config.data_dir.join("programs")),
        acceleration: config.acceleration.clone(),
        agent: config.agent.clone(),
        cpu_template: config.runtime_options.cpu_template.clone(),
        huge_pages: config.runtime_options.huge_pages,
        affinity: config.runtime_options.affinity.clone(),
        cpu_percent: config.runtime_options.cpu_percent,
        jailer: config.runtime_options.jailer.clone(),
        balloon: config.runtime_options.balloon,
        disk_bytes_per_s: config.runtime_options.disk_bytes_per_s,
        disk_ops_per_s: config.runtime_options.disk_ops_per_s,
        docker_socket: config.runtime_options.docker_socket.clone(),
        docker_network: config.runtime_options.docker_network.clone(),
        base: config.runtime_options.virtualbox_base.clone(),
        environment: config.runtime_options.virtualbox_environment.clone(),
        console_bytes: config.console_bytes,
        ..RuntimeConfig::default()
    })
}

/// Looks at everything that machines need here. Needs no running server and changes nothing that lasts.
pub async fn doctor(config: &EngineConfig) -> Vec<Finding> {
    let mut infos = Vec::new();
    for runtime in runtimes(config).iter() {
        infos.push(runtime.probe().await);
    }
    let firecracker = infos
        .iter()
        .any(|info| info.name == "firecracker" && info.usable);
    let mut findings = runtime_findings(infos);
    findings.push(agent_finding(&config.agent));
    findings.extend(kernel_findings(config));
    findings.push(disk_finding(config));
    findings.push(memory_finding(config));
    findings.push(limits_finding(cgroup::support()));
    findings.push(network_finding(config).await);
    let opens_taps = firecracker && config.runtime_options.jailer.is_none();
    let routes = matches!(config.network.mode, Mode::Auto | Mode::Routed);
    if opens_taps && routes && network::obstacle().is_none() {
        let mode = std::fs::metadata(network::TUN).map(|found| found.mode());
        findings.extend(mode.ok().and_then(taps_finding));
    }
    findings.push(images_finding(&config.data_dir));
    findings
}

fn finding(area: &str, level: Level, found: impl Into<String>, hint: Option<&str>) -> Finding {
    Finding {
        area: area.into(),
        level,
        found: found.into(),
        hint: hint.map(str::to_owned),
    }
}

/// One runtime is enough: what else is missing only limits.
fn runtime_findings(infos: Vec<RuntimeInfo>) -> Vec<Finding> {
    let unusable = match infos.iter().any(|info| info.usable) {
        true => Level::Limited,
        false => Level::Missing,
    };
    let findings = infos
        .into_iter()
        .map(|info| runtime_finding(info, unusable));
    findings.collect()
}

fn runtime_finding(info: RuntimeInfo, unusable: Level) -> Finding {
    let area = format!("runtime {}", info.name);
    let program = [info.version, info.path.map(|path| format!("({path})"))];
    let program = program.into_iter().flatten().collect::<Vec<_>>().join(" ");
    if !info.usable {
        let reason = info.reason.unwrap_or_else(|| "it is not usable".into());
        let found = match program.is_empty() {
            true => reason,
            false => format!("{program}: {reason}"),
        };
        return Finding {
            area,
            level: unusable,
            found,
            hint: info.hint,
        };
    }
    let version = match program.is_empty() {
        true => "unknown version".to_owned(),
        false => program,
    };
    let acceleration = info.acceleration.as_deref().unwrap_or("no acceleration");
    let (level, found) = match info.capabilities.isolation {
        Isolation::Hardware => (
            Level::Good,
            format!("{version}, hardware virtualization ({acceleration})"),
        ),
        Isolation::Emulation => (
            Level::Limited,
            format!("{version}, emulation ({acceleration}): slow, and not a security boundary"),
        ),
        Isolation::SharedKernel | Isolation::None => (
            Level::Limited,
            format!("{version}, shares the host's kernel"),
        ),
    };
    let found = match info.reason {
        Some(reason) => format!("{found}; {reason}"),
        None => found,
    };
    Finding {
        area,
        level,
        found,
        hint: info.hint,
    }
}

fn agent_finding(agent: &Path) -> Finding {
    if agent.is_file() {
        finding("agent", Level::Good, agent.display().to_string(), None)
    } else {
        let hint = "build it with `cargo xtask agent`, or set HUTCH_AGENT to its path";
        finding(
            "agent",
            Level::Missing,
            format!("{} is not there", agent.display()),
            Some(hint),
        )
    }
}

/// The server's own kernel, and each one that has a name.
fn kernel_findings(config: &EngineConfig) -> Vec<Finding> {
    let file = |area: &str, path: &Path, absent| match path.is_file() {
        true => finding(area, Level::Good, path.display().to_string(), None),
        false => finding(
            area,
            absent,
            format!("{} is not there", path.display()),
            Some(
                "the configuration must name a kernel package or a kernel; without `kernel` the distribution's is taken",
            ),
        ),
    };
    let own = match &config.kernel {
        Some(path) => file("kernel", path, Level::Missing),
        None => finding(
            "kernel",
            Level::Good,
            "the distribution's, downloaded when first needed",
            None,
        ),
    };
    let named = config.kernels.named.iter();
    let named =
        named.map(|(name, kernel)| file(&format!("kernel {name}"), &kernel.path, Level::Limited));
    [own].into_iter().chain(named).collect()
}

fn disk_finding(config: &EngineConfig) -> Finding {
    let (level, found, hint) = pool::finding(config);
    finding("disk", level, found, hint)
}

fn memory_finding(config: &EngineConfig) -> Finding {
    let (total, available) = admission::host_memory();
    let found = format!(
        "{available} of {total} MiB available; machines may be promised {} MiB",
        total * u64::from(config.memory_overcommit)
    );
    if available < config.memory_floor_mib {
        finding(
            "memory",
            Level::Missing,
            found,
            Some("end something else, or lower `memory_floor_mib`"),
        )
    } else {
        finding("memory", Level::Good, found, None)
    }
}

fn limits_finding(support: cgroup::Support) -> Finding {
    if support.unlimited.is_empty() {
        let found = format!("cgroups limit {}", support.limited.join(", "));
        return finding("limits", Level::Good, found, None);
    }
    let found = format!(
        "VMMs run without limits of {}: {}",
        support.unlimited.join(", "),
        support.reason.as_deref().unwrap_or("no reason is known")
    );
    let hint =
        "run the server as root on a host, or in a container that may write to /sys/fs/cgroup";
    finding("limits", Level::Limited, found, Some(hint))
}

async fn network_finding(config: &EngineConfig) -> Finding {
    let nothing = |reason: &str, hint: Option<&str>| {
        let found =
            format!("machines reach nothing, and are reached through their agents: {reason}");
        finding("network", Level::Limited, found, hint)
    };
    let obstacle = match config.network.mode {
        Mode::None => return nothing("the configuration says so", None),
        Mode::Auto | Mode::Routed => network::obstacle(),
        Mode::User => Some(("it is not wanted".to_owned(), "set network.mode to auto")),
    };
    let Some((reason, hint)) = obstacle else {
        return match network::ways_out() {
            Ok(ways) => finding("network", Level::Good, format!("routed; {ways}"), None),
            Err(error) => finding("network", Level::Limited, error.chain(), None),
        };
    };
    if config.network.mode == Mode::Routed {
        return nothing(&reason, Some(hint));
    }
    match hutch_runtime::user_network(None).await {
        Ok(passt) => {
            let found = format!(
                "machines of qemu reach what is public by {}, and all are reached through their agents; not routed, since {reason}",
                passt.display()
            );
            finding("network", Level::Limited, found, Some(hint))
        }
        Err(why) => {
            let hint = why
                .hint
                .unwrap_or_else(|| format!("install passt, or {hint}"));
            nothing(&format!("{reason}; {}", why.reason), Some(&hint))
        }
    }
}

/// Firecracker opens its tap by itself, as the user of its machine's slot; other VMMs get theirs opened, and its jailer
/// makes it a device of its own. `mode`: of the device; whoever opens it still gets no taps but his own without
/// CAP_NET_ADMIN (the kernel's `Documentation/networking/tuntap.rst`).
fn taps_finding(mode: u32) -> Option<Finding> {
    if mode & 0o006 == 0o006 {
        return None;
    }
    let tun = network::TUN;
    let found = format!(
        "{tun} has mode {:04o}: machines of firecracker, which run as users of their own, do not start with a network",
        mode & 0o7777
    );
    let hint = format!(
        "chmod 0666 {tun}, as udev has it: it lets nobody but root make taps; or name Firecracker's jailer in runtime.jailer"
    );
    Some(finding("taps", Level::Limited, found, Some(&hint)))
}

fn images_finding(data_dir: &Path) -> Finding {
    if hutch_disk::pool::exists(data_dir) && !hutch_disk::pool::is_mounted(data_dir) {
        let found = "in the pool, which the server mounts at its start";
        return finding("images", Level::Good, found, None);
    }
    let count = |dir: &Path| std::fs::read_dir(dir).map_or(0, Iterator::count);
    let (images, machines) = (count(&images_dir(data_dir)), count(&machines_dir(data_dir)));
    let found = format!("{images} images, {machines} machines");
    if images == 0 {
        let hint = "`hutch run debian-base -- cat /etc/os-release` makes the first one";
        finding("images", Level::Limited, found, Some(hint))
    } else {
        finding("images", Level::Good, found, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hutch_contract::node::Capabilities;

    fn info(name: &str, usable: bool) -> RuntimeInfo {
        RuntimeInfo {
            name: name.into(),
            usable,
            reason: (!usable).then(|| "not found".into()),
            hint: (!usable).then(|| format!("install {name}")),
            version: Some("1.2.3".into()),
            path: Some(format!("/usr/bin/{name}")),
            acceleration: Some("kvm".into()),
            capabilities: Capabilities {
                isolation: Isolation::Hardware,
                pause: true,
                memory_snapshot: false,
                live_resize: false,
                network: false,
            },
        }
    }

    #[test]
    fn one_usable_runtime_is_enough() {
        let levels = |usable: [bool; 2]| {
            let infos = vec![info("a", usable[0]), info("b", usable[1])];
            let findings = runtime_findings(infos).into_iter();
            findings.map(|finding| finding.level).collect::<Vec<_>>()
        };
        assert_eq!(levels([true, true]), [Level::Good, Level::Good]);
        assert_eq!(levels([false, true]), [Level::Limited, Level::Good]);
        assert_eq!(levels([false, false]), [Level::Missing, Level::Missing]);
    }

    #[test]
    fn a_device_for_taps_that_is_roots_alone_is_told() {
        assert_eq!(taps_finding(0o020_666), None);
        for mode in [0o020_600, 0o020_660, 0o020_664] {
            let told = taps_finding(mode).unwrap();
            assert_eq!(told.level, Level::Limited);
            let words = format!("{:04o}", mode & 0o777);
            assert!(told.found.contains(&words), "{told:?}");
            assert!(told.hint.unwrap().contains("chmod 0666 /dev/net/tun"));
        }
    }

    #[test]
    fn version_path_reason_and_remedy_are_told() {
        let found = runtime_findings(vec![info("qemu", true), info("firecracker", false)]);
        assert_eq!(
            found[0].found,
            "1.2.3 (/usr/bin/qemu), hardware virtualization (kvm)"
        );
        assert_eq!(found[1].found, "1.2.3 (/usr/bin/firecracker): not found");
        assert_eq!(found[1].hint.as_deref(), Some("install firecracker"));
        let bare = RuntimeInfo {
            version: None,
            path: None,
            ..info("docker", false)
        };
        assert_eq!(runtime_findings(vec![bare])[0].found, "not found");
    }
}
