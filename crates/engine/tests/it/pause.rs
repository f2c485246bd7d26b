//! Machines that are paused, by wish, and go on as soon as something uses them.

use hutch_contract::machine::{Exit, Status};
use rustix::process::{Signal, kill_process};
use tokio::net::TcpListener;

use crate::crash::after_a_crash;
use crate::lab::Lab;

impl Lab {
    async fn paused(&self, name: &str) {
        self.engine.pause(&self.who, name).await.unwrap();
        self.wait(name, Status::Paused).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_uses_a_paused_machine_lets_it_go_on() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let starts = lab.now("a").starts;
    lab.sh("a", "sleep 1000 & echo $! > sleeper").await.unwrap();

    lab.paused("a").await;
    // Again is no error, and it stays so.
    let again = lab.engine.pause(&lab.who, "a").await.unwrap();
    assert_eq!(again.status, Status::Paused);
    let said = lab.sh("a", "kill -0 $(cat sleeper) && echo lives").await;
    assert_eq!(said.unwrap().stdout, "lives\n");
    assert_eq!(lab.now("a").status, Status::Running);

    lab.paused("a").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(lab.engine.dial(&lab.who, "a", port).await.unwrap());
    listener.accept().await.unwrap();

    lab.paused("a").await;
    let resumed = lab.engine.resume(&lab.who, "a").await.unwrap();
    assert_eq!(resumed.status, Status::Starting);
    lab.wait("a", Status::Running).await.unwrap();
    assert_eq!(lab.now("a").starts, starts, "none of it was a start");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_use_a_paused_machine_at_once_are_all_served() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    for _ in 0..5 {
        lab.paused("a").await;
        let all = (0..20).map(|_| lab.sh("a", "echo here"));
        for said in futures::future::join_all(all).await {
            assert_eq!(said.unwrap().stdout, "here\n");
        }
    }
}

#[test]
fn a_paused_machine_outlives_its_server_and_stays_paused() {
    after_a_crash(
        async |lab| {
            lab.running("a").await;
            lab.paused("a").await;
        },
        async |lab| {
            assert_eq!(lab.now("a").status, Status::Paused);
            assert_eq!(lab.sh("a", "echo back").await.unwrap().stdout, "back\n");
            lab.delete("a").await;
            assert_eq!(lab.home.left(), []);
        },
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_machine_can_be_stopped_killed_and_deleted() {
    let Some(lab) = Lab::new().await else { return };
    let machine = lab.running("a").await;
    lab.paused("a").await;
    lab.stop("a").await;
    let stopped = lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(stopped.exit, Some(Exit::PowerOff), "its guest was asked");
    for verb in ["pause", "resume"] {
        let refused = match verb {
            "pause" => lab.engine.pause(&lab.who, "a").await,
            _ => lab.engine.resume(&lab.who, "a").await,
        };
        assert_eq!(refused.unwrap_err().code(), "wrong_status", "{verb}");
    }
    lab.start("a").await;
    lab.wait("a", Status::Running).await.unwrap();
    lab.paused("a").await;
    kill_process(lab.pid(&machine, "vmm"), Signal::KILL).unwrap();
    lab.wait("a", Status::Stopped).await.unwrap();
    lab.start("a").await;
    lab.wait("a", Status::Running).await.unwrap();
    lab.paused("a").await;
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_still_starting_can_be_paused() {
    let Some(lab) = Lab::new().await else { return };
    lab.create("a").await.unwrap();
    lab.paused("a").await;
    assert_eq!(lab.sh("a", "echo up").await.unwrap().stdout, "up\n");
}
