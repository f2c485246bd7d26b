//! A tiny root filesystem from the host's static busybox, as a tar archive.

use crate::error::Error;
use rustix::process::Signal;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

const PLACES: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];

/// Directories and their modes; `/bin` holds everything, the other places lead there.
const DIRECTORIES: [(&str, u32); 13] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("lib", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
];

const LINKS: [(&str, &str); 5] = [
    ("sbin", "bin"),
    ("usr/bin", "../bin"),
    ("usr/sbin", "../bin"),
    ("var/run", "../run"),
    ("etc/mtab", "../proc/self/mounts"),
];

const FILES: [(&str, &str); 6] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/resolv.conf", ""),
    (
        "etc/os-release",
        "NAME=BusyBox\nID=busybox\nPRETTY_NAME=\"BusyBox\"\n",
    ),
    ("etc/profile", "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"),
];

/// Writes the archive. Equal programs give equal archives.
pub fn busybox(out: &mut dyn Write) -> Result<(), Error> {
    let found = PLACES.iter().map(Path::new).find(|path| path.is_file());
    let missing = || Error::MissingProgram {
        program: "busybox",
        package: "busybox-static",
    };
    let program = found.ok_or_else(missing)?;
    let bytes = std::fs::read(program).map_err(Error::io("read", program))?;
    if needs_libraries(&bytes) != Some(false) {
        return Err(Error::NotStatic {
            path: program.to_owned(),
        });
    }
    let applets = applets(program)?;
    write(out, &bytes, &applets).map_err(Error::stream("write the archive"))
}

fn applets(program: &Path) -> Result<Vec<String>, Error> {
    let mut command = Command::new(program);
    command
        .arg("--list")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(Stdio::piped());
    crate::sys::bind(&mut command, &[], None, Signal::KILL);
    let mut child = command.spawn().map_err(Error::io("run", program))?;
    let mut list = String::new();
    let stdout = child.stdout.take().expect("piped above");
    let read = stdout.take(1 << 20).read_to_string(&mut list);
    let waited = child.wait();
    read.and(waited)
        .map_err(Error::io("read the applets of", program))?;
    let good = |name: &&str| {
        *name != "busybox"
            && name.len() < 100
            && name
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'/')
    };
    let mut names: Vec<String> = list.lines().filter(good).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn write(out: &mut dyn Write, program: &[u8], applets: &[String]) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    let mut add = |kind, path: &str, mode, link: &str, content: &[u8]| -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_path(path)?;
        if !link.is_empty() {
            header.set_link_name_literal(link)?;
        }
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content)
    };
    for (path, mode) in DIRECTORIES {
        add(tar::EntryType::Directory, path, mode, "", b"")?;
    }
    add(tar::EntryType::Regular, "bin/busybox", 0o755, "", program)?;
    for name in applets {
        add(
            tar::EntryType::Symlink,
            &format!("bin/{name}"),
            0o777,
            "busybox",
            b"",
        )?;
    }
    for (path, target) in LINKS {
        add(tar::EntryType::Symlink, path, 0o777, target, b"")?;
    }
    for (path, content) in FILES {
        add(tar::EntryType::Regular, path, 0o644, "", content.as_bytes())?;
    }
    tar.finish()
}

/// Whether an ELF64 program asks for a loader (`PT_INTERP`); `None` when it is no such program.
fn needs_libraries(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: [u8; 4] = 3u32.to_le_bytes();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let u16_at = |at: usize| {
        Some(usize::from(u16::from_le_bytes(
            elf.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let table = usize::try_from(u64::from_le_bytes(elf.get(0x20..0x28)?.try_into().ok()?)).ok()?;
    let (size, count) = (u16_at(0x36)?, u16_at(0x38)?);
    let mut needs = false;
    for index in 0..count {
        let at = table.checked_add(index * size)?;
        needs |= elf.get(at..at.checked_add(4)?)? == PT_INTERP;
    }
    Some(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_programs_are_told_from_others() {
        let elf = |kinds: &[u32]| {
            let mut elf = b"\x7fELF\x02\x01".to_vec();
            elf.resize(64, 0);
            elf[0x20] = 64;
            elf[0x36] = 56;
            elf[0x38] = kinds.len() as u8;
            for kind in kinds {
                elf.extend(kind.to_le_bytes());
                elf.extend([0; 52]);
            }
            elf
        };
        assert_eq!(needs_libraries(&elf(&[1, 2])), Some(false));
        assert_eq!(needs_libraries(&elf(&[1, 3])), Some(true));
        assert_eq!(needs_libraries(&elf(&[1, 3])[..100]), None);
        assert_eq!(needs_libraries(b"#!/bin/sh\n"), None);
    }
}
