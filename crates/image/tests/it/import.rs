//! Disks from elsewhere: whole ones are taken, everything else is refused and leaves nothing.

use crate::archives::{Tar, build};
use hutch_image::{Error, Kind, Limits, import_ext4};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

fn import(from: &Path, to: &Path) -> Result<hutch_image::Built, Error> {
    import_ext4(
        &File::open(from).unwrap(),
        to,
        &Limits::default(),
        &mut |_| {},
    )
}

#[test]
fn a_clean_disk_is_copied_and_keeps_its_holes() {
    let disk = build(&[&Tar::new().file("a", &[7; 50_000]).end()]);
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    match import(disk.file.path(), &target) {
        Err(Error::MissingProgram { .. }) => return eprintln!("skipped: no e2fsck"),
        built => assert_eq!(built.unwrap().sha256, disk.built.sha256),
    }
    assert!(std::fs::read(&target).unwrap() == disk.bytes());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&target).unwrap());
    assert!(blocks * 512 < 8 << 20, "{blocks}");
    assert_eq!(
        import(disk.file.path(), &target).unwrap_err().kind(),
        Kind::Internal
    );
    assert!(target.exists(), "an existing file is not ours to remove");
}

#[test]
fn what_is_no_ext4_disk_is_refused() {
    let disk = build(&[&Tar::new().end()]);
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let zeros = dir.path().join("zeros");
    std::fs::write(&zeros, [0; 8192]).unwrap();
    let short = dir.path().join("short");
    std::fs::write(&short, [0; 10]).unwrap();
    let cut = dir.path().join("cut");
    std::fs::write(&cut, &disk.bytes()[..1 << 20]).unwrap();
    for (bad, words) in [
        (&zeros, "no ext4 superblock"),
        (&short, "too short"),
        (&cut, "cut short"),
    ] {
        let error = import(bad, &target).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.kind(), Kind::Invalid);
    }
    let error = import(dir.path(), &target).unwrap_err();
    assert!(error.to_string().contains("regular file"), "{error}");
    assert!(!target.exists());
}

#[test]
fn a_damaged_disk_is_refused_in_the_words_of_e2fsck() {
    let disk = build(&[&Tar::new().file("a", b"a").end()]);
    let file = OpenOptions::new()
        .write(true)
        .open(disk.file.path())
        .unwrap();
    // The block bitmap's group descriptor.
    file.write_all_at(&[0xff; 64], 4096).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    match import(disk.file.path(), &target) {
        Err(Error::MissingProgram { .. }) => return eprintln!("skipped: no e2fsck"),
        Err(Error::Unclean { report }) => {
            assert!(report.contains("group descriptor"), "{report}");
            assert!(!report.contains("/proc"), "{report}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!target.exists());
}
