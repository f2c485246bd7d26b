//! The child that writes disks: equal to building in process, unprivileged, and gone with its
//! parent.

use crate::archives::{Tar, build, file_of, head};
use hutch_image::{Built, Error, Job, Kind, Limits, Purpose, build_in_child, check_ext4};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hutch-build-disk"))
}

fn job(limits: Limits) -> Job {
    Job {
        purpose: Purpose::Root,
        limits,
    }
}

fn run(tar: &[u8], limits: Limits, output: &File) -> Result<Built, Error> {
    let output = output.try_clone().unwrap();
    build_in_child(
        exe(),
        &job(limits),
        vec![file_of(tar)],
        output,
        None,
        &mut |_| {},
    )
}

fn sample() -> Vec<u8> {
    let owned = crate::archives::Head {
        uid: 1234,
        mode: 0o4711,
        ..head(b'0')
    };
    Tar::new().dir("d").add("d/su", owned, &[5; 10_000]).end()
}

#[test]
fn the_child_makes_the_same_disk_as_we_do() {
    let here = build(&[&sample()]);
    let output = tempfile::NamedTempFile::new().unwrap();
    let built = run(&sample(), Limits::default(), output.as_file()).unwrap();
    assert_eq!(built, here.built);
    assert!(std::fs::read(output.path()).unwrap() == here.bytes());
}

#[test]
fn the_layer_is_the_archive_however_it_came() {
    let tar = sample();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    for upload in [tar.clone(), gzip.finish().unwrap()] {
        let output = tempfile::tempfile().unwrap();
        let layer = tempfile::NamedTempFile::new().unwrap();
        let copy = Some(layer.reopen().unwrap());
        let job = job(Limits::default());
        build_in_child(
            exe(),
            &job,
            vec![file_of(&upload)],
            output,
            copy,
            &mut |_| {},
        )
        .unwrap();
        let unpacked = zstd::decode_all(layer.reopen().unwrap()).unwrap();
        // What comes behind the end of the archive may be missing.
        assert!(tar.starts_with(&unpacked) && unpacked.len() + 1024 >= tar.len());
    }
}

#[test]
fn an_ordinary_user_gets_the_same_disk_as_root() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can become an ordinary user");
    }
    let here = build(&[&sample()]);
    // The user may reach neither our target directory nor a private file of ours.
    let dir = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()
        .unwrap();
    let program = dir.path().join("build-disk");
    std::fs::copy(exe(), &program).unwrap();
    let (input, output) = (file_of(&sample()), tempfile::NamedTempFile::new().unwrap());
    let output_for_child = output.reopen().unwrap();
    use std::os::fd::AsRawFd;
    for file in [&input, &output_for_child] {
        rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty()).unwrap();
    }
    let mut child = Command::new(program)
        .arg("build-disk")
        .uid(4321)
        .gid(4321)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let order = format!(
        r#"{{"job":{},"parent":{},"inputs":[{}],"output":{}}}"#,
        serde_json::to_string(&job(Limits::default())).unwrap(),
        std::process::id(),
        input.as_raw_fd(),
        output_for_child.as_raw_fd(),
    );
    child
        .stdin
        .take()
        .unwrap()
        .write_all(order.as_bytes())
        .unwrap();
    let answer = child.wait_with_output().unwrap();
    assert!(
        answer.status.success(),
        "{}",
        String::from_utf8_lossy(&answer.stdout)
    );
    assert!(std::fs::read(output.path()).unwrap() == here.bytes());
}

#[test]
fn refusals_come_through_with_kind_and_hint() {
    let output = tempfile::tempfile().unwrap();
    let tar = Tar::new().file("/x", b"").end();
    let error = run(&tar, Limits::default(), &output).unwrap_err();
    assert_eq!(
        error.to_string(),
        "archive, entry `/x`: the path is absolute"
    );
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.hint().unwrap().contains("tar -C"));
}

#[test]
fn a_child_that_meets_its_memory_limit_is_exhausted_not_broken() {
    let output = tempfile::tempfile().unwrap();
    let limits = Limits {
        max_memory_bytes: 1 << 20,
        ..Limits::default()
    };
    let error = run(&sample(), limits, &output).unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{error:?}");
}

#[test]
fn a_disk_beyond_the_limit_is_refused() {
    let output = tempfile::tempfile().unwrap();
    let limits = Limits {
        max_disk_bytes: 8 << 20,
        ..Limits::default()
    };
    let error = run(&sample(), limits, &output).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error:?}");
}

#[test]
fn a_missing_executable_is_not_found() {
    let output = tempfile::tempfile().unwrap();
    let missing = Path::new("/nonexistent/hutch");
    let outcome = build_in_child(
        missing,
        &job(Limits::default()),
        vec![],
        output,
        None,
        &mut |_| {},
    );
    assert_eq!(outcome.unwrap_err().kind(), Kind::NotFound);
}

/// The child is looked at while it reads 16 GiB of zeros.
#[test]
fn the_child_has_no_privilege_and_dies_with_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("input");
    let endless = crate::archives::Head {
        size: Some(16 << 30),
        ..head(b'0')
    };
    std::fs::write(&input, Tar::new().add("zeros", endless, b"").cut()).unwrap();
    File::options()
        .write(true)
        .open(&input)
        .unwrap()
        .set_len(17 << 30)
        .unwrap();
    // A shell is the parent that gets killed: it starts the child with the order and then waits.
    let order = format!(
        r#"{{"job":{},"parent":PID,"inputs":[8],"output":9}}"#,
        serde_json::to_string(&job(Limits::default())).unwrap()
    );
    let script = r#"printf '%s' "$2" | sed "s/PID/$$/" >"$4/order"
        "$1" build-disk 8<"$3" 9<>"$4/disk" 7</etc/hostname <"$4/order" >/dev/null &
        echo $!; wait"#;
    let mut shell = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(exe())
        .args([
            order.as_str(),
            input.to_str().unwrap(),
            dir.path().to_str().unwrap(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(shell.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let proc = Path::new("/proc").join(line.trim());
    let status = || std::fs::read_to_string(proc.join("status")).unwrap_or_default();
    wait_until("the child confines itself", || {
        status().contains("NoNewPrivs:\t1")
    });
    wait_until("the child lowers its limits", || {
        limit(&proc, "Max open files") == "64"
    });
    if rustix::process::geteuid().is_root() {
        assert!(
            status().contains("Uid:\t65534\t65534\t65534\t65534"),
            "{}",
            status()
        );
        assert!(status().contains("CapEff:\t0000000000000000"));
        assert!(
            status().lines().any(|line| line.trim() == "Groups:"),
            "{}",
            status()
        );
    }
    let mut open: Vec<_> = std::fs::read_dir(proc.join("fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2", "8", "9"]);
    shell.kill().unwrap();
    shell.wait().unwrap();
    wait_until("the child is gone", || {
        let status = status();
        status.is_empty() || status.contains("State:\tZ")
    });
}

fn limit(proc: &Path, name: &str) -> String {
    let limits = std::fs::read_to_string(proc.join("limits")).unwrap_or_default();
    let line = limits
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_default();
    line[name.len().min(line.len())..]
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("waited in vain: {what}");
}

#[test]
fn what_the_real_tar_packs_is_the_same_twice_and_clean() {
    let Some(tar) = etc_of_this_machine() else {
        return;
    };
    let (one, two) = (
        tempfile::NamedTempFile::new().unwrap(),
        tempfile::tempfile().unwrap(),
    );
    let first = run(&tar, Limits::default(), one.as_file()).unwrap();
    assert_eq!(first, run(&tar, Limits::default(), &two).unwrap());
    match check_ext4(one.path()) {
        Err(Error::MissingProgram { .. }) => eprintln!("skipped: no e2fsck"),
        outcome => outcome.unwrap(),
    }
}

/// Whatever this machine has in `/etc`, packed by the real `tar`.
fn etc_of_this_machine() -> Option<Vec<u8>> {
    let output = Command::new("tar")
        .args([
            "-C",
            "/",
            "--exclude=etc/shadow*",
            "--exclude=etc/gshadow*",
            "--xattrs",
            "-cf",
            "-",
            "./etc",
        ])
        .stderr(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = output else {
        eprintln!("skipped: no tar");
        return None;
    };
    let mut bytes = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    let _ = child.wait();
    Some(bytes)
}
