//! What an archive holds arrives on the disk: content, owners, modes, times, links, devices,
//! attributes, long names.

use crate::archives::{Head, Tar, build, head, link};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;

#[test]
fn owners_modes_times_and_kinds_are_kept() {
    let tar = Tar::new()
        .add(
            "./",
            Head {
                mode: 0o711,
                uid: 7,
                ..head(b'5')
            },
            b"",
        )
        .add(
            "./tmp/",
            Head {
                mode: 0o1777,
                ..head(b'5')
            },
            b"",
        )
        .add(
            "./su",
            Head {
                mode: 0o4755,
                uid: 70_000,
                gid: 80_000,
                mtime: 12,
                ..head(b'0')
            },
            b"x",
        )
        .add(
            "./null",
            Head {
                device: (1, 3),
                ..head(b'3')
            },
            b"",
        )
        .add(
            "./disk",
            Head {
                device: (4095, 0xf_ffff),
                ..head(b'4')
            },
            b"",
        )
        .add("./pipe", head(b'6'), b"")
        .add("./short", link(b'2', "su"), b"")
        .add("./long", link(b'2', &"a/".repeat(40)), b"")
        .add("./other", link(b'1', "./su"), b"")
        .end();
    let disk = build(&[&tar]);
    let fs = disk.fs();
    let inode = |path: &str| fs.inode(fs.resolve(path).unwrap()).unwrap();
    let root = inode("/");
    assert_eq!((root.mode & 0o7777, root.uid), (0o711, 7));
    assert_eq!(inode("/tmp").mode & 0o7777, 0o1777);
    let su = inode("/su");
    assert_eq!(
        (su.mode & 0o7777, su.uid, su.gid, su.mtime),
        (0o4755, 70_000, 80_000, 12)
    );
    assert_eq!(su.links_count, 2);
    assert_eq!(fs.resolve("/su").unwrap(), fs.resolve("/other").unwrap());
    assert_eq!(inode("/null").dev_numbers(), Some((1, 3)));
    assert_eq!(inode("/disk").dev_numbers(), Some((4095, 0xf_ffff)));
    assert_eq!(inode("/pipe").mode >> 12, 0o1);
    assert_eq!(
        fs.symlink_target(fs.resolve("/short").unwrap()).unwrap(),
        b"su"
    );
    assert_eq!(
        fs.symlink_target(fs.resolve("/long").unwrap()).unwrap(),
        "a/".repeat(40).as_bytes()
    );
    assert_eq!(disk.built.files, 8);
}

#[test]
fn pax_headers_say_what_the_old_header_cannot() {
    let long = format!("d/{}", "n".repeat(255));
    let acl = [
        2u32.to_le_bytes().as_slice(),
        &[1, 0, 6, 0, 255, 255, 255, 255],
    ]
    .concat();
    let tar = Tar::new()
        .dir("d")
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"1700000000.25"),
            ("uid", b"3000000000"),
            ("SCHILY.xattr.user.colour", b"blue\0\xff"),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            ("SCHILY.xattr.system.posix_acl_access", &acl),
            ("comment", b"ignored"),
        ])
        .file("short", b"content")
        .extended(b'g', &[("comment", b"made by hand")])
        .file("plain", b"")
        .end();
    let disk = build(&[&tar]);
    let path = format!("/{long}");
    assert_eq!(disk.read(&path), b"content");
    let fs = disk.fs();
    let number = fs.resolve(&path).unwrap();
    let inode = fs.inode(number).unwrap();
    assert_eq!((inode.uid, inode.mtime), (3_000_000_000, 1_700_000_000));
    assert_eq!(inode.mtime_extra >> 2, 250_000_000);
    let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = fs
        .xattrs(number)
        .unwrap()
        .into_iter()
        .map(|xattr| (xattr.full_name().unwrap(), xattr.value))
        .collect();
    assert_eq!(xattrs[&b"user.colour"[..]], b"blue\0\xff");
    assert_eq!(xattrs[&b"security.capability"[..]], b"\x01\0\0\x02");
    assert_eq!(
        xattrs[&b"system.posix_acl_access"[..]],
        [1, 0, 0, 0, 1, 0, 6, 0]
    );
    assert!(disk.exists("/plain"));
}

#[test]
fn gnu_long_names_and_links_are_read() {
    let (name, target) = (format!("{}/x", "d".repeat(150)), "t".repeat(300));
    let tar = Tar::new()
        .add("././@LongLink", head(b'L'), format!("{name}\0").as_bytes())
        .add(
            "././@LongLink",
            head(b'K'),
            format!("{target}\0").as_bytes(),
        )
        .add("cut", link(b'2', "cut"), b"")
        .end();
    let disk = build(&[&tar]);
    let fs = disk.fs();
    let number = fs.resolve(&format!("/{name}")).unwrap();
    assert_eq!(fs.symlink_target(number).unwrap(), target.as_bytes());
}

#[test]
fn gnu_sparse_files_get_their_holes_back() {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_size(1024);
    let octal = |field: &mut [u8], number: u64| {
        field.copy_from_slice(format!("{number:011o}\0").as_bytes());
    };
    let gnu = header.as_gnu_mut().unwrap();
    for (piece, (at, len)) in gnu.sparse.iter_mut().zip([(4096, 512), (1 << 20, 512)]) {
        octal(&mut piece.offset, at);
        octal(&mut piece.numbytes, len);
    }
    octal(&mut gnu.realsize, 2 << 20);
    for field in [&mut gnu.uid, &mut gnu.gid] {
        *field = *b"0000000\0";
    }
    gnu.mtime = *b"00000000000\0";
    header.set_cksum();
    let content = [[1; 512], [2; 512]].concat();
    let tar = Tar::new()
        .raw(header.as_bytes())
        .raw(&content)
        .file("after", b"!")
        .end();
    let disk = build(&[&tar]);
    let mut expected = vec![0; 2 << 20];
    expected[4096..4608].fill(1);
    expected[1 << 20..(1 << 20) + 512].fill(2);
    assert!(disk.read("/sparse") == expected);
    assert_eq!(disk.read("/after"), b"!");
}

#[test]
fn every_packing_gives_the_same_disk() {
    let plain = Tar::new()
        .dir("etc")
        .file("etc/motd", &[b'x'; 100_000])
        .end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&plain).unwrap();
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    let expected = build(&[&plain]);
    for packed in [gzip.finish().unwrap(), xz.finish().unwrap(), zstd] {
        assert!(build(&[&packed]).bytes() == expected.bytes());
    }
}

#[test]
fn equal_archives_give_equal_disks_and_other_content_another_uuid() {
    let tar = |content: &[u8]| Tar::new().file("a", content).end();
    let (one, same, other) = (
        build(&[&tar(b"1")]),
        build(&[&tar(b"1")]),
        build(&[&tar(b"2")]),
    );
    assert!(one.bytes() == same.bytes());
    assert_eq!(one.built, same.built);
    assert_ne!(one.built.sha256, other.built.sha256);
    assert_ne!(one.fs().superblock().uuid, other.fs().superblock().uuid);
}

#[test]
fn a_later_entry_of_one_kind_replaces_the_earlier() {
    let tar = Tar::new()
        .dir("d")
        .file("d/kept", b"k")
        .file("f", b"first")
        .add("old", link(b'1', "f"), b"")
        .file("f", b"second")
        .add(
            "d",
            Head {
                mode: 0o700,
                ..head(b'5')
            },
            b"",
        )
        .end();
    let disk = build(&[&tar]);
    assert_eq!(
        (disk.read("/f"), disk.read("/old")),
        (b"second".into(), b"first".into())
    );
    assert_eq!(disk.read("/d/kept"), b"k");
    let fs = disk.fs();
    assert_eq!(
        fs.inode(fs.resolve("/d").unwrap()).unwrap().mode & 0o7777,
        0o700
    );
}

#[test]
fn missing_parents_are_made_and_an_own_lost_and_found_is_dropped() {
    let tar = Tar::new().dir("lost+found").file("a/b/c", b"c").end();
    let disk = build(&[&tar]);
    let fs = disk.fs();
    let parent = fs.inode(fs.resolve("/a/b").unwrap()).unwrap();
    assert_eq!((parent.mode & 0o7777, parent.uid), (0o755, 0));
    assert_eq!(disk.names("/"), ["a"]);
}

#[test]
fn there_is_room_and_it_can_grow() {
    let disk = build(&[&Tar::new().file("a", &vec![b'x'; 600 << 10]).end()]);
    let fs = disk.fs();
    let superblock = fs.superblock();
    assert!(superblock.free_blocks_count * 4096 >= 64 << 20);
    assert!(superblock.free_inodes_count >= 4096);
    // Groups that are added later get as many inodes: one for 16 KiB.
    assert!(superblock.inodes_per_group >= 8192);
    assert!(disk.built.used_bytes < 4 << 20, "{:?}", disk.built);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_tree_survives(
        files in prop::collection::btree_map("[a-c]{1,2}(/[d-f]{1,3}){0,3}", (prop::collection::vec(any::<u8>(), 0..9000), 0u32..0o10000), 0..40),
    ) {
        // A name that is a file cannot be another one's parent.
        let files: BTreeMap<_, _> = files
            .iter()
            .filter(|(name, _)| !files.keys().any(|other| other.starts_with(&format!("{name}/"))))
            .collect();
        let mut tar = Tar::new();
        for (name, (content, mode)) in &files {
            tar = tar.add(name.as_bytes(), Head { mode: *mode, ..head(b'0') }, content);
        }
        let disk = build(&[&tar.end()]);
        let fs = disk.fs();
        for (name, (content, mode)) in files {
            let path = format!("/{name}");
            prop_assert_eq!(&disk.read(&path), content);
            prop_assert_eq!(u32::from(fs.inode(fs.resolve(&path).unwrap()).unwrap().mode & 0o7777), *mode);
        }
    }
}

#[test]
fn a_directory_of_many_names_is_found_whole() {
    let mut tar = Tar::new();
    for number in 0..3000 {
        tar = tar.file(&format!("many/{number:050}"), b"");
    }
    let disk = build(&[&tar.end()]);
    assert_eq!(disk.names("/many").len(), 3000);
    assert!(disk.exists(&format!("/many/{:050}", 2999)));
}
