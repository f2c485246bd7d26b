//! Files in machines of the stub runtime: through the client, and by hand where it is about headers.

use bytes::Bytes;
use futures::{StreamExt, stream};
use hutch_contract::client::{Client, Upload};
use hutch_contract::error::Kind;
use hutch_contract::file::FileKind;
use hutch_contract::page::Page;
use hutch_server::Running;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::machines::{LONG, bench, body, bytes_of, spec};

/// Status line and headers, in lower case, and the body of an answer to a request made by hand.
async fn asked(running: &Running, method: &str, target: &str, headers: &str) -> (String, Vec<u8>) {
    let mut stream = UnixStream::connect(running.socket()).await.unwrap();
    let request =
        format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|at| at == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    (head.to_lowercase(), answer.split_off(end + 4))
}

async fn write(client: &Client, path: &str, content: &[u8]) {
    let upload = Upload {
        path: path.to_owned(),
        ..Upload::default()
    };
    client
        .write_file("a", &upload, body(content.to_vec()))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_in_and_out_whole() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let place = home.shared().to_str().unwrap().to_owned();
    client
        .make_dir("a", &format!("{place}/deep/er"), true)
        .await
        .unwrap();
    let big: Vec<u8> = (0..5_000_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    for (name, content) in [
        ("empty", Vec::new()),
        ("small", b"x".to_vec()),
        ("big", big),
    ] {
        let path = format!("{place}/{name}");
        let sha = Sha256::digest(&content);
        for size_bytes in [Some(content.len() as u64), None] {
            let upload = Upload {
                path: path.clone(),
                mode: Some(0o640),
                size_bytes,
                ..Upload::default()
            };
            let written = client
                .write_file("a", &upload, body(content.clone()))
                .await
                .unwrap();
            assert_eq!(written.size_bytes, content.len() as u64);
            let download = client.read_file("a", &path, 0, None).await.unwrap();
            assert_eq!(
                (download.size_bytes, download.mode),
                (Some(content.len() as u64), Some(0o640))
            );
            assert_eq!(Sha256::digest(bytes_of(download).await), sha, "{name}");
        }
    }
    let part = client
        .read_file("a", &format!("{place}/big"), 1_000_000, Some(3))
        .await
        .unwrap();
    assert_eq!(
        bytes_of(part).await,
        (1_000_000..1_000_003_u32)
            .map(|i| (i * 7 % 251) as u8)
            .collect::<Vec<_>>()
    );
    for (liar, content) in [
        ("/proc/self/status", &b"Name:"[..]),
        ("/sys/class/net/lo/mtu", b"6"),
    ] {
        let read = bytes_of(client.read_file("a", liar, 0, None).await.unwrap()).await;
        assert!(
            read.starts_with(content),
            "{liar}: a file that lies about its size is read all the same"
        );
    }

    let stat = client
        .stat_file("a", &format!("{place}/small"))
        .await
        .unwrap();
    assert_eq!(
        (stat.kind, stat.size_bytes, stat.mode & 0o7777),
        (FileKind::File, 1, 0o640)
    );
    let page = client.list_files("a", &place, None, Some(3)).await.unwrap();
    let names: Vec<_> = page.items.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["big", "deep", "empty"]);
    let rest = client
        .list_files("a", &place, page.next.as_deref(), Some(3))
        .await
        .unwrap();
    assert_eq!((rest.items[0].name.as_str(), rest.next), ("small", None));
    assert!(
        client
            .remove_file("a", &format!("{place}/deep"), false)
            .await
            .is_err()
    );
    client
        .remove_file("a", &format!("{place}/deep"), true)
        .await
        .unwrap();
    let missing = client
        .read_file("a", &format!("{place}/none"), 0, None)
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(missing.kind(), Kind::NotFound, "{missing:?}");
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_leaves_the_old_file() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let path = home.shared().join("kept").to_str().unwrap().to_owned();
    let upload = Upload {
        path: path.clone(),
        ..Upload::default()
    };
    client
        .write_file("a", &upload, body(b"old".to_vec()))
        .await
        .unwrap();
    let broken = stream::iter([
        Ok(Bytes::from_static(b"new")),
        Err(std::io::ErrorKind::BrokenPipe.into()),
    ]);
    assert!(
        client
            .write_file("a", &upload, broken.boxed())
            .await
            .is_err()
    );
    let kept = bytes_of(client.read_file("a", &path, 0, None).await.unwrap()).await;
    assert_eq!(kept, b"old");
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_a_file_is_answered_as_http_says() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let place = home.shared().to_str().unwrap().to_owned();
    let content: Vec<u8> = (0..300_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    write(&client, &format!("{place}/f"), &content).await;
    write(&client, &format!("{place}/empty"), b"").await;
    let file = format!("/v1/machines/a/files?path={place}/f");

    let (head, whole) = asked(&running, "GET", &file, "").await;
    assert!(
        head.starts_with("http/1.1 200") && whole == content,
        "{head}"
    );
    assert!(head.contains("\r\naccept-ranges: bytes"), "{head}");
    let etag = head.lines().find_map(|line| line.strip_prefix("etag: "));
    let etag = etag.unwrap().to_owned();
    let (head, none) = asked(&running, "HEAD", &file, "").await;
    assert!(
        head.starts_with("http/1.1 200") && none.is_empty(),
        "{head}"
    );
    assert!(head.contains("\r\ncontent-length: 300000"), "{head}");

    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=100000-250000", 100_000, 250_000),
        ("bytes=299999-", 299_999, 299_999),
        ("bytes=7-999999999", 7, 299_999),
        ("bytes=-5", 299_995, 299_999),
        ("bytes=-999999999", 0, 299_999),
    ] {
        let (head, part) = asked(&running, "GET", &file, &format!("range: {range}\r\n")).await;
        assert!(head.starts_with("http/1.1 206"), "{range}: {head}");
        let says = format!("\r\ncontent-range: bytes {first}-{last}/300000");
        assert!(head.contains(&says), "{range}: {head}");
        assert!(part == content[first..=last], "{range}");
    }
    for range in ["bytes=300000-", "bytes=99999999999999999999-", "bytes=-0"] {
        let (head, _) = asked(&running, "GET", &file, &format!("range: {range}\r\n")).await;
        assert!(head.starts_with("http/1.1 416"), "{range}: {head}");
        assert!(head.contains("\r\ncontent-range: bytes */300000"), "{head}");
    }
    // Not one range of bytes, of another file, or of one that has none: all of it.
    for (target, headers, size) in [
        ("f", "range: bytes=0-1,4-5\r\n", 300_000),
        ("f", "range: lines=1-2\r\n", 300_000),
        ("f", "range: bytes=0-1\r\nif-range: \"x\"\r\n", 300_000),
        ("empty", "range: bytes=0-1\r\n", 0),
    ] {
        let target = format!("/v1/machines/a/files?path={place}/{target}");
        let (head, all) = asked(&running, "GET", &target, headers).await;
        assert!(head.starts_with("http/1.1 200"), "{headers}: {head}");
        assert_eq!(all.len(), size, "{headers}");
    }
    let same = format!("range: bytes=0-1\r\nif-range: {etag}\r\n");
    let (head, _) = asked(&running, "GET", &file, &same).await;
    assert!(head.starts_with("http/1.1 206"), "{head}");
    let (head, all) = asked(
        &running,
        "GET",
        "/v1/machines/a/files?path=/proc/self/status",
        "range: bytes=0-1\r\n",
    )
    .await;
    assert!(
        head.starts_with("http/1.1 200") && all.len() > 100,
        "{head}"
    );
    for (method, target, headers) in [
        ("GET", format!("{file}&offset=1"), "range: bytes=0-1\r\n"),
        (
            "PUT",
            file,
            "content-range: bytes 0-0/3\r\ncontent-length: 0\r\n",
        ),
    ] {
        let (head, _) = asked(&running, method, &target, headers).await;
        assert!(head.starts_with("http/1.1 400"), "{target}: {head}");
    }
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_added_to_moved_and_given_other_modes() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let place = home.shared().to_str().unwrap().to_owned();
    let at = |name: &str| format!("{place}/{name}");
    for piece in ["one ", "two"] {
        let upload = Upload {
            path: at("log"),
            append: true,
            ..Upload::default()
        };
        let added = client.write_file("a", &upload, body(piece.into())).await;
        assert_eq!(added.unwrap().size_bytes, piece.len() as u64);
    }
    let log = client.read_file("a", &at("log"), 0, None).await.unwrap();
    assert_eq!(bytes_of(log).await, b"one two");

    write(&client, &at("other"), b"x").await;
    let kept = client.move_file("a", &at("log"), &at("other"), false).await;
    assert_eq!(kept.unwrap_err().kind(), Kind::Conflict);
    client
        .move_file("a", &at("log"), &at("other"), true)
        .await
        .unwrap();
    let moved = client.stat_file("a", &at("other")).await.unwrap();
    assert_eq!(moved.size_bytes, 7);

    client.make_dir("a", &at("dir/sub"), true).await.unwrap();
    client
        .chmod_file("a", &at("dir"), 0o711, true)
        .await
        .unwrap();
    for dir in ["dir", "dir/sub"] {
        assert_eq!(client.stat_file("a", &at(dir)).await.unwrap().mode, 0o711);
    }
    let stranger = client
        .chown_file("a", &at("dir"), "no-such-user", true)
        .await;
    assert_eq!(stranger.unwrap_err().kind(), Kind::NotFound);
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_are_listed_and_searched_in_pages() {
    let Some((home, running, client)) = bench().await else {
        return;
    };
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    let place = home.shared().to_str().unwrap().to_owned();
    for dir in ["a/b", "c", ".git"] {
        let dir = format!("{place}/{dir}");
        client.make_dir("a", &dir, true).await.unwrap();
        for name in ["x.rs", "y.txt"] {
            write(&client, &format!("{dir}/{name}"), b"x").await;
        }
    }
    let paths = |page: &Page<_>| -> Vec<String> {
        let items: &Vec<hutch_contract::file::FileInfo> = &page.items;
        let paths = items.iter().map(|file| file.path.clone().unwrap());
        paths
            .map(|path| path.strip_prefix(&place).unwrap()[1..].to_owned())
            .collect()
    };
    let mut all = Vec::new();
    let mut cursor = None;
    loop {
        let page = client
            .list_tree("a", &place, None, cursor.as_deref(), Some(2))
            .await
            .unwrap();
        all.extend(paths(&page));
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(
        all,
        [
            ".git",
            ".git/x.rs",
            ".git/y.txt",
            "a",
            "a/b",
            "a/b/x.rs",
            "a/b/y.txt",
            "c",
            "c/x.rs",
            "c/y.txt"
        ]
    );
    let two = client.list_tree("a", &place, Some(2), None, None).await;
    assert!(!paths(&two.unwrap()).contains(&"a/b/x.rs".to_owned()));
    let found = client.glob_files("a", &place, "**/*.rs", None, None).await;
    assert_eq!(paths(&found.unwrap()), ["a/b/x.rs", "c/x.rs"]);
    let wrong = client.glob_files("a", &place, "/etc/*", None, None).await;
    assert_eq!(wrong.unwrap_err().kind(), Kind::Invalid);
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}
