//! cpio archives in the "newc" form that Linux unpacks as its first root
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`). Deterministic: no times, owners
//! are root, inode numbers count up.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// Writes one archive.
pub(crate) struct Cpio<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, (0, 0), b"")
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, (0, 0), content)
    }

    pub(crate) fn character(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
    ) -> io::Result<()> {
        self.entry(name, CHARACTER | mode, device, b"")
    }

    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, (0, 0), b"")?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.inode = self.inode.wrapping_add(1);
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let name_size = u32::try_from(name.len() + 1).map_err(|_| io::ErrorKind::InvalidInput)?;
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        // Header and name end on a multiple of four, and so does the content.
        let zeros = [0; 4];
        let unpadded = header.len() + name.len() + 1;
        self.out
            .write_all(&zeros[..1 + (unpadded.next_multiple_of(4) - unpadded)])?;
        self.out.write_all(content)?;
        self.out
            .write_all(&zeros[..content.len().next_multiple_of(4) - content.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_end_is_marked() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.directory("dev").unwrap();
        cpio.file("init", 0o755, b"hello").unwrap();
        cpio.character("dev/console", 0o600, (5, 1)).unwrap();
        let bytes = cpio.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let at = |needle: &[u8]| {
            bytes
                .windows(needle.len())
                .position(|part| part == needle)
                .unwrap()
        };
        for name in [&b"dev\0"[..], b"init\0", b"dev/console\0", b"TRAILER!!!\0"] {
            let header = at(name) - 110;
            assert_eq!(&bytes[header..header + 6], b"070701");
            assert_eq!(header % 4, 0);
        }
        assert_eq!(at(b"hello") % 4, 0);
        assert_eq!(&bytes[at(b"init\0") - 110 + 14..][..8], b"000081ED");
        assert_eq!(
            &bytes[at(b"dev/console\0") - 110 + 78..][..16],
            b"0000000500000001"
        );
    }
}
