//! Writing a tree as an ext4 filesystem, with mkext4: first all metadata, then the content of the
//! files as the archives yield it.
//!
//! The filesystems grow online: mkext4 makes no resize inode, and Linux then goes over to
//! `meta_bg` descriptors by itself (`EXT4_IOC_RESIZE_FS`; seen to work on 6.1 up to 1 TiB). Added
//! groups get as many inodes as the first ones, so these get what a whole group should have.

use crate::archive::Meta;
use crate::error::Error;
use crate::limits::Limits;
use crate::refusal::Refusal;
use crate::tree::{Node, NodeKind, Place, Tree};
use mkext4::{FsBuilder, InodeCount, InodeHandle, Options, ROOT, RegionSink, SpecialKind};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const BLOCK: u64 = 4096;
const GROUP_BLOCKS: u64 = 32_768;
/// Stands in the superblock for "made at": a constant, so that equal input gives equal bytes
/// (2020-01-01; `e2fsck` dislikes times in the future).
const EPOCH: i64 = 1_577_836_800;

/// What a disk is for; decides label, spare room and journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// A root filesystem, which is written to and grows.
    Root,
    /// Kernel modules, mounted read-only.
    Modules,
}

/// Numbers of a filesystem, before it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    blocks: u64,
    inodes: u32,
    journal_blocks: u32,
}

/// A filesystem whose metadata is decided; `files` says whose content lies where in the archives.
pub(crate) struct Filesystem {
    pub(crate) layout: mkext4::Layout,
    pub(crate) files: BTreeMap<Place, InodeHandle>,
    pub(crate) content_bytes: u64,
    pub(crate) entries: u64,
}

impl Filesystem {
    /// Lays `tree` out. `seed` becomes the filesystem's UUID and hash seed.
    pub(crate) fn lay_out(
        tree: &Tree,
        purpose: Purpose,
        seed: &[u8; 32],
        limits: &Limits,
    ) -> Result<Self, Error> {
        let writer = |source| Error::Writer { source };
        let plan = plan(tree, purpose);
        let too_large = || Refusal::TooLarge {
            limit: limits.max_disk_bytes,
        };
        if plan.blocks * BLOCK > limits.max_disk_bytes {
            return Err(Error::Refused {
                layer: 0,
                entry: None,
                why: too_large(),
            });
        }
        let mut options = Options::new(plan.blocks * BLOCK, uuid(seed), EPOCH);
        options.inodes = InodeCount::Exact(plan.inodes);
        options.journal_blocks = Some(plan.journal_blocks);
        options.reserved_percent = 0;
        options.label = Some(purpose.label().into());
        let mut declared = Declared {
            builder: FsBuilder::new(options).map_err(writer)?,
            handles: HashMap::new(),
            files: BTreeMap::new(),
            content_bytes: 0,
            entries: 0,
        };
        declared.all(tree).map_err(writer)?;
        let Declared {
            builder,
            files,
            content_bytes,
            entries,
            ..
        } = declared;
        let layout = builder.seal().map_err(writer)?;
        Ok(Self {
            layout,
            files,
            content_bytes,
            entries,
        })
    }
}

impl Purpose {
    fn label(self) -> &'static str {
        match self {
            Purpose::Root => "hutch-root",
            Purpose::Modules => "hutch-modules",
        }
    }
}

struct Declared {
    builder: FsBuilder,
    handles: HashMap<usize, InodeHandle>,
    files: BTreeMap<Place, InodeHandle>,
    content_bytes: u64,
    entries: u64,
}

impl Declared {
    /// Declares everything in the order of names, so that the order of entries in an archive does
    /// not show. No recursion: the depth is the archive's choice.
    fn all(&mut self, tree: &Tree) -> mkext4::Result<()> {
        self.builder.set_meta(ROOT, meta(&tree.nodes[0].meta))?;
        self.xattrs(ROOT, &tree.nodes[0])?;
        let mut stack = vec![(0, ROOT)];
        while let Some((dir, handle)) = stack.pop() {
            let NodeKind::Directory { children } = &tree.nodes[dir].kind else {
                continue;
            };
            for (name, child) in children {
                self.entries += 1;
                let node = &tree.nodes[child.node];
                if let Some(first) = self.handles.get(&child.node) {
                    self.builder.hardlink(handle, name, *first)?;
                    continue;
                }
                let new = self.one(handle, name, node)?;
                self.xattrs(new, node)?;
                if matches!(node.kind, NodeKind::Directory { .. }) {
                    stack.push((child.node, new));
                } else {
                    self.handles.insert(child.node, new);
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, dir: InodeHandle, name: &str, node: &Node) -> mkext4::Result<InodeHandle> {
        let meta = meta(&node.meta);
        let builder = &mut self.builder;
        Ok(match &node.kind {
            NodeKind::Directory { .. } => builder.mkdir(dir, name, meta)?,
            NodeKind::File { size, place } => {
                let handle = builder.file(dir, name, meta, *size)?;
                if *size > 0 {
                    self.files.insert(*place, handle);
                    self.content_bytes += size;
                }
                handle
            }
            NodeKind::Symlink { target } => builder.symlink(dir, name, target, meta)?,
            NodeKind::Character { major, minor } => {
                let kind = SpecialKind::Char {
                    major: *major,
                    minor: *minor,
                };
                builder.mknod(dir, name, meta, kind)?
            }
            NodeKind::Block { major, minor } => {
                let kind = SpecialKind::Block {
                    major: *major,
                    minor: *minor,
                };
                builder.mknod(dir, name, meta, kind)?
            }
            NodeKind::Fifo => builder.mknod(dir, name, meta, SpecialKind::Fifo)?,
        })
    }

    fn xattrs(&mut self, handle: InodeHandle, node: &Node) -> mkext4::Result<()> {
        for (name, value) in &node.xattrs {
            let on_disk = crate::acl::is_acl(name)
                .then(|| crate::acl::to_ext4(value))
                .flatten();
            self.builder
                .set_xattr(handle, name, on_disk.as_deref().unwrap_or(value))?;
        }
        Ok(())
    }
}

fn meta(meta: &Meta) -> mkext4::Meta {
    mkext4::Meta::new(meta.mode, meta.uid, meta.gid, meta.mtime)
}

/// A UUID (version 8: "made by the application") from a digest.
fn uuid(seed: &[u8; 32]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&seed[..16]);
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}

/// How large the filesystem must be: an upper bound of what the tree needs, spare room, and the
/// tables of each group.
fn plan(tree: &Tree, purpose: Purpose) -> Plan {
    let (used, nodes) = usage(tree);
    let root = purpose == Purpose::Root;
    let spare = if root {
        (used / 4).max((64 << 20) / BLOCK)
    } else {
        256
    };
    // A journal costs nothing until it is written, but it never grows with the disk.
    let journal_blocks: u64 = match (root, used + spare) {
        (false, _) => 1024,
        (true, 0..65_536) => 4096,
        (true, 65_536..131_072) => 8192,
        (true, _) => 16_384,
    };
    let free_inodes = if root { (nodes / 4).max(4096) } else { 0 };
    let mut blocks = used + spare + journal_blocks;
    loop {
        // mkext4 refuses a journal of more than a quarter.
        blocks = blocks.max(journal_blocks * 4).next_multiple_of(256);
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        // One inode for 16 KiB, as mke2fs does.
        let ratio = if root { GROUP_BLOCKS / 4 } else { 16 };
        let per_group = (nodes + free_inodes + 16)
            .div_ceil(groups)
            .next_multiple_of(16)
            .max(ratio);
        // Two bitmaps, the inode table, and a copy of superblock and descriptors.
        let overhead = groups * (2 + per_group / 16 + 1 + groups.div_ceil(128)) + 64;
        let wanted = used + spare + journal_blocks + overhead;
        if per_group <= GROUP_BLOCKS && wanted <= blocks {
            let inodes = u32::try_from(per_group * groups).unwrap_or(u32::MAX);
            let journal_blocks = u32::try_from(journal_blocks).expect("at most 16384");
            return Plan {
                blocks,
                inodes,
                journal_blocks,
            };
        }
        blocks = wanted.max(
            blocks
                + if per_group > GROUP_BLOCKS {
                    GROUP_BLOCKS
                } else {
                    0
                },
        );
    }
}

/// Blocks and inodes that the tree's reachable part needs at most.
fn usage(tree: &Tree) -> (u64, u64) {
    let mut blocks = 64;
    let mut nodes = 0;
    let mut seen = vec![false; tree.nodes.len()];
    let mut stack = vec![0];
    while let Some(index) = stack.pop() {
        if std::mem::replace(&mut seen[index], true) {
            continue;
        }
        nodes += 1;
        let node = &tree.nodes[index];
        blocks += u64::from(!node.xattrs.is_empty());
        match &node.kind {
            NodeKind::Directory { children } => {
                let bytes: u64 = children
                    .keys()
                    .map(|name| (name.len() as u64 + 15) & !3)
                    .sum();
                // Hashed directories fill their blocks by half at worst, under two index levels.
                blocks += 2 + if bytes > 3500 {
                    bytes / 1800 + bytes / 500_000 + 4
                } else {
                    0
                };
                stack.extend(children.values().map(|child| child.node));
            }
            // Besides its data a large file needs a few blocks for its extents.
            NodeKind::File { size, .. } => {
                blocks += size.div_ceil(BLOCK)
                    + size.div_ceil(64 << 20) / 64
                    + 2 * u64::from(*size > 256 << 20);
            }
            NodeKind::Symlink { target } => blocks += u64::from(target.len() > 59),
            _ => {}
        }
    }
    (blocks, nodes)
}

/// A disk file that was empty: blocks of zeros are not written, so they stay holes.
pub(crate) struct HoleySink<'a> {
    file: &'a File,
}

impl<'a> HoleySink<'a> {
    /// Empties `file` and gives it its final length.
    pub(crate) fn new(file: &'a File, len: u64) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(len)?;
        Ok(Self { file })
    }
}

impl RegionSink for HoleySink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Runs of blocks with content go out in one call each.
        let mut start = None;
        for (index, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let at = index * BLOCK as usize;
            match (is_zero(block), start) {
                (false, None) => start = Some(at),
                (true, Some(from)) => {
                    self.file
                        .write_all_at(&bytes[from..at], offset + from as u64)?;
                    start = None;
                }
                _ => {}
            }
        }
        match start {
            Some(from) => self.file.write_all_at(&bytes[from..], offset + from as u64),
            None => Ok(()),
        }
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Without an early exit inside of a piece the compiler uses vector instructions.
    bytes
        .chunks(256)
        .all(|piece| piece.iter().fold(0, |sum, byte| sum | byte) == 0)
}
