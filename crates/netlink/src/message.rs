//! Messages (`struct nlmsghdr`), written and read.

use crate::attribute::attributes;
use crate::{Error, Result};

pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;

const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
const NESTED: u16 = 0x8000;

/// One message to the kernel: its type, what it does, the header of its kind and attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// For errors: what it does, a verb and its object.
    pub(crate) what: &'static str,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    body: Vec<u8>,
    too_long: bool,
}

impl Message {
    pub(crate) fn new(what: &'static str, kind: u16, flags: u16, header: &[u8]) -> Self {
        Self {
            what,
            kind,
            flags,
            body: header.to_vec(),
            too_long: false,
        }
    }

    /// Adds an attribute.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or_else(|_| {
            self.too_long = true;
            0
        });
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute made of attributes.
    pub(crate) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.body.len();
        self.put(kind | NESTED, &[]);
        inner(self);
        match u16::try_from(self.body.len() - start) {
            Ok(length) => self.body[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.too_long = true,
        }
        self
    }

    /// Adds a string with its NUL.
    pub(crate) fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes)
    }

    pub(crate) fn be32(&mut self, kind: u16, number: u32) -> &mut Self {
        self.put(kind, &number.to_be_bytes())
    }

    pub(crate) fn be64(&mut self, kind: u16, number: u64) -> &mut Self {
        self.put(kind, &number.to_be_bytes())
    }

    pub(crate) fn ne32(&mut self, kind: u16, number: u32) -> &mut Self {
        self.put(kind, &number.to_ne_bytes())
    }

    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// One of the same purpose with nothing in it, to collect attributes.
    pub(crate) fn empty(&self) -> Self {
        Self::new(self.what, 0, 0, &[])
    }

    /// Adds what another one has collected.
    pub(crate) fn append(&mut self, other: &Self) {
        self.body.extend(&other.body);
        self.too_long |= other.too_long;
    }

    /// Appends the message as the kernel takes it.
    pub(crate) fn write(&self, sequence: u32, flags: u16, to: &mut Vec<u8>) -> Result<()> {
        if self.too_long {
            return Err(Error::TooLong(self.what));
        }
        let length = HEADER + self.body.len();
        to.extend(
            u32::try_from(length)
                .map_err(|_| Error::TooLong(self.what))?
                .to_ne_bytes(),
        );
        to.extend(self.kind.to_ne_bytes());
        to.extend((self.flags | flags).to_ne_bytes());
        to.extend(sequence.to_ne_bytes());
        to.extend(0u32.to_ne_bytes());
        to.extend(&self.body);
        to.resize(to.len().next_multiple_of(4), 0);
        Ok(())
    }
}

/// A message from the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// The socket that it answers, or whose change it tells.
    pub(crate) port: u32,
    pub(crate) body: &'a [u8],
}

/// The messages of a datagram; what is malformed ends the list.
pub(crate) fn messages(mut data: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = data.first_chunk()?;
        let number = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = number(0) as usize;
        let body = data.get(HEADER..length)?;
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: number(8),
            port: number(12),
            body,
        })
    })
}

const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;
const ERROR_TEXT: u16 = 1;

/// The code in a `NLMSG_ERROR` (0 for an acknowledgement) and the kernel's words about it.
pub(crate) fn verdict(received: &Received<'_>) -> Option<(i32, String)> {
    let body = received.body;
    let code = i32::from_ne_bytes(*body.first_chunk()?);
    let said = || {
        if received.flags & ACK_TLVS == 0 {
            return None;
        }
        let asked = match received.flags & CAPPED {
            0 => crate::attribute::ne32(body.get(4..8)?)? as usize,
            _ => HEADER,
        };
        let rest = body.get(asked.checked_next_multiple_of(4)?.checked_add(4)?..)?;
        let (_, text) = attributes(rest).find(|(kind, _)| *kind == ERROR_TEXT)?;
        Some(crate::attribute::text(text))
    };
    Some((code, said().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_reads_back() {
        let mut message = Message::new("try", 7, REQUEST, &[1, 2, 3, 4]);
        message.text(1, "abc").nest(2, |inner| {
            inner.be32(3, 9);
        });
        let mut bytes = Vec::new();
        message.write(5, ACK, &mut bytes).unwrap();
        let read: Vec<_> = messages(&bytes).collect();
        assert_eq!(read.len(), 1);
        assert_eq!(
            (read[0].kind, read[0].flags, read[0].sequence),
            (7, REQUEST | ACK, 5)
        );
        let inner: &[u8] = &[8, 0, 3, 0, 0, 0, 0, 9];
        let all: Vec<_> = attributes(&read[0].body[4..]).collect();
        assert_eq!(all, [(1, &b"abc\0"[..]), (2, inner)]);
    }

    #[test]
    fn what_is_too_long_is_refused_when_it_is_written() {
        let mut message = Message::new("try", 7, 0, &[]);
        message.nest(1, |inner| {
            inner.put(1, &[0; 40_000]).put(2, &[0; 40_000]);
        });
        let written = message.write(0, 0, &mut Vec::new());
        assert!(matches!(written, Err(Error::TooLong("try"))));
        let mut message = Message::new("try", 7, 0, &[]);
        message.put(1, &[0; 65_532]);
        assert!(message.write(0, 0, &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn any_datagram_is_read_to_an_end(bytes: Vec<u8>, flags: u16) {
            prop_assert!(messages(&bytes).count() <= bytes.len() / HEADER);
            let received = Received { kind: 2, flags, sequence: 0, port: 0, body: &bytes };
            prop_assert_eq!(verdict(&received).is_some(), bytes.len() >= 4);
        }
    }
}
