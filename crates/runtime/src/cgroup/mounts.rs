//! Where cgroup hierarchies are mounted, read from `/proc/self/mountinfo`. What they are good for is decided elsewhere.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Of the kernel's two cgroup interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) point: PathBuf,
    pub(super) version: Version,
    /// Of version 1: what it controls.
    pub(super) controllers: Vec<String>,
    pub(super) writable: bool,
    /// Whether all of the hierarchy is mounted, and not a part.
    pub(super) whole: bool,
}

/// All cgroup hierarchies of a `mountinfo` (proc_pid_mountinfo(5)). Lines that mean nothing are passed over.
pub(super) fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<Mount> {
    // `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point, options) = (before.next()?, before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, super_options) = (after.next()?, after.nth(1)?);
    let version = match kind {
        "cgroup" => Version::V1,
        "cgroup2" => Version::V2,
        _ => return None,
    };
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    Some(Mount {
        point: PathBuf::from(OsString::from_vec(unescaped(point))),
        version,
        controllers: match version {
            Version::V1 => super_options.split(',').map(str::to_owned).collect(),
            Version::V2 => Vec::new(),
        },
        writable: !read_only(options) && !read_only(super_options),
        whole: root == "/",
    })
}

/// The kernel writes blanks, tabs, line ends and backslashes in paths as `\` and three octal digits.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 4).filter(|_| byte == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(code.unwrap_or(byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn escaped(path: &str) -> String {
        let mut text = String::new();
        for c in path.chars() {
            match c {
                ' ' | '\t' | '\n' | '\\' => text.push_str(&format!("\\{:03o}", c as u32)),
                c => text.push(c),
            }
        }
        text
    }

    #[test]
    fn hierarchies_are_found_among_other_mounts() {
        let text = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
            31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 /docker/ab /sys/fs/cgroup/cpu,cpuacct rw shared:9 master:3 - cgroup cgroup rw,cpu,cpuacct\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified ro,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse(text);
        let points: Vec<_> = found
            .iter()
            .map(|mount| mount.point.to_str().unwrap())
            .collect();
        assert_eq!(
            points,
            [
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/systemd",
                "/sys/fs/cgroup/unified"
            ]
        );
        assert_eq!(found[0].controllers, ["rw", "cpu", "cpuacct"]);
        assert_eq!(
            (found[0].version, found[0].whole, found[0].writable),
            (Version::V1, false, true)
        );
        assert_eq!(
            (found[2].version, found[2].whole, found[2].writable),
            (Version::V2, true, false)
        );
    }

    proptest! {
        #[test]
        fn any_path_is_read_as_it_is(path in "/[a-z0-9 \t\n\\\\-]{0,40}", optional in 0..4usize) {
            let optional = " shared:7".repeat(optional);
            let text = format!("41 31 0:38 / {} rw{optional} - cgroup2 none rw\n", escaped(&path));
            let found = parse(&text);
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(found[0].point.to_str().unwrap(), path);
        }

        #[test]
        fn nothing_is_too_odd_to_read(text in "(.|\n){0,200}", cut in 0..80usize) {
            parse(&text);
            let line = "41 31 0:38 / /sys/fs/c\\0 rw - cgroup2 none rw\n";
            parse(&line[..cut.min(line.len())]);
        }
    }
}
