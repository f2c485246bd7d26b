//! Reading a tar archive that may be hostile: framing, numbers, long names and PAX headers, each
//! bounded. Says what the entries are; whether they fit together is `tree.rs`'s business.
//!
//! The format is that of POSIX.1-2001 (ustar and pax) and of GNU tar's manual, "Basic Tar Format".
//! The framing is our own because the `tar` crate reads extended headers of any size into memory
//! and ignores what follows the end mark.

use crate::limits::Limits;
use crate::pax::{Pax, parse_number};
use crate::refusal::Refusal;
use crate::sparse::SparseMap;
use std::io::{self, Read};

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Directory,
    File,
    Symlink { target: Vec<u8> },
    HardLink { target: Vec<u8> },
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// Owner, permission bits and time of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, u32),
}

/// One entry, its path as in the archive.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) meta: Meta,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
    /// Bytes of content, holes included; 0 unless it is a file.
    pub(crate) size: u64,
}

/// Why reading stopped; `path` is the entry at fault, when one was known.
#[derive(Debug)]
pub(crate) enum Failure {
    Refused { path: Option<Vec<u8>>, why: Refusal },
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if let Some(why) = crate::unpack::refusal(&error) {
            return Failure::Refused { path: None, why };
        }
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return Failure::Refused {
                path: None,
                why: Refusal::Truncated,
            };
        }
        Failure::Io(error)
    }
}

fn refuse<T>(path: &[u8], why: Refusal) -> Result<T, Failure> {
    Err(Failure::Refused {
        path: Some(path.to_vec()),
        why,
    })
}

/// A tar archive read from front to back. After [`Archive::next`] gave a file, reading from the
/// archive itself yields the file's content, holes as zeros.
pub(crate) struct Archive<R> {
    input: R,
    max_header_bytes: u64,
    /// Bytes of the current entry's data that are not read yet, without padding.
    left: u64,
    padding: u64,
    sparse: Option<SparseMap>,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R, limits: &Limits) -> Self {
        let max_header_bytes = limits.max_header_bytes;
        Self {
            input,
            max_header_bytes,
            left: 0,
            padding: 0,
            sparse: None,
        }
    }

    pub(crate) fn input(&self) -> &R {
        &self.input
    }

    pub(crate) fn into_input(self) -> R {
        self.input
    }

    /// The next entry, or `None` once the end mark was found and nothing but zeros follows it.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Failure> {
        let mut pax = Pax::default();
        loop {
            self.skip_rest()?;
            let mut block = [0; BLOCK];
            self.input.read_exact(&mut block)?;
            if block.iter().all(|byte| *byte == 0) {
                self.expect_only_zeros()?;
                return match pax.is_empty() {
                    true => Ok(None),
                    false => Err(Failure::Refused {
                        path: None,
                        why: Refusal::Truncated,
                    }),
                };
            }
            let header = Header { block };
            let path = header.path();
            header.check().or_else(|why| match why {
                // A name from a damaged header tells nothing.
                Refusal::BadChecksum => Err(Failure::Refused { path: None, why }),
                why => refuse(&path, why),
            })?;
            let size = header
                .number(124..136, "size")
                .or_else(|why| refuse(&path, why))?;
            match header.block[156] {
                b'L' => pax.set_path(self.long_name(size, &path)?),
                b'K' => pax.set_link(self.long_name(size, &path)?),
                b'x' => {
                    let bytes = self.extended(size, &path)?;
                    pax.parse(&bytes).or_else(|why| refuse(&path, why))?;
                }
                b'g' => {
                    let bytes = self.extended(size, &path)?;
                    Pax::check_global(&bytes).or_else(|why| refuse(&path, why))?;
                }
                _ => return self.entry(&header, pax, size).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, mut pax: Pax, size: u64) -> Result<Entry, Failure> {
        let path = pax.take_path().unwrap_or_else(|| header.path());
        let stored = pax.size().unwrap_or(size);
        self.begin_data(stored).or_else(|why| refuse(&path, why))?;
        let content = match header.block[156] {
            b'S' => {
                let map = self
                    .sparse_map(header, stored)
                    .or_else(|failure| match failure {
                        Failure::Refused { why, .. } => refuse(&path, why),
                        other => Err(other),
                    })?;
                let total = map.total();
                self.sparse = Some(map);
                total
            }
            _ => stored,
        };
        let mut read = || -> Result<Entry, Refusal> {
            let kind = header.kind(&path, pax.take_link())?;
            if content > 0 && kind != EntryKind::File {
                return Err(Refusal::UnexpectedContent { kind: kind.words() });
            }
            let xattrs = pax.take_xattrs();
            let meta = header.meta(&pax)?;
            let size = content;
            Ok(Entry {
                path: path.clone(),
                kind,
                meta,
                xattrs,
                size,
            })
        };
        read().or_else(|why| refuse(&path, why))
    }

    /// A GNU long name: text and NUL bytes at its end only.
    fn long_name(&mut self, size: u64, path: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut name = self.extended(size, path)?;
        name.truncate(
            name.iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |last| last + 1),
        );
        if name.contains(&0) {
            return refuse(&name, Refusal::NulInName);
        }
        Ok(name)
    }

    /// Reads an extended header's data whole.
    fn extended(&mut self, size: u64, path: &[u8]) -> Result<Vec<u8>, Failure> {
        if size > self.max_header_bytes {
            return refuse(
                path,
                Refusal::HeaderTooLarge {
                    limit: self.max_header_bytes,
                },
            );
        }
        self.begin_data(size).or_else(|why| refuse(path, why))?;
        let mut bytes = vec![0; usize::try_from(size).expect("bounded by the limit above")];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn begin_data(&mut self, size: u64) -> Result<(), Refusal> {
        if size > i64::MAX as u64 {
            return Err(Refusal::BadNumber { field: "size" });
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// The map of a GNU sparse file: four pieces in the header, then blocks of 21.
    fn sparse_map(&mut self, header: &Header, stored: u64) -> Result<SparseMap, Failure> {
        let refused = |why| Failure::Refused { path: None, why };
        let real = header.number(483..495, "real size").map_err(refused)?;
        let mut pieces = Vec::new();
        let mut block = header.block;
        let (mut range, mut more) = (386..482, block[482] == 1);
        loop {
            for piece in block[range.clone()].chunks_exact(24) {
                if piece[0] != 0 {
                    let field = "sparse map";
                    let at = parse_number(&piece[..12], field).map_err(refused)?;
                    let len = parse_number(&piece[12..], field).map_err(refused)?;
                    pieces.push((at, len));
                }
            }
            if pieces.len() as u64 * 24 > self.max_header_bytes {
                return Err(refused(Refusal::HeaderTooLarge {
                    limit: self.max_header_bytes,
                }));
            }
            if !more {
                break;
            }
            self.input.read_exact(&mut block)?;
            (range, more) = (0..504, block[504] == 1);
        }
        SparseMap::new(pieces, real, stored).map_err(refused)
    }

    fn skip_rest(&mut self) -> Result<(), Failure> {
        self.sparse = None;
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.input).take(rest), &mut io::sink())?;
        if skipped < rest {
            return Err(Failure::Refused {
                path: None,
                why: Refusal::Truncated,
            });
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    fn expect_only_zeros(&mut self) -> Result<(), Failure> {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.input.read(&mut buffer)? {
                0 => return Ok(()),
                count if buffer[..count].iter().all(|byte| *byte == 0) => {}
                _ => {
                    return Err(Failure::Refused {
                        path: None,
                        why: Refusal::TrailingGarbage,
                    });
                }
            }
        }
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut want = buffer.len();
        if let Some(map) = &mut self.sparse {
            let hole = map.hole_here();
            if hole > 0 {
                let count = want.min(usize::try_from(hole).unwrap_or(usize::MAX));
                buffer[..count].fill(0);
                map.advance(count as u64);
                return Ok(count);
            }
            want = want.min(usize::try_from(map.data_here()).unwrap_or(usize::MAX));
        }
        want = want.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::Error::other(Refusal::Truncated));
        }
        self.left -= count as u64;
        if let Some(map) = &mut self.sparse {
            map.advance(count as u64);
        }
        Ok(count)
    }
}

/// One header block.
struct Header {
    block: [u8; BLOCK],
}

impl Header {
    fn check(&self) -> Result<(), Refusal> {
        let stated =
            parse_number(&self.block[148..156], "checksum").map_err(|_| Refusal::BadChecksum)?;
        let sum: u64 = self.block.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = self.block[148..156]
            .iter()
            .map(|byte| u64::from(*byte))
            .sum();
        if sum - own + 8 * u64::from(b' ') != stated {
            return Err(Refusal::BadChecksum);
        }
        Ok(())
    }

    fn is_posix(&self) -> bool {
        &self.block[257..263] == b"ustar\0"
    }

    fn path(&self) -> Vec<u8> {
        let name = trim_nul(self.block[..100].to_vec());
        // GNU archives keep other things where POSIX has its prefix.
        match trim_nul(self.block[345..500].to_vec()) {
            prefix if self.is_posix() && !prefix.is_empty() => [&prefix, &b"/"[..], &name].concat(),
            _ => name,
        }
    }

    fn number(&self, range: std::ops::Range<usize>, field: &'static str) -> Result<u64, Refusal> {
        parse_number(&self.block[range], field)
    }

    fn small(&self, range: std::ops::Range<usize>, field: &'static str) -> Result<u32, Refusal> {
        let number = self.number(range, field)?;
        u32::try_from(number).map_err(|_| Refusal::BadNumber { field })
    }

    fn kind(&self, path: &[u8], long_link: Option<Vec<u8>>) -> Result<EntryKind, Refusal> {
        let target = || long_link.unwrap_or_else(|| trim_nul(self.block[157..257].to_vec()));
        let device = || -> Result<(u32, u32), Refusal> {
            let out = |_| Refusal::DeviceOutOfRange;
            let major = self.small(329..337, "device number").map_err(out)?;
            let minor = self.small(337..345, "device number").map_err(out)?;
            // What Linux' new dev_t can hold in an ext4 inode.
            if major > 0xfff || minor > 0xf_ffff {
                return Err(Refusal::DeviceOutOfRange);
            }
            Ok((major, minor))
        };
        Ok(match self.block[156] {
            // Archives older than POSIX mark directories by a slash only.
            b'0' | 0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink { target: target() },
            b'2' => EntryKind::Symlink { target: target() },
            b'3' => device().map(|(major, minor)| EntryKind::Character { major, minor })?,
            b'4' => device().map(|(major, minor)| EntryKind::Block { major, minor })?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            code => {
                let code = crate::error::printable(&[code], 4);
                return Err(Refusal::UnsupportedType { code });
            }
        })
    }

    fn meta(&self, pax: &Pax) -> Result<Meta, Refusal> {
        let mode = self.number(100..108, "mode")? & 0o7777;
        let uid = pax
            .uid()
            .map_or_else(|| self.small(108..116, "owner"), Ok)?;
        let gid = pax
            .gid()
            .map_or_else(|| self.small(116..124, "group"), Ok)?;
        // The largest id means "none" to Linux.
        for (id, field) in [(uid, "owner"), (gid, "group")] {
            if id == u32::MAX {
                return Err(Refusal::BadNumber { field });
            }
        }
        let mtime = match pax.mtime() {
            Some(mtime) => mtime,
            None => (
                i64::try_from(self.number(136..148, "time")?).unwrap_or(i64::MAX),
                0,
            ),
        };
        // The range of an ext4 time stamp (34 bits, from 1901 on); outside of it the kernel
        // clamps too.
        let mtime = (
            mtime.0.clamp(-(1 << 31), (3 << 32) + (1 << 31) - 1),
            mtime.1,
        );
        Ok(Meta {
            mode: u16::try_from(mode).expect("12 bits"),
            uid,
            gid,
            mtime,
        })
    }
}

impl EntryKind {
    /// The kind in words, for messages.
    pub(crate) fn words(&self) -> &'static str {
        match self {
            EntryKind::Directory => "a directory",
            EntryKind::File => "a file",
            EntryKind::Symlink { .. } => "a symbolic link",
            EntryKind::HardLink { .. } => "a hard link",
            EntryKind::Character { .. } => "a character device",
            EntryKind::Block { .. } => "a block device",
            EntryKind::Fifo => "a named pipe",
        }
    }
}

fn trim_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
