//! Images: made or not, never half; not taken away from who needs them.

use futures::StreamExt;
use futures::future::join_all;
use hutch_contract::image::ImportFormat;
use hutch_contract::machine::Status;
use hutch_contract::operation::OperationState;
use hutch_engine::Error;

use crate::lab::{Lab, body, tiny};

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_upload_fails_and_frees_its_name() {
    let Some(lab) = Lab::new().await else { return };
    let before = hutch_engine::inventory(&lab.home.data()).unwrap();
    let ended = lab
        .import("b", b"this is no archive at all".repeat(100))
        .await;
    let OperationState::Failed { message, .. } = ended else {
        panic!("{ended:?}");
    };
    assert!(!message.is_empty());
    assert_eq!(hutch_engine::inventory(&lab.home.data()).unwrap(), before);
    assert!(lab.engine.image(&lab.who, "b").is_err());
    assert_eq!(lab.import("b", tiny()).await, OperationState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let Some(lab) = Lab::new().await else { return };
    let broken = body(tiny()).chain(futures::stream::iter([Err(std::io::Error::other("gone"))]));
    let name = "b".parse().unwrap();
    let made = lab
        .engine
        .import_image(&lab.who, name, ImportFormat::Tar, broken.boxed())
        .await;
    assert!(matches!(made, Err(Error::Upload { .. })));
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_can_be_used_as_soon_as_its_operation_has_ended() {
    let Some(lab) = Lab::new().await else { return };
    for n in 0..10 {
        let name = format!("i{n}");
        assert_eq!(lab.import(&name, tiny()).await, OperationState::Succeeded);
        lab.engine.image(&lab.who, &name).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_is_one_image() {
    let Some(lab) = Lab::new().await else { return };
    let import = || {
        let name = "b".parse().unwrap();
        lab.engine
            .import_image(&lab.who, name, ImportFormat::Tar, body(tiny()))
    };
    let results = join_all((0..8).map(|_| import())).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_deleted_once_and_its_machines_go_on() {
    let Some(lab) = Lab::new().await else { return };
    lab.running("a").await;
    let deletes = (0..8).map(|_| lab.engine.delete_image(&lab.who, "tiny"));
    let results = join_all(deletes).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert_eq!(lab.create("b").await.unwrap_err().code(), "image_not_found");
    lab.restart("a").await;
    lab.wait("a", Status::Running).await.unwrap();
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_machines_are_being_made_from_stays() {
    let Some(lab) = Lab::new().await else { return };
    let creates = join_all((0..10).map(|n| {
        let lab = &lab;
        async move { lab.create(&format!("m{n}")).await }
    }));
    let (created, deleted) = tokio::join!(creates, lab.engine.delete_image(&lab.who, "tiny"));
    let made: Vec<_> = created.into_iter().flatten().collect();
    if deleted.is_err() {
        assert!(
            matches!(deleted, Err(Error::ImageBusy { .. })),
            "{deleted:?}"
        );
    }
    for machine in made {
        lab.wait(machine.name.as_str(), Status::Running)
            .await
            .unwrap();
    }
}
