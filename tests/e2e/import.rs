//! Images from outside: hostile ones are refused by name, broken-off ones leave nothing.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use hutch_contract::error::Kind;
use hutch_contract::image::ImportFormat;
use hutch_contract::operation::OperationState;
use hutch_tests::{Lab, Runtime, entry, lab, root_tar, wait_until};
use tar::EntryType;

#[tokio::test]
async fn hostile_tars_are_refused_with_the_entry_named() {
    let lab = lab!(Runtime::Stub).start().await;
    let mut link = entry("link-out", EntryType::Link, 0);
    link.set_link_name("../../outside").unwrap();
    link.set_cksum();
    let cases = [
        ("../evil", entry("../evil", EntryType::Directory, 0)),
        (
            "etc/../../evil",
            entry("etc/../../evil", EntryType::Directory, 0),
        ),
        ("link-out", link),
        // A file and a directory of one name.
        ("noise/below", entry("noise/below", EntryType::Directory, 0)),
    ];
    for (named, header) in cases {
        refused(&lab, named, root_tar(1, &[header])).await;
    }
    let mut short = root_tar(1, &[]);
    short.truncate(700_000);
    refused(&lab, "cut short", short).await;

    assert_eq!(lab.inventory(), [""; 0]);
    let good = lab.import("tried", root_tar(1, &[])).await.unwrap();
    assert_eq!(good.state, OperationState::Succeeded);
    lab.finish().await;
}

/// Each under the same name: a refused import must give it back.
async fn refused(lab: &Lab, named: &str, tar: Vec<u8>) {
    let message = match lab.import("tried", tar).await {
        Ok(operation) => match operation.state {
            OperationState::Failed { message, .. } => message,
            other => panic!("{named}: {other:?}"),
        },
        Err(error) => {
            assert_eq!(error.kind(), Kind::Invalid, "{named}: {error}");
            error.to_string()
        }
    };
    assert!(message.contains(named), "{named}: {message}");
    assert!(lab.client().all_images().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_killed_upload_leaves_nothing_and_a_killed_import_goes_on() {
    let mut lab = lab!(Runtime::Stub).start().await;
    let tar = root_tar(64, &[]);

    // While the body is coming in: half of it is sent, the rest never is.
    let half: Vec<_> = tar[..tar.len() / 2]
        .chunks(64 << 10)
        .map(Bytes::copy_from_slice)
        .collect();
    let body = futures::stream::iter(half.into_iter().map(Ok)).chain(futures::stream::pending());
    let (client, size) = (lab.client(), tar.len() as u64);
    let upload = tokio::spawn(async move {
        let name = "again".parse().unwrap();
        client
            .import_image(&name, ImportFormat::Tar, Some(size), body.boxed())
            .await
    });
    wait_until(
        "the upload has begun",
        Duration::from_secs(60),
        async || {
            lab.inventory()
                .iter()
                .any(|item| item.starts_with("spooled"))
        },
    )
    .await;
    lab.kill().await;
    assert!(upload.await.unwrap().is_err());
    lab.restart().await;
    gone(&lab).await;

    // While the disk is being written.
    let chunks: Vec<_> = tar
        .chunks(64 << 10)
        .map(Bytes::copy_from_slice)
        .map(Ok)
        .collect();
    let body = futures::stream::iter(chunks).boxed();
    let name = "again".parse().unwrap();
    let accepted = lab
        .client()
        .import_image(&name, ImportFormat::Tar, Some(size), body)
        .await;
    let accepted = accepted.unwrap().operation;
    lab.kill().await;
    lab.restart().await;
    // What was accepted is done, whoever does it.
    let ended = lab.operation(accepted.as_str()).await;
    assert_eq!(ended.state, OperationState::Succeeded);
    lab.client().delete_image("again").await.unwrap();
    gone(&lab).await;

    let ended = lab.import("again", tar).await.unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
    lab.finish().await;
}

async fn gone(lab: &Lab) {
    assert!(lab.client().all_images().await.unwrap().is_empty());
    // What was put aside is erased in the background.
    let empty = async || lab.inventory().is_empty();
    wait_until("nothing is left", Duration::from_secs(60), empty).await;
}
