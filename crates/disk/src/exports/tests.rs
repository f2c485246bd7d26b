//! Exports there and back, over stores that fail at any call, and with content that lies.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use proptest::prelude::*;

use super::*;
use crate::test_support::SmallFilesystem;

const MIB: u64 = 1 << 20;
const LIMITS: Limits = Limits {
    size_bytes: 1 << 40,
    content_bytes: 1 << 30,
};

/// Objects in memory, which may fail at one call.
#[derive(Debug, Default)]
struct Memory {
    objects: Mutex<BTreeMap<Key, Vec<u8>>>,
    calls: Mutex<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    made: usize,
    fails_at: Option<usize>,
    /// What is asked for happens nevertheless, and nobody hears of it.
    too_late: bool,
    added: Vec<Key>,
}

impl Memory {
    fn fail_at(&self, call: usize, too_late: bool) {
        *self.calls.lock().unwrap() = Calls {
            fails_at: Some(call),
            too_late,
            ..Calls::default()
        };
    }

    fn failed(&self) -> bool {
        let calls = self.calls.lock().unwrap();
        calls.fails_at.is_some_and(|call| call < calls.made)
    }

    fn call<T>(&self, key: &Key, does: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        let mut calls = self.calls.lock().unwrap();
        let fails = calls.fails_at == Some(calls.made);
        calls.made += 1;
        if fails && calls.too_late {
            drop(does());
        }
        if fails {
            return Err(Error::Object {
                key: key.to_string(),
                kind: Kind::Unavailable,
                problem: "cannot be reached".into(),
            });
        }
        does()
    }

    fn keys(&self, group: &str) -> Vec<Key> {
        let objects = self.objects.lock().unwrap();
        let keys = objects.keys().filter(|key| key.to_string().contains(group));
        keys.cloned().collect()
    }

    fn change(&self, key: &Key, change: impl FnOnce(&mut Vec<u8>)) {
        change(self.objects.lock().unwrap().get_mut(key).unwrap());
    }
}

#[async_trait]
impl Objects for Memory {
    async fn has(&self, key: &Key) -> Result<bool, Error> {
        self.call(key, || Ok(self.objects.lock().unwrap().contains_key(key)))
    }

    async fn get(&self, key: &Key, limit: usize) -> Result<Vec<u8>, Error> {
        let failed = |kind, problem: &str| Error::Object {
            key: key.to_string(),
            kind,
            problem: problem.into(),
        };
        self.call(key, || {
            let objects = self.objects.lock().unwrap();
            let found = objects
                .get(key)
                .ok_or_else(|| failed(Kind::NotFound, "is not there"))?;
            match found.len() <= limit {
                true => Ok(found.clone()),
                false => Err(failed(Kind::Invalid, "is too large")),
            }
        })
    }

    async fn add(&self, key: &Key, bytes: Bytes) -> Result<bool, Error> {
        let added = self.call(key, || {
            let mut objects = self.objects.lock().unwrap();
            let is_new = !objects.contains_key(key);
            objects.entry(key.clone()).or_insert_with(|| bytes.to_vec());
            Ok(is_new)
        })?;
        self.calls.lock().unwrap().added.push(key.clone());
        Ok(added)
    }
}

/// A disk in a file: its size, and what is written where.
#[derive(Debug, Clone)]
struct Content {
    size: u64,
    data: Vec<(u64, Vec<u8>)>,
}

impl Content {
    fn file(&self) -> File {
        let file = tempfile::tempfile().unwrap();
        self.write(&file);
        file
    }

    fn write(&self, file: &File) {
        for (at, bytes) in &self.data {
            file.write_all_at(bytes, *at).unwrap();
        }
        file.set_len(self.size).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        read_all(&self.file())
    }
}

fn read_all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes that do not become smaller.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn sample() -> Content {
    let data = vec![
        (0, noise(1, 5000)),
        (3 * MIB - 100, noise(2, 300)),
        (5 * MIB, noise(3, 2 * MIB as usize)),
        // The same chunk once more.
        (9 * MIB, noise(3, MIB as usize)),
        (12 * MIB, noise(4, 777)),
    ];
    let size = 12 * MIB + 777;
    Content { size, data }
}

fn source(disk: File) -> Source {
    let len = disk.metadata().unwrap().len();
    let mut digest = DiskDigest::default();
    for (index, chunk) in read_all(&disk).chunks(MIB as usize).enumerate() {
        digest.add(index as u64 * MIB, chunk);
    }
    Source {
        disk,
        sha256: digest.finish(len).0,
        about: About {
            machine: None,
            snapshot: None,
            image: None,
            created_at_ms: 7,
        },
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn exports(objects: &Arc<Memory>) -> Exports {
    Exports::new(objects.clone(), OwnerId::new())
}

async fn export(to: &Exports, content: &Content) -> Result<Exported, Error> {
    to.export(&name("web"), source(content.file()), &|_, _| {})
        .await
}

async fn import(from: &Exports) -> Result<File, Error> {
    let manifest = from.find(&name("web"), LIMITS).await?;
    let file = tempfile::tempfile().unwrap();
    let into = file.try_clone().unwrap();
    from.import(&manifest, into, plainly(), &|_, _| {}).await?;
    Ok(file)
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(test)
}

#[test]
fn a_disk_comes_back_with_its_holes() {
    run(async {
        let to = exports(&Arc::default());
        let content = sample();
        let exported = export(&to, &content).await.unwrap();
        assert_eq!(exported.manifest.size_bytes, content.size);
        // 0, 2, 3, 5, 6, 9 (which is 5) and 12.
        assert_eq!((exported.manifest.chunks(), exported.sent_chunks), (7, 6));
        let back = import(&to).await.unwrap();
        assert_eq!(read_all(&back), content.bytes());
        assert!(back.metadata().unwrap().blocks() * 512 < 4 * MIB);
    });
}

#[test]
fn only_what_changed_is_sent_again() {
    run(async {
        let objects = Arc::default();
        let to = exports(&objects);
        let mut content = sample();
        export(&to, &content).await.unwrap();
        content.data.push((5 * MIB + 10, b"changed".to_vec()));
        let source = source(content.file());
        let again = to.export(&name("web-2"), source, &|_, _| {}).await.unwrap();
        assert_eq!(again.sent_chunks, 1);
        assert!(again.sent_bytes < 2 * MIB, "{again:?}");
        let first = import(&to).await.unwrap();
        assert_eq!(read_all(&first), sample().bytes());
    });
}

#[test]
fn owners_share_nothing() {
    run(async {
        let objects = Arc::default();
        let (one, other) = (exports(&objects), exports(&objects));
        export(&one, &sample()).await.unwrap();
        assert_eq!(import(&other).await.unwrap_err().kind(), Kind::NotFound);
        let all = export(&other, &sample()).await.unwrap();
        assert_eq!(all.sent_chunks, 6);
    });
}

#[test]
fn an_export_is_never_replaced() {
    run(async {
        let to = exports(&Arc::default());
        export(&to, &sample()).await.unwrap();
        // The same once more: what a server does that was killed before it heard.
        let again = export(&to, &sample()).await.unwrap();
        assert_eq!((again.sent_chunks, again.sent_bytes), (0, 0));
        let mut other = sample();
        other.data.push((1, b"other".to_vec()));
        assert_eq!(export(&to, &other).await.unwrap_err().kind(), Kind::Exists);
        assert_eq!(read_all(&import(&to).await.unwrap()), sample().bytes());
    });
}

#[test]
fn an_interrupted_export_goes_on_and_sends_no_chunk_twice() {
    for too_late in [false, true] {
        let mut interrupted = 0;
        for call in 0.. {
            let over = run(async {
                let objects = Arc::<Memory>::default();
                let to = exports(&objects);
                objects.fail_at(call, too_late);
                let first = export(&to, &sample()).await;
                if !objects.failed() {
                    return true;
                }
                assert_eq!(first.unwrap_err().kind(), Kind::Unavailable);
                let whole = import(&to).await;
                // Only when the last that failed was the manifest itself.
                assert!(whole.is_err() || too_late, "call {call}");
                let before = objects.keys("chunks").len();
                *objects.calls.lock().unwrap() = Calls::default();
                let second = export(&to, &sample()).await.unwrap();
                assert_eq!(second.sent_chunks as usize, 6 - before, "call {call}");
                assert_eq!(read_all(&import(&to).await.unwrap()), sample().bytes());
                false
            });
            if over {
                break;
            }
            interrupted += 1;
        }
        // A look and an addition of each chunk, and the manifest.
        assert_eq!(interrupted, 13);
    }
}

#[test]
fn an_import_that_fails_at_any_call_says_so() {
    run(async {
        let objects = Arc::<Memory>::default();
        let to = exports(&objects);
        export(&to, &sample()).await.unwrap();
        for call in 0..8 {
            objects.fail_at(call, false);
            assert_eq!(import(&to).await.unwrap_err().kind(), Kind::Unavailable);
        }
        objects.fail_at(8, false);
        assert!(import(&to).await.is_ok());
    });
}

#[test]
fn what_was_changed_in_the_store_is_refused() {
    run(async {
        let objects = Arc::<Memory>::default();
        let to = exports(&objects);
        export(&to, &sample()).await.unwrap();
        let chunks = objects.keys("chunks");
        let refused = async |what: &str| {
            let error = import(&to).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{what}: {error}");
        };
        for key in &chunks {
            let good = objects.objects.lock().unwrap()[key].clone();
            objects.change(key, |bytes| bytes.truncate(bytes.len() / 2));
            refused("cut").await;
            objects.change(key, |bytes| {
                *bytes = chunk::pack(&vec![0; 256 << 20]).unwrap()
            });
            refused("a bomb").await;
            objects.change(key, |bytes| *bytes = vec![0; 8 << 20]);
            refused("too large").await;
            let other = chunks.iter().find(|other| *other != key).unwrap();
            let others = objects.objects.lock().unwrap()[other].clone();
            objects.change(key, |bytes| *bytes = others);
            refused("another").await;
            objects.change(key, |bytes| *bytes = good);
        }
        let manifest = objects.keys("disks").remove(0);
        let good = objects.objects.lock().unwrap()[&manifest].clone();
        let text = String::from_utf8(good.clone()).unwrap();
        let mut changed: serde_json::Value = serde_json::from_str(&text).unwrap();
        // A chunk less, another order, another digest: each is well-formed.
        let run = changed["chunks"][2]["sha256"].as_array_mut().unwrap();
        run.reverse();
        objects.change(&manifest, |bytes| *bytes = changed.to_string().into());
        refused("another order").await;
        changed["chunks"].as_array_mut().unwrap().pop();
        objects.change(&manifest, |bytes| *bytes = changed.to_string().into());
        refused("a chunk less").await;
        objects.change(&manifest, |bytes| *bytes = good);
        assert!(import(&to).await.is_ok());
        objects.objects.lock().unwrap().remove(&chunks[0]);
        assert_eq!(import(&to).await.unwrap_err().kind(), Kind::NotFound);
    });
}

#[test]
fn a_disk_that_is_not_what_it_was_is_not_exported() {
    run(async {
        let objects = Arc::<Memory>::default();
        let to = exports(&objects);
        let mut wrong = source(sample().file());
        wrong.disk.write_all_at(b"rot", 100).unwrap();
        let error = to
            .export(&name("web"), wrong, &|_, _| {})
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        wrong = source(sample().file());
        wrong.disk.set_len(MIB).unwrap();
        let error = to
            .export(&name("web"), wrong, &|_, _| {})
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert_eq!(objects.keys("disks"), []);
    });
}

#[test]
fn progress_ends_with_all_of_it() {
    run(async {
        let to = exports(&Arc::default());
        let told = Mutex::new((0, 0));
        let tell = |done: u64, total: u64| {
            let mut told = told.lock().unwrap();
            assert!(done <= total);
            *told = (done.max(told.0), total);
        };
        let source = source(sample().file());
        let exported = to.export(&name("web"), source, &tell).await.unwrap();
        let (done, total) = *told.lock().unwrap();
        assert!(done > 6 * MIB && done <= total, "{done} of {total}");
        *told.lock().unwrap() = (0, 0);
        let into = tempfile::tempfile().unwrap();
        let import = to.import(&exported.manifest, into, plainly(), &tell);
        import.await.unwrap();
        let (done, total) = *told.lock().unwrap();
        assert_eq!(done, total);
    });
}

fn in_directory(dir: &Path) -> Exports {
    let directory = Directory::new(dir.to_owned(), "own-writer");
    Exports::new(
        Arc::new(directory),
        "own-01k0000000000000000000000a".parse().unwrap(),
    )
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn a_directory_holds_exports_and_nothing_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let to = in_directory(dir.path());
        export(&to, &sample()).await.unwrap();
        assert_eq!(files(dir.path()).len(), 7);
        assert!(to.has(&name("web")).await.unwrap());
        assert!(!to.has(&name("web-2")).await.unwrap());
        assert_eq!(read_all(&import(&to).await.unwrap()), sample().bytes());
        for path in files(dir.path()) {
            assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        }
    });
}

#[test]
fn what_a_writer_left_is_swept_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("own-writer/partial");
    let others = dir.path().join("own-other/partial");
    for partial in [&ours, &others] {
        std::fs::create_dir_all(partial).unwrap();
        std::fs::write(partial.join("0123"), "half").unwrap();
    }
    let directory = Directory::new(dir.path().to_owned(), "own-writer");
    directory.sweep().unwrap();
    assert_eq!(files(dir.path()), [others.join("0123")]);
    Directory::new(dir.path().join("missing"), "own-writer")
        .sweep()
        .unwrap();
}

#[test]
fn a_directory_that_is_not_there_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let to = in_directory(&dir.path().join("mount"));
        assert_eq!(
            export(&to, &sample()).await.unwrap_err().kind(),
            Kind::NotFound
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn links_and_other_things_in_a_directory_are_not_followed() {
    run(async {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let owner = dir.path().join("own-01k0000000000000000000000a");
        let to = in_directory(dir.path());
        symlink(outside.path(), &owner).unwrap();
        assert!(export(&to, &sample()).await.is_err());
        std::fs::remove_file(&owner).unwrap();
        std::fs::create_dir(&owner).unwrap();
        symlink(outside.path(), owner.join("chunks")).unwrap();
        assert!(export(&to, &sample()).await.is_err());
        std::fs::remove_file(owner.join("chunks")).unwrap();
        symlink(outside.path(), dir.path().join("own-writer")).unwrap();
        assert!(export(&to, &sample()).await.is_err());
        std::fs::remove_file(dir.path().join("own-writer")).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);

        export(&to, &sample()).await.unwrap();
        let manifest = owner.join("disks/web.json");
        let secret = outside.path().join("secret");
        std::fs::rename(&manifest, &secret).unwrap();
        symlink(&secret, &manifest).unwrap();
        assert!(import(&to).await.is_err());
        std::fs::remove_file(&manifest).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &manifest,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        assert!(import(&to).await.is_err());
        assert!(to.has(&name("web")).await.is_err());
    });
}

#[test]
fn a_full_directory_is_told_of_and_keeps_nothing_half() {
    let Some(small) = SmallFilesystem::mount("8m") else {
        return;
    };
    run(async {
        let to = in_directory(small.path());
        let size = 64 * MIB;
        let data = vec![(0, noise(9, 32 * MIB as usize))];
        let large = Content { size, data };
        assert_eq!(export(&to, &large).await.unwrap_err().kind(), Kind::Full);
        let there = files(small.path());
        assert!(
            there.iter().all(|path| path.extension().unwrap() == "zst"),
            "{there:?}"
        );
        assert!(!there.is_empty());
    });
}

#[test]
fn a_full_disk_ends_an_import() {
    run(async {
        let to = exports(&Arc::default());
        let exported = export(&to, &sample()).await.unwrap();
        let full: Arc<Write> = Arc::new(|_, _, _| Err(std::io::ErrorKind::StorageFull.into()));
        let into = tempfile::tempfile().unwrap();
        let import = to.import(&exported.manifest, into, full, &|_, _| {});
        assert_eq!(import.await.unwrap_err().kind(), Kind::Full);
    });
}

fn content() -> impl Strategy<Value = Content> {
    let piece = (0u64..6 * MIB, prop::collection::vec(any::<u8>(), 1..9000));
    let pieces = prop::collection::vec(piece, 0..6);
    (1u64..7 * MIB, pieces).prop_map(|(size, data)| Content { size, data })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_disk_comes_back(content in content()) {
        run(async {
            let to = exports(&Arc::default());
            let exported = export(&to, &content).await.unwrap();
            let back = import(&to).await.unwrap();
            assert_eq!(read_all(&back), content.bytes());
            assert_eq!(exported.manifest.size_bytes, content.size);
        });
    }
}
