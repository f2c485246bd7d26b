//! `cargo xtask agent`: the program that runs in guests, built apart from all else.
//!
//! It has its own target directory, because its flags and features are its own, and is copied only when its bytes have
//! changed: everything that is made from it is kept by its contents.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::command::{cargo, command, output, run};

/// It is in every initramfs, and so in every guest's memory.
const MAX_BYTES: u64 = 5 << 20;
/// `PT_INTERP` of elf(5): the program asks for a dynamic linker.
const PT_INTERP: u32 = 3;

/// Builds the agent, checks it, and puts it beside `hutch`. Returns where it is.
pub fn build(release: bool) -> Result<PathBuf> {
    // Named, so that the flags below are not those of build scripts, too.
    let version = output(&mut command("rustc", ["-vV"]))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc -vV names no host")?;
    let target_dir = crate::target_dir().join("agent");
    run(cargo([
        "build",
        "--package",
        "hutch-agent",
        "--profile",
        "agent",
        "--target",
        host,
    ])
    .arg("--target-dir")
    .arg(&target_dir)
    .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    let built = target_dir.join(host).join("agent/hutch-agent");
    let bytes = fs::read(&built)?;
    check(&bytes)?;
    let place = crate::profile_dir(release).join("guest/hutch-agent");
    install(&bytes, &place)?;
    eprintln!("agent: {} KiB, {}", bytes.len() >> 10, place.display());
    Ok(place)
}

/// Refuses an agent that does not fit.
fn check(elf: &[u8]) -> Result {
    let size = elf.len() as u64;
    if size >= MAX_BYTES {
        return Err(format!("the agent has {size} bytes, and may have {MAX_BYTES}").into());
    }
    match asks_for_linker(elf) {
        None => Err("the agent is no 64-bit ELF program".into()),
        Some(true) => Err("the agent is linked dynamically: no guest has its libraries".into()),
        Some(false) => Ok(()),
    }
}

/// Whether a 64-bit little-endian ELF program has a `PT_INTERP`; `None` when it is no such program.
fn asks_for_linker(elf: &[u8]) -> Option<bool> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let headers = usize::try_from(u64_at(32)?).ok()?;
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    for header in 0..count {
        let at = headers + header * size;
        if u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?) == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

fn install(bytes: &[u8], place: &Path) -> Result {
    if fs::read(place).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::create_dir_all(place.parent().expect("a file in a directory"))?;
    let new = place.with_extension("new");
    fs::write(&new, bytes)?;
    fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(fs::rename(&new, place)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The head of an ELF file with one program header of that type.
    fn elf(kind: u32) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64..68].copy_from_slice(&kind.to_le_bytes());
        elf
    }

    #[test]
    fn an_agent_must_be_small_static_and_a_program() {
        assert!(check(&elf(1)).is_ok());
        assert!(check(&elf(PT_INTERP)).is_err());
        assert!(check(b"#!/bin/sh").is_err());
        assert!(check(&elf(1)[..60]).is_err());
        let mut large = elf(1);
        large.resize(MAX_BYTES as usize, 0);
        assert!(check(&large).is_err());
    }
}
