//! Pages of a process like any other, saved and brought up to date.

use std::io::Write;
use std::sync::atomic::AtomicBool;

use super::pages::{PAGE, Pages};
use super::*;
use crate::sys::Mapped;

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

#[tokio::test]
async fn a_file_is_read_once_for_all_and_nobody_can_change_what_was_read() {
    let saved = file(&[7; 3 * PAGE]);
    let memories = Memories::default();
    let (one, other) = tokio::join!(memories.read(saved.path()), memories.read(saved.path()));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert!(Arc::ptr_eq(&one, &other));

    // As a VMM opens it, which maps it privately.
    let number = std::os::fd::AsRawFd::as_raw_fd(&one.as_fd());
    let path = format!("/proc/self/fd/{number}");
    let opened = File::options().read(true).write(true).open(&path).unwrap();
    let mut read = vec![0; 3 * PAGE];
    opened.read_exact_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
    assert_eq!(opened.metadata().unwrap().len(), 3 * PAGE as u64);
    opened.write_at(b"x", 0).unwrap_err();
    opened.set_len(1).unwrap_err();
    opened.set_len(1 << 20).unwrap_err();

    // Another content is another memory.
    drop(one);
    std::fs::write(saved.path(), [8; PAGE]).unwrap();
    let now = memories.read(saved.path()).await.unwrap();
    assert!(!Arc::ptr_eq(&now, &other));
    assert_eq!(now.of().size(), PAGE as u64);
}

#[tokio::test]
async fn zeros_take_no_memory() {
    let mut bytes = vec![0; 64 << 20];
    bytes[5 << 20] = 1;
    let saved = file(&bytes);
    let memory = Memories::default().read(saved.path()).await.unwrap();
    let stat = rustix::fs::fstat(&*memory).unwrap();
    assert_eq!(stat.st_size, 64 << 20);
    assert!(stat.st_blocks * 512 <= 64 << 10, "{}", stat.st_blocks);
}

fn pages(of: &Mapped) -> Pages {
    let (at, size) = of.place();
    Pages::of(std::process::id(), at, size).unwrap()
}

fn first_bytes(file: &File, pages: usize) -> Vec<u8> {
    let byte = |page: usize| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, (page * PAGE) as u64).unwrap();
        byte[0]
    };
    (0..pages).map(byte).collect()
}

static GO_ON: AtomicBool = AtomicBool::new(false);

#[test]
fn what_was_booted_is_saved_without_its_zeros() {
    let guest = Mapped::new(1024 * PAGE, None).unwrap();
    for (page, byte) in [(0, 1), (1, 0), (2, 3), (700, 4), (1023, 5)] {
        guest.write(page * PAGE, byte);
    }
    let into = tempfile::tempfile().unwrap();
    assert_eq!(pages(&guest).save(&into, &GO_ON).unwrap(), 4 * PAGE as u64);
    assert_eq!(into.metadata().unwrap().len(), 1024 * PAGE as u64);
    let saved = first_bytes(&into, 1024);
    assert_eq!((saved[0], saved[2], saved[700], saved[1023]), (1, 3, 4, 5));
    assert_eq!(saved.iter().filter(|byte| **byte != 0).count(), 4);

    // Later only what has changed meanwhile, zeros too.
    guest.write(2 * PAGE, 0);
    guest.write(3 * PAGE, 9);
    assert_eq!(
        pages(&guest).update(&into, &GO_ON).unwrap(),
        2 * PAGE as u64
    );
    assert_eq!(first_bytes(&into, 4), [1, 0, 0, 9]);
}

#[test]
fn what_went_on_from_a_file_writes_only_what_is_its_own() {
    let base = file(&[7; 1024 * PAGE]);
    let guest = Mapped::new(1024 * PAGE, Some(base.as_file())).unwrap();
    // Read, and not its own by that.
    assert_eq!(guest.read(5 * PAGE), 7);
    guest.write(6 * PAGE, 8);
    guest.write(1000 * PAGE, 0);
    // What it does not have for itself is not looked at, and stays as it is.
    let into = tempfile::tempfile().unwrap();
    into.write_all_at(&[7; 1024 * PAGE], 0).unwrap();
    into.write_all_at(&[1], 5 * PAGE as u64).unwrap();
    let written = pages(&guest).update(&into, &GO_ON).unwrap();
    assert_eq!(written, 2 * PAGE as u64);
    assert_eq!(first_bytes(&into, 8), [7, 7, 7, 7, 7, 1, 8, 7]);
    let mut page = vec![1; PAGE];
    into.read_exact_at(&mut page, 1000 * PAGE as u64).unwrap();
    assert_eq!(page[0], 0);
    assert!(page[1..].iter().all(|byte| *byte == 7));
}

#[test]
fn a_save_that_nobody_waits_for_ends() {
    let guest = Mapped::new(16 * PAGE, None).unwrap();
    guest.write(0, 1);
    let into = tempfile::tempfile().unwrap();
    let error = pages(&guest).save(&into, &AtomicBool::new(true));
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::Interrupted);
}

#[test]
fn nonsense_for_an_address_is_refused() {
    for (at, size) in [(1, PAGE as u64), (0, 1), (u64::MAX - 4095, 2 * PAGE as u64)] {
        assert!(Pages::of(std::process::id(), at, size).is_err());
    }
    // Nothing is mapped there.
    let nowhere = Pages::of(std::process::id(), 1 << 62, PAGE as u64).unwrap();
    let into = tempfile::tempfile().unwrap();
    assert!(nowhere.save(&into, &GO_ON).is_err());
}
