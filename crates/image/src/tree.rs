//! The tree that one or several archives describe, as an index: names, owners, links and where
//! each file's content lies. No content is held and nothing is written.
//!
//! Rules:
//! - Within one archive a later entry of the same kind replaces the earlier one, as `tar` does; a
//!   directory keeps its children. An entry of another kind is refused.
//! - A later archive may replace anything, and removes by OCI whiteouts: `.wh.NAME` the name,
//!   `.wh..wh..opq` all that lower archives put into the directory. Other `.wh..wh.` names are
//!   bookkeeping of old layer formats and skipped.
//! - Links are never followed: an entry below a symbolic link is refused. Parents that no archive
//!   names are made, 0755 and owned by root.

use crate::archive::{Entry, EntryKind, Meta};
use crate::error::printable;
use crate::limits::Limits;
use crate::refusal::Refusal;
use std::collections::BTreeMap;

/// Where the content of a file lies: the archive and the entry's number in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    pub(crate) ordinal: u64,
}

#[derive(Debug)]
pub(crate) enum NodeKind {
    Directory { children: BTreeMap<Box<str>, Child> },
    File { size: u64, place: Place },
    Symlink { target: Box<str> },
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) node: usize,
    /// The last archive that named it.
    layer: usize,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) kind: NodeKind,
    pub(crate) meta: Meta,
    pub(crate) xattrs: Box<[(String, Vec<u8>)]>,
    /// Hard links beyond the first name, counting removed ones.
    links: u32,
}

/// Room that every node takes here and in the ext4 writer, roughly.
const NODE_BYTES: u64 = 640;
/// What the ext4 writer holds for each directory, long link and attribute block.
const BLOCK_BYTES: u64 = 4096;

/// The merged tree. Node 0 is the root.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    layer: usize,
    ordinal: u64,
    entries: u64,
    content_bytes: u64,
    metadata_bytes: u64,
    limits: Limits,
}

impl Tree {
    pub(crate) fn new(limits: &Limits) -> Self {
        let meta = Meta {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
        };
        Self {
            nodes: vec![directory(meta)],
            layer: 0,
            ordinal: 0,
            entries: 0,
            content_bytes: 0,
            metadata_bytes: 0,
            limits: limits.clone(),
        }
    }

    /// From here on entries come from the archive number `layer`, which lies over the earlier.
    pub(crate) fn begin_layer(&mut self, layer: usize) {
        (self.layer, self.ordinal) = (layer, 0);
    }

    /// Adds the next entry of the current archive.
    pub(crate) fn add(&mut self, mut entry: Entry) -> Result<(), Refusal> {
        let place = Place {
            layer: self.layer,
            ordinal: self.ordinal,
        };
        self.ordinal += 1;
        self.charge(&entry)?;
        let path = std::mem::take(&mut entry.path);
        let path = components(&path, self.limits.max_depth)?;
        let Some((name, parents)) = path.split_last() else {
            return self.set_root(entry);
        };
        let dir = self.parent(parents, entry.meta.mtime)?;
        if let Some(removed) = name.strip_prefix(".wh.") {
            return self.whiteout(dir, removed);
        }
        check_xattrs(&entry.xattrs)?;
        if let EntryKind::HardLink { target } = &entry.kind {
            let node = self.link_target(target)?;
            return self.insert(dir, name, node);
        }
        let existing = self.children(dir).get(*name).map(|child| child.node);
        if let (EntryKind::Directory, Some(node)) = (&entry.kind, existing)
            && matches!(self.nodes[node].kind, NodeKind::Directory { .. })
        {
            self.nodes[node].meta = entry.meta;
            self.nodes[node].xattrs = entry.xattrs.into();
            return self.insert(dir, name, node);
        }
        let node = new_node(entry, place)?;
        self.nodes.push(node);
        self.insert(dir, name, self.nodes.len() - 1)
    }

    /// Puts `node` under `name`, if what stands there may be replaced.
    fn insert(&mut self, dir: usize, name: &str, node: usize) -> Result<(), Refusal> {
        let layer = self.layer;
        if let Some(old) = self.children(dir).get(name) {
            let (before, now) = (self.nodes[old.node].words(), self.nodes[node].words());
            if old.layer == layer && before != now {
                return Err(Refusal::Conflict { before, now });
            }
        }
        self.children_mut(dir)
            .insert(name.into(), Child { node, layer });
        Ok(())
    }

    fn charge(&mut self, entry: &Entry) -> Result<(), Refusal> {
        let limits = &self.limits;
        self.entries += 1;
        if self.entries > limits.max_entries {
            return Err(Refusal::TooManyEntries {
                limit: limits.max_entries,
            });
        }
        self.content_bytes = self.content_bytes.saturating_add(entry.size);
        if self.content_bytes > limits.max_content_bytes {
            return Err(Refusal::TooLarge {
                limit: limits.max_content_bytes,
            });
        }
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let (target, block) = match &entry.kind {
            EntryKind::Symlink { target } => (target.len(), target.len() > 59),
            kind => (0, *kind == EntryKind::Directory),
        };
        let blocks = u64::from(block) + u64::from(xattrs > 0);
        self.metadata_bytes +=
            NODE_BYTES + blocks * BLOCK_BYTES + (entry.path.len() + xattrs + target) as u64;
        if self.metadata_bytes > limits.max_metadata_bytes {
            return Err(Refusal::TooMuchMetadata {
                limit: limits.max_metadata_bytes,
            });
        }
        Ok(())
    }

    fn set_root(&mut self, entry: Entry) -> Result<(), Refusal> {
        if entry.kind != EntryKind::Directory {
            let now = entry.kind.words();
            return Err(Refusal::Conflict {
                before: EntryKind::Directory.words(),
                now,
            });
        }
        check_xattrs(&entry.xattrs)?;
        self.nodes[0].meta = entry.meta;
        self.nodes[0].xattrs = entry.xattrs.into();
        Ok(())
    }

    /// The directory that `parents` leads to; missing ones are made.
    fn parent(&mut self, parents: &[&str], mtime: (i64, u32)) -> Result<usize, Refusal> {
        let mut dir = 0;
        for (depth, name) in parents.iter().enumerate() {
            let found = self.children(dir).get(*name).map(|child| child.node);
            let node = match found {
                Some(node) if matches!(self.nodes[node].kind, NodeKind::Directory { .. }) => node,
                Some(node) => {
                    let parent = printable(parents[..=depth].join("/").as_bytes(), 200);
                    let kind = self.nodes[node].words();
                    return Err(Refusal::BelowNonDirectory { parent, kind });
                }
                None => {
                    self.metadata_bytes += NODE_BYTES + BLOCK_BYTES + name.len() as u64;
                    self.nodes.push(directory(Meta {
                        mode: 0o755,
                        uid: 0,
                        gid: 0,
                        mtime,
                    }));
                    self.nodes.len() - 1
                }
            };
            // Named by this archive, at least as a parent: an opaque mark must not remove it.
            let layer = self.layer;
            self.children_mut(dir)
                .insert((*name).into(), Child { node, layer });
            dir = node;
        }
        Ok(dir)
    }

    fn link_target(&mut self, target: &[u8]) -> Result<usize, Refusal> {
        let printed = || printable(target, 200);
        let path = components(target, self.limits.max_depth)
            .map_err(|_| Refusal::LinkOutside { target: printed() })?;
        let mut node = 0;
        for name in &path {
            let NodeKind::Directory { children } = &self.nodes[node].kind else {
                return Err(Refusal::LinkTargetMissing { target: printed() });
            };
            let child = children.get(*name);
            node = child
                .ok_or_else(|| Refusal::LinkTargetMissing { target: printed() })?
                .node;
        }
        if matches!(self.nodes[node].kind, NodeKind::Directory { .. }) {
            return Err(Refusal::LinkToDirectory { target: printed() });
        }
        self.nodes[node].links += 1;
        // ext4's EXT4_LINK_MAX.
        if self.nodes[node].links >= 65_000 {
            return Err(Refusal::TooManyLinks);
        }
        Ok(node)
    }

    fn whiteout(&mut self, dir: usize, removed: &str) -> Result<(), Refusal> {
        match removed {
            "" | "." | ".." => Err(Refusal::BadWhiteout),
            ".wh..opq" => {
                self.remove_lower(dir);
                Ok(())
            }
            _ if removed.starts_with(".wh.") => Ok(()),
            name => {
                let layer = self.layer;
                match self.children(dir).get(name).copied() {
                    Some(child) if child.layer < layer => {
                        self.children_mut(dir).remove(name);
                    }
                    // This archive put its own there: only what lies below it goes.
                    Some(child) => self.remove_lower(child.node),
                    None => {}
                }
                Ok(())
            }
        }
    }

    /// Removes what archives below the current one put into the directory `dir`.
    fn remove_lower(&mut self, dir: usize) {
        let layer = self.layer;
        let mut stack = vec![dir];
        while let Some(node) = stack.pop() {
            if let NodeKind::Directory { children } = &mut self.nodes[node].kind {
                children.retain(|_, child| child.layer == layer);
                stack.extend(children.values().map(|child| child.node));
            }
        }
    }

    fn children(&self, dir: usize) -> &BTreeMap<Box<str>, Child> {
        match &self.nodes[dir].kind {
            NodeKind::Directory { children } => children,
            _ => unreachable!("only directories are passed here"),
        }
    }

    fn children_mut(&mut self, dir: usize) -> &mut BTreeMap<Box<str>, Child> {
        match &mut self.nodes[dir].kind {
            NodeKind::Directory { children } => children,
            _ => unreachable!("only directories are passed here"),
        }
    }

    /// Drops an empty `lost+found` of the root, which the filesystem makes itself.
    pub(crate) fn finish(&mut self) -> Result<(), Refusal> {
        let Some(child) = self.children(0).get("lost+found") else {
            return Ok(());
        };
        match &self.nodes[child.node].kind {
            NodeKind::Directory { children } if children.is_empty() => {
                self.children_mut(0).remove("lost+found");
                Ok(())
            }
            _ => Err(Refusal::LostAndFound),
        }
    }
}

impl Node {
    fn words(&self) -> &'static str {
        match &self.kind {
            NodeKind::Directory { .. } => EntryKind::Directory.words(),
            NodeKind::File { .. } => EntryKind::File.words(),
            NodeKind::Symlink { .. } => "a symbolic link",
            NodeKind::Character { .. } => "a character device",
            NodeKind::Block { .. } => "a block device",
            NodeKind::Fifo => EntryKind::Fifo.words(),
        }
    }
}

fn directory(meta: Meta) -> Node {
    let kind = NodeKind::Directory {
        children: BTreeMap::new(),
    };
    Node {
        kind,
        meta,
        xattrs: Box::default(),
        links: 0,
    }
}

fn new_node(entry: Entry, place: Place) -> Result<Node, Refusal> {
    let kind = match entry.kind {
        EntryKind::Directory => NodeKind::Directory {
            children: BTreeMap::new(),
        },
        EntryKind::File => NodeKind::File {
            size: entry.size,
            place,
        },
        EntryKind::Symlink { target } => NodeKind::Symlink {
            target: symlink_target(target)?,
        },
        EntryKind::Character { major, minor } => NodeKind::Character { major, minor },
        EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
        EntryKind::Fifo => NodeKind::Fifo,
        EntryKind::HardLink { .. } => unreachable!("hard links make no node"),
    };
    Ok(Node {
        kind,
        meta: entry.meta,
        xattrs: entry.xattrs.into(),
        links: 0,
    })
}

fn symlink_target(target: Vec<u8>) -> Result<Box<str>, Refusal> {
    if target.is_empty() || target.len() > 4095 || target.contains(&0) {
        return Err(Refusal::BadSymlink);
    }
    String::from_utf8(target)
        .map(Into::into)
        .map_err(|_| Refusal::NotUtf8)
}

/// The names that `path` is made of; none for the root. `.` and doubled slashes mean nothing.
fn components(path: &[u8], max_depth: usize) -> Result<Vec<&str>, Refusal> {
    if path.is_empty() {
        return Err(Refusal::EmptyPath);
    }
    if path[0] == b'/' {
        return Err(Refusal::AbsolutePath);
    }
    if path.contains(&0) {
        return Err(Refusal::NulInName);
    }
    if path.len() > 4096 {
        return Err(Refusal::PathTooLong);
    }
    let text = std::str::from_utf8(path).map_err(|_| Refusal::NotUtf8)?;
    let names: Vec<&str> = text
        .split('/')
        .filter(|name| !matches!(*name, "" | "."))
        .collect();
    if names.contains(&"..") {
        return Err(Refusal::ParentPath);
    }
    if names.iter().any(|name| name.len() > 255) {
        return Err(Refusal::NameTooLong);
    }
    if names.len() > max_depth {
        return Err(Refusal::TooDeep { limit: max_depth });
    }
    Ok(names)
}

/// Namespaces that ext4 keeps, and a size that fits one block whatever the layout.
fn check_xattrs(xattrs: &[(String, Vec<u8>)]) -> Result<(), Refusal> {
    let mut bytes = 0;
    for (name, value) in xattrs {
        let known = ["user.", "trusted.", "security."]
            .iter()
            .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
            || crate::acl::is_acl(name);
        if !known || name.len() > 255 || name.contains('\0') {
            return Err(Refusal::BadXattr {
                name: printable(name.as_bytes(), 64),
            });
        }
        if crate::acl::is_acl(name) && crate::acl::to_ext4(value).is_none() {
            return Err(Refusal::BadXattr { name: name.clone() });
        }
        bytes += 16 + name.len().next_multiple_of(4) + value.len().next_multiple_of(4);
    }
    // One block, less its header and end mark.
    if bytes > 4096 - 32 - 4 {
        return Err(Refusal::XattrsTooLarge);
    }
    Ok(())
}
