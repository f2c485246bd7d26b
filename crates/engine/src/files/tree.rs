//! Lists of directories and of what lies below them, and changes to paths that leave contents alone.

use std::fmt::Write;

use hutch_contract::file::FileInfo;
use hutch_contract::page::Page;
use hutch_guest::session::{self, Session};

use super::{check_path, info, text};
use crate::access::Access;
use crate::{Engine, Error, Principal, machines};

/// What of a directory is wanted.
#[derive(Debug, Clone, Default)]
pub struct ListFiles {
    /// Path in the machine.
    pub path: String,
    /// How many directories down: 1 for the directory alone, none for all the way.
    pub depth: Option<u32>,
    /// Only paths below it that match.
    pub pattern: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Rows in the page.
    pub limit: u32,
}

/// Another mode or owner.
#[derive(Debug, Clone, Default)]
pub struct ChangeFile {
    /// Path in the machine.
    pub path: String,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner, or `owner:group`.
    pub owner: Option<String>,
    /// All below a directory too.
    pub recursive: bool,
}

impl Engine {
    /// Lists a directory in pages: by name, each directory before what is in it.
    ///
    /// # Errors
    /// What the guest says of the path and the pattern; that the machine does not run.
    pub async fn list_files(
        &self,
        who: &Principal,
        reference: &str,
        list: ListFiles,
    ) -> Result<Page<FileInfo>, Error> {
        machines::page_limit(list.limit)?;
        let after = after(list.cursor.as_deref().unwrap_or_default())?;
        if list.pattern.as_deref() == Some("") {
            return Err(Error::invalid("pattern", "is empty".to_owned()));
        }
        let session = self
            .files_of(who, Access::Read, reference, &list.path)
            .await?;
        // Older agents know this much.
        if list.depth == Some(1) && list.pattern.is_none() {
            return names(&session, &list.path, &after, list.limit).await;
        }
        let walk = session::Walk {
            path: list.path.clone(),
            after,
            limit: list.limit,
            depth: list.depth.unwrap_or(0),
            pattern: list.pattern.unwrap_or_default(),
        };
        let page = session.walk(&walk).await?;
        let top = list.path.trim_end_matches('/');
        let items = page.found.into_iter().map(|found| FileInfo {
            path: Some(format!("{top}/{}", text(&found.path))),
            ..info(found.info)
        });
        Ok(Page {
            items: items.collect(),
            next: page.next.as_deref().map(cursor),
        })
    }

    /// Gives a file another path, in one step. With `replace`, what is there is gone then.
    ///
    /// # Errors
    /// What the guest says of the paths; that the machine does not run.
    pub async fn move_file(
        &self,
        who: &Principal,
        reference: &str,
        path: &str,
        to: &str,
        replace: bool,
    ) -> Result<(), Error> {
        check_path("to", to)?;
        let session = self.files_of(who, Access::Write, reference, path).await?;
        Ok(session.move_file(path, to, !replace).await?)
    }

    /// Gives a file another mode or owner.
    ///
    /// # Errors
    /// What the guest says of the path and the owner; that the machine does not run.
    pub async fn change_file(
        &self,
        who: &Principal,
        reference: &str,
        change: ChangeFile,
    ) -> Result<(), Error> {
        let owner = match change.owner {
            Some(owner) if owner.is_empty() => {
                return Err(Error::invalid("owner", "is empty".to_owned()));
            }
            owner => owner.unwrap_or_default(),
        };
        let session = self
            .files_of(who, Access::Write, reference, &change.path)
            .await?;
        let change = session::Change {
            path: change.path,
            mode: change.mode,
            owner,
            recursive: change.recursive,
        };
        Ok(session.change_file(&change).await?)
    }
}

async fn names(
    session: &Session,
    path: &str,
    after: &[u8],
    limit: u32,
) -> Result<Page<FileInfo>, Error> {
    let page = session.list_dir(path, after, limit).await?;
    let last = page.entries.last().map(|last| cursor(&last.name));
    Ok(Page {
        next: last.filter(|_| page.more),
        items: page.entries.into_iter().map(info).collect(),
    })
}

/// A path of the guest as a cursor: text, from which each of its bytes can be had again.
fn cursor(path: &[u8]) -> String {
    let mut cursor = String::new();
    for chunk in path.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '%' => cursor.push_str("%25"),
                character => cursor.push(character),
            }
        }
        for byte in chunk.invalid() {
            write!(cursor, "%{byte:02x}").expect("a string takes everything");
        }
    }
    cursor
}

/// The path that a cursor stands for.
fn after(cursor: &str) -> Result<Vec<u8>, Error> {
    let wrong = || Error::invalid("cursor", "is none that a page had".to_owned());
    let mut parts = cursor.split('%');
    let mut path = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).ok_or_else(wrong)?;
        path.push(u8::from_str_radix(digits, 16).map_err(|_| wrong())?);
        path.extend_from_slice(rest.as_bytes());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_text_and_loses_nothing() {
        for path in [
            &b""[..],
            b"a/b c",
            "é/ü".as_bytes(),
            b"100%/%41",
            b"\xff\xfe/a\x80%",
            b"new\nline",
        ] {
            assert_eq!(after(&cursor(path)).unwrap(), path);
        }
        for wrong in ["%", "a%4", "%zz", "%é1"] {
            assert!(after(wrong).is_err(), "{wrong}");
        }
    }
}
