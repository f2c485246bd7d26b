//! ISO 9660 images of a few files, all in the root directory: what any guest mounts without tools. Level 1, without
//! extensions: names of at most eight and three letters, digits and underscores, which Linux shows in small letters.
//! Numbers of sections are those of ECMA-119, fourth edition.

/// Bytes of a logical sector and of a logical block.
const SECTOR: usize = 2048;
/// Numbers of the sectors; the first sixteen are the system's.
const DESCRIPTOR: usize = 16;
const TERMINATOR: usize = 17;
const PATHS_LITTLE: usize = 18;
const PATHS_BIG: usize = 19;
const ROOT: usize = 20;
const FILES: usize = 21;
/// The path table has one row, that of the root: 9.4.
const PATHS_BYTES: u32 = 10;

/// An image of these files.
///
/// # Panics
/// A name that level 1 does not have, a file of more than 4 GiB, or more than fit one sector of directory.
pub fn image(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut root = Vec::new();
    root.extend(record(&[0], ROOT, SECTOR, true));
    root.extend(record(&[1], ROOT, SECTOR, true));
    let mut at = FILES;
    for (name, content) in sorted(files) {
        root.extend(record(
            identifier(name).as_bytes(),
            at,
            content.len(),
            false,
        ));
        at += content.len().div_ceil(SECTOR);
    }
    assert!(root.len() <= SECTOR, "one sector of directory");
    let mut image = vec![0; at * SECTOR];
    let mut put = |sector: usize, bytes: &[u8]| {
        let from = sector * SECTOR;
        image[from..from + bytes.len()].copy_from_slice(bytes);
    };
    put(DESCRIPTOR, &descriptor(at));
    // 8.3: its type, the standard's name, its version.
    put(TERMINATOR, b"\xffCD001\x01");
    put(PATHS_LITTLE, &paths(u32::to_le_bytes, u16::to_le_bytes));
    put(PATHS_BIG, &paths(u32::to_be_bytes, u16::to_be_bytes));
    put(ROOT, &root);
    let mut at = FILES;
    for (_, content) in sorted(files) {
        put(at, content);
        at += content.len().div_ceil(SECTOR);
    }
    image
}

/// Directories are in the order of their identifiers: 9.3.
fn sorted<'a>(files: &[(&'a str, &'a [u8])]) -> Vec<(&'a str, &'a [u8])> {
    let mut files = files.to_vec();
    files.sort_by_key(|(name, _)| identifier(name));
    files
}

/// `NAME.EXT;VERSION`: 7.5.1.
fn identifier(name: &str) -> String {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let fits = |part: &str, most: usize| {
        part.len() <= most && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    assert!(
        fits(stem, 8) && !stem.is_empty() && fits(extension, 3),
        "{name}"
    );
    format!("{stem}.{extension};1").to_ascii_uppercase()
}

/// A number in both orders: 7.3.3.
fn both(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn both_short(number: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (number.to_le_bytes(), number.to_be_bytes());
    [a, b, c, d]
}

fn number(number: usize) -> u32 {
    number.try_into().expect("images are far smaller")
}

/// A directory record: 9.1.
fn record(identifier: &[u8], sector: usize, bytes: usize, directory: bool) -> Vec<u8> {
    let length = (33 + identifier.len()).next_multiple_of(2);
    let mut record = Vec::with_capacity(length);
    record.push(u8::try_from(length).expect("names are short"));
    // No extended attributes.
    record.push(0);
    record.extend(both(number(sector)));
    record.extend(both(number(bytes)));
    // No date; the same image for the same files.
    record.extend([0; 7]);
    record.push(if directory { 2 } else { 0 });
    record.extend([0; 2]);
    record.extend(both_short(1));
    record.push(u8::try_from(identifier.len()).expect("names are short"));
    record.extend(identifier);
    record.resize(length, 0);
    record
}

/// The path table: 9.4.
fn paths(long: fn(u32) -> [u8; 4], short: fn(u16) -> [u8; 2]) -> Vec<u8> {
    let mut row = vec![1, 0];
    row.extend(long(number(ROOT)));
    row.extend(short(1));
    row.extend([0, 0]);
    row
}

/// The primary volume descriptor: 8.4.
fn descriptor(sectors: usize) -> Vec<u8> {
    let mut all = b"\x01CD001\x01\0".to_vec();
    let text = |all: &mut Vec<u8>, words: &str, length: usize| {
        let from = all.len();
        all.extend(words.bytes());
        all.resize(from + length, b' ');
    };
    text(&mut all, "", 32);
    text(&mut all, "HUTCH_AGENT", 32);
    all.extend([0; 8]);
    all.extend(both(number(sectors)));
    all.extend([0; 32]);
    all.extend([both_short(1), both_short(1), both_short(SECTOR as u16)].concat());
    all.extend(both(PATHS_BYTES));
    all.extend(number(PATHS_LITTLE).to_le_bytes());
    all.extend([0; 4]);
    all.extend(number(PATHS_BIG).to_be_bytes());
    all.extend([0; 4]);
    all.extend(record(&[0], ROOT, SECTOR, true));
    // Set, publisher, preparer and application; then names of three files.
    text(&mut all, "", 4 * 128 + 3 * 37);
    // Four dates that are not given: 8.4.26.1.
    for _ in 0..4 {
        all.extend([b'0'; 16]);
        all.push(0);
    }
    all.push(1);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one file as a mount would: descriptor, root directory, record.
    fn read<'a>(image: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
        let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
        let descriptor = 16 * 2048;
        assert_eq!(&image[descriptor..descriptor + 6], b"\x01CD001");
        assert_eq!(number(descriptor + 80) * 2048, image.len());
        let (root, size) = (number(descriptor + 158), number(descriptor + 166));
        let (mut at, end) = (root * 2048, root * 2048 + size);
        while at < end && image[at] > 0 {
            let name = &image[at + 33..at + 33 + usize::from(image[at + 32])];
            if name == wanted.as_bytes() {
                let from = number(at + 2) * 2048;
                return Some(&image[from..from + number(at + 10)]);
            }
            at += usize::from(image[at]);
        }
        None
    }

    #[test]
    fn files_are_where_the_directory_says() {
        let big = vec![7; 5000];
        let files: [(&str, &[u8]); 3] = [("unit", b"u"), ("agent", &big), ("install.sh", b"")];
        let image = image(&files);
        assert_eq!(image.len() % SECTOR, 0);
        assert_eq!(read(&image, "AGENT.;1"), Some(&big[..]));
        assert_eq!(read(&image, "UNIT.;1"), Some(&b"u"[..]));
        assert_eq!(read(&image, "INSTALL.SH;1"), Some(&b""[..]));
        assert_eq!(read(&image, "install.sh"), None);
    }

    #[test]
    fn the_descriptor_has_its_fields_in_their_places() {
        let descriptor = descriptor(99);
        // 8.4: the root's record at 157, the version of the structure at 882, from 1.
        assert_eq!(descriptor[156], 34);
        assert_eq!(descriptor.len(), 882);
        assert_eq!(descriptor[881], 1);
    }
}
