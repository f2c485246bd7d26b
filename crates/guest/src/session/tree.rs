//! The calls about paths and what lies below them: renaming, other modes and owners, walks.

use bytes::Bytes;

use super::Session;
use super::file::{FileInfo, NAME};
use crate::error::{Error, Result};
use crate::{deadlines, limits, pb};

const WALK: &str = "Walk";

/// What of a path is to be changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: String,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Name or number, `user:group` allowed; empty for no other one.
    pub owner: String,
    /// All below it as well.
    pub recursive: bool,
}

/// What of a tree is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Walk {
    /// The directory.
    pub path: String,
    /// Where the page before ended; empty for the first.
    pub after: Vec<u8>,
    /// At most so many paths, and never more than 1000.
    pub limit: u32,
    /// How many directories down; 0 for all the way.
    pub depth: u32,
    /// Only paths that match; empty for all.
    pub pattern: String,
}

/// A path below the directory that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// From that directory: at most 4096 bytes, no name of it empty, `.` or `..`, no NUL.
    pub path: Vec<u8>,
    /// What it is.
    pub info: FileInfo,
}

/// One page of a walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkPage {
    /// Each directory before what is in it.
    pub found: Vec<Found>,
    /// Where the next page begins; none after the last. A page may have found nothing and still have a next one.
    pub next: Option<Vec<u8>>,
}

impl Session {
    /// Renames; what is at `to` is replaced, or with `keep_existing` the reason for a refusal.
    pub async fn move_file(&self, from: &str, to: &str, keep_existing: bool) -> Result<()> {
        self.needs("Move", limits::GENERATION_FILES)?;
        let request = pb::MoveRequest {
            from: from.into(),
            to: to.into(),
            keep_existing,
        };
        self.unary("Move", deadlines::MOVE, |mut agent| async move {
            agent.r#move(request).await
        })
        .await
        .map(drop)
    }

    /// Gives a path another mode or owner.
    pub async fn change_file(&self, change: &Change) -> Result<()> {
        self.needs("Change", limits::GENERATION_FILES)?;
        let request = pb::ChangeRequest {
            path: change.path.clone(),
            mode: change.mode,
            owner: change.owner.clone(),
            recursive: change.recursive,
        };
        self.unary("Change", deadlines::CHANGE, |mut agent| async move {
            agent.change(request).await
        })
        .await
        .map(drop)
    }

    /// What lies below a directory, one page of it. Links are not followed.
    pub async fn walk(&self, walk: &Walk) -> Result<WalkPage> {
        self.needs(WALK, limits::GENERATION_FILES)?;
        let limit = walk.limit.clamp(1, limits::LIST_ENTRIES);
        let request = pb::WalkRequest {
            path: walk.path.clone(),
            after: Bytes::copy_from_slice(&walk.after),
            limit,
            depth: walk.depth,
            pattern: walk.pattern.clone(),
        };
        let reply = self
            .unary(WALK, deadlines::WALK, |mut agent| async move {
                agent.walk(request).await
            })
            .await?;
        page(reply, &walk.after, limit)
    }
}

fn page(reply: pb::WalkReply, after: &[u8], limit: u32) -> Result<WalkPage> {
    let lie = |what| Error::Protocol { call: WALK, what };
    if reply.found.len() > limit as usize {
        return Err(lie("more paths than asked for"));
    }
    // Without an order a guest could keep us asking for ever.
    let mut last = after.to_vec();
    let mut follows = |path: &[u8]| {
        let follows = names(&last).lt(names(path));
        last = path.to_vec();
        follows
    };
    let mut found = Vec::with_capacity(reply.found.len());
    for file in reply.found {
        let info = file.info.ok_or_else(|| lie("no file information"))?;
        let info = FileInfo::check(WALK, info)?;
        if !possible(&file.path) || names(&file.path).next_back() != Some(&info.name) {
            return Err(lie("an impossible path"));
        }
        if !follows(&file.path) {
            return Err(lie("paths out of order"));
        }
        found.push(Found {
            path: file.path.into(),
            info,
        });
    }
    let next = Some(Vec::from(reply.next)).filter(|next| !next.is_empty());
    if let Some(next) = &next {
        let is_last = found.last().is_some_and(|last| last.path == *next);
        if !possible(next) || !(is_last || follows(next)) {
            return Err(lie("a walk that does not go on"));
        }
    }
    Ok(WalkPage { found, next })
}

/// The names of a path; an empty one has none.
fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
}

fn possible(path: &[u8]) -> bool {
    let impossible = |name: &[u8]| matches!(name, b"" | b"." | b"..");
    path.len() <= NAME && !path.contains(&0) && !path.split(|byte| *byte == b'/').any(impossible)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(after: &str, paths: &[&str], next: &str) -> Result<WalkPage> {
        let found = paths.iter().map(|path| pb::FoundFile {
            path: Bytes::copy_from_slice(path.as_bytes()),
            info: Some(pb::FileInfo {
                name: Bytes::copy_from_slice(path.rsplit('/').next().unwrap().as_bytes()),
                ..Default::default()
            }),
        });
        let reply = pb::WalkReply {
            found: found.collect(),
            next: Bytes::copy_from_slice(next.as_bytes()),
        };
        page(reply, after.as_bytes(), 3)
    }

    #[test]
    fn a_page_goes_on_in_the_order_of_a_walk_or_is_not_believed() {
        for (after, paths, next) in [
            ("", &["a", "a/b", "a-b"][..], "a-b"),
            ("a/b", &["a/b/c", "a/c"], ""),
            ("a", &[], "a/z"),
            ("a", &["b"], "c/d"),
        ] {
            let page = checked(after, paths, next).unwrap();
            assert_eq!(page.next.is_some(), !next.is_empty());
        }
        for (after, paths, next) in [
            ("", &["a", "a"][..], ""),
            ("", &["a-b", "a/b"], ""),
            ("b", &["a"], ""),
            ("a", &["a"], ""),
            ("a", &[], "a"),
            ("b", &[], "a/z"),
            ("", &["b"], "a"),
            ("", &["../a"], ""),
            ("", &["/a"], ""),
            ("", &["a//b"], ""),
            ("", &["a/"], ""),
            ("", &[""], ""),
            ("", &["a\0"], ""),
            ("", &[], ".."),
            ("", &["a", "b", "c", "d"], ""),
        ] {
            assert!(
                checked(after, paths, next).is_err(),
                "{after} {paths:?} {next}"
            );
        }
    }
}
