//! Archives that no honest program makes are refused, with the rule and the entry named.

use crate::archives::{Head, Tar, build_with, file_of, head, link, refusal, refusal_with};
use hutch_image::{Error, Kind, Limits, Purpose, Refusal, build_disk};
use proptest::prelude::*;
use std::io::Write;

#[track_caller]
fn refused(tar: Tar, name: &str, expected: Refusal) {
    let (entry, why) = refusal(&tar.end());
    assert_eq!(why, expected);
    assert_eq!(entry.as_deref(), Some(format!("`{name}`").as_str()));
}

#[test]
fn paths_out_of_the_tree() {
    refused(
        Tar::new().file("/etc/passwd", b""),
        "/etc/passwd",
        Refusal::AbsolutePath,
    );
    refused(Tar::new().file("../x", b""), "../x", Refusal::ParentPath);
    refused(
        Tar::new().file("a/../../x", b""),
        "a/../../x",
        Refusal::ParentPath,
    );
    refused(Tar::new().dir("a/.."), "a/..", Refusal::ParentPath);
    refused(
        Tar::new().pax(&[("path", b"/x")]).file("x", b""),
        "/x",
        Refusal::AbsolutePath,
    );
    refused(Tar::new().file("", b""), "", Refusal::EmptyPath);
    let conflict = Refusal::Conflict {
        before: "a directory",
        now: "a file",
    };
    refused(Tar::new().file("./.", b""), "./.", conflict);
}

#[test]
fn names_that_no_filesystem_holds() {
    refused(
        Tar::new().pax(&[("path", b"a\0b")]).file("x", b""),
        "pax",
        Refusal::NulInName,
    );
    let hidden = Tar::new().add("long", head(b'L'), b"a\0b\0").file("x", b"");
    refused(hidden, "a\\0b", Refusal::NulInName);
    refused(
        Tar::new().add(b"\xff", head(b'0'), b""),
        "\u{fffd}",
        Refusal::NotUtf8,
    );
    let name = "n".repeat(256);
    let tar = Tar::new().pax(&[("path", name.as_bytes())]).file("x", b"");
    let (_, why) = refusal(&tar.end());
    assert_eq!(why, Refusal::NameTooLong);
    let path = "n/".repeat(2100);
    let (_, why) = refusal(
        &Tar::new()
            .pax(&[("path", path.as_bytes())])
            .file("x", b"")
            .end(),
    );
    assert_eq!(why, Refusal::PathTooLong);
    let path = "n/".repeat(257);
    let (_, why) = refusal(&Tar::new().pax(&[("path", path.as_bytes())]).dir("x").end());
    assert_eq!(why, Refusal::TooDeep { limit: 256 });
}

#[test]
fn nothing_is_written_through_links_or_files() {
    let below = |kind| Refusal::BelowNonDirectory {
        parent: "a".into(),
        kind,
    };
    let tar = Tar::new()
        .add("a", link(b'2', "/etc"), b"")
        .file("a/passwd", b"");
    refused(tar, "a/passwd", below("a symbolic link"));
    refused(
        Tar::new().file("a", b"").file("a/b", b""),
        "a/b",
        below("a file"),
    );
    // A directory that is replaced by a link, to lead later entries elsewhere.
    let tar = Tar::new()
        .dir("a")
        .add("a", link(b'2', "/etc"), b"")
        .file("a/passwd", b"");
    let conflict = Refusal::Conflict {
        before: "a directory",
        now: "a symbolic link",
    };
    refused(tar, "a", conflict);
}

#[test]
fn hard_links_lead_only_to_files_that_are_there() {
    let outside = |target: &str| Refusal::LinkOutside {
        target: target.into(),
    };
    let missing = |target: &str| Refusal::LinkTargetMissing {
        target: target.into(),
    };
    let hard = |target: &str| Tar::new().file("f", b"").add("l", link(b'1', target), b"");
    refused(hard("/etc/shadow"), "l", outside("/etc/shadow"));
    refused(hard("../f"), "l", outside("../f"));
    refused(hard(""), "l", outside(""));
    refused(hard("g"), "l", missing("g"));
    refused(hard("l"), "l", missing("l"));
    refused(hard("f/x"), "l", missing("f/x"));
    refused(
        hard("."),
        "l",
        Refusal::LinkToDirectory { target: ".".into() },
    );
    let tar = Tar::new()
        .add("s", link(b'2', "/"), b"")
        .add("l", link(b'1', "s/etc"), b"");
    refused(tar, "l", missing("s/etc"));
    let tar = Tar::new()
        .file("f", b"")
        .add("l", link(b'1', "f"), b"content");
    refused(
        tar,
        "l",
        Refusal::UnexpectedContent {
            kind: "a hard link",
        },
    );
}

#[test]
fn too_many_names_of_one_file() {
    let mut tar = Tar::new().file("f", b"");
    for number in 0..65_000 {
        tar = tar.add(format!("{number}"), link(b'1', "f"), b"");
    }
    assert_eq!(refusal(&tar.end()).1, Refusal::TooManyLinks);
}

#[test]
fn one_name_for_two_kinds() {
    let conflict = |before, now| Refusal::Conflict { before, now };
    let tar = Tar::new().file("a", b"").dir("a");
    refused(tar, "a", conflict("a file", "a directory"));
    let tar = Tar::new().dir("a").file("a", b"");
    refused(tar, "a", conflict("a directory", "a file"));
    let tar = Tar::new().file("a/b", b"").file("a", b"");
    refused(tar, "a", conflict("a directory", "a file"));
    let tar = Tar::new().dir("lost+found").file("lost+found/x", b"");
    refused(tar, "lost+found", Refusal::LostAndFound);
}

#[test]
fn numbers_that_make_no_sense() {
    let device = |device| {
        Tar::new().add(
            "d",
            Head {
                device,
                ..head(b'3')
            },
            b"",
        )
    };
    refused(device((4096, 0)), "d", Refusal::DeviceOutOfRange);
    refused(device((0, 1 << 20)), "d", Refusal::DeviceOutOfRange);
    let owner = Tar::new().add(
        "o",
        Head {
            uid: 1 << 33,
            ..head(b'0')
        },
        b"",
    );
    refused(owner, "o", Refusal::BadNumber { field: "owner" });
    let none = Tar::new().add(
        "o",
        Head {
            gid: u64::from(u32::MAX),
            ..head(b'0')
        },
        b"",
    );
    refused(none, "o", Refusal::BadNumber { field: "group" });
    let huge = Tar::new().add(
        "h",
        Head {
            size: Some(u64::MAX),
            ..head(b'0')
        },
        b"",
    );
    refused(huge, "h", Refusal::BadNumber { field: "size" });
    let negative = Tar::new().pax(&[("size", b"-5")]).file("n", b"");
    refused(negative, "pax", Refusal::BadNumber { field: "size" });
}

#[test]
fn kinds_and_headers_that_are_not_supported() {
    let volume = Refusal::UnsupportedType { code: "V".into() };
    refused(Tar::new().add("v", head(b'V'), b""), "v", volume);
    let sparse = Tar::new().pax(&[("GNU.sparse.major", b"1")]).file("s", b"");
    refused(sparse, "pax", Refusal::PaxSparse);
    let global = Tar::new().extended(b'g', &[("path", b"x")]).file("s", b"");
    refused(global, "pax", Refusal::GlobalPax { key: "path".into() });
    refused(
        Tar::new().add("p", head(b'x'), b"12 nonsense"),
        "p",
        Refusal::BadPax,
    );
    let xattr = |name: &str, value: &[u8]| {
        Tar::new()
            .pax(&[(&format!("SCHILY.xattr.{name}"), value)])
            .file("f", b"")
    };
    refused(
        xattr("system.nfs4_acl", b""),
        "f",
        Refusal::BadXattr {
            name: "system.nfs4_acl".into(),
        },
    );
    refused(xattr("user.big", &[0; 4096]), "f", Refusal::XattrsTooLarge);
    refused(
        Tar::new().add("l", link(b'2', ""), b""),
        "l",
        Refusal::BadSymlink,
    );
    refused(
        Tar::new().dir("a").file("a/.wh..", b""),
        "a/.wh..",
        Refusal::BadWhiteout,
    );
}

#[test]
fn escape_sequences_in_names_are_not_printed() {
    let tar = Tar::new().file("/\x1b[2J\u{202e}x", b"").end();
    let error = build_with(&[&tar], &Limits::default()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "archive, entry `/\\u{1b}[2J\\u{202e}x`: the path is absolute"
    );
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.hint().unwrap().contains("tar -C"));
}

#[test]
fn limits_hold() {
    let limits = Limits {
        max_content_bytes: 1000,
        max_entries: 10,
        max_metadata_bytes: 20_000,
        max_header_bytes: 600,
        ..Limits::default()
    };
    let tar = Tar::new().file("a", &[1; 600]).file("b", &[1; 600]).end();
    assert_eq!(
        refusal_with(&tar, &limits).1,
        Refusal::TooLarge { limit: 1000 }
    );
    let many = (0..11)
        .fold(Tar::new(), |tar, n| tar.file(&format!("{n}"), b""))
        .end();
    assert_eq!(
        refusal_with(&many, &limits).1,
        Refusal::TooManyEntries { limit: 10 }
    );
    let dirs = (0..9)
        .fold(Tar::new(), |tar, n| tar.dir(&format!("{n}")))
        .end();
    assert_eq!(
        refusal_with(&dirs, &limits).1,
        Refusal::TooMuchMetadata { limit: 20_000 }
    );
    for header in [b'x', b'g', b'L', b'K'] {
        let tar = Tar::new().add("h", head(header), &[b'x'; 601]).end();
        assert_eq!(
            refusal_with(&tar, &limits).1,
            Refusal::HeaderTooLarge { limit: 600 }
        );
    }
    // The size alone must not make us allocate or wait.
    let tar = Tar::new()
        .add(
            "h",
            Head {
                size: Some(1 << 40),
                ..head(b'x')
            },
            b"",
        )
        .end();
    assert_eq!(
        refusal_with(&tar, &Limits::default()).1,
        Refusal::HeaderTooLarge { limit: 1 << 20 }
    );
    let tar = Tar::new()
        .add(
            "h",
            Head {
                size: Some(1 << 40),
                ..head(b'0')
            },
            b"",
        )
        .end();
    assert!(matches!(refusal(&tar).1, Refusal::TooLarge { .. }));
}

#[test]
fn archives_that_end_too_early_or_too_late() {
    let whole = Tar::new().file("a", &[1; 5000]).end();
    for cut in [0, 100, 512, 1000, 512 + 5000, whole.len() - 1024] {
        assert_eq!(refusal(&whole[..cut]).1, Refusal::Truncated, "{cut}");
    }
    let open = Tar::new().pax(&[("path", b"x")]).end();
    assert_eq!(refusal(&open).1, Refusal::Truncated);
    let garbage = [&whole[..], b"garbage"].concat();
    assert_eq!(refusal(&garbage).1, Refusal::TrailingGarbage);
    let second = [&whole[..], &Tar::new().file("/x", b"").end()].concat();
    assert_eq!(refusal(&second).1, Refusal::TrailingGarbage);
    assert_eq!(refusal(&[b'x'; 4096]).1, Refusal::BadChecksum);
    let mut damaged = whole;
    damaged[0] ^= 1;
    assert_eq!(refusal(&damaged).1, Refusal::BadChecksum);
}

#[test]
fn bombs_and_damaged_packings() {
    let gzip = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    };
    let tar = Tar::new().file("a", &vec![0; 4 << 20]).end();
    let limits = Limits {
        max_unpacked_bytes: 1 << 20,
        ..Limits::default()
    };
    let limit = 1 << 20;
    assert_eq!(
        refusal_with(&gzip(&tar), &limits).1,
        Refusal::UnpacksTooLarge { limit }
    );
    let packed = gzip(&tar);
    let cut = refusal(&packed[..packed.len() / 2]).1;
    assert!(
        matches!(cut, Refusal::BadCompression { .. } | Refusal::Truncated),
        "{cut:?}"
    );
    let trailing = refusal(&[&packed[..], b"garbage"].concat()).1;
    assert!(
        matches!(trailing, Refusal::BadCompression { .. }),
        "{trailing:?}"
    );
    // A window that would need more memory than allowed.
    let limits = Limits {
        max_window_bytes: 1 << 16,
        ..Limits::default()
    };
    let mut zstd = zstd::Encoder::new(Vec::new(), 1).unwrap();
    zstd.window_log(24).unwrap();
    zstd.write_all(&tar).unwrap();
    let why = refusal_with(&zstd.finish().unwrap(), &limits).1;
    assert!(matches!(why, Refusal::BadCompression { .. }), "{why:?}");
}

#[test]
fn a_stream_of_almost_nothing_is_a_bomb() {
    // 3 GiB of zeros in about 100 KiB of zstd.
    let mut zstd = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let mut header = Tar::new()
        .add(
            "z",
            Head {
                size: Some(3 << 30),
                ..head(b'0')
            },
            b"",
        )
        .cut();
    zstd.write_all(&std::mem::take(&mut header)).unwrap();
    let zeros = vec![0; 16 << 20];
    for _ in 0..192 {
        zstd.write_all(&zeros).unwrap();
    }
    let packed = zstd.finish().unwrap();
    assert_eq!(refusal(&packed).1, Refusal::Bomb { limit: 1000 });
}

#[test]
fn an_archive_that_changes_meanwhile_is_noticed() {
    let (one, two) = (
        Tar::new().file("a", b"one").end(),
        Tar::new().file("a", b"two").end(),
    );
    let mut inputs = [file_of(&one)];
    let other = inputs[0].try_clone().unwrap();
    let output = tempfile::tempfile().unwrap();
    let mut swapped = false;
    let outcome = build_disk(
        &mut inputs,
        &output,
        Purpose::Root,
        &Limits::default(),
        &mut |_| {
            if !std::mem::replace(&mut swapped, true) {
                std::os::unix::fs::FileExt::write_all_at(&other, &two, 0).unwrap();
            }
        },
    );
    assert!(
        matches!(outcome, Err(Error::Changed { layer: 0 })),
        "{outcome:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn damage_never_panics_and_never_gives_an_unclean_disk(
        at in 0usize..4096, bit in 0u8..8, fix in any::<bool>(),
    ) {
        let mut tar = Tar::new()
            .dir("d")
            .pax(&[("path", b"d/p"), ("SCHILY.xattr.user.a", b"b")])
            .file("x", b"content")
            .add("d/l", link(b'1', "d/p"), b"")
            .end();
        let at = at % tar.len();
        tar[at] ^= 1 << bit;
        let block = at / 512 * 512;
        if fix {
            let mut header = tar::Header::new_old();
            header.as_mut_bytes().copy_from_slice(&tar[block..block + 512]);
            header.set_cksum();
            tar[block..block + 512].copy_from_slice(header.as_bytes());
        }
        let mut inputs = [file_of(&tar)];
        let output = tempfile::tempfile().unwrap();
        let outcome = build_disk(&mut inputs, &output, Purpose::Root, &Limits::default(), &mut |_| {});
        match outcome {
            Ok(_) => prop_assert!(mkext4::reader::Fs::open(output).unwrap().verify().unwrap().is_empty()),
            Err(error) => prop_assert!(matches!(error, Error::Refused { .. }), "{error:?}"),
        }
    }
}
