//! Files into and out of machines, images in.

use std::os::unix::fs::PermissionsExt;

use crate::fake::Fake;
use crate::hutch::Hutch;

#[tokio::test]
async fn a_file_goes_in_with_its_mode_and_into_a_directory_under_its_name() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    let local = hutch.home.path().join("setup.sh");
    let content: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[0]).collect();
    std::fs::write(&local, &content).unwrap();
    std::fs::set_permissions(&local, PermissionsExt::from_mode(0o750)).unwrap();
    for (target, path) in [
        ("web:/root", "/root/setup.sh"),
        ("web:/root/", "/root/setup.sh"),
        ("web:/srv/x", "/srv/x"),
    ] {
        let ended = hutch.run(&["cp", "setup.sh", target]).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        assert_eq!(fake.file(path), Some((0o750, content.clone())), "{target}");
    }
}

#[tokio::test]
async fn what_is_piped_goes_in_and_out() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    assert_eq!(
        hutch.run_with(&["cp", "-", "web:/x"], b"piped").await.code,
        Some(0)
    );
    assert_eq!(fake.file("/x").unwrap().1, b"piped");
    let out = hutch.run(&["cp", "web:/x", "-"]).await;
    assert_eq!((out.code, out.stdout.as_str()), (Some(0), "piped"));
}

#[tokio::test]
async fn a_file_comes_out_with_its_mode_under_the_name_that_was_asked_for() {
    let fake = Fake::start().await;
    fake.put_file("/usr/bin/tool", 0o4755, b"\x7fELF");
    let hutch = Hutch::at(&fake.url);
    // The server of the test says that the file is called `../../evil`.
    assert_eq!(
        hutch.run(&["cp", "web:/usr/bin/tool", "."]).await.code,
        Some(0)
    );
    let local = hutch.home.path().join("tool");
    assert_eq!(std::fs::read(&local).unwrap(), b"\x7fELF");
    assert_eq!(
        std::fs::metadata(&local).unwrap().permissions().mode() & 0o7777,
        0o755
    );
    assert_eq!(
        std::fs::read_dir(hutch.home.path()).unwrap().count(),
        1,
        "nothing else was written"
    );
    fake.put_file("/usr/bin/tool", 0o644, b"new");
    assert_eq!(
        hutch.run(&["cp", "web:/usr/bin/tool", "tool"]).await.code,
        Some(0)
    );
    assert_eq!(std::fs::read(&local).unwrap(), b"new");
}

#[tokio::test]
async fn what_cannot_be_copied_is_said_before_anything_is_written() {
    let fake = Fake::start().await;
    fake.put_file("/x", 0o644, b"x");
    let hutch = Hutch::at(&fake.url);
    std::fs::create_dir(hutch.home.path().join("dir")).unwrap();
    std::os::unix::fs::symlink("elsewhere", hutch.home.path().join("link")).unwrap();
    let mut said = String::new();
    for (from, to) in [
        ("a", "b"),
        ("web:/a", "db:/b"),
        ("web:x", "."),
        ("dir", "web:/x"),
        ("web:/root", "."),
        ("nowhere", "web:/x"),
        ("-", "web:/root"),
        ("link/../dir", "web:/srv/"),
        ("web:/x", "no/such/"),
        ("web:/x", "no/such"),
        ("web:/x", "link"),
        ("web:/gone", "."),
        ("web:/..", "dir"),
        ("absent:/x", "."),
        ("dir/../dir", "absent:/x"),
    ] {
        let ended = hutch.run(&["cp", from, to]).await;
        let code = ended.code.unwrap();
        said += &format!(
            "{from} {to}: {code} {}",
            ended.stderr.lines().next().unwrap_or("-")
        );
        said.push('\n');
    }
    insta::assert_snapshot!(said, @r"
    a b: 2 error: one side of a copy, and only one, is in a machine
    web:/a db:/b: 2 error: one side of a copy, and only one, is in a machine
    web:x .: 2 error: `x` is not an absolute path in a machine
    dir web:/x: 2 error: dir is a directory, and only single files can be copied
    web:/root .: 2 error: /root is a directory, and only single files can be copied
    nowhere web:/x: 4 error: open nowhere: No such file or directory (os error 2)
    - web:/root: 2 error: /root names no file
    link/../dir web:/srv/: 4 error: open link/../dir: No such file or directory (os error 2)
    web:/x no/such/: 2 error: no/such/ is not a directory
    web:/x no/such: 4 error: write into no: entity not found
    web:/x link: 2 error: link is a symbolic link
    web:/gone .: 4 error: no such file
    web:/.. dir: 2 error: dir names no file
    absent:/x .: 4 error: machine `absent` not found
    dir/../dir absent:/x: 2 error: dir/../dir is a directory, and only single files can be copied
    ");
    let mut left = std::fs::read_dir(hutch.home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect::<Vec<_>>();
    left.sort();
    assert_eq!(left, ["dir", "link"]);
}

#[tokio::test]
async fn an_image_goes_in_as_what_it_looks_like() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    let mut disk = vec![0; 4096];
    disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
    std::fs::write(hutch.home.path().join("disk"), &disk).unwrap();
    std::fs::write(hutch.home.path().join("root.tar"), b"tar").unwrap();
    insta::assert_snapshot!(hutch.run(&["image", "import", "disk", "--name", "mine"]).await.shown(), @r"
    exit code 0
    --- stdout
    mine
    --- stderr
      fetch packages
      write the disk
    ");
    assert_eq!(fake.file("image mine ext4").unwrap().1, disk);
    assert_eq!(
        hutch
            .run(&["image", "import", "root.tar", "--name", "other"])
            .await
            .code,
        Some(0)
    );
    assert_eq!(fake.file("image other tar").unwrap().1, b"tar");
    assert_eq!(
        hutch
            .run(&[
                "image", "import", "disk", "--name", "odd", "--format", "tar"
            ])
            .await
            .code,
        Some(0)
    );
    assert!(fake.file("image odd tar").is_some());
}

#[tokio::test]
async fn an_image_that_is_refused_is_an_error_with_a_hint() {
    let hutch = Hutch::at(&Fake::start().await.url);
    let ended = hutch
        .run_with(&["image", "import", "-", "--name", "bad"], b"tar")
        .await;
    insta::assert_snapshot!(ended.shown(), @r"
    exit code 1
    --- stdout
    --- stderr
      fetch packages
      write the disk
    error: entry `../x` leaves the tree
    hint: make it anew
    ");
}
