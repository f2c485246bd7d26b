//! Walking a tree in order, from the start or from where an earlier walk stopped: each directory before what is in it,
//! the names of a directory by their bytes.
//!
//! The tree belongs to the guest's users, who may change it meanwhile. Links are never followed: every directory is opened
//! name by name from the first one. Memory is bounded by [`HELD`], open files by two, and paths by what the kernel takes,
//! however deep and wide the tree is.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use hutch_guest::{limits, pb};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::{self, Errno};
use tonic::Status;

use super::glob::{Pattern, Places};
use super::{PAGE, failed, info, is_dots};

/// Longest path below the first directory, in bytes; what is deeper is not gone into.
const PATH: usize = 4095;
/// Names read from a directory at once.
const NAMES: usize = 4096;
/// Bytes of names that wait; more are forgotten and read again.
const HELD: usize = 4 * 1024 * 1024;
/// Names looked at for one page.
const LOOKS: usize = 50_000;

/// A walk below one directory.
pub struct Walk {
    top: OwnedFd,
    levels: Vec<Level>,
    /// The directory of the last level, while it is open.
    open: Option<Rc<OwnedFd>>,
    held: usize,
    depth: usize,
    pattern: Option<Pattern>,
}

/// A directory on the way down.
struct Level {
    /// Bytes of its path, which is the beginning of the last level's.
    path: Vec<u8>,
    /// The name that was last taken.
    after: Vec<u8>,
    waiting: VecDeque<Vec<u8>>,
    /// There may be names after those.
    more: bool,
    places: Option<Places>,
}

/// What a walk has come to.
pub struct Step {
    /// Its path from the first directory.
    pub path: Vec<u8>,
    /// What it is; links are not followed.
    pub stat: Stat,
    /// Whether it matches the pattern.
    pub matches: bool,
    parent: Rc<OwnedFd>,
}

impl Walk {
    /// Begins below the directory `top`, behind the path `after` if that is not empty.
    ///
    /// # Errors
    /// A path that no walk gives.
    pub fn begin(
        top: OwnedFd,
        after: &[u8],
        depth: u32,
        pattern: Option<Pattern>,
    ) -> Result<Self, Status> {
        let mut walk = Self {
            top,
            levels: Vec::new(),
            open: None,
            held: 0,
            depth: match depth {
                0 => usize::MAX,
                depth => depth as usize,
            },
            pattern,
        };
        let start = walk.pattern.as_ref().map(Pattern::start);
        walk.push(Vec::new(), start);
        if after.is_empty() {
            return Ok(walk);
        }
        let possible = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
        if after.len() > PATH || !after.split(|byte| *byte == b'/').all(possible) {
            return Err(Status::invalid_argument("no walk has come to that place"));
        }
        let mut path = Vec::new();
        for name in after.split(|byte| *byte == b'/') {
            if let Some(level) = walk.levels.last_mut() {
                level.after = name.to_vec();
            }
            path = joined(&path, name);
            if !walk.descend(path.clone(), name) {
                break;
            }
        }
        Ok(walk)
    }

    /// Goes on to the next path.
    ///
    /// # Errors
    /// The kernel's of the first directory, and of a disk that cannot be read. What vanished, was never a directory or is
    /// forbidden is passed over.
    pub fn next(&mut self) -> io::Result<Option<Step>> {
        while let Some(level) = self.levels.last() {
            if level.waiting.is_empty() && !level.more {
                self.levels.pop();
                self.open = None;
                continue;
            }
            if self.open.is_none() {
                match beneath(&self.top, &level.path) {
                    Ok(dir) => self.open = Some(Rc::new(dir)),
                    Err(errno) => {
                        self.pass_over(errno)?;
                        continue;
                    }
                }
            }
            if let Err(errno) = self.fill() {
                self.pass_over(errno)?;
                continue;
            }
            if let Some(step) = self.take()? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// Leaves the last level, where that is no reason to end.
    fn pass_over(&mut self, errno: Errno) -> io::Result<()> {
        let below = self.levels.len() > 1;
        match errno {
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::LOOP
            | Errno::ACCESS
            | Errno::PERM
            | Errno::SRCH
                if below =>
            {
                if let Some(level) = self.levels.pop() {
                    self.held -= bytes(&level.waiting);
                }
                self.open = None;
                Ok(())
            }
            errno => Err(errno),
        }
    }

    /// Sees to it that the last level has names, if there are any more.
    fn fill(&mut self) -> io::Result<()> {
        let (Some(level), Some(dir)) = (self.levels.last_mut(), &self.open) else {
            return Ok(());
        };
        if !level.waiting.is_empty() {
            return Ok(());
        }
        let (names, more) = names(dir, &level.after, NAMES)?;
        level.waiting = names.into();
        level.more = more;
        self.held += bytes(&level.waiting);
        for level in &mut self.levels {
            if self.held <= HELD {
                break;
            }
            // It will be read again. The last one is never larger than the bound.
            self.held -= bytes(&level.waiting);
            level.more |= !level.waiting.is_empty();
            level.waiting.clear();
        }
        Ok(())
    }

    /// Takes the last level's next name and goes into it if it is a directory; none if it has vanished.
    fn take(&mut self) -> io::Result<Option<Step>> {
        let (Some(level), Some(dir)) = (self.levels.last_mut(), &self.open) else {
            return Ok(None);
        };
        let Some(name) = level.waiting.pop_front() else {
            return Ok(None);
        };
        self.held -= name.len();
        let parent = dir.clone();
        let stat = statat(&*parent, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
        let path = joined(&level.path, &name);
        level.after.clone_from(&name);
        let stat = match stat {
            Ok(stat) => stat,
            Err(Errno::IO) => return Err(Errno::IO),
            Err(_) => return Ok(None),
        };
        if path.len() > PATH {
            return Ok(None);
        }
        let matches = match (&self.pattern, level.places) {
            (Some(pattern), Some(places)) => pattern.accepts(pattern.step(places, &name)),
            _ => true,
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.descend(path.clone(), &name);
        }
        Ok(Some(Step {
            path,
            stat,
            matches,
            parent,
        }))
    }

    /// Makes `path`, which is `name` in the last level, the next directory, unless nothing of it is wanted.
    fn descend(&mut self, path: Vec<u8>, name: &[u8]) -> bool {
        let places = match (&self.pattern, self.levels.last()) {
            (Some(pattern), Some(level)) => level.places.map(|places| pattern.step(places, name)),
            _ => None,
        };
        let fruitless = match (&self.pattern, places) {
            (Some(pattern), Some(places)) => !pattern.goes_on(places),
            _ => false,
        };
        if fruitless || self.levels.len() >= self.depth {
            return false;
        }
        self.push(path, places);
        true
    }

    fn push(&mut self, path: Vec<u8>, places: Option<Places>) {
        self.open = None;
        self.levels.push(Level {
            path,
            after: Vec::new(),
            waiting: VecDeque::new(),
            more: true,
            places,
        });
    }
}

impl Step {
    /// Its own name.
    pub fn name(&self) -> &[u8] {
        let name = self.path.rsplit(|byte| *byte == b'/').next();
        name.unwrap_or_default()
    }

    /// Opens it as itself, link or not, for nothing but to look at it and to change its attributes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&*self.parent, self.name(), flags, Mode::empty())
    }

    /// Where it points, if it is a link.
    pub fn link_target(&self) -> Option<CString> {
        if FileType::from_raw_mode(self.stat.st_mode) != FileType::Symlink {
            return None;
        }
        rustix::fs::readlinkat(&*self.parent, self.name(), Vec::new()).ok()
    }
}

fn bytes(names: &VecDeque<Vec<u8>>) -> usize {
    names.iter().map(Vec::len).sum()
}

fn joined(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path {
        b"" => name.to_vec(),
        path => [path, b"/", name].concat(),
    }
}

/// Opens the directory at `path` below `top` without following a link.
///
/// # Errors
/// The kernel's.
pub fn beneath(top: &OwnedFd, path: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = openat(top, ".", flags, Mode::empty())?;
    for name in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        at = openat(&at, name, flags, Mode::empty())?;
    }
    Ok(at)
}

/// The first `limit` names of a directory after `after`, in byte order, and whether there are more. Memory is bounded by
/// the limit, not by the directory.
///
/// # Errors
/// The kernel's.
pub fn names(dir: &OwnedFd, after: &[u8], limit: usize) -> io::Result<(Vec<Vec<u8>>, bool)> {
    let mut names: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut more = false;
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if is_dots(entry.file_name()) || name <= after {
            continue;
        }
        let in_page =
            names.len() < limit || names.last().is_some_and(|last| name < last.as_slice());
        if !in_page {
            more = true;
            continue;
        }
        names.insert(name.to_owned());
        if names.len() > limit {
            names.pop_last();
            more = true;
        }
    }
    Ok((names.into_iter().collect(), more))
}

/// One page of what lies below a directory.
///
/// # Errors
/// The kernel's, and what is wrong with the request.
pub fn page(path: &Path, request: &pb::WalkRequest) -> Result<pb::WalkReply, Status> {
    let failed = failed("list", path);
    let pattern = match request.pattern.as_str() {
        "" => None,
        pattern => Some(Pattern::parse(pattern)?),
    };
    let limit = match request.limit {
        0 => limits::LIST_ENTRIES,
        limit => limit.min(limits::LIST_ENTRIES),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = openat(CWD, path, flags, Mode::empty()).map_err(&failed)?;
    let mut walk = Walk::begin(top, &request.after, request.depth, pattern)?;
    let mut reply = pb::WalkReply::default();
    let mut bytes = 0;
    for _ in 0..LOOKS {
        let Some(step) = walk.next().map_err(&failed)? else {
            reply.next.clear();
            return Ok(reply);
        };
        if step.matches {
            let target = step.link_target();
            bytes += step.path.len() + target.as_ref().map_or(0, |t| t.as_bytes().len()) + 96;
            reply.found.push(pb::FoundFile {
                path: step.path.clone().into(),
                info: Some(info(step.name(), &step.stat, target)),
            });
        }
        // The next one may be as long as a path and a link's target can be.
        let full = reply.found.len() >= limit as usize || bytes + 2 * PATH > PAGE;
        reply.next = step.path.into();
        if full {
            return Ok(reply);
        }
    }
    Ok(reply)
}
