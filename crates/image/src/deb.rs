//! Debian packages: the kernel and its modules taken out of a `.deb` (deb(5): an `ar` archive that
//! holds `data.tar`, packed or not). Nothing else of a package is looked at, no script is run.

use crate::archive::{Archive, EntryKind, Failure};
use crate::error::Error;
use crate::limits::Limits;
use crate::unpack::Unpacked;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Whether the file begins like a package.
pub(crate) fn is_package(path: &Path) -> Result<bool, Error> {
    let mut magic = Vec::new();
    let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut magic));
    read.map_err(Error::io("read", path))?;
    Ok(magic == b"!<arch>\n")
}

/// Where the files of a kernel package are put: `vmlinuz-RELEASE` and `modules/RELEASE/…`,
/// modules unpacked. Symbolic links (to headers) are left out.
pub(crate) fn take_kernel(deb: &Path, into: &Path) -> Result<(), Error> {
    let limits = Limits {
        max_unpacked_bytes: 4 << 30,
        ..Limits::default()
    };
    let mut file = File::open(deb).map_err(Error::io("open", deb))?;
    let len = seek_data(&mut file, deb)?;
    let unpacked = Unpacked::new(file.take(len), &limits).map_err(Error::io("unpack", deb))?;
    let mut archive = Archive::new(unpacked, &limits);
    while let Some(entry) = archive.next().map_err(|failure| fail(deb, failure))? {
        if entry.kind != EntryKind::File {
            continue;
        }
        let Some(name) = std::str::from_utf8(&entry.path).ok().and_then(target) else {
            continue;
        };
        put(&mut archive, &into.join(name), &limits)?;
    }
    Ok(())
}

/// The name below our directory for a path of the package; `None` for what we do not need.
fn target(path: &str) -> Option<String> {
    let path = path.strip_prefix("./").unwrap_or(path);
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return None;
    }
    if let Some(kernel) = path.strip_prefix("boot/") {
        return kernel.starts_with("vmlinuz-").then(|| kernel.to_owned());
    }
    let path = path.strip_prefix("usr/").unwrap_or(path);
    path.strip_prefix("lib/")
        .filter(|path| path.starts_with("modules/"))
        .map(str::to_owned)
}

/// Writes one file; packed modules are unpacked, so that every loader can read them.
pub(crate) fn put(content: &mut dyn Read, path: &Path, limits: &Limits) -> Result<(), Error> {
    let dir = path.parent().expect("a name was joined");
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let name = path.to_str().unwrap_or_default();
    let plain = [".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|end| name.strip_suffix(end));
    let path = plain.map_or_else(|| path.to_owned(), |stem| format!("{stem}.ko").into());
    let write = || -> io::Result<()> {
        let mut file = File::create_new(&path)?;
        match plain {
            Some(_) => io::copy(&mut Unpacked::new(content, limits)?, &mut file)?,
            None => io::copy(content, &mut file)?,
        };
        Ok(())
    };
    write().map_err(Error::io("write", &path))
}

/// Goes to the content of `data.tar*` and gives its length.
fn seek_data(file: &mut File, path: &Path) -> Result<u64, Error> {
    let not = || Error::Package {
        path: path.to_owned(),
        why: "this is no Debian package",
    };
    let read = Error::io("read", path);
    let mut seek = || -> io::Result<Option<u64>> {
        let mut magic = [0; 8];
        file.read_exact(&mut magic)?;
        if magic != *b"!<arch>\n" {
            return Ok(None);
        }
        loop {
            let mut header = [0; 60];
            file.read_exact(&mut header)?;
            let size = std::str::from_utf8(&header[48..58]).ok().map(str::trim);
            let Some(size) = size.and_then(|size| size.parse::<u32>().ok()) else {
                return Ok(None);
            };
            if header[..16].starts_with(b"data.tar") {
                return Ok(Some(size.into()));
            }
            let skip = i64::from(size) + i64::from(size % 2);
            io::Seek::seek(file, io::SeekFrom::Current(skip))?;
        }
    };
    match seek() {
        Ok(len) => len.ok_or_else(not),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(not()),
        Err(error) => Err(read(error)),
    }
}

fn fail(deb: &Path, failure: Failure) -> Error {
    match failure {
        Failure::Refused { path, why } => {
            let entry = path.map(|path| crate::error::printable(&path, 200));
            Error::Refused {
                layer: 0,
                entry,
                why,
            }
        }
        Failure::Io(source) => Error::io("read", deb)(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kernel_and_modules_are_taken_and_no_path_leads_out() {
        assert_eq!(target("./boot/vmlinuz-6.1").as_deref(), Some("vmlinuz-6.1"));
        assert_eq!(
            target("./usr/lib/modules/6.1/a.ko").as_deref(),
            Some("modules/6.1/a.ko")
        );
        for other in [
            "./boot/config-6.1",
            "./etc/passwd",
            "./lib/modules/../../x",
            "/boot/vmlinuz-1",
            "lib/modules",
        ] {
            assert_eq!(target(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_package_is_said_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [&b""[..], b"!<arch>\n", b"!<arch>\nshort", &[b'x'; 200]] {
            let path = dir.path().join("x.deb");
            std::fs::write(&path, bytes).unwrap();
            let error = take_kernel(&path, dir.path()).unwrap_err();
            assert!(
                error.to_string().ends_with("this is no Debian package"),
                "{error}"
            );
        }
    }
}
