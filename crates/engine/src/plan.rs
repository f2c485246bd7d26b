//! What comes next for a machine: all policy, and no effect.
//!
//! ```text
//!                      create                         start, restart
//!                        │                   ┌──────────────────────────────┐
//!                        ▼                   ▼                              │
//!                    ┌────────┐ Prepare ┌────────┐ Boot, Greet ┌─────────┐ stop, restart: ShutDown
//!   wanted running:  │ absent │────────►│ files  │────────────►│ running │──────────────┐
//!                    └────────┘         └────────┘             └─────────┘              ▼
//!                        │ a step fails      │ a step fails     │ the guest   │    ┌─────────┐
//!                        ▼                   ▼                  │ powers off, │    │ stopped │
//!                    ┌──────────────────────────┐               │ crashes ────┼───►└─────────┘
//!                    │ failed(code, reason)     │               │ or reboots ─┴──► Boot again
//!                    └──────────────────────────┘
//!   wanted paused:  running ─► Pause ─► paused ─► Greet when wanted running again; what does not run yet comes to run first
//!   ended by itself, and to come back by its policy: stopped ─► Boot again, as it is still wanted
//!   wanted deleted, from everywhere:  Kill ─► Remove ─► the record is gone
//!   asked for at creation: KeepInitial between Prepare and the first Boot
//!   work (a snapshot, a restore), beside the level: Snapshot where it rests as running or stopped, and on the way to paused;
//!   Restore from everywhere but while it stops, after which it comes to its level again
//!   unknown: a process may be there and cannot be proved to be ours: nothing is done until it can
//! ```
//!
//! A machine's task asks [`next`] again after every step and every event, so a step may fail, be interrupted by a
//! newer wish or by the end of the server at any line: what is the case is looked at again, and the plan goes on.

use hutch_contract::lifetime::Restart;
use hutch_contract::machine::{Exit, Status};
use hutch_contract::record::{MachineRecord, Observed, Wanted, Work};

/// What is known of a machine's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// There is none. `Some`: how the last one ended, when that has not been recorded.
    None(Option<Exit>),
    /// It runs, and is proved to be ours.
    Alive,
    /// Something holds its place, and whose it is cannot be proved.
    Unproved,
}

/// What is the case on the host. The record says what was wanted and what was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its process.
    pub life: Life,
    /// Its directory holds all that a start needs.
    pub files: bool,
    /// Its agent answers on the present connection and has its identity.
    pub greeted: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until something happens.
    Rest,
    /// Make the directory and clone the disk.
    Prepare,
    /// Keep the disk as a snapshot, before anything has run on it.
    KeepInitial,
    /// Start the VMM.
    Boot,
    /// Let it execute where it was paused, reach the agent, give it its identity, and record that the machine runs.
    Greet,
    /// Stop its execution, and record that.
    Pause,
    /// Take the snapshot that is wanted of it.
    Snapshot,
    /// Look whether the snapshot that is wanted is whole, then end the VMM and put the disk in its place.
    Restore,
    /// Ask the guest to power off, and end the VMM when it does not.
    ShutDown,
    /// End the VMM.
    Kill,
    /// Record that it does not run, and how it ended.
    NoteStopped(Option<Exit>),
    /// Record that a restart has stopped it.
    NoteRestarting,
    /// Record that its process cannot be proved.
    NoteUnknown,
    /// Erase its files, then drop the record with its name and slot.
    Remove,
}

/// The next step towards what is wanted.
pub fn next(record: &MachineRecord, facts: &Facts) -> Step {
    let given_up =
        matches!(record.observed, Observed::Failed { .. }) && record.served == record.generation;
    let (snapshot, restore) = match &record.work {
        Some(Work::Snapshot { .. }) => (true, false),
        Some(Work::Restore { .. }) => (false, true),
        None => (false, false),
    };
    let at_rest = if snapshot {
        Step::Snapshot
    } else if restore {
        Step::Restore
    } else {
        Step::Rest
    };
    match (&facts.life, record.wanted) {
        (Life::Unproved, _) => match record.observed {
            Observed::Unknown { .. } => Step::Rest,
            _ => Step::NoteUnknown,
        },

        (Life::Alive, Wanted::Deleted) => Step::Kill,
        (Life::Alive, Wanted::Stopped) => Step::ShutDown,
        (Life::Alive, Wanted::Running | Wanted::Paused) if given_up => Step::Kill,
        (Life::Alive, Wanted::Running | Wanted::Paused) if record.restart => Step::ShutDown,
        (Life::Alive, Wanted::Running | Wanted::Paused) if restore => Step::Restore,
        (Life::Alive, Wanted::Paused) => match record.observed {
            // Its guest has to bring its disk in order, so it goes on for a moment.
            Observed::Running if snapshot && facts.greeted => Step::Snapshot,
            _ if snapshot => Step::Greet,
            Observed::Paused if record.served == record.generation => Step::Rest,
            _ if came_to_run(record) => Step::Pause,
            _ => Step::Greet,
        },
        (Life::Alive, Wanted::Running) => match record.observed {
            Observed::Running if facts.greeted => at_rest,
            _ => Step::Greet,
        },

        (Life::None(_), Wanted::Deleted) => Step::Remove,
        (Life::None(exit), Wanted::Stopped) => {
            let served = record.served == record.generation;
            if record.observed == Observed::Stopped && served && exit.is_none() {
                at_rest
            } else {
                Step::NoteStopped(exit.clone())
            }
        }
        (Life::None(_), Wanted::Running | Wanted::Paused) if given_up => at_rest,
        (Life::None(_), Wanted::Running | Wanted::Paused) if record.restart => Step::NoteRestarting,
        (Life::None(_), Wanted::Running | Wanted::Paused) if restore => Step::Restore,
        (Life::None(exit), Wanted::Running | Wanted::Paused) if came_to_run(record) => match exit {
            Some(Exit::Reboot) => Step::Boot,
            Some(exit) => Step::NoteStopped(Some(exit.clone())),
            None => Step::NoteStopped(Some(Exit::Lost)),
        },
        (Life::None(_), Wanted::Running | Wanted::Paused) if facts.files => {
            match record.keep_initial {
                true => Step::KeepInitial,
                false => Step::Boot,
            }
        }
        (Life::None(_), Wanted::Running | Wanted::Paused) => Step::Prepare,
    }
}

/// Whether the present run of the machine had come to answer: then a silent agent is waited for, not given up.
pub fn came_to_run(record: &MachineRecord) -> bool {
    matches!(
        record.observed,
        Observed::Running | Observed::Paused | Observed::Unknown { .. }
    )
}

/// Whether a machine that has ended in this way, without being told to, is started again.
pub fn comes_back(record: &MachineRecord, exit: Option<&Exit>) -> bool {
    let by_its_policy = match record.lifetime.restart.unwrap_or_default() {
        Restart::Never => false,
        Restart::OnFailure => exit != Some(&Exit::PowerOff),
        Restart::Always => true,
    };
    by_its_policy && is_up(record.wanted)
}

/// Whether it is to go back to a snapshot.
fn is_restored(record: &MachineRecord) -> bool {
    matches!(record.work, Some(Work::Restore { .. }))
}

/// Whether a machine has a process at this level.
pub fn is_up(wanted: Wanted) -> bool {
    matches!(wanted, Wanted::Running | Wanted::Paused)
}

/// Whether a newer wish makes going on with `step` pointless. Only steps that wait for a guest are asked.
pub fn superseded(step: &Step, record: &MachineRecord) -> bool {
    match step {
        Step::Boot | Step::Greet | Step::Prepare | Step::KeepInitial => {
            !is_up(record.wanted) || record.restart
        }
        Step::ShutDown | Step::Snapshot | Step::Restore => record.wanted == Wanted::Deleted,
        _ => false,
    }
}

/// The status that the API shows.
pub fn status(record: &MachineRecord) -> Status {
    match (&record.observed, record.wanted) {
        (Observed::Unknown { .. }, _) => Status::Unknown,
        (_, Wanted::Deleted) => Status::Deleting,
        (Observed::Failed { .. }, _) if record.served == record.generation => Status::Failed,
        (_, Wanted::Running | Wanted::Paused) if is_restored(record) => Status::Starting,
        (Observed::Running, Wanted::Running) if !record.restart => Status::Running,
        (Observed::Paused, Wanted::Paused) if record.served == record.generation => Status::Paused,
        (Observed::Running | Observed::Paused, Wanted::Paused) if !record.restart => {
            Status::Pausing
        }
        (_, Wanted::Running | Wanted::Paused) => Status::Starting,
        // Unserved, a start that was taken back may still be on its way.
        (Observed::Stopped, Wanted::Stopped) if record.served == record.generation => {
            Status::Stopped
        }
        (_, Wanted::Stopped) => Status::Stopping,
    }
}

#[cfg(test)]
mod tests;
