//! Reading attributes (`struct nlattr`): type, length and value, aligned to four bytes.

/// Only the type, without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 4;

/// Each attribute's type and value; what is malformed ends the list.
pub fn attributes(mut data: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = data.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = data.get(HEADER..length)?;
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn find(data: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(data)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// A string up to its NUL; anything that is not UTF-8 is replaced.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

/// A number in network byte order.
pub fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// A number in network byte order.
pub fn be64(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(value.try_into().ok()?))
}

/// A number in the host's byte order.
pub fn ne32(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broken_lists_end_early() {
        assert_eq!(attributes(&[1, 0, 0, 0, 1, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[255; 64]).count(), 0);
        assert_eq!(find(&[5, 0, 7, 0x80, 9, 0, 0, 0], 7), Some(&[9][..]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes: Vec<u8>) {
            prop_assert!(attributes(&bytes).count() <= bytes.len() / HEADER);
        }
    }
}
