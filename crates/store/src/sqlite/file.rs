//! The database file: how it is opened, brought to the newest schema and checked.
//!
//! SQLite sees damage of its own structure only, so every row carries a checksum of what it says.
//! It is compared at every read, and for all rows at open while the file is small
//! ([`CHECK_BYTES`]): both checks read the whole file, so their time grows with it. A compacted
//! store of a thousand machines is far below that bound.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, ffi};

use crate::{Change, Entry, Error, Key, Revision};

/// Files up to this size are checked completely when they are opened.
const CHECK_BYTES: u64 = 64 << 20;

/// How long to wait for another process that has the file open.
const BUSY: Duration = Duration::from_secs(5);

/// Step `n` brings schema `n` to `n + 1`; `PRAGMA user_version` is the schema of a file.
const MIGRATIONS: [&str; 1] = [include_str!("0001-records.sql")];

/// Opens `path` for the writer: creates, refuses, checks and migrates it as needed.
pub(super) fn open_writer(path: &Path, max_pages: Option<u32>) -> Result<Connection, Error> {
    if !is_safe(rusqlite::version_number()) {
        return Err(Error::UnsafeSqlite {
            found: rusqlite::version(),
        });
    }
    let at = |source| Error::sqlite(path, source);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags).map_err(at)?;
    conn.busy_timeout(BUSY).map_err(at)?;
    // Before anything is changed in a file that may not be ours to change.
    let known = MIGRATIONS.len() as i64;
    let found = schema(&conn).map_err(at)?;
    if found > known {
        return Err(Error::NewerSchema {
            path: path.into(),
            found,
            known,
        });
    }
    configure(&conn).map_err(at)?;
    empty_log(&conn).map_err(at)?;
    if let Some(pages) = max_pages {
        conn.pragma_update(None, "max_page_count", pages)
            .map_err(at)?;
    }
    // The structure before a migration works on it, the rows when they surely have the columns.
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    if size <= CHECK_BYTES {
        check_structure(&conn).map_err(at)?;
    }
    migrate(&mut conn).map_err(at)?;
    if size <= CHECK_BYTES {
        check_rows(&conn).map_err(at)?;
    } else {
        tracing::info!(path = %path.display(), size, "file is large: rows are checked as read");
    }
    verify(&conn, path)?;
    Ok(conn)
}

/// Opens `path`, which a writer has prepared, for reading only.
pub(super) fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(BUSY)?;
    keep_log_on_close(&conn)?;
    Ok(conn)
}

/// Makes closing `conn` leave the write-ahead log alone.
pub(super) fn keep_log_on_close(conn: &Connection) -> rusqlite::Result<()> {
    let flag = rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    conn.set_db_config(flag, true).map(drop)
}

/// Every WAL version before 3.51.3 can corrupt a file that two connections write and checkpoint
/// at once, and 3.52.0 was withdrawn (sqlite.org/wal.html#walresetbug).
fn is_safe(version: i32) -> bool {
    version >= 3_051_003 && version != 3_052_000
}

fn schema(conn: &Connection) -> rusqlite::Result<i64> {
    conn.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// What durability and the checks depend on; `wal_autocheckpoint` because SQLite would hide an
/// i/o error of a checkpoint that it makes by itself.
const SETTINGS: [(&str, &str); 5] = [
    ("journal_mode", "wal"),
    ("synchronous", "2"),
    ("foreign_keys", "1"),
    ("cell_size_check", "1"),
    ("wal_autocheckpoint", "0"),
];

fn configure(conn: &Connection) -> rusqlite::Result<()> {
    for (setting, wanted) in SETTINGS {
        let mut pragma = conn.prepare(&format!("PRAGMA {setting} = {wanted}"))?;
        let mut rows = pragma.query([])?;
        // To the end: the switch to WAL is written, and may fail, after the row that reports it.
        while rows.next()?.is_some() {}
    }
    Ok(())
}

/// Believes what is read back only. To be called after the file was read, when SQLite knows.
fn verify(conn: &Connection, path: &Path) -> Result<(), Error> {
    for (setting, wanted) in SETTINGS {
        let found = conn
            .pragma_query_value(None, setting, |row| {
                let value = row.get_ref(0)?;
                Ok(match value.as_i64() {
                    Ok(number) => number.to_string(),
                    Err(_) => value.as_str()?.to_owned(),
                })
            })
            .map_err(|source| Error::sqlite(path, source))?;
        if found != wanted {
            return Err(Error::Setting {
                path: path.into(),
                setting,
                found,
                wanted,
            });
        }
    }
    Ok(())
}

/// Copies what an earlier process left in the log into the database.
///
/// If that process ended because an fsync of the log failed, the kernel may hold pages of the log
/// that it calls clean and that the disk never got. A commit behind them would be lost with them.
fn empty_log(conn: &Connection) -> rusqlite::Result<()> {
    conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
}

fn migrate(conn: &mut Connection) -> rusqlite::Result<()> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Read again under the lock: another process may have been faster.
    let from = usize::try_from(schema(&tx)?).map_err(|_| damage("a negative schema version"))?;
    for step in MIGRATIONS.iter().skip(from) {
        tx.execute_batch(step)?;
    }
    if from == 0 {
        Head::default().insert(&tx)?;
    }
    if from < MIGRATIONS.len() {
        tx.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
    }
    tx.commit()
}

fn check_structure(conn: &Connection) -> rusqlite::Result<()> {
    let verdict: String = conn
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .optional()?
        .unwrap_or_default();
    if verdict == "ok" {
        Ok(())
    } else {
        Err(damage(verdict))
    }
}

fn check_rows(conn: &Connection) -> rusqlite::Result<()> {
    let head = Head::read(conn)?;
    let mut rows = conn.prepare("SELECT key, version, value, sum FROM entry")?;
    for entry in rows.query_map([], entry)? {
        if entry?.version > head.revision {
            return Err(damage("an entry is newer than the newest revision"));
        }
    }
    let mut rows = conn.prepare("SELECT revision, key, value, sum FROM change")?;
    for change in rows.query_map([], change)? {
        let revision = change?.revision.0;
        if revision <= head.compacted || revision > head.revision {
            return Err(damage("a change is outside of the log"));
        }
    }
    Ok(())
}

/// The row of the table `head`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// Newest revision.
    pub(super) revision: u64,
    /// Changes up to here are no longer in the log.
    pub(super) compacted: u64,
}

impl Head {
    pub(super) fn read(conn: &Connection) -> rusqlite::Result<Self> {
        let mut query = conn.prepare_cached("SELECT revision, compacted, sum FROM head")?;
        let found = query.query_row([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        let (revision, compacted, stored): (i64, i64, u32) =
            found.optional()?.ok_or_else(|| damage("no head"))?;
        let head = Self {
            revision: revision.cast_unsigned(),
            compacted: compacted.cast_unsigned(),
        };
        if head.sum() == stored {
            Ok(head)
        } else {
            Err(damage("the head does not match its checksum"))
        }
    }

    pub(super) fn update(self, conn: &Connection) -> rusqlite::Result<()> {
        conn.prepare_cached("UPDATE head SET revision = ?1, compacted = ?2, sum = ?3")?
            .execute(self.columns())
            .map(drop)
    }

    fn insert(self, conn: &Connection) -> rusqlite::Result<()> {
        conn.execute(
            "INSERT INTO head (id, revision, compacted, sum) VALUES (0, ?1, ?2, ?3)",
            self.columns(),
        )
        .map(drop)
    }

    fn columns(self) -> (i64, i64, u32) {
        (
            self.revision.cast_signed(),
            self.compacted.cast_signed(),
            self.sum(),
        )
    }

    fn sum(self) -> u32 {
        sum("", self.revision, Some(&self.compacted.to_le_bytes()))
    }
}

/// Checksum of a row. Key and revision are in it so that a row put in another's place is seen.
pub(super) fn sum(key: &str, revision: u64, value: Option<&[u8]>) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&revision.to_le_bytes());
    crc.update(key.as_bytes());
    // Keys have no NUL, so the end of the key is plain; a deletion differs from an empty value.
    crc.update(&[0, u8::from(value.is_some())]);
    crc.update(value.unwrap_or_default());
    crc.finalize()
}

/// Decodes `key, version, value, sum`.
pub(super) fn entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let (key, version, value): (String, i64, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let version = version.cast_unsigned();
    let key = verified(key, version, Some(&value), row.get(3)?)?;
    Ok(Entry {
        key,
        version,
        value,
    })
}

/// Decodes `revision, key, value, sum`.
pub(super) fn change(row: &rusqlite::Row<'_>) -> rusqlite::Result<Change> {
    let (revision, key, value): (i64, String, Option<Vec<u8>>) =
        (row.get(0)?, row.get(1)?, row.get(2)?);
    let revision = revision.cast_unsigned();
    let key = verified(key, revision, value.as_deref(), row.get(3)?)?;
    Ok(Change {
        revision: Revision(revision),
        key,
        value,
    })
}

fn verified(
    key: String,
    revision: u64,
    value: Option<&[u8]>,
    stored: u32,
) -> rusqlite::Result<Key> {
    if sum(&key, revision, value) != stored {
        return Err(damage(format!(
            "{key:?} of revision {revision} does not match its checksum"
        )));
    }
    Key::new(key).map_err(|error| damage(error.to_string()))
}

/// What is wrong with the file, in the shape that rusqlite's row closures return.
fn damage(finding: impl Into<String>) -> rusqlite::Error {
    #[derive(Debug)]
    struct Damage(String);
    impl fmt::Display for Damage {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(&self.0)
        }
    }
    impl std::error::Error for Damage {}
    rusqlite::Error::FromSqlConversionFailure(0, Type::Null, Box::new(Damage(finding.into())))
}

impl Error {
    /// Sorts SQLite's errors by what they mean for the store.
    pub(super) fn sqlite(path: &Path, source: rusqlite::Error) -> Self {
        use rusqlite::Error::{
            FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType,
        };
        let (code, extended) = match &source {
            rusqlite::Error::SqliteFailure(error, _) => (Some(error.code), error.extended_code),
            _ => (None, 0),
        };
        let is_damage = matches!(
            source,
            FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..)
        );
        let (path, source) = (path.to_owned(), Arc::new(source));
        match code {
            Some(ErrorCode::DiskFull) => Self::Full { path, source },
            // The shared-memory file could not grow: in effect the same.
            Some(_) if extended == ffi::SQLITE_IOERR_SHMSIZE => Self::Full { path, source },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                Self::Locked { path, source }
            }
            Some(ErrorCode::SystemIoFailure) => Self::Io { path, source },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged { path, source }
            }
            _ if is_damage => Self::Damaged { path, source },
            _ => Self::Sqlite { path, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_can_lose_data_are_refused() {
        for (version, safe) in [
            (3_040_001, false),
            (3_051_002, false),
            (3_051_003, true),
            (3_052_000, false),
            (3_052_001, true),
            (rusqlite::version_number(), true),
        ] {
            assert_eq!(is_safe(version), safe, "{version}");
        }
    }

    #[test]
    fn settings_that_do_not_take_are_an_error() {
        // A database in memory has no write-ahead log.
        let conn = Connection::open_in_memory().unwrap();
        configure(&conn).unwrap();
        let error = verify(&conn, Path::new(":memory:")).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Setting {
                    setting: "journal_mode",
                    ..
                }
            ),
            "{error}"
        );
    }
}
