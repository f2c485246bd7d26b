//! The bytes of a frame: encoding, and decoding from a stream that may hold anything. No IO, no state of a connection.
//!
//! ```text
//! 0      4      5         9          13       15      19
//! │ magic│ kind │ session │ sequence │ length │ crc32 │ payload …
//! ```
//! Numbers are big-endian. The checksum covers kind to length and the payload. SYN and ACK carry a nonce of 16 bytes,
//! DATA 1 to 4096 bytes, FIN none.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// First bytes of each frame: no valid UTF-8, and the first one occurs once, so no magic hides inside another.
pub const MAGIC: [u8; 4] = [0xf5, b'H', b'u', 0x9c];
/// Bytes before the payload.
pub const HEADER: usize = 19;
/// Largest payload, in bytes.
pub const PAYLOAD: usize = 4096;
/// Bytes of the nonce in SYN and ACK.
pub const NONCE: usize = 16;
/// Zeros sent before a SYN or ACK: enough to complete any frame that was cut off before it.
pub const FILLER: usize = HEADER + PAYLOAD;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The host begins a session.
    Syn = 1,
    /// The guest answers with the same session and nonce.
    Ack = 2,
    /// Bytes of the session.
    Data = 3,
    /// The sender has no more bytes in this session.
    Fin = 4,
}

impl Kind {
    fn parse(byte: u8) -> Option<Self> {
        [Self::Syn, Self::Ack, Self::Data, Self::Fin]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    fn allows(self, length: usize) -> bool {
        match self {
            Self::Syn | Self::Ack => length == NONCE,
            Self::Data => (1..=PAYLOAD).contains(&length),
            Self::Fin => length == 0,
        }
    }
}

/// One frame whose checksum was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// The session that it belongs to.
    pub session: u32,
    /// Its place among DATA and FIN of its direction and session, from 0, wrapping; 0 in SYN and ACK.
    pub sequence: u32,
    /// Its bytes.
    pub payload: Bytes,
}

/// Appends one frame to `out`.
///
/// # Panics
/// When the payload's length is not one that `kind` allows.
pub fn encode(out: &mut BytesMut, kind: Kind, session: u32, sequence: u32, payload: &[u8]) {
    assert!(
        kind.allows(payload.len()),
        "{kind:?} with {} bytes",
        payload.len()
    );
    let start = out.len();
    out.reserve(HEADER + payload.len());
    out.put_slice(&MAGIC);
    out.put_u8(kind as u8);
    out.put_u32(session);
    out.put_u32(sequence);
    out.put_u16(payload.len() as u16);
    let checksum = checksum(&out[start..], payload);
    out.put_u32(checksum);
    out.put_slice(payload);
}

/// Appends filler and then a SYN or ACK to `out`.
pub fn encode_handshake(out: &mut BytesMut, kind: Kind, session: u32, nonce: &[u8; NONCE]) {
    out.put_bytes(0, FILLER);
    encode(out, kind, session, 0, nonce);
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[MAGIC.len()..HEADER - 4]);
    hasher.update(payload);
    hasher.finalize()
}

/// What the decoder found next.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A whole frame.
    Frame(Frame),
    /// Bytes that belong to no valid frame, skipped. Not reported for zeros.
    Garbage,
}

/// Finds frames in a stream of bytes. Holds less than one frame beyond what was last put in.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Where to put the next bytes: append only.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next frame, or that garbage was skipped; `None` when more bytes are needed.
    pub fn next_found(&mut self) -> Option<Found> {
        let magic = self.buffer.iter().position(|byte| *byte == MAGIC[0]);
        let before = magic.unwrap_or(self.buffer.len());
        let garbage = self.buffer[..before].iter().any(|byte| *byte != 0);
        self.buffer.advance(before);
        if garbage {
            return Some(Found::Garbage);
        }
        let seen = self.buffer.len().min(MAGIC.len());
        if self.buffer[..seen] != MAGIC[..seen] {
            return Some(self.skip());
        }
        if self.buffer.len() < HEADER {
            return None;
        }
        let mut header = &self.buffer[MAGIC.len()..HEADER];
        let kind = Kind::parse(header.get_u8());
        let (session, sequence) = (header.get_u32(), header.get_u32());
        let (length, sum) = (usize::from(header.get_u16()), header.get_u32());
        let Some(kind) = kind.filter(|kind| kind.allows(length)) else {
            return Some(self.skip());
        };
        if self.buffer.len() < HEADER + length {
            return None;
        }
        if checksum(
            &self.buffer[..HEADER],
            &self.buffer[HEADER..HEADER + length],
        ) != sum
        {
            return Some(self.skip());
        }
        self.buffer.advance(HEADER);
        let payload = self.buffer.split_to(length).freeze();
        Some(Found::Frame(Frame {
            kind,
            session,
            sequence,
            payload,
        }))
    }

    /// Gives up what looked like a frame: only its first byte, since a real one may begin inside.
    fn skip(&mut self) -> Found {
        self.buffer.advance(1);
        Found::Garbage
    }
}

#[cfg(test)]
mod tests;
