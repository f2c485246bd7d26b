//! Archives to disk: index, layout, content, digest.

use crate::archive::{Archive, Failure};
use crate::error::{Error, printable};
use crate::ext4::{Filesystem, HoleySink, Purpose, is_zero};
use crate::limits::Limits;
use crate::progress::{OnProgress, Progress};
use crate::tree::{Place, Tree};
use crate::unpack::Unpacked;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;

/// What an error of the copy was about.
const COPY: &str = "write the layer";

/// A finished disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Built {
    /// Length of the disk file, bytes.
    pub size_bytes: u64,
    /// Bytes of it that are not zero, counted in blocks of 4096: what it takes on a filesystem
    /// that keeps holes.
    pub used_bytes: u64,
    /// Digest of the disk as [`disk_digest`] defines it, hexadecimal.
    pub sha256: String,
    /// Names in the filesystem, hard links included; 0 for an imported disk.
    pub files: u64,
}

/// Writes the tree of the `layers` (tar archives, lowest first, each plain or packed with gzip, xz
/// or zstd) to the file `output` as an ext4 filesystem. What `output` held is lost. Equal archives
/// give equal bytes.
pub fn build_disk(
    layers: &mut [File],
    output: &File,
    purpose: Purpose,
    limits: &Limits,
    progress: OnProgress<'_>,
) -> Result<Built, Error> {
    build_disk_and_layer(layers, output, None, purpose, limits, progress)
}

/// The same, and `layer` becomes the last of the `layers` as it was read: a tar packed with zstd.
pub(crate) fn build_disk_and_layer(
    layers: &mut [File],
    output: &File,
    layer: Option<&File>,
    purpose: Purpose,
    limits: &Limits,
    progress: OnProgress<'_>,
) -> Result<Built, Error> {
    let (tree, digests) = index(layers, limits, progress)?;
    let seed = digests
        .iter()
        .fold(Sha256::new(), |sum, digest| sum.chain_update(digest));
    let seed: [u8; 32] = seed.chain_update(purpose_tag(purpose)).finalize().into();
    let filesystem = Filesystem::lay_out(&tree, purpose, &seed, limits)?;
    drop(tree);
    let outputs = (output, layer);
    write(&filesystem, layers, &digests, outputs, limits, progress)?;
    let (sha256, used_bytes) = disk_digest(output, progress)?;
    let size_bytes = filesystem.layout.image_len();
    Ok(Built {
        size_bytes,
        used_bytes,
        sha256,
        files: filesystem.entries,
    })
}

fn purpose_tag(purpose: Purpose) -> [u8; 1] {
    match purpose {
        Purpose::Root => [0],
        Purpose::Modules => [1],
    }
}

/// The first reading: the tree, and a digest of each unpacked archive.
fn index(
    layers: &mut [File],
    limits: &Limits,
    progress: OnProgress<'_>,
) -> Result<(Tree, Vec<[u8; 32]>), Error> {
    let mut tree = Tree::new(limits);
    let mut digests = Vec::new();
    let total = layers
        .iter()
        .map(|file| file.metadata().map_or(0, |meta| meta.len()))
        .sum();
    let mut before = 0;
    for (layer, file) in layers.iter_mut().enumerate() {
        tree.begin_layer(layer);
        let mut archive = open(file, layer, limits, None)?;
        let mut reported = 0;
        while let Some(entry) = archive.next().map_err(|failure| fail(layer, failure))? {
            let path = entry.path.clone();
            tree.add(entry).map_err(|why| {
                fail(
                    layer,
                    Failure::Refused {
                        path: Some(path),
                        why,
                    },
                )
            })?;
            let done = before + archive.input().packed_bytes();
            if done >= reported + (4 << 20) {
                reported = done;
                progress(Progress::bytes("reading the archive", done, Some(total)));
            }
        }
        before += archive.input().packed_bytes();
        digests.push(sha256(archive)?);
    }
    tree.finish().map_err(|why| {
        fail(
            0,
            Failure::Refused {
                path: Some(b"lost+found".to_vec()),
                why,
            },
        )
    })?;
    progress(Progress::bytes("reading the archive", total, Some(total)));
    Ok((tree, digests))
}

/// The second reading: contents go to where the layout has room for them.
fn write(
    filesystem: &Filesystem,
    layers: &mut [File],
    digests: &[[u8; 32]],
    (output, copy): (&File, Option<&File>),
    limits: &Limits,
    progress: OnProgress<'_>,
) -> Result<(), Error> {
    let total = Some(filesystem.content_bytes);
    let writer_error = |source| Error::Writer { source };
    let sink = HoleySink::new(output, filesystem.layout.image_len())
        .map_err(Error::stream("size the disk"))?;
    let mut writer = filesystem.layout.writer(sink).map_err(writer_error)?;
    let (mut done, mut reported) = (0, 0);
    let last = layers.len().saturating_sub(1);
    for (layer, file) in layers.iter_mut().enumerate() {
        let mut archive = open(file, layer, limits, copy.filter(|_| layer == last))?;
        let mut ordinal = 0;
        while let Some(entry) = archive.next().map_err(|failure| fail(layer, failure))? {
            let place = Place { layer, ordinal };
            ordinal += 1;
            let Some(handle) = filesystem.files.get(&place) else {
                continue;
            };
            let mut content = Content {
                archive: &mut archive,
                failure: None,
            };
            if let Err(error) = writer.fill(*handle, &mut content) {
                return Err(match content.failure.take() {
                    Some(failure) => fail(layer, with_path(failure, entry.path)),
                    None => writer_error(error),
                });
            }
            done += entry.size;
            if done >= reported + (4 << 20) {
                reported = done;
                progress(Progress::bytes("writing the disk", done, total));
            }
        }
        // Only now is it sure that both readings saw the same.
        if sha256(archive)? != digests[layer] {
            return Err(Error::Changed { layer });
        }
    }
    writer.finish().map_err(writer_error)?;
    progress(Progress::bytes(
        "writing the disk",
        filesystem.content_bytes,
        total,
    ));
    Ok(())
}

fn open<'a>(
    file: &'a mut File,
    layer: usize,
    limits: &Limits,
    copy: Option<&'a File>,
) -> Result<Archive<Unpacked<'a>>, Error> {
    file.rewind().map_err(Error::stream("rewind an archive"))?;
    let mut unpacked = Unpacked::new(file, limits).map_err(|error| fail(layer, error.into()))?;
    if let Some(copy) = copy {
        unpacked.copy_to(copy).map_err(Error::stream(COPY))?;
    }
    Ok(Archive::new(unpacked, limits))
}

fn sha256(archive: Archive<Unpacked<'_>>) -> Result<[u8; 32], Error> {
    archive
        .into_input()
        .into_sha256()
        .map_err(Error::stream(COPY))
}

fn fail(layer: usize, failure: Failure) -> Error {
    match failure {
        Failure::Refused { path, why } => {
            let entry = path.map(|path| format!("`{}`", printable(&path, 200)));
            Error::Refused { layer, entry, why }
        }
        Failure::Io(source) => Error::Stream {
            action: "read an archive",
            source,
        },
    }
}

fn with_path(failure: Failure, entry: Vec<u8>) -> Failure {
    match failure {
        Failure::Refused { why, .. } => Failure::Refused {
            path: Some(entry),
            why,
        },
        io => io,
    }
}

/// The content of one file. mkext4 flattens read errors to text, so they are kept here.
struct Content<'a, R> {
    archive: &'a mut Archive<R>,
    failure: Option<Failure>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.archive.read(buffer).map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failure = Some(error.into());
            }
            kind.into()
        })
    }
}

/// The digest of a disk and the bytes of it that are not zero. It does not depend on which zeros
/// are holes: SHA-256 over, for each block of 4096 bytes that is not all zero, its offset (8
/// bytes, little endian) and its content (a last short block as it is), then the disk's length
/// (8 bytes, little endian). Hexadecimal.
pub fn disk_digest(disk: &File, progress: OnProgress<'_>) -> Result<(String, u64), Error> {
    let read = Error::stream("read the disk");
    let (digest, used) = digest(disk, progress).map_err(read)?;
    Ok((hex(&digest), used))
}

fn digest(disk: &File, progress: OnProgress<'_>) -> io::Result<([u8; 32], u64)> {
    let len = disk.metadata()?.len();
    let mut sum = Sha256::new();
    let mut used = 0;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let data = match rustix::fs::seek(disk, SeekFrom::Data(at)) {
            Ok(data) if data < len => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        // Holes of the host's filesystem may have any size; our blocks do not.
        let end = rustix::fs::seek(disk, SeekFrom::Hole(data))?
            .next_multiple_of(4096)
            .min(len);
        at = (data - data % 4096).max(at);
        while at < end {
            let want = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            disk.read_exact_at(&mut buffer[..want], at)?;
            for (index, block) in buffer[..want].chunks(4096).enumerate() {
                if !is_zero(block) {
                    sum.update((at + index as u64 * 4096).to_le_bytes());
                    sum.update(block);
                    used += block.len() as u64;
                }
            }
            at += want as u64;
        }
        progress(Progress::bytes("checking the disk", at, Some(len)));
    }
    sum.update(len.to_le_bytes());
    Ok((sum.finalize().into(), used))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
