//! The command line of guests' kernels: what is the same below every VMM. What one needs besides, and where a guest finds
//! its disks and its channel there, is said in that runtime's own files.

use crate::MachineSpec;

const COMMON: [&str; 6] = [
    "console=ttyS0",
    // Looking for serial lines that are not there takes a quarter of a second.
    "8250.nr_uarts=1",
    "quiet",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    // A panic resets at once, and a reset ends the VMM.
    "panic=-1",
];

/// The whole line: what is common, the runtime's `own` words, the machine's.
pub(crate) fn kernel_line(own: Vec<String>, spec: &MachineSpec) -> String {
    let common = COMMON.into_iter().map(str::to_owned);
    let words = common.chain(own).chain(spec.kernel_args.iter().cloned());
    words.collect::<Vec<_>>().join(" ")
}
