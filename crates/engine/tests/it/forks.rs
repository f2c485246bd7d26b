//! Forks that are asked for again with the same idempotency key.

use hutch_contract::machine::{Machine, Status};
use hutch_contract::snapshot::ForkMachine;
use hutch_engine::{Error, Fork};

use crate::lab::Lab;

impl Lab {
    async fn fork_once(&self, request: &ForkMachine) -> Result<Fork, Error> {
        let (engine, who) = (&self.engine, &self.who);
        engine.fork(who, "a", request.clone(), Some("once")).await
    }
}

fn three() -> ForkMachine {
    ForkMachine {
        count: Some(3),
        ..ForkMachine::default()
    }
}

fn ids(fork: &Fork) -> Vec<String> {
    let id = |copy: &Result<Machine, Error>| copy.as_ref().unwrap().id.to_string();
    fork.copies.iter().map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_is_sent_again_makes_no_second_copies() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let first = lab.fork_once(&three()).await.unwrap();
    assert!(!first.replayed);
    let again = lab.fork_once(&three()).await.unwrap();
    assert!(again.replayed);
    assert_eq!(ids(&again), ids(&first));
    assert_eq!(again.pause_us, None, "it did not stand still for that");
    let other = ForkMachine {
        count: Some(2),
        ..three()
    };
    let refused = lab.fork_once(&other).await.unwrap_err();
    assert!(matches!(refused, Error::IdempotencyMismatch));
    let without = lab.engine.fork(&lab.who, "a", three(), None).await.unwrap();
    assert!(ids(&without).iter().all(|id| !ids(&first).contains(id)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_is_sent_twice_at_once_makes_each_copy_once() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let named = ForkMachine {
        name_prefix: Some("copy".parse().unwrap()),
        ..three()
    };
    let mut all = Vec::new();
    let asked = async || match lab.fork_once(&named).await {
        // One snapshot at a time: who comes second asks again, as clients do.
        Err(Error::MachineBusy { .. }) => None,
        forked => Some(ids(&forked.unwrap())),
    };
    for forked in futures::future::join_all((0..4).map(|_| asked())).await {
        all.extend(forked);
    }
    all.push(asked().await.unwrap());
    all.dedup();
    assert_eq!(all.len(), 1, "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_not_made_is_made_when_the_fork_is_sent_again() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    lab.running("mine").await;
    let named = ForkMachine {
        names: vec!["new".parse().unwrap(), "mine".parse().unwrap()],
        ..ForkMachine::default()
    };
    let first = lab.fork_once(&named).await.unwrap();
    let made = first.copies[0].as_ref().unwrap();
    assert_eq!(first.copies[1].as_ref().unwrap_err().code(), "name_taken");
    lab.delete("mine").await;
    let again = lab.fork_once(&named).await.unwrap();
    assert!(!again.replayed);
    assert_eq!(again.copies[0].as_ref().unwrap().id, made.id);
    assert_eq!(again.copies[1].as_ref().unwrap().name.as_str(), "mine");
    lab.wait("mine", Status::Running).await.unwrap();
}
