//! Files in and out, whole or not at all.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use bytes::Bytes;
use hutch_guest::pb::{self, write_file_chunk::Part};
use sha2::{Digest, Sha256};
use tokio_stream::iter;
use tonic::{Code, Status};

use crate::harness::*;

fn open(path: &str) -> pb::WriteFileOpen {
    pb::WriteFileOpen {
        path: path.into(),
        ..Default::default()
    }
}

async fn write(client: &mut Client, open: pb::WriteFileOpen, data: &[u8]) -> Result<u64, Status> {
    let open = pb::WriteFileChunk {
        part: Some(Part::Open(open)),
    };
    let data = data.chunks(32 * 1024).map(|data| pb::WriteFileChunk {
        part: Some(Part::Data(Bytes::copy_from_slice(data))),
    });
    let messages: Vec<_> = [open].into_iter().chain(data).collect();
    Ok(client.write_file(iter(messages)).await?.into_inner().size)
}

async fn read(
    client: &mut Client,
    path: &str,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>, Status> {
    let request = pb::ReadFileRequest {
        path: path.into(),
        offset,
        length,
    };
    let mut stream = client.read_file(request).await?.into_inner();
    let mut data = Vec::new();
    let mut first = true;
    while let Some(message) = stream.message().await? {
        assert_eq!(message.info.is_some(), first);
        first = false;
        data.extend(&message.data);
    }
    Ok(data)
}

fn entries(agent: &Agent) -> Vec<String> {
    let entries = std::fs::read_dir(agent.root()).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn three_hundred_megabytes_go_in_and_out_unchanged() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let block: Vec<u8> = (0..32 * 1024u32).flat_map(|i| i.to_le_bytes()).collect();
    let size = 300 * 1024 * 1024 / block.len();
    let mut sum = Sha256::new();
    (0..size).for_each(|_| sum.update(&block));
    let sum = sum.finalize();
    let blocks = std::iter::repeat_n(Bytes::from(block), size);
    let parts =
        blocks.flat_map(|block| (0..4).map(move |i| block.slice(i * 32768..(i + 1) * 32768)));
    let data = parts.map(|data| pb::WriteFileChunk {
        part: Some(Part::Data(data)),
    });
    let open = pb::WriteFileOpen {
        size: Some(300 * 1024 * 1024),
        ..open("big")
    };
    let first = pb::WriteFileChunk {
        part: Some(Part::Open(open)),
    };
    let reply = client
        .write_file(iter(std::iter::once(first).chain(data)))
        .await
        .unwrap();
    assert_eq!(reply.into_inner().size, 300 * 1024 * 1024);
    let request = pb::ReadFileRequest {
        path: "big".into(),
        ..Default::default()
    };
    let mut stream = client.read_file(request).await.unwrap().into_inner();
    let mut out = Sha256::new();
    while let Some(message) = stream.message().await.unwrap() {
        out.update(&message.data);
    }
    assert_eq!(out.finalize(), sum);
}

#[tokio::test]
async fn a_file_appears_whole_or_not_at_all() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    write(&mut client, open("f"), b"old").await.unwrap();
    for wrong in [2, 4, u64::MAX] {
        let open = pb::WriteFileOpen {
            size: Some(wrong),
            ..open("f")
        };
        assert_eq!(
            code(write(&mut client, open, b"new").await),
            Code::InvalidArgument
        );
    }
    // A host that goes away in the middle.
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let first = pb::WriteFileChunk {
        part: Some(Part::Open(open("f"))),
    };
    sender.send(first).await.unwrap();
    let mut other = agent.connect().await;
    other
        .hello(pb::HelloRequest { generation: 1 })
        .await
        .unwrap();
    let half = tokio::spawn(async move {
        other
            .write_file(tokio_stream::wrappers::ReceiverStream::new(receiver))
            .await
    });
    until("the temporary file is there", || entries(&agent).len() == 2).await;
    half.abort();
    drop(sender);
    until("the temporary file is gone", || entries(&agent) == ["f"]).await;
    assert_eq!(std::fs::read(agent.root().join("f")).unwrap(), b"old");
}

#[tokio::test]
async fn mode_owner_and_parents_are_as_asked() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    assert_eq!(
        code(write(&mut client, open("a/b/f"), b"x").await),
        Code::NotFound
    );
    let asked = pb::WriteFileOpen {
        make_parents: true,
        mode: 0o4751,
        ..open("a/b/f")
    };
    write(&mut client, asked, b"x").await.unwrap();
    let mode = |path: &str| std::fs::metadata(agent.root().join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("a/b/f"), mode("a/b")), (0o4751, 0o755));
    write(&mut client, open("a/b/f"), b"y").await.unwrap();
    assert_eq!(mode("a/b/f"), 0o4751);
    write(&mut client, open("plain"), b"").await.unwrap();
    assert_eq!(mode("plain"), 0o644);
    let stranger = pb::WriteFileOpen {
        owner: "no-such-user".into(),
        ..open("g")
    };
    assert_eq!(
        code(write(&mut client, stranger, b"x").await),
        Code::NotFound
    );
    if rustix::process::geteuid().is_root() {
        let owned = pb::WriteFileOpen {
            owner: "4242:77".into(),
            ..open("g")
        };
        write(&mut client, owned, b"x").await.unwrap();
        let meta = std::fs::metadata(agent.root().join("g")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (4242, 77));
    }
}

#[tokio::test]
async fn writing_goes_through_links_and_not_into_special_files() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    std::fs::write(agent.root().join("target"), "old").unwrap();
    symlink("target", agent.root().join("link")).unwrap();
    write(&mut client, open("link"), b"new").await.unwrap();
    assert_eq!(std::fs::read(agent.root().join("target")).unwrap(), b"new");
    assert!(agent.root().join("link").is_symlink());
    for special in ["/dev/null", "/", "."] {
        let refused = write(&mut client, open(special), b"x").await;
        assert_eq!(code(refused), Code::FailedPrecondition, "{special}");
    }
}

#[tokio::test]
async fn a_part_of_a_file_is_read_and_what_never_ends_is_refused() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let data: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
    write(&mut client, open("f"), &data).await.unwrap();
    assert!(read(&mut client, "f", 0, 0).await.unwrap() == data);
    assert!(read(&mut client, "f", 5, 300_000).await.unwrap() == data[5..300_005]);
    assert!(read(&mut client, "f", 999_999, 10).await.unwrap() == data[999_999..]);
    assert!(
        read(&mut client, "f", 5_000_000, 0)
            .await
            .unwrap()
            .is_empty()
    );
    write(&mut client, open("empty"), b"").await.unwrap();
    assert!(read(&mut client, "empty", 0, 0).await.unwrap().is_empty());
    assert!(
        !read(&mut client, "/proc/self/status", 0, 0)
            .await
            .unwrap()
            .is_empty()
    );
    let fifo = agent.root().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for special in ["fifo", "/dev/zero", "/dev/ptmx", "/", "."] {
        let refused = read(&mut client, special, 0, 0).await;
        assert_eq!(code(refused), Code::FailedPrecondition, "{special}");
    }
    assert_eq!(
        code(read(&mut client, "missing", 0, 0).await),
        Code::NotFound
    );
    assert_eq!(
        code(read(&mut client, "f/x", 0, 0).await),
        Code::FailedPrecondition
    );
    assert_eq!(
        code(read(&mut client, "f", u64::MAX, 0).await),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn hostile_paths_are_answered_and_not_followed() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    symlink("loop", agent.root().join("loop")).unwrap();
    let long = format!("/{}", "x".repeat(5000));
    let name = "n".repeat(300);
    for bad in ["", "a\0b", &long, &name, "loop/x"] {
        let stat = pb::StatRequest {
            path: bad.into(),
            follow: false,
        };
        assert_eq!(
            code(client.stat(stat).await),
            Code::InvalidArgument,
            "{bad:?}"
        );
        assert_eq!(
            code(write(&mut client, open(bad), b"x").await),
            Code::InvalidArgument
        );
    }
    for root in ["/", "//", "/.", "/..", "/proc/.."] {
        let remove = pb::RemoveRequest {
            path: root.into(),
            recursive: true,
        };
        assert_eq!(
            code(client.remove(remove).await),
            Code::InvalidArgument,
            "{root}"
        );
    }
    // An error's text stays small enough for its header, whatever was asked.
    let mut request = start("p", &["true"]);
    request.user = "é".repeat(200_000);
    assert_eq!(
        start_error(&mut client, request).await.code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn stat_tells_links_from_what_they_point_to() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    std::fs::write(agent.root().join("f"), "12345").unwrap();
    symlink("f", agent.root().join("l")).unwrap();
    let stat = |path: &str, follow| pb::StatRequest {
        path: path.into(),
        follow,
    };
    let link = client.stat(stat("l", false)).await.unwrap().into_inner();
    assert_eq!(
        (link.kind(), &link.link_target[..]),
        (pb::file_info::Kind::Symlink, &b"f"[..])
    );
    let file = client.stat(stat("l", true)).await.unwrap().into_inner();
    assert_eq!((file.kind(), file.size), (pb::file_info::Kind::File, 5));
    assert!(file.link_target.is_empty() && file.modified_unix_ms > 1_600_000_000_000);
    let null = client
        .stat(stat("/dev/null", false))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(null.kind(), pb::file_info::Kind::Other);
}

#[tokio::test]
async fn a_huge_directory_comes_in_pages_in_order() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let dir = agent.root().join("dir");
    std::fs::create_dir(&dir).unwrap();
    let mut expected: Vec<String> = (0..3500)
        .map(|i| format!("{i}{}", "x".repeat(150)))
        .collect();
    for name in &expected {
        // Links with the longest targets there can be.
        symlink("t".repeat(4000), dir.join(name)).unwrap();
    }
    expected.sort();
    let mut found = Vec::new();
    let mut after = Bytes::new();
    loop {
        let request = pb::ListDirRequest {
            path: "dir".into(),
            after: after.clone(),
            limit: 5000,
        };
        let page = client.list_dir(request).await.unwrap().into_inner();
        assert!(page.entries.len() <= 1000);
        found.extend(
            page.entries
                .iter()
                .map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()),
        );
        after = page.entries.last().unwrap().name.clone();
        if !page.more {
            break;
        }
    }
    assert_eq!(found, expected);
    let request = pb::ListDirRequest {
        path: "dir".into(),
        limit: 2,
        ..Default::default()
    };
    assert_eq!(
        client
            .list_dir(request)
            .await
            .unwrap()
            .into_inner()
            .entries
            .len(),
        2
    );
    let file = pb::ListDirRequest {
        path: "dir/x".into(),
        ..Default::default()
    };
    assert_eq!(code(client.list_dir(file).await), Code::NotFound);
}

#[tokio::test]
async fn what_is_added_stands_at_the_end_of_what_was_there() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let append = |path: &str| pb::WriteFileOpen {
        append: true,
        ..open(path)
    };
    let made = pb::WriteFileOpen {
        mode: 0o600,
        ..append("log")
    };
    assert_eq!(write(&mut client, made, b"one ").await.unwrap(), 4);
    symlink("log", agent.root().join("link")).unwrap();
    let kept = pb::WriteFileOpen {
        mode: 0o777,
        ..append("link")
    };
    write(&mut client, kept, b"two ").await.unwrap();
    let log = agent.root().join("log");
    let inode = std::fs::metadata(&log).unwrap().ino();
    let much = vec![b'x'; 1_000_000];
    write(&mut client, append("log"), &much).await.unwrap();
    let meta = std::fs::metadata(&log).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.ino(), meta.len()),
        (0o600, inode, 1_000_008)
    );
    assert!(std::fs::read(&log).unwrap().starts_with(b"one two xxx"));
    // A little that does not come whole is not added at all.
    for wrong in [2, 4] {
        let wrong = pb::WriteFileOpen {
            size: Some(wrong),
            ..append("log")
        };
        let refused = write(&mut client, wrong, b"new").await;
        assert_eq!(code(refused), Code::InvalidArgument);
    }
    assert_eq!(std::fs::metadata(&log).unwrap().len(), 1_000_008);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        agent.root().join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for special in ["/dev/null", "fifo", "."] {
        let refused = write(&mut client, append(special), b"x").await;
        assert_eq!(code(refused), Code::FailedPrecondition, "{special}");
    }
    assert_eq!(entries(&agent).len(), 3, "nothing temporary");
}

#[tokio::test]
async fn directories_are_made_and_trees_removed() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let make = |path: &str, parents| pb::MakeDirRequest {
        path: path.into(),
        mode: 0o1777,
        parents,
    };
    assert_eq!(
        code(client.make_dir(make("a/b", false)).await),
        Code::NotFound
    );
    client.make_dir(make("a/b", true)).await.unwrap();
    client.make_dir(make("a/b", true)).await.unwrap();
    assert_eq!(
        code(client.make_dir(make("a/b", false)).await),
        Code::AlreadyExists
    );
    let mode = std::fs::metadata(agent.root().join("a/b"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o1777);
    std::fs::write(agent.root().join("a/b/f"), "x").unwrap();
    assert_eq!(
        code(client.make_dir(make("a/b/f", true)).await),
        Code::AlreadyExists
    );
    let remove = |recursive| pb::RemoveRequest {
        path: "a".into(),
        recursive,
    };
    assert_eq!(
        code(client.remove(remove(false)).await),
        Code::FailedPrecondition
    );
    client.remove(remove(true)).await.unwrap();
    assert_eq!(code(client.remove(remove(true)).await), Code::NotFound);
}
