//! VMMs and agents that do not do what they should: failed with a reason, nothing left alive, deletable, curable.

use hutch_contract::error::Kind;
use hutch_contract::machine::Status;
use hutch_engine::Error;

use crate::lab::{Lab, spec};

/// A start that goes wrong like this ends as `failed` for a reason with these words, and works once it is cured.
async fn fails(behaviour: &str, words: &str) {
    let Some(lab) = Lab::with(|config| config.boot_timeout_ms = 2500).await else {
        return;
    };
    let machine = lab.stopped("a", behaviour).await;
    lab.start("a").await;
    let error = lab.wait("a", Status::Running).await.unwrap_err();
    assert!(matches!(error, Error::MachineFailed { .. }), "{error}");
    assert!(error.hint().unwrap().contains("`hutch logs a`"));
    let reason = lab.now("a").reason.unwrap();
    assert!(reason.contains(words), "{reason}");
    let parts: Vec<_> = reason.split(": ").collect();
    assert!(parts.windows(2).all(|pair| pair[0] != pair[1]), "{reason}");
    // The failure is told first; then what is left of the start is ended.
    assert_eq!(lab.home.settle(0), 0);

    let refused = lab.sh("a", "true").await.unwrap_err();
    assert!(matches!(refused, Error::MachineFailed { .. }), "{refused}");

    std::fs::remove_file(lab.dir(&machine).join("stub.json")).unwrap();
    lab.start("a").await;
    lab.wait("a", Status::Running).await.unwrap();
    assert_eq!(lab.now("a").reason, None);

    std::fs::write(lab.dir(&machine).join("stub.json"), behaviour).unwrap();
    lab.restart("a").await;
    lab.wait("a", Status::Failed).await.unwrap();
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_hangs() {
    fails(r#"{"start": "hang"}"#, "took longer").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_crashes() {
    fails(r#"{"start": "crash"}"#, "signal 6").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_refuses_to_run() {
    fails(r#"{"start": {"exit_code": 7}}"#, "told to end at once").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_says_nothing() {
    fails(r#"{"agent": "silent"}"#, "answer").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_says_nonsense() {
    fails(r#"{"agent": "garbage"}"#, "connection to the guest lost").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_an_agent() {
    fails(r#"{"agent": "none"}"#, "nothing listens").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_hangs_while_it_starts_can_be_stopped_and_deleted() {
    let Some(lab) = Lab::new().await else { return };
    lab.stopped("a", r#"{"agent": "silent"}"#).await;
    lab.start("a").await;
    lab.stop("a").await;
    lab.wait("a", Status::Stopped).await.unwrap();
    assert_eq!(lab.home.settle(0), 0);
    lab.start("a").await;
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_hangs_while_it_starts_can_be_deleted() {
    let Some(lab) = Lab::new().await else { return };
    lab.stopped("a", r#"{"start": "hang"}"#).await;
    lab.start("a").await;
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_is_refused_with_the_reason() {
    let Some(lab) = Lab::new().await else { return };
    let mut unknown = spec("a");
    unknown.runtime = Some("abacus".into());
    let error = lab.engine.create(&lab.who, unknown, None).await;
    assert!(matches!(error, Err(Error::NoSuchRuntime { .. })));
    let mut imageless = spec("a");
    imageless.image = "none".into();
    let error = lab.engine.create(&lab.who, imageless, None).await;
    assert_eq!(error.unwrap_err().code(), "image_not_found");
    assert!(lab.engine.machine(&lab.who, "a").is_err());
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn emulation_needs_leave() {
    let tcg = |config: &mut hutch_engine::EngineConfig| {
        config.allow_emulation = false;
        config.acceleration = Some("tcg".into());
    };
    let Some(lab) = Lab::with(tcg).await else {
        return;
    };
    let infos = lab.engine.runtimes().await;
    if !infos.iter().any(|info| info.name == "qemu" && info.usable) {
        return eprintln!("skipped: QEMU is not installed");
    }
    let mut request = spec("a");
    request.runtime = Some("qemu".into());
    let error = lab.engine.create(&lab.who, request, None).await;
    let error = error.unwrap_err();
    assert!(error.to_string().contains("only emulates"), "{error}");
    assert!(error.hint().unwrap().contains("allow_emulation"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_takes_no_more() {
    let Some(lab) = Lab::with(|config| config.max_machines = 1).await else {
        return;
    };
    lab.running("a").await;
    let error = lab.create("b").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted);
    lab.delete("a").await;
    lab.running("b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disks_reserve_is_not_touched() {
    let Some(home) = crate::lab::Home::new() else {
        return;
    };
    let mut config = home.config();
    config.disk_reserve_mib = u64::MAX >> 20;
    let engine = hutch_engine::Engine::open(config).await.unwrap();
    let who = engine.local_admin();
    let (name, format) = (
        "a".parse().unwrap(),
        hutch_contract::image::ImportFormat::Tar,
    );
    let body = crate::lab::body(crate::lab::tiny());
    let error = engine.import_image(&who, name, format, body).await;
    assert_eq!(error.unwrap_err().code(), "exhausted");
    assert_eq!(home.left(), []);
}
