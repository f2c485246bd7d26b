//! What an export is: a list of chunks, and the facts about the disk that they make up. Written last, so an export
//! without one is none; read with no trust in it.

use hutch_contract::name::Name;
use serde::{Deserialize, Serialize};

use super::chunk::{CHUNK_BYTES, ChunkId};

/// The format that is written, and the only one that is read.
const FORMAT: u32 = 1;
/// The most bytes of a manifest that are read: those of a disk with some 900 GiB in it.
pub(super) const MAX_BYTES: usize = 64 << 20;

/// What is exported besides the disk's content; all of it may be a lie in a manifest of somebody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// What the machine was called, where it is the disk of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
    /// What the snapshot was called, where it is of one that has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
    /// What the image was called that the disk began as, or is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
    /// When it was asked for, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
}

/// A disk as it is exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are not in blocks of zeros.
    pub used_bytes: u64,
    /// The digest of the whole, in hexadecimal, as of an image's disk.
    pub sha256: String,
    chunk_bytes: u32,
    chunks: Vec<Run>,
    /// Where it is from.
    pub about: About,
}

/// Chunks beside each other. What no run tells of is zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// The number of the first, counted from the disk's begin.
    at: u64,
    sha256: Vec<ChunkId>,
}

/// The limits on a disk that somebody hands in.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest disk, in bytes.
    pub size_bytes: u64,
    /// The most bytes in chunks.
    pub content_bytes: u64,
}

/// A chunk and where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub offset: u64,
    pub len: usize,
    pub id: ChunkId,
}

/// The chunks of a disk, as they are found from its begin to its end.
#[derive(Default)]
pub(super) struct Chunks(Vec<Run>);

impl Chunks {
    pub fn add(&mut self, number: u64, id: ChunkId) {
        match self.0.last_mut() {
            Some(run) if run.at + run.sha256.len() as u64 == number => run.sha256.push(id),
            _ => self.0.push(Run {
                at: number,
                sha256: vec![id],
            }),
        }
    }
}

impl Manifest {
    pub(super) fn new(
        chunks: Chunks,
        size_bytes: u64,
        (sha256, used_bytes): (String, u64),
        about: About,
    ) -> Manifest {
        Manifest {
            format: FORMAT,
            size_bytes,
            used_bytes,
            sha256,
            chunk_bytes: CHUNK_BYTES,
            chunks: chunks.0,
            about,
        }
    }

    /// How many chunks it has.
    pub fn chunks(&self) -> u64 {
        self.chunks.iter().map(|run| run.sha256.len() as u64).sum()
    }

    /// The chunks from the disk's begin to its end.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> {
        let chunk = u64::from(self.chunk_bytes);
        let numbered = self.chunks.iter().flat_map(|run| {
            let placed = run.sha256.iter().enumerate();
            placed.map(move |(index, id)| (run.at + index as u64, *id))
        });
        numbered.map(move |(number, id)| {
            let offset = number * chunk;
            let len = chunk.min(self.size_bytes - offset) as usize;
            Piece { offset, len, id }
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has string keys only")
    }

    /// Reads a manifest, or tells what is wrong with it.
    pub(super) fn decode(bytes: &[u8], limits: &Limits) -> Result<Manifest, String> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let unread = |error: serde_json::Error| format!("cannot be read: {error}");
        let head: Head = serde_json::from_slice(bytes).map_err(unread)?;
        if head.format != FORMAT {
            let format = head.format;
            return Err(format!(
                "has format {format}, and {FORMAT} is what is known"
            ));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(unread)?;
        manifest.check(limits)?;
        Ok(manifest)
    }

    fn check(&self, limits: &Limits) -> Result<(), String> {
        let chunk = u64::from(self.chunk_bytes);
        if !self.chunk_bytes.is_power_of_two() || !(64 << 10..=16 << 20).contains(&chunk) {
            return Err(format!("has chunks of {chunk} bytes"));
        }
        if self.size_bytes == 0 || self.size_bytes > limits.size_bytes {
            let (size, most) = (self.size_bytes, limits.size_bytes);
            return Err(format!(
                "is of a disk of {size} bytes; from 1 to {most} may be"
            ));
        }
        self.sha256
            .parse::<ChunkId>()
            .map_err(|why| format!("has a digest that is {why}"))?;
        let count = self.size_bytes.div_ceil(chunk);
        // The first number that the next run may have.
        let mut next = 0;
        for run in &self.chunks {
            let len = run.sha256.len() as u64;
            if len == 0 || run.at < next || run.at >= count || len > count - run.at {
                return Err(format!("has chunks at {} that cannot be there", run.at));
            }
            next = run.at + len;
        }
        let content = self.chunks() * chunk;
        if content > limits.content_bytes.saturating_add(chunk) {
            let most = limits.content_bytes;
            return Err(format!(
                "has {content} bytes in chunks, and {most} are the most"
            ));
        }
        if self.used_bytes > content {
            return Err("has more bytes than its chunks".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const LIMITS: Limits = Limits {
        size_bytes: 1 << 40,
        content_bytes: 1 << 30,
    };

    fn about() -> About {
        About {
            machine: Some("web".parse().unwrap()),
            snapshot: None,
            image: Some("busybox".parse().unwrap()),
            created_at_ms: 1_790_000_000_000,
        }
    }

    fn good() -> Value {
        json!({
            "format": 1, "size_bytes": 10 << 20, "used_bytes": 4096, "chunk_bytes": 1 << 20,
            "sha256": ChunkId::of(b"whole").to_string(),
            "chunks": [{"at": 0, "sha256": [ChunkId::of(b"a").to_string()]}, {"at": 9, "sha256": [ChunkId::of(b"b").to_string()]}],
            "about": {"created_at_ms": 0, "machine": "web"},
        })
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let decode = |value: &Value| Manifest::decode(value.to_string().as_bytes(), &LIMITS);
        assert!(decode(&good()).is_ok());
        let id = ChunkId::of(b"a").to_string();
        let many = vec![id.clone(); 1026];
        for (pointer, wrong, problem) in [
            ("/format", json!(2), "format 2"),
            ("/size_bytes", json!(0), "of 0 bytes"),
            ("/size_bytes", json!(u64::MAX), "bytes; from 1"),
            ("/size_bytes", json!(-1), "cannot be read"),
            ("/size_bytes", json!(1 << 20), "at 9 that cannot"),
            ("/used_bytes", json!(3 << 20), "more bytes than its chunks"),
            ("/chunk_bytes", json!(0), "chunks of 0"),
            ("/chunk_bytes", json!(1), "chunks of 1"),
            ("/chunk_bytes", json!(3 << 19), "chunks of"),
            ("/chunk_bytes", json!(1u32 << 31), "chunks of"),
            ("/sha256", json!("00"), "length of a sha256"),
            ("/chunks/1/at", json!(0), "at 0 that cannot"),
            ("/chunks/1/at", json!(10), "at 10 that cannot"),
            ("/chunks/1/at", json!(u64::MAX), "that cannot be there"),
            ("/chunks/0/sha256", json!([]), "at 0 that cannot"),
            (
                "/chunks/0/sha256",
                json!(["../../../etc/passwd"]),
                "length of a sha256",
            ),
            (
                "/chunks/0/sha256/0",
                json!(id.replace('a', "A")),
                "lower-case",
            ),
            ("/chunks/0/sha256", json!(many), "that cannot be there"),
            ("/about/machine", json!("../web"), "is not a name"),
        ] {
            let mut value = good();
            *value.pointer_mut(pointer).unwrap() = wrong;
            let refused = decode(&value).unwrap_err();
            assert!(refused.contains(problem), "{pointer}: {refused}");
        }
        let mut value = good();
        value["size_bytes"] = json!(1u64 << 40);
        value["chunks"] = json!([{"at": 5, "sha256": many}]);
        assert!(decode(&value).unwrap_err().contains("bytes in chunks"));
        assert!(Manifest::decode(b"[[[[[[[[", &LIMITS).is_err());
        assert!(Manifest::decode("[".repeat(1 << 20).as_bytes(), &LIMITS).is_err());
    }

    proptest! {
        #[test]
        fn pieces_come_back_in_their_places(numbers in prop::collection::btree_set(0u64..64, 0..40), short in 0u64..1 << 20) {
            let size = (64 << 20) - short;
            let mut chunks = Chunks::default();
            for number in &numbers {
                chunks.add(*number, ChunkId::of(&number.to_le_bytes()));
            }
            let whole = (ChunkId::of(b"whole").to_string(), 0);
            let manifest = Manifest::new(chunks, size, whole, about());
            let read = Manifest::decode(&manifest.encode(), &LIMITS).unwrap();
            prop_assert_eq!(&read, &manifest);
            prop_assert_eq!(read.chunks(), numbers.len() as u64);
            let mut pieces = read.pieces();
            for number in numbers {
                let offset = number << 20;
                let len = (size - offset).min(1 << 20) as usize;
                let id = ChunkId::of(&number.to_le_bytes());
                prop_assert_eq!(pieces.next(), Some(Piece { offset, len, id }));
            }
            prop_assert_eq!(pieces.next(), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::decode(&bytes, &LIMITS);
        }
    }
}
