//! Time passes in these tests without waiting for it.

use hutch_contract::lifetime::Restart;
use hutch_contract::record::Observed;

use super::*;
use crate::rows::tests::machine_record;

const IDLE: Duration = Duration::from_secs(60);

fn running(lifetime: Lifetime) -> MachineRecord {
    MachineRecord {
        observed: Observed::Running,
        expires_at_ms: end_of(&lifetime, 0),
        lifetime,
        ..machine_record()
    }
}

fn idle() -> Lifetime {
    Lifetime {
        idle_pause_s: Some(60),
        ..Lifetime::default()
    }
}

fn ttl(action: Option<TtlAction>) -> Lifetime {
    Lifetime {
        ttl_s: Some(10),
        ttl_action: action,
        ..Lifetime::default()
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_idle_a_while_after_the_last_of_all_uses() {
    let uses = Uses::new();
    let (first, second) = (uses.hold(), uses.hold());
    let begun = Instant::now();
    tokio::spawn(async move {
        tokio::time::sleep(IDLE * 2).await;
        drop(first);
        tokio::time::sleep(IDLE / 2).await;
        drop(second);
    });
    assert_eq!(due(&running(idle()), &uses, 0).await, Due::Idle(IDLE));
    assert_eq!(begun.elapsed().as_secs(), 60 * 2 + 30 + 60);
}

#[tokio::test(start_paused = true)]
async fn a_use_that_is_over_counts_from_its_end() {
    let uses = Uses::new();
    let begun = Instant::now();
    let once = uses.clone();
    tokio::spawn(async move {
        tokio::time::sleep(IDLE / 2).await;
        drop(once.hold());
    });
    assert_eq!(due(&running(idle()), &uses, 0).await, Due::Idle(IDLE));
    assert_eq!(begun.elapsed().as_secs(), 30 + 60);
}

#[tokio::test(start_paused = true)]
async fn only_what_runs_is_idle_but_time_passes_for_all() {
    let uses = Uses::new();
    let both = Lifetime {
        ttl_s: Some(100_000),
        ..idle()
    };
    let paused = MachineRecord {
        wanted: Wanted::Paused,
        observed: Observed::Paused,
        ..running(both)
    };
    assert_eq!(due(&paused, &uses, 0).await, Due::Ttl);
    let nothing = running(Lifetime::default());
    let never = tokio::time::timeout(IDLE * 1000, due(&nothing, &uses, 0)).await;
    assert!(never.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_is_used_is_not_put_to_rest() {
    let uses = Uses::new();
    let held = uses.hold();
    tokio::time::sleep(IDLE).await;
    let used = || panic!("somebody uses it");
    assert!(!uses.unless_used(IDLE, used));
    drop(held);
    assert!(!uses.unless_used(IDLE, used), "a moment ago");
    tokio::time::sleep(IDLE).await;
    let mut rests = false;
    assert!(uses.unless_used(IDLE, || rests = true));
    assert!(rests);
}

#[test]
fn an_end_does_what_was_said_and_pauses_otherwise() {
    for (action, wanted) in [
        (None, Wanted::Paused),
        (Some(TtlAction::Pause), Wanted::Paused),
        (Some(TtlAction::Stop), Wanted::Stopped),
        (Some(TtlAction::Delete), Wanted::Deleted),
    ] {
        let mut record = running(ttl(action));
        expire(&mut record, 9_999);
        assert_eq!(record.wanted, Wanted::Running, "{action:?}: not yet");
        expire(&mut record, 10_000);
        assert_eq!(
            (record.wanted, record.generation),
            (wanted, 2),
            "{action:?}"
        );
        assert_eq!(record.expires_at_ms, None);
        expire(&mut record, 20_000);
        assert_eq!(record.generation, 2, "{action:?}: once");
    }
}

#[test]
fn what_stands_still_already_is_only_deleted() {
    let stopped = |action| MachineRecord {
        wanted: Wanted::Stopped,
        observed: Observed::Stopped,
        ..running(ttl(Some(action)))
    };
    for (action, wanted) in [
        (TtlAction::Pause, Wanted::Stopped),
        (TtlAction::Stop, Wanted::Stopped),
        (TtlAction::Delete, Wanted::Deleted),
    ] {
        let mut record = stopped(action);
        expire(&mut record, 10_000);
        assert_eq!(record.wanted, wanted, "{action:?}");
    }
}

#[test]
fn what_goes_on_after_its_end_gets_as_much_time_again() {
    let mut record = running(ttl(None));
    renew(&mut record, 5_000);
    assert_eq!(record.expires_at_ms, Some(10_000), "it is not over");
    expire(&mut record, 10_000);
    renew(&mut record, 30_000);
    assert_eq!(record.expires_at_ms, Some(40_000));
}

#[test]
fn a_change_keeps_what_it_leaves_out() {
    let now = Lifetime {
        ttl_action: Some(TtlAction::Stop),
        ..ttl(None)
    };
    let with_idle = changed(&now, &idle(), true).expect("it is possible");
    assert_eq!(
        (with_idle.idle_pause_s, with_idle.ttl_s),
        (Some(60), Some(10))
    );
    assert_eq!(with_idle.ttl_action, Some(TtlAction::Stop));
    let never = Lifetime {
        idle_pause_s: Some(0),
        ttl_s: Some(0),
        ttl_action: None,
        restart: Some(Restart::Always),
    };
    let without = changed(&with_idle, &never, true).expect("it is possible");
    assert_eq!((without.idle_pause_s, without.ttl_s), (None, None));
    assert_eq!(without.restart, Some(Restart::Always));
}

#[test]
fn what_cannot_be_is_refused() {
    let none = Lifetime::default();
    let action = Lifetime {
        ttl_action: Some(TtlAction::Delete),
        ..Lifetime::default()
    };
    let told = |asked: &Lifetime, pauses| changed(&none, asked, pauses).map_err(|e| e.to_string());
    assert!(told(&action, true).is_err_and(|why| why.contains("needs `ttl_s`")));
    assert!(told(&idle(), false).is_err_and(|why| why.contains("cannot pause")));
    assert!(told(&ttl(None), false).is_err_and(|why| why.contains("`stop` or `delete`")));
    assert!(told(&ttl(Some(TtlAction::Stop)), false).is_ok());
}
