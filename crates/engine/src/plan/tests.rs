//! The policy as tables, and what holds for every order of wishes, failures and crashes.

use proptest::prelude::*;

use hutch_contract::id::{OperationId, SnapshotId};
use hutch_contract::lifetime::Lifetime;

use super::*;
use crate::rows::tests::machine_record;

fn facts(life: Life) -> Facts {
    Facts {
        life,
        files: true,
        greeted: false,
    }
}

fn record(wanted: Wanted, observed: Observed) -> MachineRecord {
    MachineRecord {
        wanted,
        observed,
        ..machine_record()
    }
}

fn failed() -> Observed {
    Observed::Failed {
        code: "boot".into(),
        reason: "no".into(),
    }
}

#[test]
fn a_new_machine_is_prepared_booted_and_greeted() {
    let new = record(Wanted::Running, Observed::Absent);
    let nothing = Facts {
        life: Life::None(None),
        files: false,
        greeted: false,
    };
    assert_eq!(next(&new, &nothing), Step::Prepare);
    assert_eq!(next(&new, &facts(Life::None(None))), Step::Boot);
    assert_eq!(next(&new, &facts(Life::Alive)), Step::Greet);
}

#[test]
fn a_running_machine_rests_and_is_greeted_again_when_its_agent_is_lost() {
    let running = record(Wanted::Running, Observed::Running);
    assert_eq!(
        next(
            &running,
            &Facts {
                greeted: true,
                ..facts(Life::Alive)
            }
        ),
        Step::Rest
    );
    assert_eq!(next(&running, &facts(Life::Alive)), Step::Greet);
}

#[test]
fn what_ended_by_itself_comes_back_as_its_policy_says() {
    let crashes = [
        Some(Exit::Panic),
        Some(Exit::Signal { signal: 9 }),
        Some(Exit::Lost),
        None,
    ];
    let ends = crashes.iter().chain([&Some(Exit::PowerOff)]);
    for exit in ends {
        let crashed = *exit != Some(Exit::PowerOff);
        for (policy, back) in [
            (None, false),
            (Some(Restart::Never), false),
            (Some(Restart::OnFailure), crashed),
            (Some(Restart::Always), true),
        ] {
            let mut machine = record(Wanted::Running, Observed::Running);
            machine.lifetime.restart = policy;
            assert_eq!(
                comes_back(&machine, exit.as_ref()),
                back,
                "{policy:?} after {exit:?}"
            );
            machine.wanted = Wanted::Stopped;
            assert!(!comes_back(&machine, exit.as_ref()), "it is wanted stopped");
        }
    }
}

#[test]
fn a_paused_machine_rests_and_goes_on_when_it_is_wanted_to() {
    let mut machine = record(Wanted::Paused, Observed::Running);
    machine.generation += 1;
    assert_eq!(status(&machine), Status::Pausing);
    assert_eq!(next(&machine, &facts(Life::Alive)), Step::Pause);
    machine.observed = Observed::Paused;
    machine.served = machine.generation;
    assert_eq!(status(&machine), Status::Paused);
    // Nobody has a session with it, and nobody is to have one.
    assert_eq!(next(&machine, &facts(Life::Alive)), Step::Rest);
    let died = facts(Life::None(Some(Exit::Signal { signal: 9 })));
    assert!(matches!(next(&machine, &died), Step::NoteStopped(Some(_))));
    machine.wanted = Wanted::Stopped;
    machine.generation += 1;
    assert_eq!(next(&machine, &facts(Life::Alive)), Step::ShutDown);
    machine.wanted = Wanted::Running;
    assert_eq!(status(&machine), Status::Starting);
    assert_eq!(next(&machine, &facts(Life::Alive)), Step::Greet);
}

#[test]
fn a_machine_that_is_still_starting_comes_to_run_before_it_is_paused() {
    let new = record(Wanted::Paused, Observed::Absent);
    assert_eq!(status(&new), Status::Starting);
    assert_eq!(next(&new, &facts(Life::None(None))), Step::Boot);
    assert_eq!(next(&new, &facts(Life::Alive)), Step::Greet);
}

#[test]
fn a_guest_that_reboots_is_booted_and_one_that_ends_is_stopped() {
    let running = record(Wanted::Running, Observed::Running);
    assert_eq!(
        next(&running, &facts(Life::None(Some(Exit::Reboot)))),
        Step::Boot
    );
    for exit in [
        Exit::PowerOff,
        Exit::Panic,
        Exit::Signal { signal: 11 },
        Exit::Code { code: 1 },
    ] {
        assert_eq!(
            next(&running, &facts(Life::None(Some(exit.clone())))),
            Step::NoteStopped(Some(exit))
        );
    }
    assert_eq!(
        next(&running, &facts(Life::None(None))),
        Step::NoteStopped(Some(Exit::Lost))
    );
}

#[test]
fn a_failed_start_is_ended_and_waits_to_be_asked_again() {
    let given_up = record(Wanted::Running, failed());
    assert_eq!(next(&given_up, &facts(Life::Alive)), Step::Kill);
    assert_eq!(next(&given_up, &facts(Life::None(None))), Step::Rest);
    let asked = MachineRecord {
        generation: given_up.generation + 1,
        ..given_up
    };
    assert_eq!(next(&asked, &facts(Life::None(None))), Step::Boot);
    assert_eq!(status(&asked), Status::Starting);
}

#[test]
fn a_restart_stops_first() {
    let asked = MachineRecord {
        restart: true,
        ..record(Wanted::Running, Observed::Running)
    };
    assert_eq!(next(&asked, &facts(Life::Alive)), Step::ShutDown);
    assert_eq!(
        next(&asked, &facts(Life::None(Some(Exit::PowerOff)))),
        Step::NoteRestarting
    );
    assert_eq!(status(&asked), Status::Starting);
}

#[test]
fn a_start_that_is_taken_back_is_stopping_until_nothing_runs() {
    let stopped = record(Wanted::Stopped, Observed::Stopped);
    assert_eq!(status(&stopped), Status::Stopped);
    assert_eq!(next(&stopped, &facts(Life::None(None))), Step::Rest);
    let taken_back = MachineRecord {
        generation: stopped.generation + 2,
        ..stopped
    };
    assert_eq!(status(&taken_back), Status::Stopping);
    assert_eq!(
        next(&taken_back, &facts(Life::None(None))),
        Step::NoteStopped(None)
    );
}

fn snapshot() -> Option<Work> {
    Some(Work::Snapshot {
        snapshot: SnapshotId::new(),
        memory: false,
        operation: OperationId::new(),
    })
}

fn restore() -> Option<Work> {
    Some(Work::Restore {
        snapshot: SnapshotId::new(),
        disk_only: false,
        operation: OperationId::new(),
    })
}

#[test]
fn a_snapshot_waits_for_the_machine_to_rest() {
    let with = |record: MachineRecord| MachineRecord {
        work: snapshot(),
        ..record
    };
    let running = with(record(Wanted::Running, Observed::Running));
    let greeted = Facts {
        greeted: true,
        ..facts(Life::Alive)
    };
    assert_eq!(next(&running, &greeted), Step::Snapshot);
    // Its guest cannot be asked to stand still, yet.
    assert_eq!(next(&running, &facts(Life::Alive)), Step::Greet);
    assert_eq!(status(&running), Status::Running);
    let starting = with(record(Wanted::Running, Observed::Absent));
    assert_eq!(next(&starting, &facts(Life::Alive)), Step::Greet);
    let stopped = with(record(Wanted::Stopped, Observed::Stopped));
    assert_eq!(next(&stopped, &facts(Life::None(None))), Step::Snapshot);
    let broken = with(record(Wanted::Running, failed()));
    assert_eq!(next(&broken, &facts(Life::None(None))), Step::Snapshot);
    // It goes on, is taken, and is paused again.
    let mut paused = with(record(Wanted::Paused, Observed::Paused));
    assert_eq!(next(&paused, &facts(Life::Alive)), Step::Greet);
    paused.observed = Observed::Running;
    assert_eq!(next(&paused, &greeted), Step::Snapshot);
    paused.work = None;
    assert_eq!(next(&paused, &greeted), Step::Pause);
    let deleted = with(record(Wanted::Deleted, Observed::Running));
    assert_eq!(next(&deleted, &greeted), Step::Kill);
    assert!(superseded(&Step::Snapshot, &deleted) && !superseded(&Step::Snapshot, &stopped));
}

#[test]
fn a_restore_comes_before_what_became_of_the_process() {
    let with = |record: MachineRecord| MachineRecord {
        work: restore(),
        ..record
    };
    let running = with(record(Wanted::Running, Observed::Running));
    assert_eq!(next(&running, &facts(Life::Alive)), Step::Restore);
    assert_eq!(status(&running), Status::Starting);
    // A crash between its end and the new disk must not leave it stopped.
    let killed = facts(Life::None(Some(Exit::Killed)));
    assert_eq!(next(&running, &killed), Step::Restore);
    let restored = record(Wanted::Running, Observed::Stopped);
    assert_eq!(next(&restored, &killed), Step::Boot);
    // What cannot boot is what needs it most.
    let broken = with(record(Wanted::Running, failed()));
    assert_eq!(next(&broken, &facts(Life::None(None))), Step::Restore);
    let stopped = with(record(Wanted::Stopped, Observed::Stopped));
    assert_eq!(next(&stopped, &facts(Life::None(None))), Step::Restore);
    let stopping = with(record(Wanted::Stopped, Observed::Running));
    assert_eq!(next(&stopping, &facts(Life::Alive)), Step::ShutDown);
}

fn any_exit() -> impl Strategy<Value = Option<Exit>> {
    prop_oneof![
        Just(None),
        Just(Some(Exit::PowerOff)),
        Just(Some(Exit::Reboot)),
        Just(Some(Exit::Killed)),
        Just(Some(Exit::Lost)),
    ]
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let life = prop_oneof![
        any_exit().prop_map(Life::None),
        Just(Life::Alive),
        Just(Life::Unproved)
    ];
    (life, any::<bool>(), any::<bool>()).prop_map(|(life, files, greeted)| Facts {
        greeted: greeted && life == Life::Alive,
        life,
        files,
    })
}

fn any_record() -> impl Strategy<Value = MachineRecord> {
    let wanted = prop_oneof![
        Just(Wanted::Running),
        Just(Wanted::Paused),
        Just(Wanted::Stopped),
        Just(Wanted::Deleted)
    ];
    let observed = prop_oneof![
        Just(Observed::Absent),
        Just(Observed::Running),
        Just(Observed::Paused),
        Just(Observed::Stopped),
        Just(failed()),
        Just(Observed::Unknown { reason: "?".into() }),
    ];
    let work = prop_oneof![
        Just(()).prop_map(|()| None),
        Just(()).prop_map(|()| snapshot()),
        Just(()).prop_map(|()| restore()),
    ];
    let policy = prop_oneof![
        Just(None),
        Just(Some(Restart::OnFailure)),
        Just(Some(Restart::Always))
    ];
    let flags = (any::<bool>(), any::<bool>(), policy);
    let all = (wanted, observed, flags, 0..2u64, work);
    all.prop_map(|(wanted, observed, flags, ahead, work)| {
        let (restart, keep_initial, policy) = flags;
        let base = record(wanted, observed);
        MachineRecord {
            work,
            keep_initial,
            lifetime: Lifetime {
                restart: policy,
                ..Lifetime::default()
            },
            restart: restart && is_up(wanted),
            generation: base.served + ahead,
            ..base
        }
    })
}

/// What a step brings about when it works. `None`: the record is gone.
fn perform(
    step: &Step,
    mut record: MachineRecord,
    mut facts: Facts,
) -> Option<(MachineRecord, Facts)> {
    match step {
        Step::Rest => {}
        Step::Prepare => facts.files = true,
        Step::KeepInitial => record.keep_initial = false,
        Step::Boot => facts.life = Life::Alive,
        Step::Greet => {
            facts.greeted = true;
            record.observed = Observed::Running;
            if record.wanted == Wanted::Running {
                record.served = record.generation;
            }
        }
        Step::Pause => {
            facts.greeted = false;
            record.observed = Observed::Paused;
            record.served = record.generation;
        }
        Step::Snapshot => record.work = None,
        Step::Restore => {
            record.work = None;
            record.observed = Observed::Stopped;
            if record.wanted == Wanted::Stopped {
                record.served = record.generation;
            }
            facts.life = Life::None(None);
            facts.greeted = false;
        }
        Step::ShutDown | Step::Kill => {
            facts.life = Life::None(Some(Exit::Killed));
            facts.greeted = false;
        }
        Step::NoteStopped(exit) => {
            if !comes_back(&record, exit.as_ref()) {
                record.wanted = Wanted::Stopped;
                record.served = record.generation;
            }
            record.observed = Observed::Stopped;
            facts.life = Life::None(None);
        }
        Step::NoteRestarting => {
            record.observed = Observed::Stopped;
            record.restart = false;
            facts.life = Life::None(None);
        }
        Step::NoteUnknown => record.observed = Observed::Unknown { reason: "?".into() },
        Step::Remove => return None,
    }
    Some((record, facts))
}

proptest! {
    /// From every state the plan comes to rest at what is wanted, within a few steps, and stays there.
    #[test]
    fn every_state_comes_to_rest(record in any_record(), facts in any_facts()) {
        let wanted = record.wanted;
        let unproved = facts.life == Life::Unproved;
        let mut state = Some((record, facts));
        let mut steps = 0;
        while let Some((record, facts)) = state.clone() {
            let step = next(&record, &facts);
            if step == Step::Rest {
                break;
            }
            state = perform(&step, record, facts);
            steps += 1;
            prop_assert!(steps <= 10, "no rest");
        }
        match state {
            None => prop_assert!(wanted == Wanted::Deleted),
            Some((record, _)) if unproved => prop_assert_eq!(status(&record), Status::Unknown),
            Some((record, facts)) => {
                prop_assert!(wanted != Wanted::Deleted);
                prop_assert!(record.work.is_none(), "work is left");
                if wanted == Wanted::Paused && facts.life == Life::Alive {
                    prop_assert_eq!(status(&record), Status::Paused);
                }
                if wanted == Wanted::Stopped {
                    prop_assert_eq!(status(&record), Status::Stopped);
                    prop_assert!(matches!(facts.life, Life::None(_)));
                }
            }
        }
    }

    /// Nothing destructive is done to what cannot be proved to be ours.
    #[test]
    fn the_unproved_is_left_alone(record in any_record(), facts in any_facts()) {
        let facts = Facts { life: Life::Unproved, greeted: false, ..facts };
        prop_assert!(matches!(next(&record, &facts), Step::Rest | Step::NoteUnknown));
    }

    /// Files go only when no process uses them, and a process is started only when none is there.
    #[test]
    fn effects_fit_the_process(record in any_record(), facts in any_facts()) {
        match next(&record, &facts) {
            Step::Remove | Step::Boot | Step::Prepare | Step::KeepInitial => prop_assert!(matches!(facts.life, Life::None(_))),
            Step::Kill | Step::ShutDown | Step::Greet | Step::Pause => prop_assert_eq!(facts.life, Life::Alive),
            _ => {}
        }
    }
}
