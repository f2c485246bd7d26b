//! The life of a machine: ours to start and stop, the guest's to end.

use std::time::Duration;

use hutch_contract::error::Kind;
use hutch_contract::expose::ChangeMachine;
use hutch_contract::lifetime::{Lifetime, Restart};
use hutch_contract::machine::{Exit, Machine, Status};
use hutch_contract::operation::OperationState;
use hutch_engine::{Engine, Target};
use rustix::process::{Signal, kill_process};

use crate::lab::{Home, LONG, Lab, tiny};

/// The guest ends by itself: its agent with this exit code.
async fn guest_ends(lab: &Lab, machine: &Machine, code: &str) {
    std::fs::write(lab.dir(machine).join("exit_code"), format!("{code}\n")).unwrap();
    drop(lab.sh("a", "kill -KILL $PPID").await);
}

/// An agent that [`guest_ends`] can tell how to end.
async fn lab() -> Option<Lab> {
    let home = Home::new()?;
    let mut config = home.config();
    let script = format!(
        "#!/bin/sh\n{} \"$@\" && exit\nread code <exit_code && exit $code\nexit 1\n",
        config.agent.display()
    );
    config.agent = home.program("agent", &script);
    let lab = Lab::of(home, Engine::open(config).await.unwrap());
    assert_eq!(lab.import("tiny", tiny()).await, OperationState::Succeeded);
    Some(lab)
}

/// Waits for the `n`th start of a machine that keeps running.
pub async fn starts(lab: &Lab, name: &str, n: u32) -> Machine {
    for _ in 0..600 {
        let now = lab.now(name);
        if now.starts >= n && now.status == Status::Running {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{:?}", lab.now(name));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_made_stopped_started_restarted_and_deleted() {
    let Some(lab) = Lab::new().await else { return };
    let made = lab.running("a").await;
    assert_eq!((made.starts, made.exit), (1, None));
    lab.stop("a").await;
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::PowerOff));
    assert_eq!(lab.home.settle(0), 0);
    lab.start("a").await;
    assert_eq!(lab.wait("a", Status::Running).await.unwrap().starts, 2);
    lab.restart("a").await;
    assert_eq!(lab.wait("a", Status::Running).await.unwrap().starts, 3);
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
    lab.running("a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_survives_a_stop() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    let disk = lab.dir(&machine).join("disk.raw");
    std::fs::write(&disk, "mine").unwrap();
    lab.restart("a").await;
    lab.wait("a", Status::Running).await.unwrap();
    assert_eq!(std::fs::read(disk).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_is_stopped_and_can_be_started() {
    let Some(lab) = lab().await else { return };
    let machine = lab.running("a").await;
    guest_ends(&lab, &machine, "0").await;
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::PowerOff));
    lab.start("a").await;
    lab.wait("a", Status::Running).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reboots_is_started_again_each_time() {
    let Some(lab) = lab().await else { return };
    let machine = lab.running("a").await;
    for n in 2..4 {
        guest_ends(&lab, &machine, "64").await;
        assert_eq!(starts(&lab, "a", n).await.exit, None);
    }
    assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_comes_back_by_itself_where_its_policy_says_so() {
    let Some(lab) = lab().await else { return };
    let machine = lab.running("a").await;
    comes_back(&lab, "a", Restart::OnFailure).await;
    kill_process(lab.pid(&machine, "vmm"), Signal::ABORT).unwrap();
    assert_eq!(starts(&lab, "a", 2).await.exit, None);
    kill_process(lab.pid(&machine, "shim"), Signal::KILL).unwrap();
    starts(&lab, "a", 3).await;
    // Nothing has failed when its guest powers off,
    guest_ends(&lab, &machine, "0").await;
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!((stopped.starts, stopped.exit), (3, Some(Exit::PowerOff)));
    // which matters to one that is always to run, as long as nobody stops it.
    comes_back(&lab, "a", Restart::Always).await;
    lab.start("a").await;
    starts(&lab, "a", 4).await;
    guest_ends(&lab, &machine, "0").await;
    starts(&lab, "a", 5).await;
    lab.stop("a").await;
    assert_eq!(lab.wait("a", Status::Stopped).await.unwrap().starts, 5);
}

pub async fn comes_back(lab: &Lab, name: &str, when: Restart) {
    let change = ChangeMachine {
        lifetime: Some(Lifetime {
            restart: Some(when),
            ..Lifetime::default()
        }),
        ..ChangeMachine::default()
    };
    lab.engine.change(&lab.who, name, &change).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_dies_is_seen() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    kill_process(lab.pid(&machine, "vmm"), Signal::ABORT).unwrap();
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::Signal { signal: 6 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_is_killed_takes_its_vmm_along() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    kill_process(lab.pid(&machine, "shim"), Signal::KILL).unwrap();
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::Lost));
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_tells_at_once_what_will_not_come() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    let error = lab.wait("a", Status::Running).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.hint().unwrap().contains("`hutch start a`"));
    let waiting = {
        let (engine, who) = (lab.engine.clone(), lab.who.clone());
        tokio::spawn(async move {
            let target = Target::Status(Status::Failed);
            engine.wait(&who, "a", target, LONG).await
        })
    };
    tokio::task::yield_now().await;
    lab.delete("a").await;
    assert!(waiting.await.unwrap().is_err());
    // Gone is gone, however late one asks.
    let id = machine.id.as_str();
    let gone = lab.engine.wait(&lab.who, id, Target::Gone, LONG).await;
    assert_eq!(gone.unwrap(), None);
    let soon = Duration::from_millis(1);
    lab.running("b").await;
    let target = Target::Status(Status::Stopped);
    let late = lab.engine.wait(&lab.who, "b", target, soon).await;
    assert_eq!(late.unwrap_err().kind(), Kind::Timeout);
}
