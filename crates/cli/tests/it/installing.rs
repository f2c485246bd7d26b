//! `hutch runtime install` against a small mirror that serves releases laid out as the makers' are.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use crate::hutch::{Ended, Hutch};

const ARCH: &str = std::env::consts::ARCH;

/// What it serves, by path.
#[derive(Clone, Default)]
struct Mirror(Arc<Mutex<BTreeMap<String, Served>>>);

#[derive(Clone)]
enum Served {
    Whole(Vec<u8>),
    /// Says so many bytes, and ends after those that there are.
    CutOff(Vec<u8>, u64),
}

impl Mirror {
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/releases", listener.local_addr().unwrap());
        let router = Router::new().fallback(serve).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    fn put(&self, version: &str, asset: &str, served: Served) {
        let path = format!("/releases/v{version}/{asset}");
        self.0.lock().unwrap().insert(path, served);
    }

    /// A release of Firecracker's layout, with its checksum.
    fn firecracker(&self, version: &str, archive: Vec<u8>) {
        let asset = format!("firecracker-v{version}-{ARCH}.tgz");
        let sums = format!("{}  {asset}\n", sha256(&archive));
        self.put(
            version,
            &format!("{asset}.sha256.txt"),
            Served::Whole(sums.into()),
        );
        self.put(version, &asset, Served::Whole(archive));
    }
}

async fn serve(State(mirror): State<Mirror>, request: Request) -> Response {
    let served = mirror.0.lock().unwrap().get(request.uri().path()).cloned();
    match served {
        None => StatusCode::NOT_FOUND.into_response(),
        Some(Served::Whole(bytes)) => bytes.into_response(),
        Some(Served::CutOff(bytes, says)) => {
            let end = async {
                // What there is must be on its way before the connection goes.
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(std::io::Error::other("cut off"))
            };
            let bytes = stream::iter([Ok(Bytes::from(bytes))]);
            let body = Body::from_stream(bytes.chain(stream::once(end)));
            ([(header::CONTENT_LENGTH, says)], body).into_response()
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A packed tar. Paths are written as they are, also those that no honest tool writes.
fn tgz(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let pack = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(pack);
    for (path, kind, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        if *kind == tar::EntryType::Symlink {
            header.set_link_name("/bin/sh").unwrap();
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, *content).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn member(program: &str, version: &str) -> String {
    format!("release-v{version}-{ARCH}/{program}-v{version}-{ARCH}")
}

/// Like a real one, with more in it than is wanted.
fn release(version: &str, program: &[u8]) -> Vec<u8> {
    let file = tar::EntryType::Regular;
    let dir = format!("release-v{version}-{ARCH}/");
    let debug = member("firecracker", version) + ".debug";
    tgz(&[
        (&dir, tar::EntryType::Directory, b""),
        (&debug, file, b"not wanted"),
        (&member("firecracker", version), file, program),
        (&member("jailer", version), file, b"jailer"),
        (&format!("{dir}SHA256SUMS"), file, b"not wanted either"),
    ])
}

fn programs(hutch: &Hutch) -> PathBuf {
    hutch.home.path().join("data/programs")
}

/// All that is there, hidden files too.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

async fn install(hutch: &Hutch, url: &str, more: &[&str]) -> Ended {
    let arguments = ["runtime", "install", "firecracker", "--from", url];
    hutch.run(&[&arguments, more].concat()).await
}

#[tokio::test]
async fn a_release_is_installed_with_its_jailer() {
    let (hutch, mirror) = (Hutch::alone(), Mirror::default());
    let url = mirror.start().await;
    mirror.firecracker("9.9.9", release("9.9.9", b"first"));
    let ended = install(&hutch, &url, &["--version", "v9.9.9"]).await;
    let dir = programs(&hutch);
    assert_eq!(ended.code, Some(0), "{}", ended.shown());
    let lines: Vec<_> = ended.stdout.lines().map(PathBuf::from).collect();
    assert_eq!(lines, [dir.join("firecracker"), dir.join("jailer")]);
    assert!(
        ended.stderr.contains("firecracker 9.9.9 is installed"),
        "{}",
        ended.stderr
    );
    assert_eq!(names(&dir), ["firecracker", "jailer"]);
    assert_eq!(std::fs::read(dir.join("firecracker")).unwrap(), b"first");
    assert_eq!(std::fs::read(dir.join("jailer")).unwrap(), b"jailer");
    for name in ["firecracker", "jailer"] {
        let mode = std::fs::metadata(dir.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755, "{name}");
    }
    let json = install(
        &hutch,
        &format!("{url}/"),
        &["--version", "9.9.9", "--json"],
    )
    .await;
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["version"], "9.9.9");
    assert_eq!(json["paths"][1], dir.join("jailer").to_str().unwrap());
}

#[tokio::test]
async fn a_program_that_runs_goes_on_with_its_old_file() {
    let (hutch, mirror) = (Hutch::alone(), Mirror::default());
    let url = mirror.start().await;
    let dir = programs(&hutch);
    std::fs::create_dir_all(&dir).unwrap();
    let program = dir.join("firecracker");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut running = tokio::process::Command::new(&program)
        .arg("600")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    mirror.firecracker("9.9.9", release("9.9.9", b"second"));
    let ended = install(&hutch, &url, &["--version", "9.9.9"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.shown());
    assert_eq!(std::fs::read(&program).unwrap(), b"second");
    assert_eq!(running.try_wait().unwrap(), None, "it goes on");
    running.kill().await.unwrap();
}

#[tokio::test]
async fn what_is_not_as_released_is_refused_and_changes_nothing() {
    let (hutch, mirror) = (Hutch::alone(), Mirror::default());
    let url = mirror.start().await;
    let dir = programs(&hutch);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("firecracker"), "old").unwrap();
    let good = release("9.9.9", b"new");
    let asset = format!("firecracker-v9.9.9-{ARCH}.tgz");
    let file = tar::EntryType::Regular;
    let (firecracker, jailer) = (member("firecracker", "9.9.9"), member("jailer", "9.9.9"));
    let of = |entries: &[(&str, tar::EntryType, &[u8])]| Served::Whole(tgz(entries));
    for (what, served, said) in [
        (
            "no jailer",
            of(&[(&firecracker, file, b"x")]),
            "it has no release-",
        ),
        (
            "a way out",
            of(&[
                (&format!("../{firecracker}"), file, b"x"),
                (&format!("/{firecracker}"), file, b"x"),
                ("../../../escaped", file, b"x"),
                (&jailer, file, b"x"),
            ]),
            "it has no release-",
        ),
        (
            "a link",
            of(&[
                (&firecracker, tar::EntryType::Symlink, b""),
                (&jailer, file, b"x"),
            ]),
            "is no file",
        ),
        (
            "one twice",
            of(&[
                (&firecracker, file, b"x"),
                (&firecracker, file, b"y"),
                (&jailer, file, b"x"),
            ]),
            "is there twice",
        ),
        (
            "no archive",
            Served::Whole(b"<html>".to_vec()),
            "cannot be unpacked",
        ),
        (
            "half an archive",
            Served::Whole(good[..good.len() / 2].to_vec()),
            "cannot be unpacked",
        ),
    ] {
        let Served::Whole(bytes) = &served else {
            unreachable!()
        };
        mirror.firecracker("9.9.9", bytes.clone());
        let ended = install(&hutch, &url, &["--version", "9.9.9"]).await;
        assert_eq!(ended.code, Some(1), "{what}: {}", ended.shown());
        assert!(ended.stderr.contains(said), "{what}: {}", ended.stderr);
        assert_eq!(names(&dir), ["firecracker"], "{what}");
    }
    // The checksum of something else; then a connection that breaks off.
    mirror.firecracker("9.9.9", good.clone());
    mirror.put("9.9.9", &asset, Served::Whole(release("9.9.9", b"evil")));
    let ended = install(&hutch, &url, &["--version", "9.9.9"]).await;
    assert!(ended.stderr.contains("and must have"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("nothing was installed"),
        "{}",
        ended.stderr
    );
    mirror.put(
        "9.9.9",
        &asset,
        Served::CutOff(good[..50].to_vec(), good.len() as u64),
    );
    let ended = install(&hutch, &url, &["--version", "9.9.9"]).await;
    assert!(
        ended.stderr.starts_with("  downloading "),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stderr.contains("error: download "),
        "{}",
        ended.stderr
    );
    assert_eq!(names(&dir), ["firecracker"]);
    assert_eq!(std::fs::read(dir.join("firecracker")).unwrap(), b"old");
    assert_eq!(names(hutch.home.path()), ["data"], "nothing escaped");
}

#[tokio::test]
async fn a_known_version_must_have_the_known_checksum_whatever_a_mirror_says() {
    let (hutch, mirror) = (Hutch::alone(), Mirror::default());
    let url = mirror.start().await;
    mirror.firecracker("1.16.1", release("1.16.1", b"evil"));
    let ended = install(&hutch, &url, &[]).await;
    assert_eq!(ended.code, Some(1), "{}", ended.shown());
    assert!(ended.stderr.contains("and must have"), "{}", ended.stderr);
    // The same without a file of checksums.
    let mirror = Mirror::default();
    let url = mirror.start().await;
    let asset = format!("firecracker-v1.16.1-{ARCH}.tgz");
    mirror.put("1.16.1", &asset, Served::Whole(release("1.16.1", b"evil")));
    let ended = install(&hutch, &url, &[]).await;
    assert!(ended.stderr.contains("and must have"), "{}", ended.stderr);
    assert_eq!(names(&programs(&hutch)), [""; 0]);
}

#[tokio::test]
async fn a_program_without_published_sums_needs_one_that_was_typed() {
    let (hutch, mirror) = (Hutch::alone(), Mirror::default());
    let url = mirror.start().await;
    let asset = match ARCH {
        "aarch64" => "cloud-hypervisor-static-aarch64",
        _ => "cloud-hypervisor-static",
    };
    mirror.put("99.0", asset, Served::Whole(b"program".to_vec()));
    let install = async |more: &[&str]| {
        let fixed = [
            "runtime",
            "install",
            "cloud-hypervisor",
            "--from",
            &url,
            "--version",
            "99.0",
        ];
        hutch.run(&[&fixed, more].concat()).await
    };
    let ended = install(&[]).await;
    assert!(ended.stderr.contains("is not known"), "{}", ended.stderr);
    assert!(ended.stderr.contains("--sha256"), "{}", ended.stderr);
    let ended = install(&["--sha256", &"0".repeat(64)]).await;
    assert!(
        ended.stderr.contains("and must have 000"),
        "{}",
        ended.stderr
    );
    let ended = install(&["--sha256", "abc"]).await;
    assert_eq!(ended.code, Some(2), "{}", ended.shown());
    let sum = sha256(b"program").to_uppercase();
    let ended = install(&["--sha256", &sum]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.shown());
    assert_eq!(names(&programs(&hutch)), ["cloud-hypervisor"]);
}

#[tokio::test]
async fn what_cannot_be_installed_is_said_with_what_can() {
    let hutch = Hutch::alone();
    for (arguments, code, said) in [
        (&["qemu"][..], 2, "firecracker and cloud-hypervisor"),
        (&["firecracker", "--version", "latest"], 2, "such as 1.16.1"),
        (&["firecracker", "--from", "mirror"], 2, "is no address"),
        // Nobody listens there.
        (
            &["firecracker", "--from", "http://127.0.0.1:1/x"],
            1,
            "HTTPS_PROXY",
        ),
    ] {
        let ended = hutch
            .run(&[&["runtime", "install"], arguments].concat())
            .await;
        assert_eq!(ended.code, Some(code), "{}", ended.shown());
        assert!(ended.stderr.contains(said), "{}", ended.shown());
    }
    let mirror = Mirror::default();
    let url = mirror.start().await;
    let ended = install(&hutch, &url, &["--version", "9.9.9"]).await;
    assert_eq!(ended.code, Some(4), "{}", ended.shown());
    assert!(ended.stderr.contains("404"), "{}", ended.stderr);
}
