//! The binary indexes that kmod's `modprobe` reads (kmod: `libkmod/libkmod-index.h`): a trie from
//! keys to values. All numbers are big-endian. A node is, as its flags say, a prefix, its children
//! (first and last byte, an offset for each byte between), and its values with their priorities.

use std::collections::BTreeMap;

const MAGIC: u32 = 0xb007_f457;
const VERSION: u32 = 0x0002_0001;
const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;

#[derive(Default)]
struct Node {
    values: Vec<(u32, String)>,
    children: BTreeMap<u8, Node>,
}

/// Renders an index of pairs of key and value; the order of the pairs is their priority. Keys that
/// are not ASCII cannot be looked up and are left out.
pub(crate) fn render(pairs: impl IntoIterator<Item = (String, String)>) -> Vec<u8> {
    let mut root = Node::default();
    for (priority, (key, value)) in (0..).zip(pairs) {
        // The depth of the trie is the length of the longest key.
        if !key.is_ascii() || key.len() > 512 {
            continue;
        }
        let mut node = &mut root;
        for byte in key.bytes() {
            node = node.children.entry(byte).or_default();
        }
        node.values.push((priority, value));
    }
    let mut out = Vec::new();
    for number in [MAGIC, VERSION, 0] {
        out.extend(number.to_be_bytes());
    }
    let offset = root.write(Vec::new(), &mut out);
    out[8..12].copy_from_slice(&offset.to_be_bytes());
    out
}

impl Node {
    /// Writes the children, then the node, and gives its offset with its flags. A chain of nodes
    /// with one child each becomes one node with a prefix.
    fn write(&self, mut prefix: Vec<u8>, out: &mut Vec<u8>) -> u32 {
        if self.values.is_empty()
            && let (1, Some((byte, child))) = (self.children.len(), self.children.first_key_value())
        {
            prefix.push(*byte);
            return child.write(prefix, out);
        }
        let written = self.children.iter();
        let offsets: BTreeMap<u8, u32> = written
            .map(|(byte, child)| (*byte, child.write(Vec::new(), out)))
            .collect();
        let mut offset = u32::try_from(out.len()).expect("indexes are a few MiB");
        if !prefix.is_empty() {
            offset |= HAS_PREFIX;
            out.extend(prefix);
            out.push(0);
        }
        if let (Some((first, _)), Some((last, _))) =
            (offsets.first_key_value(), offsets.last_key_value())
        {
            offset |= HAS_CHILDREN;
            out.extend([*first, *last]);
            for byte in *first..=*last {
                out.extend(offsets.get(&byte).copied().unwrap_or(0).to_be_bytes());
            }
        }
        if !self.values.is_empty() {
            offset |= HAS_VALUES;
            let count = u32::try_from(self.values.len()).expect("as many as modules");
            out.extend(count.to_be_bytes());
            for (priority, value) in &self.values {
                out.extend(priority.to_be_bytes());
                out.extend(value.as_bytes());
                out.push(0);
            }
        }
        offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks a key up as libkmod does.
    fn find(index: &[u8], key: &str) -> Vec<String> {
        let long = |at: usize| u32::from_be_bytes(index[at..at + 4].try_into().unwrap());
        let text = |at: usize| {
            let end = at + index[at..].iter().position(|byte| *byte == 0).unwrap();
            String::from_utf8(index[at..end].to_vec()).unwrap()
        };
        let (mut node, mut key) = (long(8), key.as_bytes());
        loop {
            let mut at = (node & 0x0fff_ffff) as usize;
            if node & HAS_PREFIX != 0 {
                let prefix = text(at);
                at += prefix.len() + 1;
                let Some(rest) = key.strip_prefix(prefix.as_bytes()) else {
                    return vec![];
                };
                key = rest;
            }
            let children = at;
            if node & HAS_CHILDREN != 0 {
                at += 2 + 4 * (usize::from(index[at + 1]) - usize::from(index[at]) + 1);
            }
            let Some((byte, rest)) = key.split_first() else {
                let count = if node & HAS_VALUES != 0 { long(at) } else { 0 };
                at += 4;
                let value = |_| {
                    let value = text(at + 4);
                    at += 5 + value.len();
                    value
                };
                return (0..count).map(value).collect();
            };
            if node & HAS_CHILDREN == 0 || !(index[children]..=index[children + 1]).contains(byte) {
                return vec![];
            }
            node = long(children + 2 + 4 * usize::from(byte - index[children]));
            if node == 0 {
                return vec![];
            }
            key = rest;
        }
    }

    #[test]
    fn every_key_is_found_with_all_its_values() {
        let pairs = [
            ("virtio", "a"),
            ("virtio_net", "b"),
            ("vsock", "c"),
            ("x", "d"),
            ("x", "e"),
        ];
        let index = render(pairs.map(|(key, value)| (key.into(), value.into())));
        assert_eq!(find(&index, "virtio"), ["a"]);
        assert_eq!(find(&index, "virtio_net"), ["b"]);
        assert_eq!(find(&index, "vsock"), ["c"]);
        assert_eq!(find(&index, "x"), ["d", "e"]);
        for absent in ["", "v", "virtio_", "virtio_nets", "y"] {
            assert!(find(&index, absent).is_empty(), "{absent}");
        }
        assert!(find(&render([]), "x").is_empty());
    }
}
