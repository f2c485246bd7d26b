//! Cloud Hypervisor's command line. Paths are relative to the machine's directory, the sockets that we make are
//! descriptors, and each device that a guest can see has its id and its place on the bus.

use super::{API_FD, EVENTS_FD, TAP_FD};
use crate::vsock::{GUEST_CID, PORT};
use crate::{MachineDir, MachineSpec, Nic, RuntimeConfig, kernel_line, tap};

/// The places on the PCI bus; 0 is the host bridge.
const ROOT: u8 = 1;
const MODULES: u8 = 2;
const NIC: u8 = 3;
const CHANNEL: u8 = 4;
const RNG: u8 = 5;
const BALLOON: u8 = 6;

/// What changes the command line besides the machine.
#[derive(Clone, Copy)]
pub(super) struct Host<'a> {
    /// The kernel has the Landlock that the VMM asks for.
    pub(super) landlock: bool,
    pub(super) config: &'a RuntimeConfig,
}

/// Everything after the program's name.
pub(super) fn arguments(spec: &MachineSpec, host: Host<'_>, has_modules: bool) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |option: &str, value: &str| {
        all.push(format!("--{option}"));
        if !value.is_empty() {
            all.push(value.to_owned());
        }
    };
    add("api-socket", &format!("fd={API_FD}"));
    add("event-monitor", &format!("fd={EVENTS_FD}"));
    add("seccomp", "true");
    if host.landlock {
        add("landlock", "");
    }
    add("cpus", &format!("boot={}", spec.vcpu));
    let huge = if host.config.huge_pages {
        ",hugepages=on,hugepage_size=2M"
    } else {
        ""
    };
    add("memory", &format!("size={}M{huge}", spec.memory_mib));
    add("kernel", MachineDir::KERNEL);
    add("initramfs", MachineDir::INITRAMFS);
    add("cmdline", &kernel_line(spec, has_modules));
    // Onto standard output; what is no terminal is not read from.
    add("serial", "tty");
    // On by default, and on standard output too.
    add("console", "off");
    for (option, value) in devices(spec, host.config, has_modules) {
        add(option, &value);
    }
    all
}

/// The devices that a guest sees. Each has its place, so that one that is missing moves no other.
fn devices(
    spec: &MachineSpec,
    config: &RuntimeConfig,
    has_modules: bool,
) -> Vec<(&'static str, String)> {
    let limits = limits(config);
    // The format is said: found out by the VMM it would be the guest's choice (GHSA-jmr4-g2hv-mjj6), and guests could not
    // write their first sector.
    let disk = |file: &str, name: &str, place: u8, readonly: &str| {
        let value = format!(
            "path={file},image_type=raw,readonly={readonly},serial={name},id={name},pci_device_id={place}{limits}"
        );
        ("disk", value)
    };
    let mut all = vec![disk(MachineDir::DISK, "root", ROOT, "off")];
    if has_modules {
        all.push(disk(MachineDir::MODULES, "modules", MODULES, "on"));
    }
    match &spec.nic {
        // There is no user-mode network here: a card that reaches nothing is none.
        // The last is refused before.
        Nic::None | Nic::Restricted | Nic::Filtered(_) => {}
        Nic::Tap { mac, .. } => {
            let mac = tap::mac(mac);
            // A queue for each direction. It may not set a size for the tap's packets, and reads it.
            let card = format!("fd=[{TAP_FD}],mac={mac},num_queues=2,id=nic,pci_device_id={NIC}");
            all.push(("net", card));
        }
    }
    all.push((
        "vsock",
        format!(
            "cid={GUEST_CID},socket={}/{},id=channel,pci_device_id={CHANNEL}",
            MachineDir::VMM,
            super::CHANNEL_SOCKET
        ),
    ));
    all.push((
        "rng",
        format!("src=/dev/urandom,id=rng,pci_device_id={RNG}"),
    ));
    if config.balloon {
        all.push((
            "balloon",
            format!(
                "size=0,deflate_on_oom=on,free_page_reporting=on,id=balloon,pci_device_id={BALLOON}"
            ),
        ));
    }
    all
}

/// The most that a disk does in a second.
fn limits(config: &RuntimeConfig) -> String {
    let limit = |name: &str, most: Option<u64>| match most {
        Some(most) => format!(",{name}_size={most},{name}_refill_time=1000"),
        None => String::new(),
    };
    limit("bw", config.disk_bytes_per_s) + &limit("ops", config.disk_ops_per_s)
}

/// The kernel's command line.
fn kernel_line(spec: &MachineSpec, has_modules: bool) -> String {
    let mut words = vec![
        "hutch.root=serial:root".to_owned(),
        format!("hutch.channel=vsock:{PORT}"),
    ];
    if has_modules {
        words.push("hutch.modules=serial:modules".to_owned());
    }
    kernel_line::kernel_line(words, spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments_on(landlock: bool, config: &RuntimeConfig, has_modules: bool) -> Vec<String> {
        arguments(&spec(), Host { landlock, config }, has_modules)
    }

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "mch-1".into(),
            label: "hab12-7".into(),
            vcpu: 2,
            memory_mib: 256,
            kernel_args: vec!["extra=1,2".into()],
            nic: Nic::Restricted,
            user: None,
        }
    }

    #[test]
    fn the_command_line_of_devices_version_1() {
        let all = arguments_on(true, &RuntimeConfig::default(), true);
        let expected = "\
--api-socket|fd=3
--event-monitor|fd=4
--seccomp|true
--landlock
--cpus|boot=2
--memory|size=256M
--kernel|kernel
--initramfs|initramfs
--cmdline|console=ttyS0 8250.nr_uarts=1 quiet cryptomgr.notests random.trust_cpu=on panic=-1 hutch.root=serial:root hutch.channel=vsock:1003 hutch.modules=serial:modules extra=1,2
--serial|tty
--console|off
--disk|path=disk.raw,image_type=raw,readonly=off,serial=root,id=root,pci_device_id=1
--disk|path=modules.img,image_type=raw,readonly=on,serial=modules,id=modules,pci_device_id=2
--vsock|cid=3,socket=run/vmm/vsock.sock,id=channel,pci_device_id=4
--rng|src=/dev/urandom,id=rng,pci_device_id=5";
        assert_eq!(all.join("|").replace("|--", "\n--"), expected);
    }

    #[test]
    fn a_device_that_is_missing_moves_no_other() {
        let with = RuntimeConfig {
            balloon: true,
            ..RuntimeConfig::default()
        };
        let nic = Nic::Tap {
            name: "hab12-7".into(),
            mac: [0x06, 0, 0xac, 0x10, 0, 5],
        };
        let with = devices(&MachineSpec { nic, ..spec() }, &with, true);
        assert_eq!(
            with[2],
            (
                "net",
                "fd=[5],mac=06:00:ac:10:00:05,num_queues=2,id=nic,pci_device_id=3".to_owned()
            )
        );
        let without = devices(&spec(), &RuntimeConfig::default(), false);
        assert_eq!(without.len(), with.len() - 3);
        assert!(without.iter().all(|device| with.contains(device)));
    }

    #[test]
    fn a_host_is_told_apart_by_what_it_has_and_gives() {
        let config = RuntimeConfig {
            huge_pages: true,
            balloon: true,
            disk_bytes_per_s: Some(1 << 20),
            disk_ops_per_s: Some(100),
            ..RuntimeConfig::default()
        };
        let all = arguments_on(false, &config, false);
        assert!(!all.contains(&"--landlock".to_owned()), "{all:?}");
        assert!(!all.join(" ").contains("modules"), "{all:?}");
        let limits = "bw_size=1048576,bw_refill_time=1000,ops_size=100,ops_refill_time=1000";
        for part in [
            "--memory size=256M,hugepages=on,hugepage_size=2M ",
            &format!(",id=root,pci_device_id=1,{limits} "),
            "--balloon size=0,deflate_on_oom=on,free_page_reporting=on,id=balloon,pci_device_id=6",
        ] {
            assert!(all.join(" ").contains(part), "{part} in {all:?}");
        }
    }
}
