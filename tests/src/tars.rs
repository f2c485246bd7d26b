//! Root filesystem tars for imports.

use tar::{Builder, EntryType, Header};

/// A header as hostile as wanted: the name is not looked at.
pub fn entry(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header.set_mtime(1_700_000_000);
    header.set_cksum();
    header
}

/// A small root filesystem with a file of so many MiB that nothing compresses, then the given entries.
pub fn root_tar(mib: usize, more: &[Header]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for dir in ["bin/", "etc/", "proc/", "sys/", "dev/", "tmp/"] {
        tar.append(&entry(dir, EntryType::Directory, 0), std::io::empty())
            .unwrap();
    }
    let mut state = 1_u32;
    let noise: Vec<u8> = (0..mib << 20)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    tar.append(
        &entry("noise", EntryType::Regular, noise.len() as u64),
        &noise[..],
    )
    .unwrap();
    for header in more {
        tar.append(header, std::io::empty()).unwrap();
    }
    tar.into_inner().unwrap()
}
