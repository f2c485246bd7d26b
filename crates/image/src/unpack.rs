//! Streams unpacked by magic: plain, gzip, xz or zstd, with a bounded window, a bounded result and
//! a digest of it.
//!
//! A broken rule travels through `std::io::Error` as a [`Refusal`]; [`refusal`] takes it out again.

use crate::limits::Limits;
use crate::refusal::Refusal;
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::rc::Rc;

/// The ratio of a bomb is looked at beyond this size: small streams of zeros are common.
const BOMB_FLOOR_BYTES: u64 = 1 << 30;

/// The higher ones save a few bytes of what is a cache, and cost every import.
const COPY_LEVEL: i32 = 1;

/// An unpacked stream.
pub(crate) struct Unpacked<'a> {
    decoder: Box<dyn Read + 'a>,
    packed: bool,
    packed_bytes: Rc<Cell<u64>>,
    unpacked_bytes: u64,
    max_bytes: u64,
    max_ratio: u64,
    sha256: Sha256,
    /// All that was read, packed again.
    copy: Option<zstd::Encoder<'a, &'a File>>,
}

struct Counted<R> {
    inner: R,
    bytes: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes.set(self.bytes.get() + count as u64);
        Ok(count)
    }
}

impl<'a> Unpacked<'a> {
    /// Looks at the first bytes of `input` and unpacks what they say.
    pub(crate) fn new(input: impl Read + 'a, limits: &Limits) -> io::Result<Self> {
        let packed_bytes = Rc::new(Cell::new(0));
        let counted = Counted {
            inner: input,
            bytes: Rc::clone(&packed_bytes),
        };
        let mut input = BufReader::with_capacity(256 << 10, counted);
        let magic = input.fill_buf()?;
        let window = limits.max_window_bytes.max(1 << 10);
        let (decoder, packed): (Box<dyn Read + 'a>, bool) = if magic.starts_with(&[0x1f, 0x8b]) {
            (Box::new(flate2::bufread::MultiGzDecoder::new(input)), true)
        } else if magic.starts_with(b"\xfd7zXZ\0") {
            // Beside its window xz needs a few tables.
            let memory = window + (16 << 20);
            let stream =
                liblzma::stream::Stream::new_stream_decoder(memory, liblzma::stream::CONCATENATED)?;
            (
                Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream)),
                true,
            )
        } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(window.ilog2())?;
            (Box::new(decoder), true)
        } else {
            (Box::new(input), false)
        };
        Ok(Self {
            decoder,
            packed,
            packed_bytes,
            unpacked_bytes: 0,
            max_bytes: limits.max_unpacked_bytes,
            max_ratio: limits.max_ratio,
            sha256: Sha256::new(),
            copy: None,
        })
    }

    /// Writes all that will be read to `file` as well, packed with zstd.
    pub(crate) fn copy_to(&mut self, file: &'a File) -> io::Result<()> {
        self.copy = Some(zstd::Encoder::new(file, COPY_LEVEL)?);
        Ok(())
    }

    /// Bytes taken from the input so far.
    pub(crate) fn packed_bytes(&self) -> u64 {
        self.packed_bytes.get()
    }

    /// Ends the copy. The digest of all that was read.
    pub(crate) fn into_sha256(self) -> io::Result<[u8; 32]> {
        if let Some(copy) = self.copy {
            copy.finish()?;
        }
        Ok(self.sha256.finalize().into())
    }

    fn check(&self) -> Result<(), Refusal> {
        if self.unpacked_bytes > self.max_bytes {
            return Err(Refusal::UnpacksTooLarge {
                limit: self.max_bytes,
            });
        }
        let allowed = self.packed_bytes.get().saturating_mul(self.max_ratio);
        if self.packed && self.unpacked_bytes > BOMB_FLOOR_BYTES.max(allowed) {
            return Err(Refusal::Bomb {
                limit: self.max_ratio,
            });
        }
        Ok(())
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self
            .decoder
            .read(buffer)
            .map_err(|error| match error.kind() {
                // What the operating system says stays as it is; the rest is the decoder's opinion.
                _ if error.raw_os_error().is_some() || !self.packed => error,
                io::ErrorKind::Interrupted => error,
                _ => io::Error::other(Refusal::BadCompression {
                    words: error.to_string(),
                }),
            })?;
        self.unpacked_bytes += count as u64;
        self.check().map_err(io::Error::other)?;
        self.sha256.update(&buffer[..count]);
        if let Some(copy) = &mut self.copy {
            copy.write_all(&buffer[..count])?;
        }
        Ok(count)
    }
}

/// The broken rule inside of `error`, if it carries one.
pub(crate) fn refusal(error: &io::Error) -> Option<Refusal> {
    error.get_ref()?.downcast_ref::<Refusal>().cloned()
}
