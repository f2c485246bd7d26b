//! What an end of Firecracker meant. Only a reset of its guest ends it, so our PID 1 resets to power off too, and says
//! before which it means; a panicking kernel says so by itself.

use hutch_contract::machine::Exit;

use crate::launch::ExitStatus;
use crate::process::Evidence;

/// What is said on the console before an end, by our PID 1 (`crates/agent/src/init.rs`) or the kernel. A guest can print
/// this too and then reset: it lies about nobody but itself.
const SAID: [(&[u8], Exit); 3] = [
    (b"hutch: power off", Exit::PowerOff),
    (b"hutch: reboot", Exit::Reboot),
    (b"Kernel panic - not syncing", Exit::Panic),
];

/// What a kernel says last that was told to halt, or to power off and has no way to, as here (`reboot` in its
/// `kernel/reboot.c`; with `quiet`, too). The VMM goes on for ever with a guest that does not, so the shim ends it.
pub(super) const HALTED: &str = "reboot: System halted";

/// See the module.
pub(super) fn judge(evidence: &Evidence) -> Exit {
    match evidence.status {
        ExitStatus::Signal(libc::SIGKILL) if is_halted(&evidence.console) => Exit::PowerOff,
        ExitStatus::Signal(signal) => Exit::Signal { signal },
        ExitStatus::Code(0) => said(&evidence.console).unwrap_or(Exit::Reboot),
        ExitStatus::Code(code) => Exit::Code { code },
    }
}

fn is_halted(console: &[u8]) -> bool {
    console.trim_ascii_end().ends_with(HALTED.as_bytes())
}

/// The last of these words counts.
fn said(console: &[u8]) -> Option<Exit> {
    let last = |words: &[u8]| {
        let mut windows = console.windows(words.len());
        windows.rposition(|window| window == words)
    };
    let found = SAID
        .iter()
        .filter_map(|(words, exit)| Some((last(words)?, exit)));
    found
        .max_by_key(|(at, _)| *at)
        .map(|(_, exit)| exit.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: ExitStatus, console: &str) -> Exit {
        judge(&Evidence {
            status,
            events: Vec::new(),
            console: console.as_bytes().to_vec(),
            words: Vec::new(),
        })
    }

    #[test]
    fn the_last_words_of_a_guest_that_reset_tell_why() {
        let panic = "[ 1.0] Kernel panic - not syncing: sysrq triggered crash\r\n";
        let off = "hutch: power off\r\n[ 2.0] reboot: Restarting system\r\n";
        let again = "hutch: reboot\r\n[ 2.0] reboot: Restarting system\r\n";
        let reset = |console: &str| ended(ExitStatus::Code(0), console);
        assert_eq!(reset(off), Exit::PowerOff);
        assert_eq!(reset(again), Exit::Reboot);
        assert_eq!(reset(panic), Exit::Panic);
        assert_eq!(reset(&format!("{off}{panic}")), Exit::Panic);
        assert_eq!(reset(&format!("{panic}{off}{again}")), Exit::Reboot);
        // Somebody in the guest did it alone.
        assert_eq!(reset("bye"), Exit::Reboot);
        assert_eq!(reset(""), Exit::Reboot);
    }

    #[test]
    fn a_guest_that_powered_off_on_its_own_is_told_from_a_killed_vmm() {
        let killed = |console: &str| ended(ExitStatus::Signal(libc::SIGKILL), console);
        assert_eq!(killed("[ 2.0] reboot: System halted\r\n"), Exit::PowerOff);
        let alive = "[ 2.0] reboot: System halted\r\n# ";
        assert_eq!(killed(alive), Exit::Signal { signal: 9 });
    }

    #[test]
    fn other_ends_are_not_the_guests_to_explain() {
        let off = "hutch: power off\r\n";
        assert_eq!(ended(ExitStatus::Code(148), off), Exit::Code { code: 148 });
        assert_eq!(
            ended(ExitStatus::Signal(6), off),
            Exit::Signal { signal: 6 }
        );
    }
}
