//! PAX extended headers and the numbers of tar headers.

use crate::refusal::Refusal;

/// What extended headers say about the entry that follows them.
#[derive(Debug, Default)]
pub(crate) struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(String, Vec<u8>)>,
    seen: bool,
}

impl Pax {
    /// Takes the records of one `x` header: `LENGTH KEY=VALUE\n`, the length counting itself.
    pub(crate) fn parse(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.seen = true;
        for record in (Records { rest: bytes }) {
            let (key, value) = record?;
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.add_xattr(name, value)?;
                continue;
            }
            match key {
                b"path" => self.path = Some(no_nul(value)?),
                b"linkpath" => self.link = Some(no_nul(value)?),
                b"size" => self.size = Some(decimal(value, "size")?),
                b"uid" => self.uid = Some(decimal(value, "owner")?),
                b"gid" => self.gid = Some(decimal(value, "group")?),
                b"mtime" => self.mtime = Some(time(value)?),
                key if key.starts_with(b"GNU.sparse.") => return Err(Refusal::PaxSparse),
                // Access times, user names, comments, vendors' own: nothing that a disk needs.
                _ => {}
            }
        }
        Ok(())
    }

    /// Global headers may comment, but not change entries: nobody needs that, and an entry's
    /// meaning should stand beside it.
    pub(crate) fn check_global(bytes: &[u8]) -> Result<(), Refusal> {
        for record in (Records { rest: bytes }) {
            let (key, _) = record?;
            let known: [&[u8]; 6] = [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"];
            if known.contains(&key)
                || key.starts_with(b"SCHILY.xattr.")
                || key.starts_with(b"GNU.sparse.")
            {
                return Err(Refusal::GlobalPax {
                    key: crate::error::printable(key, 64),
                });
            }
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let bad = || Refusal::BadXattr {
            name: crate::error::printable(name, 64),
        };
        let name = std::str::from_utf8(name).map_err(|_| bad())?;
        self.xattrs.retain(|(other, _)| other != name);
        self.xattrs.push((name.to_owned(), value.to_vec()));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.seen
    }

    pub(crate) fn set_path(&mut self, path: Vec<u8>) {
        self.seen = true;
        self.path = Some(path);
    }

    pub(crate) fn set_link(&mut self, link: Vec<u8>) {
        self.seen = true;
        self.link = Some(link);
    }

    pub(crate) fn take_path(&mut self) -> Option<Vec<u8>> {
        self.path.take()
    }

    pub(crate) fn take_link(&mut self) -> Option<Vec<u8>> {
        self.link.take()
    }

    pub(crate) fn take_xattrs(&mut self) -> Vec<(String, Vec<u8>)> {
        std::mem::take(&mut self.xattrs)
    }

    pub(crate) fn size(&self) -> Option<u64> {
        self.size
    }

    pub(crate) fn uid(&self) -> Option<u32> {
        self.uid
    }

    pub(crate) fn gid(&self) -> Option<u32> {
        self.gid
    }

    pub(crate) fn mtime(&self) -> Option<(i64, u32)> {
        self.mtime
    }
}

struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), Refusal>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = split_record(self.rest);
        self.rest = record.map_or(&[][..], |(_, _, rest)| rest);
        Some(
            record
                .map(|(key, value, _)| (key, value))
                .ok_or(Refusal::BadPax),
        )
    }
}

fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..len)?;
    let (end, body) = record.split_last()?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (*end == b'\n').then(|| (&body[..equals], &body[equals + 1..], &bytes[len..]))
}

fn no_nul(value: &[u8]) -> Result<Vec<u8>, Refusal> {
    if value.contains(&0) {
        return Err(Refusal::NulInName);
    }
    Ok(value.to_vec())
}

fn decimal<N: std::str::FromStr>(value: &[u8], field: &'static str) -> Result<N, Refusal> {
    let digits = value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| digits);
    text.and_then(|text| text.parse().ok())
        .ok_or(Refusal::BadNumber { field })
}

/// Seconds with an optional fraction, perhaps negative.
fn time(value: &[u8]) -> Result<(i64, u32), Refusal> {
    let bad = || Refusal::BadNumber { field: "time" };
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let dot = digits.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = match dot {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &[][..]),
    };
    let seconds: u64 = decimal(whole, "time")?;
    let seconds = i64::try_from(seconds).map_err(|_| bad())?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let padded = fraction
        .iter()
        .copied()
        .chain(std::iter::repeat(b'0'))
        .take(9);
    let nanos = padded.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

/// A number of a header: octal text, or base 256 when the first byte's top bit is set. Negative
/// and overflowing ones are refused.
pub(crate) fn parse_number(bytes: &[u8], field: &'static str) -> Result<u64, Refusal> {
    let bad = || Refusal::BadNumber { field };
    let first = bytes[0];
    if first & 0x80 != 0 {
        // The next bit is the sign.
        if first & 0x40 != 0 {
            return Err(bad());
        }
        let rest = bytes[1..].iter();
        return std::iter::once(&(first & 0x7f))
            .chain(rest)
            .try_fold(0u64, |sum, byte| {
                sum.checked_mul(256)
                    .map(|sum| sum + u64::from(*byte))
                    .ok_or_else(bad)
            });
    }
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    let text = bytes[..end].trim_ascii();
    if !text.iter().all(|byte| (b'0'..=b'7').contains(byte)) {
        return Err(bad());
    }
    // Some writers leave fields that they do not use empty.
    text.iter().try_fold(0u64, |sum, digit| {
        sum.checked_mul(8)
            .map(|sum| sum + u64::from(digit - b'0'))
            .ok_or_else(bad)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_octal_or_base_256_and_never_negative() {
        let number = |bytes: &[u8]| parse_number(bytes, "size");
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b" 644 \0\0\0"), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\x01\0"), Ok(256));
        for bad in [
            &b"-000644\0"[..],
            b"0000698\0",
            &[0xff; 8],
            &[0xff; 12],
            b"\x80\x01\0\0\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(
                number(bad),
                Err(Refusal::BadNumber { field: "size" }),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        assert_eq!(time(b"12"), Ok((12, 0)));
        assert_eq!(time(b"12.5"), Ok((12, 500_000_000)));
        assert_eq!(time(b"-12.25"), Ok((-13, 750_000_000)));
        assert_eq!(time(b"12.0000000019"), Ok((12, 1)));
        for bad in [&b""[..], b"1e9", b"1.x", b"99999999999999999999"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_parsed(key in "[a-z]{1,20}", value in prop::collection::vec(any::<u8>(), 0..200)) {
            let body = [key.as_bytes(), b"=", &value, b"\n"].concat();
            let mut len = body.len() + 2;
            while len.to_string().len() + 1 + body.len() != len {
                len = len.to_string().len() + 1 + body.len();
            }
            let record = [len.to_string().as_bytes(), b" ", &body].concat();
            let parsed: Vec<_> = Records { rest: &record }.collect();
            prop_assert_eq!(parsed, vec![Ok((key.as_bytes(), &value[..]))]);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pax::default().parse(&bytes);
            let _ = Pax::check_global(&bytes);
        }
    }
}
