//! What this host can do for machines, and how to get more out of it.

use std::path::Path;

use hutch_contract::machine::Isolation;
use hutch_contract::node::{Finding, Level, RuntimeInfo};
use hutch_runtime::RuntimeConfig;
use hutch_runtime::table::Runtimes;

use crate::engine::{images_dir, machines_dir};
use crate::{EngineConfig, admission};

/// The runtimes, configured.
pub(crate) fn runtimes(config: &EngineConfig) -> Runtimes {
    Runtimes::new(|name| RuntimeConfig {
        launcher: config.launcher.clone(),
        program: config.runtime_programs.get(name).cloned(),
        programs_dir: Some(config.data_dir.join("programs")),
        acceleration: config.acceleration.clone(),
        agent: config.agent.clone(),
        console_bytes: config.console_bytes,
        ..RuntimeConfig::default()
    })
}

/// Looks at everything that machines need here. Needs no running server and changes nothing that lasts.
pub async fn doctor(config: &EngineConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    for runtime in runtimes(config).iter() {
        findings.push(runtime_finding(runtime.probe().await));
    }
    findings.push(agent_finding(&config.agent));
    findings.push(kernel_finding(config));
    findings.push(disk_finding(&config.data_dir));
    findings.push(memory_finding(config));
    findings.push(network_finding());
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

fn runtime_finding(info: RuntimeInfo) -> Finding {
    let area = format!("runtime {}", info.name);
    let version = info.version.as_deref().unwrap_or("unknown version");
    if !info.usable {
        let reason = info.reason.unwrap_or_else(|| "it is not usable".into());
        return Finding {
            area,
            level: Level::Missing,
            found: reason,
            hint: info.hint,
        };
    }
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

fn kernel_finding(config: &EngineConfig) -> Finding {
    match &config.kernel {
        Some(path) if !path.is_file() => finding(
            "kernel",
            Level::Missing,
            format!("{} is not there", path.display()),
            Some(
                "`kernel` in the configuration must name a kernel package; without it the distribution's is taken",
            ),
        ),
        Some(path) => finding("kernel", Level::Good, path.display().to_string(), None),
        None => finding(
            "kernel",
            Level::Good,
            "the distribution's, downloaded when first needed",
            None,
        ),
    }
}

fn disk_finding(data_dir: &Path) -> Finding {
    // The directory may not exist before the first start: its nearest parent has the same file system.
    let Some(dir) = data_dir.ancestors().find(|dir| dir.is_dir()) else {
        return finding(
            "disk",
            Level::Missing,
            format!("{} cannot be made", data_dir.display()),
            None,
        );
    };
    let free = hutch_disk::free_bytes(dir).map_or(0, |bytes| bytes >> 30);
    let place = data_dir.display();
    if hutch_disk::reflink_supported(dir) {
        finding(
            "disk",
            Level::Good,
            format!("{place}: reflinks work, {free} GiB free"),
            None,
        )
    } else {
        let hint = "put the data directory on btrfs or XFS: disks are then cloned in no time";
        finding(
            "disk",
            Level::Limited,
            format!("{place}: no reflinks, disks are copied; {free} GiB free"),
            Some(hint),
        )
    }
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

fn network_finding() -> Finding {
    finding(
        "network",
        Level::Limited,
        "machines have no way out; commands and files reach them through the agent",
        None,
    )
}

fn images_finding(data_dir: &Path) -> Finding {
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
