//! What the README shows, by the command line.

use std::fs;
use std::io::Write as _;
use std::process::Command;

use hutch_tests::{Lab, Runtime, lab};
use sha2::{Digest, Sha256};

#[tokio::test]
async fn the_first_steps_with_qemu() {
    if !std::path::Path::new("/usr/bin/mmdebstrap").exists() {
        hutch_tests::skip!("mmdebstrap is not installed");
    }
    let lab = lab!(Runtime::Qemu).start().await;
    lab.hutch(&["create", "debian-base", "--name", "a"])
        .await
        .good();
    let script = "echo out; echo err >&2; exit 3";
    let ran = lab.hutch(&["exec", "a", "--", "sh", "-c", script]).await;
    assert_eq!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
        (3, "out\n", "err\n")
    );
    let release = lab
        .hutch(&["exec", "a", "--", "cat", "/etc/os-release"])
        .await
        .good();
    assert!(release.contains("ID=debian"), "{release}");
    let logs = lab.hutch(&["logs", "a"]).await.good();
    assert!(!logs.is_empty());
    assert_eq!(lab.hutch(&["list", "-q"]).await.good(), "a\n");
    lab.hutch(&["delete", "a"]).await.good();
    assert_eq!(lab.hutch(&["list", "-q"]).await.good(), "");
    lab.finish().await;
}

#[tokio::test]
async fn the_same_commands_with_the_stub() {
    let lab = lab!(Runtime::Stub).start().await;
    let ran = lab
        .hutch(&[
            "run",
            "busybox",
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 3",
        ])
        .await;
    assert_eq!((ran.code, ran.stdout.as_str()), (3, "out\n"), "{ran}");
    assert!(ran.stderr.ends_with("err\n"), "{ran}");
    lab.hutch(&["create", "busybox", "--name", "a", "--env", "WHO=me"])
        .await
        .good();
    let said = lab
        .hutch(&["exec", "a", "--", "sh", "-c", "echo $WHO"])
        .await
        .good();
    assert_eq!(said, "me\n");
    for verb in ["stop", "start", "restart"] {
        lab.hutch(&[verb, "a"]).await.good();
    }
    let shown = lab.hutch(&["get", "a", "--json"]).await.good();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["status"], &shown["starts"]),
        (&"running".into(), &3.into())
    );
    let missing = lab.hutch(&["exec", "b", "--", "true"]).await;
    assert_eq!(missing.code, 125, "{missing}");
    assert_eq!(lab.hutch(&["get", "b"]).await.code, 4);
    lab.hutch(&["delete", "--force", "a", "b"]).await.good();
    lab.finish().await;
}

#[tokio::test]
async fn a_large_file_goes_in_and_out_with_qemu() {
    const MIB: usize = 300;
    let lab = lab!(Runtime::Qemu).start().await;
    lab.busybox().await;
    lab.create("files").await;
    let (there, back) = (lab.dir.join("there"), lab.dir.join("back"));
    let mut hash = Sha256::new();
    let mut file = fs::File::create(&there).unwrap();
    let mut block = vec![0_u8; 1 << 20];
    for n in 0..MIB {
        // Every block another, so that one that is lost or twice there shows.
        for (at, word) in block.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(
                &((n << 20 | at) as u64)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .to_le_bytes(),
            );
        }
        hash.update(&block);
        file.write_all(&block).unwrap();
    }
    let hash: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();

    lab.hutch(&["cp", there.to_str().unwrap(), "files:/there"])
        .await
        .good();
    let inside = lab.sh("files", "sha256sum /there").await;
    assert!(inside.stdout.starts_with(&hash), "{inside:?}");
    lab.hutch(&["cp", "files:/there", back.to_str().unwrap()])
        .await
        .good();
    assert!(
        Command::new("cmp")
            .args([&there, &back])
            .status()
            .unwrap()
            .success()
    );
    lab.finish().await;
}

#[tokio::test]
async fn a_disk_grows_to_what_was_asked_with_qemu() {
    let lab = lab!(Runtime::Qemu).start().await;
    lab.busybox().await;
    lab.hutch(&[
        "create", "busybox", "--name", "big", "--memory", "128", "--disk", "12",
    ])
    .await
    .good();
    let kib = lab
        .sh("big", "df -k / | tail -n 1 | awk '{print $2}'")
        .await
        .stdout;
    let gib = kib.trim().parse::<f64>().unwrap() / f64::from(1 << 20);
    // ext4 keeps some for itself.
    assert!((11.0..=12.0).contains(&gib), "{gib} GiB");
    lab.sh("big", "echo kept > /kept; sync").await;
    lab.hutch(&["stop", "big"]).await.good();
    let machine = lab.client().machine("big").await.unwrap();
    clean(&lab, &machine);
    lab.hutch(&["start", "big"]).await.good();
    assert_eq!(lab.sh("big", "cat /kept").await.stdout, "kept\n");
    lab.finish().await;
}

fn clean(lab: &Lab, machine: &hutch_contract::machine::Machine) {
    let disk = lab.machine_dir(machine).join("disk.raw");
    let fsck = Command::new("/sbin/e2fsck")
        .arg("-fn")
        .arg(disk)
        .output()
        .unwrap();
    assert!(
        fsck.status.success(),
        "{}",
        String::from_utf8_lossy(&fsck.stdout)
    );
}
