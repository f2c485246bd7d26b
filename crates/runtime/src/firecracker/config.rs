//! What Firecracker is told at its start: one JSON file and a command line. Paths are relative to its working directory.
//! Field names are those of Firecracker's `src/firecracker/swagger/firecracker.yaml`; a name that it does not know at the
//! top is ignored silently, so the test holds them still.

use serde::Serialize;

use super::jail::Place;
use super::{API_SOCKET, CHANNEL_SOCKET};
use crate::vsock::{GUEST_CID, PORT};
use crate::{MachineDir, MachineSpec, Nic, RuntimeConfig, kernel_line, tap};

/// The configuration's name among the VMM's own files.
pub(super) const FILE: &str = "config.json";

/// Everything after the program's name and the machine's.
pub(super) fn arguments(place: Place) -> Vec<String> {
    let own = |name: &str| format!("{}{name}", place.own);
    let (socket, config) = (own(API_SOCKET), own(FILE));
    let mut all = vec!["--api-sock", &socket, "--config-file", &config];
    // Lower levels say something for each access of the guest that means nothing.
    all.extend(["--level", "Error"]);
    if let Some(log) = place.log {
        all.extend(["--log-path", log]);
    }
    all.into_iter().map(str::to_owned).collect()
}

/// Its name for a machine: letters, digits and `-`, at most 64.
pub(super) fn id(spec: &MachineSpec) -> String {
    let good = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
    spec.label.chars().filter(good).take(64).collect()
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Config {
    boot_source: BootSource,
    machine_config: Machine,
    drives: Vec<Drive>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    network_interfaces: Vec<Card>,
    vsock: Vsock,
    entropy: Entropy,
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<Balloon>,
}

#[derive(Debug, Serialize)]
struct BootSource {
    kernel_image_path: &'static str,
    initrd_path: &'static str,
    boot_args: String,
}

#[derive(Debug, Serialize)]
struct Machine {
    vcpu_count: u32,
    mem_size_mib: u32,
    smt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_template: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    huge_pages: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Drive {
    drive_id: &'static str,
    path_on_host: &'static str,
    /// Would only add to the kernel's command line and change the order.
    is_root_device: bool,
    is_read_only: bool,
    /// `Writeback`: a guest's flush is one of the host's.
    cache_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter: Option<RateLimiter>,
}

/// It opens the tap by itself, and would make one that is missing if it might.
#[derive(Debug, Serialize)]
struct Card {
    iface_id: &'static str,
    host_dev_name: String,
    guest_mac: String,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<Bucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<Bucket>,
}

/// `size` tokens, filled in `refill_time` milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Bucket {
    size: u64,
    refill_time: u64,
}

impl RateLimiter {
    fn new(config: &RuntimeConfig) -> Option<Self> {
        let bucket = |size: Option<u64>| {
            let refill_time = 1000;
            size.map(|size| Bucket { size, refill_time })
        };
        let limiter = Self {
            bandwidth: bucket(config.disk_bytes_per_s),
            ops: bucket(config.disk_ops_per_s),
        };
        (limiter.bandwidth.is_some() || limiter.ops.is_some()).then_some(limiter)
    }
}

#[derive(Debug, Serialize)]
struct Vsock {
    guest_cid: u32,
    uds_path: String,
}

#[derive(Debug, Serialize)]
struct Entropy {}

/// Empty at first; gives back what the guest frees.
#[derive(Debug, Serialize)]
struct Balloon {
    amount_mib: u32,
    deflate_on_oom: bool,
    free_page_reporting: bool,
}

/// The text of the configuration.
pub(super) fn text(
    spec: &MachineSpec,
    config: &RuntimeConfig,
    place: Place,
    has_modules: bool,
) -> String {
    let limiter = RateLimiter::new(config);
    let drive = |drive_id, path_on_host, is_read_only| Drive {
        drive_id,
        path_on_host,
        is_root_device: false,
        is_read_only,
        cache_type: "Writeback",
        rate_limiter: limiter,
    };
    // The guest finds them by their order: their serials are not of our choice.
    let mut drives = vec![drive("root", MachineDir::DISK, false)];
    if has_modules {
        drives.push(drive("modules", MachineDir::MODULES, true));
    }
    let network_interfaces = match &spec.nic {
        // There is no user-mode network here: a card that reaches nothing is none, and passt is refused before.
        Nic::None | Nic::Restricted | Nic::Filtered(_) => Vec::new(),
        Nic::Tap { name, mac } => vec![Card {
            iface_id: "eth0",
            host_dev_name: name.clone(),
            guest_mac: tap::mac(mac),
        }],
    };
    let config = Config {
        boot_source: BootSource {
            kernel_image_path: MachineDir::KERNEL,
            initrd_path: MachineDir::INITRAMFS,
            boot_args: kernel_line(spec, has_modules),
        },
        machine_config: Machine {
            vcpu_count: spec.vcpu,
            mem_size_mib: spec.memory_mib,
            smt: false,
            cpu_template: config.cpu_template.clone(),
            huge_pages: config.huge_pages.then_some("2M"),
        },
        drives,
        network_interfaces,
        vsock: Vsock {
            guest_cid: GUEST_CID,
            uds_path: format!("{}{CHANNEL_SOCKET}", place.own),
        },
        entropy: Entropy {},
        balloon: config.balloon.then_some(Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
        }),
    };
    serde_json::to_string(&config).expect("a configuration has no maps with odd keys")
}

/// The kernel's command line.
fn kernel_line(spec: &MachineSpec, has_modules: bool) -> String {
    let mut words: Vec<String> = [
        // Only the keyboard controller's reset ends the VMM as it should.
        "reboot=k",
        // Of that controller there is no more than this and ctrl-alt-del.
        "i8042.noaux",
        "i8042.nomux",
        "i8042.dumbkbd",
        "hutch.end=reset",
        "hutch.root=/dev/vda",
    ]
    .map(str::to_owned)
    .to_vec();
    words.push(format!("hutch.channel=vsock:{PORT}"));
    if has_modules {
        words.push("hutch.modules=/dev/vdb".to_owned());
    }
    kernel_line::kernel_line(words, spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "mch-1".into(),
            label: "hab12-7".into(),
            vcpu: 2,
            memory_mib: 256,
            kernel_args: vec!["extra=1".into()],
            nic: Nic::Restricted,
            user: None,
        }
    }

    fn config(config: &RuntimeConfig, has_modules: bool) -> Value {
        serde_json::from_str(&text(&spec(), config, Place::SHIM, has_modules)).unwrap()
    }

    #[test]
    fn the_configuration_of_devices_version_1() {
        let line = "console=ttyS0 8250.nr_uarts=1 quiet cryptomgr.notests random.trust_cpu=on panic=-1 reboot=k \
                    i8042.noaux i8042.nomux i8042.dumbkbd hutch.end=reset hutch.root=/dev/vda hutch.channel=vsock:1003 \
                    hutch.modules=/dev/vdb extra=1";
        let drive = |id: &str, path: &str, read_only: bool| {
            json!({
                "drive_id": id, "path_on_host": path, "is_root_device": false,
                "is_read_only": read_only, "cache_type": "Writeback",
            })
        };
        assert_eq!(
            config(&RuntimeConfig::default(), true),
            json!({
                "boot-source": {"kernel_image_path": "kernel", "initrd_path": "initramfs", "boot_args": line},
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 256, "smt": false},
                "drives": [drive("root", "disk.raw", false), drive("modules", "modules.img", true)],
                "vsock": {"guest_cid": 3, "uds_path": "run/vmm/vsock.sock"},
                "entropy": {},
            })
        );
    }

    #[test]
    fn a_disk_that_is_missing_moves_no_other() {
        let with = config(&RuntimeConfig::default(), true);
        let without = config(&RuntimeConfig::default(), false);
        assert_eq!(without["drives"].as_array().unwrap().len(), 1);
        assert_eq!(without["drives"][0], with["drives"][0]);
        let line = without["boot-source"]["boot_args"].as_str().unwrap();
        assert!(!line.contains("hutch.modules"), "{line}");
    }

    #[test]
    fn a_tap_is_known_by_its_name() {
        let nic = Nic::Tap {
            name: "hab12-7".into(),
            mac: [0x06, 0, 0xac, 0x10, 0, 5],
        };
        let spec = MachineSpec { nic, ..spec() };
        let text = text(&spec, &RuntimeConfig::default(), Place::SHIM, true);
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            config["network-interfaces"],
            json!([{"iface_id": "eth0", "host_dev_name": "hab12-7", "guest_mac": "06:00:ac:10:00:05"}])
        );
    }

    #[test]
    fn what_is_configured_is_asked_for() {
        let configured = RuntimeConfig {
            cpu_template: Some("T2".to_owned()),
            huge_pages: true,
            balloon: true,
            disk_ops_per_s: Some(500),
            ..RuntimeConfig::default()
        };
        let config = config(&configured, true);
        assert_eq!(config["machine-config"]["cpu_template"], "T2");
        assert_eq!(config["machine-config"]["huge_pages"], "2M");
        assert_eq!(config["balloon"]["amount_mib"], 0);
        let limiter = json!({"ops": {"size": 500, "refill_time": 1000}});
        assert_eq!(config["drives"][0]["rate_limiter"], limiter);
    }

    #[test]
    fn the_command_line_names_nothing_absolute_but_the_log() {
        assert_eq!(
            arguments(Place::SHIM).join(" "),
            "--api-sock run/vmm/api.sock --config-file run/vmm/config.json --level Error --log-path /proc/self/fd/2"
        );
        assert_eq!(
            arguments(Place::JAIL).join(" "),
            "--api-sock api.sock --config-file config.json --level Error"
        );
    }

    #[test]
    fn a_name_that_it_would_panic_at_is_mended() {
        let label = "h_ä1".to_owned() + &"x".repeat(100);
        let id = id(&MachineSpec { label, ..spec() });
        assert_eq!(id, "h1".to_owned() + &"x".repeat(62));
    }
}
