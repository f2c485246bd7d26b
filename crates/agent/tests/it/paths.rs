//! Renaming, modes and owners, and walks of trees.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use bytes::Bytes;
use hutch_guest::pb;
use tonic::{Code, Status};

use crate::harness::*;

async fn rename(
    client: &mut Client,
    from: &str,
    to: &str,
    keep_existing: bool,
) -> Result<(), Status> {
    let request = pb::MoveRequest {
        from: from.into(),
        to: to.into(),
        keep_existing,
    };
    client.r#move(request).await.map(drop)
}

#[tokio::test]
async fn a_move_replaces_what_is_there_unless_told_not_to() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let at = |path: &str| agent.root().join(path);
    std::fs::write(at("a"), "a").unwrap();
    std::fs::write(at("b"), "b").unwrap();
    std::fs::create_dir(at("dir")).unwrap();
    assert_eq!(
        code(rename(&mut client, "a", "b", true).await),
        Code::AlreadyExists
    );
    assert_eq!(std::fs::read(at("b")).unwrap(), b"b");
    rename(&mut client, "a", "b", false).await.unwrap();
    assert_eq!(std::fs::read(at("b")).unwrap(), b"a");
    rename(&mut client, "dir", "moved", true).await.unwrap();
    assert!(at("moved").is_dir() && !at("dir").exists());
    for (from, to, expected) in [
        ("none", "x", Code::NotFound),
        ("b", "none/x", Code::NotFound),
        ("b", "moved", Code::FailedPrecondition),
        ("moved", "moved/itself", Code::InvalidArgument),
        ("b", "/proc/x", Code::FailedPrecondition),
        ("", "x", Code::InvalidArgument),
    ] {
        let refused = rename(&mut client, from, to, false).await;
        assert_eq!(code(refused), expected, "{from} {to}");
    }
}

#[tokio::test]
async fn modes_and_owners_change_for_a_path_or_a_tree_and_never_behind_a_link() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let at = |path: &str| agent.root().join(path);
    let mode = |path: &str| std::fs::metadata(at(path)).unwrap().mode() & 0o7777;
    std::fs::create_dir_all(at("tree/sub")).unwrap();
    for file in ["tree/f", "tree/sub/g", "outside"] {
        std::fs::write(at(file), "x").unwrap();
        std::fs::set_permissions(at(file), PermissionsExt::from_mode(0o644)).unwrap();
    }
    symlink("../outside", at("tree/link")).unwrap();
    symlink("tree", at("way")).unwrap();
    let change = |path: &str, mode, recursive| pb::ChangeRequest {
        path: path.into(),
        mode: Some(mode),
        recursive,
        ..Default::default()
    };
    client
        .change(change("tree/link", 0o600, false))
        .await
        .unwrap();
    assert_eq!(mode("outside"), 0o600, "named itself, a link is followed");
    client.change(change("way", 0o4710, true)).await.unwrap();
    let modes = ["tree", "tree/sub", "tree/f", "tree/sub/g", "outside"].map(mode);
    assert_eq!(modes, [0o4710, 0o4710, 0o4710, 0o4710, 0o600]);
    for (bad, expected) in [
        (change("none", 0o600, true), Code::NotFound),
        (change("tree", 0o10000, false), Code::InvalidArgument),
    ] {
        assert_eq!(code(client.change(bad).await), expected);
    }
    let owner = |owner: &str| pb::ChangeRequest {
        path: "tree".into(),
        owner: owner.into(),
        recursive: true,
        ..Default::default()
    };
    let stranger = client.change(owner("no-such-user")).await;
    assert_eq!(code(stranger), Code::NotFound);
    if rustix::process::geteuid().is_root() {
        client.change(owner("4242:77")).await.unwrap();
        let of = |path: &str| {
            let meta = std::fs::symlink_metadata(at(path)).unwrap();
            (meta.uid(), meta.gid())
        };
        for path in ["tree", "tree/sub/g", "tree/link"] {
            assert_eq!(of(path), (4242, 77), "{path}");
        }
        assert_eq!(of("outside"), (0, 0));
    }
}

/// Paths of a walk in pages of `limit`, and how many pages there were.
async fn walked(client: &mut Client, request: pb::WalkRequest) -> (Vec<String>, usize) {
    let mut after = Bytes::new();
    let (mut paths, mut pages) = (Vec::new(), 0);
    loop {
        let request = pb::WalkRequest {
            after,
            ..request.clone()
        };
        let page = client.walk(request).await.unwrap().into_inner();
        let found = page.found.iter();
        paths.extend(found.map(|file| String::from_utf8(file.path.to_vec()).unwrap()));
        pages += 1;
        if page.next.is_empty() {
            return (paths, pages);
        }
        after = page.next;
    }
}

#[tokio::test]
async fn a_walk_shows_each_path_once_and_in_order_however_it_is_cut() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let at = |path: &str| agent.root().join("top").join(path);
    for dir in ["a/deep/er", "a-b", "empty", ".hidden/x"] {
        std::fs::create_dir_all(at(dir)).unwrap();
    }
    for file in [
        "a/deep/er/f.rs",
        "a/z.rs",
        "a-b/y.rs",
        "b.rs",
        ".hidden/x/g.rs",
    ] {
        std::fs::write(at(file), "x").unwrap();
    }
    symlink("..", at("a/up")).unwrap();
    let all = [
        ".hidden",
        ".hidden/x",
        ".hidden/x/g.rs",
        "a",
        "a/deep",
        "a/deep/er",
        "a/deep/er/f.rs",
        "a/up",
        "a/z.rs",
        "a-b",
        "a-b/y.rs",
        "b.rs",
        "empty",
    ];
    let request = |limit, depth, pattern: &str| pb::WalkRequest {
        path: "top".into(),
        limit,
        depth,
        pattern: pattern.into(),
        ..Default::default()
    };
    for limit in [1, 2, 3, 1000] {
        let (paths, pages) = walked(&mut client, request(limit, 0, "")).await;
        assert_eq!(paths, all, "{limit}");
        assert!(pages >= all.len() / limit as usize);
    }
    for limit in [1, 1000] {
        let (paths, _) = walked(&mut client, request(limit, 1, "")).await;
        assert_eq!(paths, [".hidden", "a", "a-b", "b.rs", "empty"]);
        let (paths, _) = walked(&mut client, request(limit, 2, "**/*.rs")).await;
        assert_eq!(paths, ["a/z.rs", "a-b/y.rs", "b.rs"]);
        let (paths, _) = walked(&mut client, request(limit, 0, "a/**/*.rs")).await;
        assert_eq!(paths, ["a/deep/er/f.rs", "a/z.rs"]);
    }
    for (bad, expected) in [
        (request(1, 0, "/x"), Code::InvalidArgument),
        (request(1, 0, "[x"), Code::InvalidArgument),
        (
            pb::WalkRequest {
                path: "none".into(),
                ..Default::default()
            },
            Code::NotFound,
        ),
        (
            pb::WalkRequest {
                path: "top/b.rs".into(),
                ..Default::default()
            },
            Code::FailedPrecondition,
        ),
        (
            pb::WalkRequest {
                after: "../a".into(),
                ..request(1, 0, "")
            },
            Code::InvalidArgument,
        ),
    ] {
        assert_eq!(code(client.walk(bad).await), expected);
    }
}

#[tokio::test]
async fn a_walk_bears_trees_that_are_wide_deep_and_change_meanwhile() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let top = agent.root().join("top");
    std::fs::create_dir(&top).unwrap();
    // More names than are held at once, most of them in directories that are gone into.
    for i in 0..6000 {
        let name = format!("{i:04}{}", "n".repeat(200));
        match i % 2 {
            0 => std::fs::create_dir_all(top.join(&name).join("in")).unwrap(),
            _ => std::fs::write(top.join(&name), "").unwrap(),
        }
    }
    let mut at = rustix::fs::open(
        &top,
        rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    // Deeper than any path that could be asked for.
    for _ in 0..3000 {
        rustix::fs::mkdirat(&at, c"d", rustix::fs::Mode::RWXU).unwrap();
        at = rustix::fs::openat(
            &at,
            c"d",
            rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    drop(at);
    let request = pb::WalkRequest {
        path: "top".into(),
        ..Default::default()
    };
    let (paths, _) = walked(&mut client, request.clone()).await;
    assert_eq!(paths.len(), 9000 + 2048);
    // What a walk stands on goes away: it goes on behind it.
    let first = client.walk(request.clone()).await.unwrap().into_inner();
    assert!(!first.next.is_empty());
    let remove = pb::RemoveRequest {
        path: "top".into(),
        recursive: true,
    };
    client.remove(remove).await.unwrap();
    std::fs::create_dir_all(top.join("zzz")).unwrap();
    let request = pb::WalkRequest {
        after: first.next,
        ..request
    };
    let rest = client.walk(request).await.unwrap().into_inner();
    assert_eq!(rest.found.len(), 1);
    assert_eq!(&rest.found[0].path[..], b"zzz");
}
