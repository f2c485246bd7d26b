//! POSIX access lists: what an archive has is the form of the system call, what ext4 keeps on disk
//! is a shorter one (Linux: `include/uapi/linux/posix_acl_xattr.h` and `fs/ext4/acl.h`).

/// Whether the attribute `name` holds an access list.
pub(crate) fn is_acl(name: &str) -> bool {
    matches!(name, "system.posix_acl_access" | "system.posix_acl_default")
}

/// Turns version 2 of the system call (tag, permissions, id in 8 bytes each) into version 1 of the
/// disk, where only named users and groups have an id.
pub(crate) fn to_ext4(value: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let entries = value.strip_prefix(&2u32.to_le_bytes())?;
    if entries.len() % 8 != 0 {
        return None;
    }
    let mut disk = 1u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        match tag {
            USER | GROUP => disk.extend(entry),
            0x01 | 0x04 | 0x10 | 0x20 => disk.extend(&entry[..4]),
            _ => return None,
        }
    }
    Some(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_users_and_groups_keep_an_id() {
        let entry = |tag: u16, perm: u16, id: u32| {
            [
                &tag.to_le_bytes()[..],
                &perm.to_le_bytes(),
                &id.to_le_bytes(),
            ]
            .concat()
        };
        let none = u32::MAX;
        let value = [
            2u32.to_le_bytes().to_vec(),
            entry(1, 6, none),
            entry(2, 4, 1000),
        ]
        .concat();
        let disk = [
            &[1, 0, 0, 0][..],
            &[1, 0, 6, 0],
            &[2, 0, 4, 0, 0xe8, 3, 0, 0],
        ]
        .concat();
        assert_eq!(to_ext4(&value), Some(disk));
        assert_eq!(to_ext4(&value[..9]), None);
        assert_eq!(to_ext4(&[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
