//! What Cloud Hypervisor's event monitor says, and what an end meant: objects of JSON over several lines, each followed
//! by an empty line (its `event_monitor` crate; the words are in `docs/api.md` and at each `event!` of its sources).

use hutch_contract::machine::Exit;
use serde::Deserialize;

use crate::launch::ExitStatus;
use crate::process::{Evidence, panicked};

/// Said first thing when a guest resets, in whatever way: it then boots again in the same process, and no option makes
/// that an end. So the shim ends it on this word. No text of a guest's gets into events.
pub(super) const RESET: &str = "\"event\": \"rebooting\"";

/// What the VMM logs when it cannot go on; it then shuts down as it does for a guest that powers off, with exit code 0.
const BROKEN: [&[u8]; 2] = [b"VCPU generated error", b"panicked"];

#[derive(Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// Whether a guest has begun to run.
pub(super) fn is_booted(text: &[u8]) -> bool {
    events(text).any(|e| e.source == "vm" && e.event == "booted")
}

/// What an end meant: from its exit status, its events, the console for a panic (which is a reset like any other) and
/// its own words for a failure of the VMM's (which ends like a power-off).
pub(super) fn judge(evidence: &Evidence) -> Exit {
    let said = |source: &str, event: &str| {
        events(&evidence.events).any(|e| e.source == source && e.event == event)
    };
    match evidence.status {
        ExitStatus::Signal(libc::SIGKILL) if said("vm", "rebooting") => {
            if panicked(&evidence.console) {
                Exit::Panic
            } else {
                Exit::Reboot
            }
        }
        ExitStatus::Signal(signal) => Exit::Signal { signal },
        ExitStatus::Code(0) if said("vm", "shutdown") && !is_broken(&evidence.words) => {
            Exit::PowerOff
        }
        ExitStatus::Code(code) => Exit::Code { code },
    }
}

/// The events that are whole: the ring may have cut the oldest.
fn events(text: &[u8]) -> impl Iterator<Item = Event> {
    let text = String::from_utf8_lossy(text).into_owned();
    let events: Vec<Event> = text
        .split("\n\n")
        .filter_map(|event| serde_json::from_str(event).ok())
        .collect();
    events.into_iter()
}

fn is_broken(words: &[u8]) -> bool {
    let contains = |word: &&[u8]| words.windows(word.len()).any(|window| window == *word);
    BROKEN.iter().any(contains)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As v53.0 prints them.
    fn monitor(events: &[&str]) -> Vec<u8> {
        let cut_by_the_ring = "  \"event\": \"rebooting\",\n  \"properties\": null\n}\n\n";
        let mut text = cut_by_the_ring.to_owned();
        for event in events {
            let (source, event) = event.split_once('/').unwrap();
            text += &format!(
                "{{\n  \"timestamp\": {{\n    \"secs\": 1,\n    \"nanos\": 2\n  }},\n  \"source\": \"{source}\",\n  \
                 \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
            );
        }
        text.into_bytes()
    }

    const UP: [&str; 3] = ["vmm/starting", "vm/booting", "vm/booted"];
    const DOWN: [&str; 3] = ["vm/shutdown", "vm/deleted", "vmm/shutdown"];

    fn ended(status: ExitStatus, events: &[&str], console: &str, words: &str) -> Exit {
        judge(&Evidence {
            status,
            events: monitor(&[&UP, events].concat()),
            console: console.as_bytes().to_vec(),
            words: words.as_bytes().to_vec(),
        })
    }

    #[test]
    fn ends_are_told_apart() {
        let killed = ExitStatus::Signal(libc::SIGKILL);
        let code = ExitStatus::Code;
        let panic = "[ 1.0] Kernel panic - not syncing: sysrq triggered crash\r\n";
        assert_eq!(ended(code(0), &DOWN, panic, ""), Exit::PowerOff);
        assert_eq!(ended(killed, &["vm/rebooting"], "bye", ""), Exit::Reboot);
        assert_eq!(ended(killed, &["vm/rebooting"], panic, ""), Exit::Panic);
        // Not the one that the ring has cut.
        assert_eq!(ended(killed, &[], panic, ""), Exit::Signal { signal: 9 });
        let dead = ExitStatus::Signal(libc::SIGSYS);
        let violation = ended(dead, &["vm/rebooting"], "", "");
        assert_eq!(violation, Exit::Signal { signal: 31 });
        assert_eq!(ended(code(1), &DOWN, "", ""), Exit::Code { code: 1 });
        assert_eq!(ended(code(0), &[], "", ""), Exit::Code { code: 0 });
        for words in [
            "cloud-hypervisor: 9.1s: <vcpu0> ERROR:vmm/src/cpu.rs:1460 -- VCPU generated error: VcpuRun(…)",
            "cloud-hypervisor: 9.1s: <_disk0_q0> ERROR:virtio-devices/src/thread_helper.rs:50 -- _disk0_q0 thread panicked",
        ] {
            assert_eq!(ended(code(0), &DOWN, "", words), Exit::Code { code: 0 });
        }
        let harmless = "WARN:vmm/src/vm.rs -- Guest-physical address not found";
        assert_eq!(ended(code(0), &DOWN, "", harmless), Exit::PowerOff);
    }

    #[test]
    fn the_shims_word_is_in_what_is_printed() {
        let text = String::from_utf8(monitor(&["vm/rebooting"])).unwrap();
        assert_eq!(text.matches(RESET).count(), 2, "the cut one and this");
        let up = String::from_utf8(monitor(&[&UP[..], &DOWN, &["vm/rebooted"]].concat())).unwrap();
        assert_eq!(up.matches(RESET).count(), 1);
        assert!(is_booted(&monitor(&UP)));
        assert!(!is_booted(&monitor(&UP[..2])));
    }
}
