//! Several archives over each other, with whiteouts as OCI images have them.

use crate::archives::{Tar, build, link};

#[test]
fn upper_archives_replace_and_remove() {
    let lower = Tar::new()
        .file("a/1", b"lower")
        .file("a/2", b"lower")
        .file("gone/x", b"")
        .file("kind", b"")
        .add("link", link(b'2', "a"), b"")
        .end();
    let upper = Tar::new()
        .file("a/1", b"upper")
        .file("a/.wh.2", b"")
        .file(".wh.gone", b"")
        .file(".wh.never-there", b"")
        .file(".wh..wh.plnk", b"")
        .dir("kind")
        .file("kind/now-a-directory", b"")
        .dir("link")
        .end();
    let disk = build(&[&lower, &upper]);
    assert_eq!(disk.names("/"), ["a", "kind", "link"]);
    assert_eq!(disk.names("/a"), ["1"]);
    assert_eq!(disk.read("/a/1"), b"upper");
    assert_eq!(disk.names("/kind"), ["now-a-directory"]);
}

#[test]
fn an_opaque_directory_hides_lower_ones_only() {
    let lower = Tar::new()
        .file("d/low", b"")
        .file("d/sub/low", b"")
        .file("d/both", b"l")
        .end();
    let upper = |early: bool| {
        let tar = Tar::new().dir("d");
        let tar = if early {
            tar.file("d/.wh..wh..opq", b"")
        } else {
            tar
        };
        let tar = tar.file("d/both", b"u").file("d/sub/up", b"");
        let tar = if early {
            tar
        } else {
            tar.file("d/.wh..wh..opq", b"")
        };
        tar.end()
    };
    for early in [true, false] {
        let disk = build(&[&lower, &upper(early)]);
        assert_eq!(disk.names("/d"), ["both", "sub"], "{early}");
        assert_eq!(disk.names("/d/sub"), ["up"], "{early}");
        assert_eq!(disk.read("/d/both"), b"u");
    }
}

#[test]
fn a_whiteout_beside_its_own_replacement_keeps_the_replacement() {
    let lower = Tar::new().file("d/low", b"").end();
    for upper in [
        Tar::new().file(".wh.d", b"").file("d/up", b"").end(),
        Tar::new().file("d/up", b"").file(".wh.d", b"").end(),
    ] {
        assert_eq!(build(&[&lower, &upper]).names("/d"), ["up"]);
    }
}

#[test]
fn links_between_archives_share_the_file() {
    let lower = Tar::new().file("f", b"shared").end();
    let upper = Tar::new()
        .add("g", link(b'1', "f"), b"")
        .file(".wh.f", b"")
        .end();
    let disk = build(&[&lower, &upper]);
    assert_eq!(disk.names("/"), ["g"]);
    assert_eq!(disk.read("/g"), b"shared");
}
