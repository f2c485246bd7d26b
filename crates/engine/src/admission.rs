//! What there is room for: sizes that make sense, memory, disk, the number of machines, slots.
//!
//! Pure over numbers that the caller has looked up; the reservation of what is granted is one short lock in `machines`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hutch_contract::machine::{
    CreateMachine, DEFAULT_DISK_GIB, DEFAULT_MEMORY_MIB, DEFAULT_VCPU, MAX_DISK_GIB,
    MAX_MEMORY_MIB, MAX_VCPU, MIN_MEMORY_MIB,
};
use hutch_disk::pool::Room;

use crate::rows::SlotRow;
use crate::{EngineConfig, Error};

const GIB: u64 = 1 << 30;
/// Most variables and labels of one machine, their longest key and value in bytes, and all of them together.
const MAX_PAIRS: usize = 256;
const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 32 * 1024;
const MAX_PAIRS_BYTES: usize = 256 * 1024;

/// The size of a machine, with every default filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub vcpu: u32,
    pub memory_mib: u32,
    pub disk_gib: u32,
}

/// Fills in defaults and refuses sizes that no machine can have.
pub(crate) fn size(request: &CreateMachine, image_bytes: u64) -> Result<Size, Error> {
    let image_gib = u32::try_from(image_bytes.div_ceil(GIB)).unwrap_or(u32::MAX);
    let size = Size {
        vcpu: request.vcpu.unwrap_or(DEFAULT_VCPU),
        memory_mib: request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
        disk_gib: request.disk_gib.unwrap_or(DEFAULT_DISK_GIB.max(image_gib)),
    };
    within("vcpu", size.vcpu, 1, MAX_VCPU, "")?;
    within(
        "memory_mib",
        size.memory_mib,
        MIN_MEMORY_MIB,
        MAX_MEMORY_MIB,
        " MiB",
    )?;
    within("disk_gib", size.disk_gib, 1, MAX_DISK_GIB, " GiB")?;
    if size.disk_gib < image_gib {
        return Err(Error::invalid(
            "disk_gib",
            format!(
                "is {}, and the image needs at least {image_gib} GiB",
                size.disk_gib
            ),
        ));
    }
    Ok(size)
}

fn within(field: &'static str, value: u32, low: u32, high: u32, unit: &str) -> Result<(), Error> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!("is {value}, and must be from {low} to {high}{unit}"),
    ))
}

/// Refuses environments and labels that are too large or cannot be passed on.
pub(crate) fn pairs(field: &'static str, pairs: &BTreeMap<String, String>) -> Result<(), Error> {
    if pairs.len() > MAX_PAIRS {
        return Err(Error::invalid(
            field,
            format!("has {} entries, and may have {MAX_PAIRS}", pairs.len()),
        ));
    }
    let mut total = 0;
    for (key, value) in pairs {
        let problem = if key.is_empty() {
            Some("has an empty key".to_owned())
        } else if key.len() > MAX_KEY_BYTES {
            Some(format!("has a key of more than {MAX_KEY_BYTES} bytes"))
        } else if key.contains(['=', '\0']) || value.contains('\0') {
            Some("has a key with `=`, or a NUL".to_owned())
        } else if value.len() > MAX_VALUE_BYTES {
            Some(format!("has a value of more than {MAX_VALUE_BYTES} bytes"))
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(Error::invalid(field, problem));
        }
        total += key.len() + value.len();
    }
    if total > MAX_PAIRS_BYTES {
        return Err(Error::invalid(
            field,
            format!("has {total} bytes, and may have {MAX_PAIRS_BYTES}"),
        ));
    }
    Ok(())
}

/// What the host has, and what is promised to machines.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Host {
    /// Memory of the host in MiB.
    pub memory_mib: u64,
    /// Memory that could be used now, in MiB (`MemAvailable`).
    pub available_mib: u64,
    /// What is free where disks lie.
    pub disk: Room,
    /// Machines that exist.
    pub machines: u64,
    /// Memory promised to machines that run or shall run, in MiB.
    pub promised_mib: u64,
}

/// Refuses a machine for which the host has no room, and says what is short.
///
/// Disks are not promised: they grow as guests write. The reserve keeps the host itself alive.
pub(crate) fn room(config: &EngineConfig, host: &Host, size: &Size) -> Result<(), Error> {
    let short = |what, need, have, unit| {
        Err(Error::Exhausted {
            what,
            need,
            have,
            unit,
        })
    };
    if host.machines >= u64::from(config.max_machines) {
        return short("machines", 1, 0, "slots");
    }
    let need = u64::from(size.memory_mib);
    let promisable = host.memory_mib * u64::from(config.memory_overcommit);
    let left = promisable.saturating_sub(host.promised_mib);
    if need > left {
        return short("memory", need, left, "MiB");
    }
    if host.available_mib < config.memory_floor_mib {
        return short("memory", config.memory_floor_mib, host.available_mib, "MiB");
    }
    disk_room(config, host.disk)
}

/// Refuses anything that would eat into the reserve: with a pool that is what its machines can still write when it has
/// grown to its end, which is the same reserve of the host's.
pub(crate) fn disk_room(config: &EngineConfig, disk: Room) -> Result<(), Error> {
    let free_mib = disk.usable(config.disk_reserve_mib << 20) >> 20;
    if free_mib < config.disk_reserve_mib {
        return Err(Error::Exhausted {
            what: "disk",
            need: config.disk_reserve_mib,
            have: free_mib,
            unit: "MiB",
        });
    }
    Ok(())
}

/// The lowest slot that nobody has and that has rested. `rows` holds every slot that was ever used.
pub(crate) fn free_slot(
    rows: &BTreeMap<u16, SlotRow>,
    last: u16,
    now_ms: u64,
    rest: Duration,
) -> Option<u16> {
    (1..=last).find(|slot| match rows.get(slot) {
        None => true,
        Some(SlotRow::Taken { .. }) => false,
        Some(SlotRow::Resting { since_ms }) => {
            now_ms.saturating_sub(*since_ms) >= rest.as_millis() as u64
        }
    })
}

impl Host {
    /// This host, with nothing promised.
    pub fn of(data_dir: &Path) -> Result<Host, Error> {
        let (memory_mib, available_mib) = host_memory();
        let disk = hutch_disk::pool::room(data_dir)?;
        Ok(Host {
            memory_mib,
            available_mib,
            disk,
            ..Host::default()
        })
    }
}

/// Memory of this host: all of it, and what could be used now, in MiB.
pub(crate) fn host_memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .map_or(0, |kib| kib >> 10)
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hutch_contract::id::MachineId;

    fn free(bytes: u64) -> Room {
        Room {
            free: bytes,
            around: None,
        }
    }

    #[test]
    fn a_pool_counts_what_it_can_grow_by() {
        let config = crate::config::tests::config("/nowhere".as_ref());
        let fits = |free, around| {
            let disk = Room {
                free,
                around: Some(around),
            };
            disk_room(&config, disk).is_ok()
        };
        // The reserve is 1 GiB, once for the host and once for the machines.
        assert!(fits(0, 2 * GIB));
        assert!(!fits(0, 2 * GIB - 1));
        assert!(fits(GIB, 0), "the pool's space is nobody else's");
        assert!(!fits(GIB - 1, GIB));
    }

    fn request() -> CreateMachine {
        CreateMachine {
            image: "busybox".into(),
            ..CreateMachine::default()
        }
    }

    #[test]
    fn defaults_grow_with_the_image() {
        let found = size(&request(), 20 * GIB).expect("a machine of the default size");
        assert_eq!(
            found,
            Size {
                vcpu: 1,
                memory_mib: 512,
                disk_gib: 20
            }
        );
    }

    #[test]
    fn absurd_sizes_are_refused_with_the_field_named() {
        let cases = [
            (
                CreateMachine {
                    vcpu: Some(0),
                    ..request()
                },
                "`vcpu`",
            ),
            (
                CreateMachine {
                    vcpu: Some(u32::MAX),
                    ..request()
                },
                "`vcpu`",
            ),
            (
                CreateMachine {
                    memory_mib: Some(0),
                    ..request()
                },
                "`memory_mib`",
            ),
            (
                CreateMachine {
                    memory_mib: Some(u32::MAX),
                    ..request()
                },
                "`memory_mib`",
            ),
            (
                CreateMachine {
                    disk_gib: Some(0),
                    ..request()
                },
                "`disk_gib`",
            ),
            (
                CreateMachine {
                    disk_gib: Some(u32::MAX),
                    ..request()
                },
                "`disk_gib`",
            ),
            (
                CreateMachine {
                    disk_gib: Some(1),
                    ..request()
                },
                "at least 2 GiB",
            ),
        ];
        for (request, named) in cases {
            let error = size(&request, 2 * GIB).expect_err(named).to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_is_short_is_said() {
        let config = crate::config::tests::config("/nowhere".as_ref());
        let plenty = Host {
            memory_mib: 1000,
            available_mib: 1000,
            disk: free(100 * GIB),
            ..Host::default()
        };
        let size = Size {
            vcpu: 1,
            memory_mib: 600,
            disk_gib: 1,
        };
        room(&config, &plenty, &size).expect("room");
        let cases = [
            (
                Host {
                    machines: u64::from(config.max_machines),
                    ..plenty
                },
                "machines",
            ),
            (
                Host {
                    promised_mib: 3500,
                    ..plenty
                },
                "memory",
            ),
            (
                Host {
                    available_mib: 10,
                    ..plenty
                },
                "memory",
            ),
            (
                Host {
                    disk: free(1 << 20),
                    ..plenty
                },
                "disk",
            ),
        ];
        for (host, what) in cases {
            let error = room(&config, &host, &size).expect_err(what);
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn a_slot_rests_before_it_is_given_again() {
        let taken = SlotRow::Taken {
            machine: MachineId::new(),
        };
        let rows = BTreeMap::from([(1, taken), (2, SlotRow::Resting { since_ms: 1000 })]);
        let rest = Duration::from_secs(30);
        assert_eq!(free_slot(&rows, 5, 2000, rest), Some(3));
        assert_eq!(free_slot(&rows, 5, 31_000, rest), Some(2));
    }

    #[test]
    fn hostile_environments_are_refused() {
        let one = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let many = (0..300).map(|n| (format!("K{n}"), String::new())).collect();
        let long = "v".repeat(MAX_VALUE_BYTES + 1);
        for bad in [
            one("", "v"),
            one("A=B", "v"),
            one("A", "v\0"),
            one("A", &long),
            many,
        ] {
            assert!(pairs("env", &bad).is_err());
        }
        assert!(pairs("env", &one("PATH", "/bin")).is_ok());
    }
}
