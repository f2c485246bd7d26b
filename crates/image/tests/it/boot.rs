//! The boot set from the distribution's package, the busybox root, and a Debian root.

use crate::archives::file_of;
use hutch_image::{
    BootSet, Bootstrap, Error, KernelSource, Kind, Limits, Purpose, boot_set, bootstrap,
    build_disk, busybox, check_ext4,
};
use mkext4::reader::Fs;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn set(cache: &Path, agent: &Path, source: &KernelSource) -> Result<BootSet, Error> {
    boot_set(cache, agent, source, &mut |_| {})
}

#[test]
fn the_distributions_kernel_becomes_a_boot_set_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::write(&agent, "#!agent one").unwrap();
    let cache = dir.path().join("cache");
    let first = match set(&cache, &agent, &KernelSource::Distribution) {
        Err(error) if error.kind() == Kind::Unavailable => {
            return eprintln!("skipped: no kernel package: {error} ({:?})", error.hint());
        }
        first => first.unwrap(),
    };
    let kernel = std::fs::read(&first.kernel).unwrap();
    if cfg!(target_arch = "x86_64") {
        // The boot sector's magic of a bzImage (Linux: Documentation/arch/x86/boot.rst).
        assert_eq!(&kernel[0x202..0x206], b"HdrS");
    }
    let initramfs = std::fs::read(&first.initramfs).unwrap();
    let has = |needle: &[u8]| initramfs.windows(needle.len()).any(|part| part == needle);
    assert!(has(b"#!agent one") && has(b"lib/modules/virtio_blk.ko\0"));
    assert!(
        has(b"/lib/modules/virtio_ring.ko\n/lib/modules/virtio.ko\n"),
        "the list of modules, in order"
    );
    let modules_disk = first.modules_disk.as_deref().unwrap();
    match check_ext4(modules_disk) {
        Err(Error::MissingProgram { .. }) => eprintln!("skipped: no e2fsck"),
        outcome => outcome.unwrap(),
    }
    let fs = Fs::open(File::open(modules_disk).unwrap()).unwrap();
    let dep = fs
        .resolve(&format!("/{}/modules.dep", first.kernel_release))
        .unwrap();
    let dep = String::from_utf8(fs.read_file(dep).unwrap()).unwrap();
    let blk = dep
        .lines()
        .find(|line| line.contains("/virtio_blk.ko:"))
        .unwrap();
    assert!(blk.ends_with("virtio/virtio_ring.ko"), "{blk}");
    for module in dep
        .lines()
        .flat_map(|line| line.split([':', ' ']))
        .filter(|name| !name.is_empty())
    {
        fs.resolve(&format!("/{}/{module}", first.kernel_release))
            .unwrap();
    }

    modprobe_finds_its_way(&fs, &first.kernel_release);

    // From the cache, without a look at the package tools or a change of any file.
    let again = set(&cache, &agent, &KernelSource::Distribution).unwrap();
    assert_eq!(first, again);
    std::fs::write(&agent, "#!agent two").unwrap();
    let other = set(&cache, &agent, &KernelSource::Distribution).unwrap();
    assert_ne!(first.id, other.id);
    assert_eq!(first.kernel, other.kernel);

    // What a killed process left is swept by the next that makes something.
    std::fs::create_dir(cache.join("boot/.tmp-dead")).unwrap();
    std::fs::write(&agent, "#!agent three").unwrap();
    let sets: Vec<BootSet> = std::thread::scope(|scope| {
        let one = || set(&cache, &agent, &KernelSource::Distribution).unwrap();
        let running: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(sets.windows(2).all(|pair| pair[0] == pair[1]));
    assert!(!cache.join("boot/.tmp-dead").exists());
}

/// kmod's `modprobe` resolves a module by our indexes, by name and by alias.
fn modprobe_finds_its_way(fs: &Fs<File>, release: &str) {
    let dir = tempfile::tempdir().unwrap();
    let modules = dir.path().join("lib/modules").join(release);
    std::fs::create_dir_all(&modules).unwrap();
    for entry in fs
        .read_dir(fs.resolve(&format!("/{release}")).unwrap())
        .unwrap()
    {
        let name = String::from_utf8(entry.name.clone()).unwrap();
        if name.starts_with("modules.") {
            std::fs::write(modules.join(name), fs.read_file(entry.inode).unwrap()).unwrap();
        }
    }
    // It only looks whether they are there.
    let dep = std::fs::read_to_string(modules.join("modules.dep")).unwrap();
    for path in dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, _)| path)
    {
        std::fs::create_dir_all(modules.join(path).parent().unwrap()).unwrap();
        File::create(modules.join(path)).unwrap();
    }
    for wanted in ["virtio_net", "virtio-net", "virtio:d00000001v00000000"] {
        let root = dir.path().to_str().unwrap();
        let mut command = std::process::Command::new("/sbin/modprobe");
        let output = command
            .args(["-D", "-d", root, "-S", release, wanted])
            .output();
        let Ok(output) = output else {
            return eprintln!("skipped: no modprobe");
        };
        let words = String::from_utf8_lossy(&output.stdout);
        let order: Vec<_> = words
            .lines()
            .filter_map(|line| line.trim().rsplit('/').next())
            .collect();
        let at = |name: &str| order.iter().position(|module| *module == name);
        assert!(
            at("virtio_ring.ko") < at("virtio.ko") && at("virtio.ko") < at("virtio_net.ko"),
            "{output:?}"
        );
        assert!(at("virtio_ring.ko").is_some(), "{wanted}: {output:?}");
    }
}

#[test]
fn what_is_no_kernel_package_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, deb) = (dir.path().join("agent"), dir.path().join("x.deb"));
    std::fs::write(&agent, "agent").unwrap();
    std::fs::write(&deb, "!<arch>\nnonsense").unwrap();
    let cache = dir.path().join("cache");
    let source = |path: &Path| KernelSource::File {
        path: path.to_owned(),
        modules: None,
    };
    let error = set(&cache, &agent, &source(&deb)).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error:?}");
    std::fs::remove_file(&deb).unwrap();
    let error = set(&cache, &agent, &source(&deb)).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
    assert_eq!(std::fs::read_dir(cache.join("kernels")).unwrap().count(), 0);
}

#[test]
fn a_kernel_alone_boots_without_modules_or_with_those_of_its_release() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, cache) = (dir.path().join("agent"), dir.path().join("cache"));
    std::fs::write(&agent, "agent").unwrap();
    let kernel = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let set = |path: &Path, modules: Option<&Path>| {
        let modules = modules.map(Path::to_owned);
        let path = path.to_owned();
        set(&cache, &agent, &KernelSource::File { path, modules })
    };
    let content = b"\x7fELF one Linux version 9.9.9-test (x)";
    let one = kernel("one", content);
    let alone = set(&one, None).unwrap();
    assert_eq!(alone.kernel_release, "9.9.9-test");
    assert_eq!(alone.modules_disk, None);
    assert_eq!(std::fs::read(alone.elf.as_ref().unwrap()).unwrap(), content);
    assert_eq!(std::fs::read(&alone.kernel).unwrap(), content);
    assert_eq!(set(&one, None).unwrap(), alone, "from the cache");

    let modules = dir.path().join("9.9.9-test");
    std::fs::create_dir(&modules).unwrap();
    std::fs::write(modules.join("modules.builtin"), "kernel/virtio_blk.ko\n").unwrap();
    let with = set(&one, Some(&modules)).unwrap();
    assert!(with.modules_disk.as_ref().unwrap().is_file());
    assert_ne!(with.id, alone.id);

    // Another kernel of that release gets the distribution's modules for it, and not what somebody named for his.
    let two = kernel("two", b"\x7fELF two Linux version 9.9.9-test (x)");
    let theirs = with.modules_disk.unwrap();
    assert_eq!(set(&two, None).unwrap().modules_disk, None);
    let packaged = theirs.parent().unwrap();
    let name = packaged.with_file_name("linux-image-9.9.9-test_1");
    std::os::unix::fs::symlink(packaged, name).unwrap();
    let same = set(
        &kernel("four", b"\x7fELF four Linux version 9.9.9-test (x)"),
        None,
    )
    .unwrap();
    let ours = same.modules_disk.unwrap();
    assert_eq!(std::fs::read(theirs).unwrap(), std::fs::read(ours).unwrap());
    assert!(same.id != with.id && same.id != alone.id);
    let other = set(&kernel("three", b"\x7fELF Linux version 9.9.8 (x)"), None).unwrap();
    assert_eq!(other.modules_disk, None);

    let error = set(&kernel("script", b"#!/bin/sh\n"), None).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error:?}");
    assert!(
        error.to_string().contains("neither a kernel package"),
        "{error}"
    );
    let deb = kernel("x.deb", b"!<arch>\nnonsense");
    let error = set(&deb, Some(&modules)).unwrap_err();
    assert!(
        error.to_string().contains("brings its own modules"),
        "{error}"
    );
}

#[test]
fn busybox_makes_a_small_root() {
    let mut tar = Vec::new();
    if let Err(error) = busybox(&mut tar) {
        return eprintln!("skipped: {error} ({:?})", error.hint());
    }
    let output = tempfile::NamedTempFile::new().unwrap();
    let mut inputs = [file_of(&tar)];
    let limits = Limits::default();
    build_disk(
        &mut inputs,
        output.as_file(),
        Purpose::Root,
        &limits,
        &mut |_| {},
    )
    .unwrap();
    match check_ext4(output.path()) {
        Err(Error::MissingProgram { .. }) => eprintln!("skipped: no e2fsck"),
        outcome => outcome.unwrap(),
    }
    let fs = Fs::open(output.reopen().unwrap()).unwrap();
    assert_eq!(
        fs.symlink_target(fs.resolve("/bin/sh").unwrap()).unwrap(),
        b"busybox"
    );
    assert_eq!(
        fs.inode(fs.resolve("/tmp").unwrap()).unwrap().mode & 0o7777,
        0o1777
    );
    assert!(fs.resolve("/etc/passwd").is_ok());
}

#[test]
fn a_cancelled_bootstrap_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("root.tar");
    match bootstrap(
        &Bootstrap::default(),
        &target,
        &AtomicBool::new(true),
        &mut |_| {},
    ) {
        Err(Error::Cancelled) => {}
        Err(error) if error.kind() == Kind::Unavailable => eprintln!("skipped: {error}"),
        other => panic!("{other:?}"),
    }
    assert!(!target.exists());
}
