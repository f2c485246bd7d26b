//! Kernels of the administrator's choice: which boot, and what is said of those that cannot.
//!
//! `HUTCH_TEST_KERNEL` and `HUTCH_TEST_MODULES` are the distribution's, as `cargo xtask test` sets them;
//! `HUTCH_TEST_OTHER_KERNEL` may name a kernel package (`.deb`) of another version.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hutch_contract::client::Error;
use hutch_contract::error::Kind;
use hutch_contract::machine::{CreateMachine, Machine};
use hutch_tests::{Lab, Runtime, lab, skip};

const LONG: Duration = Duration::from_secs(300);

/// The paths of a kernel and of its modules.
fn distribution() -> Option<(PathBuf, PathBuf)> {
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    Some((path("HUTCH_TEST_KERNEL")?, path("HUTCH_TEST_MODULES")?))
}

/// A directory like `lib/modules/RELEASE` with copies of modules; those that `damaged` names are of another kernel, as
/// their magic tells. (Its first word, the release, does not count where modules have checksums of symbols.)
fn modules(dir: &Path, from: &Path, damaged: impl Fn(&str) -> bool) {
    fs::create_dir_all(dir).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !name.ends_with(".ko") {
            continue;
        }
        let mut bytes = fs::read(entry.path()).unwrap();
        if damaged(&name) {
            let find = |part: &[u8], from: usize| {
                let found = bytes[from..].windows(part.len()).position(|w| w == part);
                from + found.unwrap_or_else(|| panic!("{name} has no {part:?}"))
            };
            let at = find(b" SMP ", find(b"vermagic=", 0));
            bytes[at..at + 5].copy_from_slice(b" UP! ");
        }
        fs::write(dir.join(name), bytes).unwrap();
    }
}

async fn create(lab: &Lab, kernel: &str) -> Result<Machine, Error> {
    let request = CreateMachine {
        kernel: Some(kernel.to_owned()),
        ..lab.request(&format!("with-{kernel}"))
    };
    lab.client().create(&request, None, Some(LONG)).await
}

#[tokio::test]
async fn kernels_of_choice_boot_or_say_why_not_with_qemu() {
    let lab = lab!(Runtime::Qemu);
    let Some((kernel, own_modules)) = distribution() else {
        skip!("HUTCH_TEST_KERNEL and HUTCH_TEST_MODULES name no kernel");
    };
    let (elf, config) = (
        kernel.with_file_name("vmlinux"),
        lab.dir.join("config.toml"),
    );
    let dir = lab.dir.join("kernels");
    modules(&dir.join("foreign"), &own_modules, |_| true);
    // What a machine can do without.
    let spare = |name: &str| name.contains("vsock") || name.contains("overlay");
    modules(&dir.join("partly"), &own_modules, spare);
    fs::create_dir(dir.join("none")).unwrap();
    fs::copy(&kernel, dir.join("plain")).unwrap();
    let named = |name: &str, path: &Path, more: &str| {
        format!("[kernels.{name}]\npath = \"{}\"\n{more}\n", path.display())
    };
    let with = |name: &str| format!("modules = \"{}\"", dir.join(name).display());
    let mut text = [
        named("plain", &dir.join("plain"), ""),
        named("elf", &elf, "args = \"first second=2\""),
        named("foreign", &kernel, &with("foreign")),
        named("partly", &kernel, &with("partly")),
        named("bare", &kernel, &with("none")),
    ]
    .concat();
    let other = std::env::var_os("HUTCH_TEST_OTHER_KERNEL").map(PathBuf::from);
    if let Some(other) = &other {
        text += &named("other", other, "");
    }
    fs::write(&config, text).unwrap();
    let lab = lab
        .env("HUTCH_CONFIG", config.to_str().unwrap())
        .env("HYPERFLEET_KERNEL_ARGS", "everywhere=1");
    let lab = lab.start().await;
    lab.busybox().await;

    // The distribution's modules are found to be those of the same release.
    let plain = create(&lab, "plain").await.unwrap();
    assert_eq!(plain.kernel.as_deref(), Some("plain"));
    let script = "uname -r; ls -d /lib/modules/$(uname -r)/modules.dep";
    let said = lab.sh("with-plain", script).await.stdout;
    let (release, there) = said.trim().split_once('\n').unwrap();
    assert!(there.contains(release), "its modules are mounted: {said}");

    create(&lab, "elf").await.unwrap();
    let line = lab.sh("with-elf", "cat /proc/cmdline").await.stdout;
    assert!(
        line.trim_end().ends_with("everywhere=1 first second=2"),
        "{line}"
    );

    let partly = create(&lab, "partly").await.unwrap();
    let console = fs::read(lab.machine_dir(&partly).join("console.log")).unwrap();
    let console = String::from_utf8_lossy(&console);
    assert!(
        console.contains("overlay.ko: "),
        "it did not load: {console}"
    );

    for (kernel, said) in [
        ("foreign", "modules that came with it did not load"),
        ("bare", "no modules came with it"),
    ] {
        let error = create(&lab, kernel).await.unwrap_err().to_string();
        assert!(
            error.contains("has no virtio_blk built in"),
            "{kernel}: {error}"
        );
        assert!(error.contains(said), "{kernel}: {error}");
    }

    let error = create(&lab, "unknown").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("bare, elf, foreign"), "{hint}");

    match other {
        None => {
            eprintln!("skipped: a kernel of another version; HUTCH_TEST_OTHER_KERNEL names none")
        }
        Some(_) => {
            create(&lab, "other").await.unwrap();
            let other = lab.sh("with-other", "uname -r").await.stdout;
            assert_ne!(other.trim(), release);
        }
    }
    lab.finish().await;
}

#[tokio::test]
async fn a_runtime_without_kernels_names_one_that_has_them() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let error = create(&lab, "any").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert!(
        error
            .to_string()
            .contains("`stub` cannot boot a kernel of choice"),
        "{error}"
    );
    assert!(
        error.hint().is_some_and(|hint| hint.contains("could")),
        "{error:?}"
    );
    lab.finish().await;
}
