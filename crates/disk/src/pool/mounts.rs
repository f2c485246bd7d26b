//! What is mounted where, as this thread sees it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The source of what is mounted at `point`, which has no links in it; of several mounts there, of the uppermost.
pub(super) fn source(point: &Path) -> io::Result<Option<PathBuf>> {
    // A thread may have mounts of its own.
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(find(&table, point))
}

/// Reads `proc_pid_mountinfo(5)`: later lines lie over earlier ones.
fn find(table: &[u8], point: &Path) -> Option<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    let mut matching = lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        if unescape(fields.nth(4)?) != point {
            return None;
        }
        // After a number of optional fields: a dash, the type, the source.
        fields.find(|field| *field == b"-")?;
        fields.nth(1).map(unescape)
    });
    matching.next_back()
}

/// Blanks, tabs, line ends and backslashes are written in octal, `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match code {
            Some(code) if first == b'\\' => {
                text.push(code);
                rest = &after[3..];
            }
            _ => {
                text.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(text).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_is_found() {
        let table = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            90 22 0:40 / /data\\040dir/pool rw shared:9 master:2 - btrfs /dev/loop1 rw\n\
            91 90 0:41 / /data\\040dir/pool rw - btrfs /dev/loop2 rw,nodiscard\n";
        let source = |point: &str| find(table, Path::new(point));
        assert_eq!(source("/data dir/pool"), Some("/dev/loop2".into()));
        assert_eq!(source("/"), Some("/dev/vda".into()));
        assert_eq!(source("/data dir"), None);
        assert_eq!(find(b"torn \\04", Path::new("/")), None);
    }
}
