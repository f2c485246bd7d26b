//! Kernel images: which release one is, and the ELF kernel inside of a packed one.

use std::io::{self, Read};

use crate::limits::Limits;
use crate::unpack::Unpacked;

const ELF: &[u8] = b"\x7fELF";
/// Larger than any kernel.
const MAX_BYTES: u64 = 256 << 20;
/// Magic of the old LZ4 format, and the size of its blocks unpacked (lz4, `doc/lz4_Frame_format.md`).
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const LZ4_BLOCK: usize = 8 << 20;

/// Whether these are the bytes of a kernel: a bzImage (Linux, `Documentation/arch/x86/boot.rst`), an ELF file or an
/// arm64 `Image` (`Documentation/arch/arm64/booting.rst`).
pub(crate) fn is_kernel(bytes: &[u8]) -> bool {
    is_bzimage(bytes) || bytes.starts_with(ELF) || bytes.get(0x38..0x3c) == Some(b"ARM\x64")
}

fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x202..0x206) == Some(b"HdrS")
}

/// What `uname -r` would say, when the image tells.
pub(crate) fn release(kernel: &[u8]) -> Option<String> {
    let told = if is_bzimage(kernel) {
        // "kernel_version": an offset, less 0x200, of a text.
        kernel.get(0x200 + usize::from(u16_at(kernel, 0x20e)?)..)?
    } else {
        const BANNER: &[u8] = b"Linux version ";
        let mut at = 0;
        loop {
            at += kernel
                .get(at..)?
                .windows(BANNER.len())
                .position(|part| part == BANNER)?
                + BANNER.len();
            // The format of the banner is there too.
            if kernel.get(at).is_some_and(u8::is_ascii_digit) {
                break &kernel[at..];
            }
        }
    };
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"._+~-".contains(byte);
    let end = told.iter().position(|byte| !good(byte))?;
    let release = std::str::from_utf8(&told[..end]).ok()?;
    let plausible = release.starts_with(|c: char| c.is_ascii_digit()) && end <= 64;
    plausible.then(|| release.to_owned())
}

/// The ELF kernel: the image itself, or what is packed in a bzImage. `None` when there is none, or it is packed in a way
/// that we do not know.
pub(crate) fn elf(kernel: &[u8]) -> Option<Vec<u8>> {
    if kernel.starts_with(ELF) {
        return Some(kernel.to_vec());
    }
    if !is_bzimage(kernel) {
        return None;
    }
    // setup_sects, payload_offset and payload_length of the boot protocol; the offset counts from the end of the setup.
    let setup = match kernel[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup + 1) * 512 + u32_at(kernel, 0x248)?;
    let payload = kernel.get(start..start.checked_add(u32_at(kernel, 0x24c)?)?)?;
    let elf = unpack(payload).ok()?;
    elf.starts_with(ELF).then_some(elf)
}

/// The kernel's build appends the size to what its packer made.
fn unpack(payload: &[u8]) -> io::Result<Vec<u8>> {
    let (packed, size) = payload
        .split_last_chunk::<4>()
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let size = u64::from(u32::from_le_bytes(*size)).min(MAX_BYTES);
    let mut elf = Vec::new();
    if let Some(mut blocks) = packed.strip_prefix(LZ4_LEGACY) {
        while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            let block = rest.get(..length).ok_or(io::ErrorKind::UnexpectedEof)?;
            let plain = lz4_flex::block::decompress(block, LZ4_BLOCK);
            elf.extend(plain.map_err(io::Error::other)?);
            if elf.len() as u64 > MAX_BYTES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            blocks = &rest[length..];
        }
        return Ok(elf);
    }
    // The decoder must not look for another stream behind the end: there the size stands. gzip has it itself.
    let input = if packed.starts_with(&[0x1f, 0x8b]) {
        payload
    } else {
        packed
    };
    Unpacked::new(input, &Limits::default())?
        .take(size)
        .read_to_end(&mut elf)?;
    Ok(elf)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let word = u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
    usize::try_from(word).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// A bzImage that has nothing but what is looked at.
    fn bzimage(version: &str, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
        image[0x248..0x24c].copy_from_slice(&0_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    fn sized(mut packed: Vec<u8>, plain: &[u8]) -> Vec<u8> {
        packed.extend((plain.len() as u32).to_le_bytes());
        packed
    }

    #[test]
    fn a_release_is_read_from_every_form() {
        let image = bzimage("6.1.0-56-cloud-amd64 (debian-kernel@lists) #1 SMP", b"");
        assert!(is_kernel(&image));
        assert_eq!(release(&image).as_deref(), Some("6.1.0-56-cloud-amd64"));
        let elf = b"\x7fELF...Linux version %s\0..Linux version 6.12.1+deb13 (x)";
        assert!(is_kernel(elf));
        assert_eq!(release(elf).as_deref(), Some("6.12.1+deb13"));
        for nothing in [
            &b"\x7fELF"[..],
            b"\x7fELF Linux version 6.1",
            b"#!/bin/sh",
            b"",
        ] {
            assert_eq!(release(nothing), None);
        }
        assert!(!is_kernel(b"#!/bin/sh"));
        assert_eq!(release(&bzimage("../../etc/passwd ", b"")), None);
    }

    #[test]
    fn the_elf_kernel_is_found_however_it_is_packed() {
        let plain = [b"\x7fELF\x02\x01".as_slice(), &[7; 100_000]].concat();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        // gzip's own last word is the size.
        let gzip = gzip.finish().unwrap();
        let mut lz4 = LZ4_LEGACY.to_vec();
        let block = lz4_flex::block::compress(&plain);
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(block);
        let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
        let mut xz = Vec::new();
        liblzma::read::XzEncoder::new(plain.as_slice(), 1)
            .read_to_end(&mut xz)
            .unwrap();
        for (name, payload) in [
            ("gzip", gzip),
            ("lz4", sized(lz4, &plain)),
            ("zstd", sized(zstd, &plain)),
            ("xz", sized(xz, &plain)),
        ] {
            assert!(
                elf(&bzimage("6.1 ", &payload)) == Some(plain.clone()),
                "{name}"
            );
        }
        assert_eq!(elf(&bzimage("6.1 ", b"something else")), None);
        assert_eq!(elf(b"#!/bin/sh"), None);
        assert!(elf(&plain) == Some(plain));
    }

    proptest! {
        #[test]
        fn damaged_images_never_panic(mut image in prop::collection::vec(any::<u8>(), 0..2000), lz4: bool) {
            if image.len() > 0x300 {
                image[0x202..0x206].copy_from_slice(b"HdrS");
                if lz4 {
                    image[0x1f1] = 0x01;
                    image[0x248..0x24c].fill(0);
                    let at = 1024.min(image.len() - 4);
                    image[at..at + 4].copy_from_slice(LZ4_LEGACY);
                }
            }
            let _ = (release(&image), elf(&image));
        }
    }
}
