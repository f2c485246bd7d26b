//! Pieces of disks: named by their content, packed to be sent, unpacked with no trust in what comes; and the digest of
//! a whole disk. Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How much of a disk is in one chunk. Where little of a disk was changed, whole chunks of it are sent again: small ones
/// cost less there, and more where all is new.
pub const CHUNK_BYTES: u32 = 1 << 20;
/// Fast, and still half the size of most disks.
const LEVEL: i32 = 3;
/// The unit of zeros and of digests.
const BLOCK: usize = 4096;

/// The sha256 of a chunk's bytes, as they are on the disk: its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// The name of what holds these bytes.
    pub fn of(bytes: &[u8]) -> ChunkId {
        ChunkId(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ChunkId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<ChunkId, &'static str> {
        // One way to write each: it becomes a key.
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err("not sha256 in lower-case hexadecimal"),
        };
        let text: &[u8; 64] = text
            .as_bytes()
            .try_into()
            .map_err(|_| "not the length of a sha256")?;
        let mut id = [0; 32];
        for (byte, pair) in id.iter_mut().zip(text.chunks(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(ChunkId(id))
    }
}

impl TryFrom<String> for ChunkId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<ChunkId, &'static str> {
        text.parse()
    }
}

impl From<ChunkId> for String {
    fn from(id: ChunkId) -> String {
        id.to_string()
    }
}

/// Packs a chunk with zstd.
pub(super) fn pack(raw: &[u8]) -> std::io::Result<Vec<u8>> {
    zstd::bulk::compress(raw, LEVEL)
}

/// The most that a chunk of so many bytes takes when it is packed.
pub(super) fn packed_limit(raw_len: usize) -> usize {
    // zstd's own bound is the length, 1/256 of it, and some for small ones.
    raw_len + raw_len / 128 + 1024
}

/// Unpacks a chunk of exactly `raw_len` bytes whose name is `id`; else tells what is wrong with it.
pub(super) fn unpack(packed: &[u8], raw_len: usize, id: ChunkId) -> Result<Vec<u8>, &'static str> {
    // It is unpacked into a buffer of this size: one that claims to hold more ends there, with no more memory used.
    let raw = zstd::bulk::decompress(packed, raw_len).map_err(|_| "cannot be unpacked")?;
    if raw.len() != raw_len {
        return Err("has not the size that it should have");
    }
    if ChunkId::of(&raw) != id {
        return Err("is not what its name says");
    }
    Ok(raw)
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let mut words = bytes.chunks_exact(16);
    words.all(|word| *word == [0; 16])
        && bytes
            .chunks_exact(16)
            .remainder()
            .iter()
            .all(|byte| *byte == 0)
}

/// The blocks of a chunk that are not all zeros, each with its place in the chunk.
pub(super) fn blocks(chunk: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let placed = chunk.chunks(BLOCK).enumerate();
    placed
        .filter(|(_, block)| !is_zero(block))
        .map(|(index, block)| (index as u64 * BLOCK as u64, block))
}

/// The digest of a whole disk, from its chunks in their order. It does not depend on which zeros are holes: sha256 over,
/// for each block of 4096 bytes that is not all zeros, its offset (8 bytes, little endian) and its content (a last short
/// block as it is), then the disk's length (8 bytes, little endian). Images and snapshots have the same.
#[derive(Default)]
pub(super) struct DiskDigest {
    sum: Sha256,
    used_bytes: u64,
}

impl DiskDigest {
    pub fn add(&mut self, offset: u64, chunk: &[u8]) {
        for (at, block) in blocks(chunk) {
            self.sum.update((offset + at).to_le_bytes());
            self.sum.update(block);
            self.used_bytes += block.len() as u64;
        }
    }

    /// The digest, in hexadecimal, and the bytes that are not in blocks of zeros.
    pub fn finish(self, size_bytes: u64) -> (String, u64) {
        let sum = self.sum.chain_update(size_bytes.to_le_bytes()).finalize();
        (ChunkId(sum.into()).to_string(), self.used_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_is_written_in_one_way() {
        let id = ChunkId::of(b"content");
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in [
            String::new(),
            id.to_string().to_uppercase(),
            format!("{id}0"),
            id.to_string()[1..].to_owned(),
            format!("../{}", &id.to_string()[3..]),
            format!("é{}", &id.to_string()[2..]),
        ] {
            assert!(wrong.parse::<ChunkId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_unpacks_to_more_than_it_should_is_refused() {
        let bomb = pack(&vec![0; 64 << 20]).unwrap();
        assert!(bomb.len() < 16 << 10);
        let id = ChunkId::of(&[0; 4096]);
        assert_eq!(unpack(&bomb, 4096, id), Err("cannot be unpacked"));
    }

    #[test]
    fn what_is_not_what_it_is_called_is_refused() {
        let packed = pack(b"this").unwrap();
        let id = ChunkId::of(b"that");
        assert_eq!(unpack(&packed, 4, id), Err("is not what its name says"));
        let (packed, id) = (pack(b"short").unwrap(), ChunkId::of(b"short"));
        let wrong = "has not the size that it should have";
        assert_eq!(unpack(&packed, 6, id), Err(wrong));
        assert_eq!(unpack(&packed[..6], 5, id), Err("cannot be unpacked"));
    }

    proptest! {
        #[test]
        fn chunks_come_back(raw in prop::collection::vec(any::<u8>(), 0..20_000)) {
            let packed = pack(&raw).unwrap();
            prop_assert!(packed.len() <= packed_limit(raw.len()));
            prop_assert_eq!(unpack(&packed, raw.len(), ChunkId::of(&raw)), Ok(raw));
        }

        #[test]
        fn zeros_are_known(len in 0usize..100, at in 0usize..100) {
            let mut bytes = vec![0; len];
            prop_assert!(is_zero(&bytes));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = 1;
                prop_assert!(!is_zero(&bytes));
            }
        }
    }
}
