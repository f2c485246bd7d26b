//! Many wishes at once, and wishes that overtake each other: one wins, none is lost, nothing is left.

use std::time::Duration;

use futures::future::join_all;
use hutch_contract::error::Kind;
use hutch_contract::machine::{Machine, Status};
use hutch_engine::Target;

use crate::lab::{LONG, Lab, spec};

#[tokio::test(flavor = "multi_thread")]
async fn of_many_creates_with_one_name_one_wins() {
    let Some(lab) = Lab::new().await else { return };
    let results = join_all((0..20).map(|_| lab.create("a"))).await;
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    assert!(
        lost.into_iter()
            .all(|lost| lost.unwrap_err().kind() == Kind::Conflict)
    );
    lab.wait("a", Status::Running).await.unwrap();
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_idempotency_key_makes_one_machine() {
    let Some(lab) = Lab::new().await else { return };
    for name in [Some("a"), None] {
        let mut request = spec("a");
        request.name = name.map(|name| name.parse().unwrap());
        let key = name.unwrap_or("none");
        let create = || lab.engine.create(&lab.who, request.clone(), Some(key));
        let results = join_all((0..20).map(|_| create())).await;
        let all: Vec<_> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(all.iter().filter(|admitted| !admitted.replayed).count(), 1);
        for admitted in &all {
            assert_eq!(admitted.machine.id, all[0].machine.id);
            // It can be looked at, whoever was answered first.
            lab.now(admitted.machine.id.as_str());
        }
        request.memory_mib = Some(65);
        let other = lab.engine.create(&lab.who, request, Some(key)).await;
        assert_eq!(other.unwrap_err().code(), "idempotency_mismatch");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_promised_once() {
    let total_mib = || {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let kib: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        u32::try_from(kib >> 10).unwrap()
    };
    let Some(lab) = Lab::with(|config| config.memory_overcommit = 1).await else {
        return;
    };
    let half = total_mib() / 2 + 1;
    let results = join_all((0..8).map(|n| {
        let mut request = spec(&format!("m{n}"));
        request.memory_mib = Some(half);
        lab.engine.create(&lab.who, request, None)
    }))
    .await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_while_it_stops_is_not_lost() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    for ms in [0, 1, 5, 10, 20, 50, 100] {
        lab.stop("a").await;
        tokio::time::sleep(Duration::from_millis(ms)).await;
        lab.start("a").await;
        // The stop comes to its end meanwhile, and must not be the last word.
        tokio::time::sleep(Duration::from_millis(200)).await;
        lab.wait("a", Status::Running).await.unwrap();
    }
    assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
    assert_eq!(lab.now("a").id, machine.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_restarts_ends_in_one_that_runs() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    for n in 0..30_u64 {
        lab.restart("a").await;
        tokio::time::sleep(Duration::from_millis(n * 7 % 40)).await;
    }
    lab.wait("a", Status::Running).await.unwrap();
    assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_can_be_deleted_at_any_moment_of_its_start() {
    let Some(lab) = Lab::new().await else { return };
    join_all((0..24_u64).map(|n| {
        let lab = &lab;
        async move {
            let name = format!("m{n}");
            lab.create(&name).await.unwrap();
            tokio::time::sleep(Duration::from_millis(n * 8)).await;
            lab.delete(&name).await;
        }
    }))
    .await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletes_at_once_agree() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    let id = machine.id.as_str();
    let results = join_all((0..10).map(|_| lab.engine.delete(&lab.who, id))).await;
    assert!(results.iter().any(Result::is_ok));
    let gone = lab.engine.wait(&lab.who, id, Target::Gone, LONG).await;
    assert_eq!(gone.unwrap(), None);
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_leaves_a_machine_that_can_be_changed() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    for patience in [0, 100, 500, 1000, 2000, 4000] {
        let patience = Duration::from_micros(patience);
        let gone = tokio::time::timeout(patience, lab.engine.restart(&lab.who, "a")).await;
        drop::<Result<Result<Machine, _>, _>>(gone);
        drop(tokio::time::timeout(patience, lab.create("b")).await);
    }
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    lab.delete("a").await;
    // Whether it was made or not, the name is of a machine that can be seen, or free.
    if lab.create("b").await.is_err() {
        lab.now("b");
    }
    lab.delete("b").await;
    assert_eq!(lab.home.left(), []);
}
