//! Making archives, also such as no honest program makes, and disks from them.

use hutch_image::{Built, Error, Limits, Purpose, Refusal, build_disk, check_ext4};
use mkext4::reader::Fs;
use std::fs::File;
use std::io::Write;

/// One entry to be, or raw bytes between entries.
pub struct Tar {
    bytes: Vec<u8>,
}

/// What stands in a header; change the fields before adding it.
pub struct Head {
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    pub size: Option<u64>,
}

pub fn head(kind: u8) -> Head {
    let mode = if kind == b'5' { 0o755 } else { 0o644 };
    Head {
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: 1_700_000_000,
        link: vec![],
        device: (0, 0),
        size: None,
    }
}

pub fn link(kind: u8, target: &str) -> Head {
    Head {
        link: target.into(),
        ..head(kind)
    }
}

impl Tar {
    pub fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// Adds an entry; the name goes into the header as it is and must fit there.
    pub fn add(mut self, name: impl AsRef<[u8]>, head: Head, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.as_ref().len()].copy_from_slice(name.as_ref());
        header.as_old_mut().linkname[..head.link.len()].copy_from_slice(&head.link);
        header.as_old_mut().linkflag = [head.kind];
        header.set_mode(head.mode);
        header.set_uid(head.uid);
        header.set_gid(head.gid);
        header.set_mtime(head.mtime);
        header.set_size(head.size.unwrap_or(content.len() as u64));
        header.set_device_major(head.device.0).unwrap();
        header.set_device_minor(head.device.1).unwrap();
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.add(name, head(b'0'), content)
    }

    pub fn dir(self, name: &str) -> Self {
        self.add(name, head(b'5'), b"")
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(b'x', records)
    }

    pub fn extended(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut len = rest + 1;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            text.extend(format!("{len} {key}=").as_bytes());
            text.extend(*value);
            text.push(b'\n');
        }
        self.add("pax", head(kind), &text)
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    /// The archive so far, without an end.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }

    pub fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }
}

pub fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A disk made from archives and found clean by `e2fsck` and by mkext4's own check.
pub struct Disk {
    pub file: tempfile::NamedTempFile,
    pub built: Built,
}

pub fn build_with(layers: &[&[u8]], limits: &Limits) -> Result<Disk, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut inputs: Vec<File> = layers.iter().map(|bytes| file_of(bytes)).collect();
    let built = build_disk(
        &mut inputs,
        file.as_file(),
        Purpose::Root,
        limits,
        &mut |_| {},
    )?;
    let disk = Disk { file, built };
    disk.check();
    Ok(disk)
}

pub fn build(layers: &[&[u8]]) -> Disk {
    build_with(layers, &Limits::default()).unwrap()
}

/// The rule that an archive breaks, and the entry that is named for it.
pub fn refusal(tar: &[u8]) -> (Option<String>, Refusal) {
    refusal_with(tar, &Limits::default())
}

pub fn refusal_with(tar: &[u8], limits: &Limits) -> (Option<String>, Refusal) {
    match build_with(&[tar], limits) {
        Err(Error::Refused { entry, why, .. }) => (entry, why),
        Err(error) => panic!("another error than a refusal: {error:?}"),
        Ok(_) => panic!("the archive was taken"),
    }
}

impl Disk {
    pub fn check(&self) {
        match check_ext4(self.file.path()) {
            Err(Error::MissingProgram { program, .. }) => {
                eprintln!("skipped: the check by {program}, which is not installed");
            }
            outcome => outcome.unwrap(),
        }
        let issues = self.fs().verify().unwrap();
        assert!(issues.is_empty(), "{issues:?}");
        assert_eq!(
            self.file.as_file().metadata().unwrap().len(),
            self.built.size_bytes
        );
    }

    pub fn fs(&self) -> Fs<File> {
        Fs::open(self.file.reopen().unwrap()).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }

    pub fn read(&self, path: &str) -> Vec<u8> {
        let fs = self.fs();
        fs.read_file(fs.resolve(path).unwrap()).unwrap()
    }

    pub fn exists(&self, path: &str) -> bool {
        self.fs().resolve(path).is_ok()
    }

    pub fn names(&self, path: &str) -> Vec<String> {
        let fs = self.fs();
        let entries = fs.read_dir(fs.resolve(path).unwrap()).unwrap();
        let names = entries
            .iter()
            .map(|entry| String::from_utf8_lossy(&entry.name).into_owned());
        let mut names: Vec<_> = names
            .filter(|name| !matches!(name.as_str(), "." | ".." | "lost+found"))
            .collect();
        names.sort();
        names
    }
}
