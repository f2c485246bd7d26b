//! What of ours is in programs of others, such as a Caddy that runs anyhow: on disk before it is put there, until it is
//! taken out. It cannot be seen without asking them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::prepare::io_error;

/// Whom we have put something into, as [`note_elsewhere`] was told.
///
/// # Errors
/// The list is there and cannot be read.
pub fn elsewhere(data_dir: &Path) -> Result<Vec<String>, Error> {
    let path = file(data_dir);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(io_error("read", &path, source)),
    }
}

/// Makes this the list, durably. Each entry is a line.
///
/// # Errors
/// The disk does not take it.
pub fn note_elsewhere(data_dir: &Path, all: &[String]) -> Result<(), Error> {
    let path = file(data_dir);
    if all.is_empty() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path, error))
            }
            _ => Ok(()),
        };
    }
    let text = all.join("\n");
    Ok(hutch_disk::write_atomic(&path, text.as_bytes(), 0o600)?)
}

fn file(data_dir: &Path) -> PathBuf {
    data_dir.join("elsewhere")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_there_as_long_as_there_is_something_in_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(elsewhere(dir.path()).unwrap(), [""; 0]);
        let all = ["localhost:2019".to_owned(), "unix//run/a b".to_owned()];
        note_elsewhere(dir.path(), &all).unwrap();
        assert_eq!(elsewhere(dir.path()).unwrap(), all);
        note_elsewhere(dir.path(), &[]).unwrap();
        note_elsewhere(dir.path(), &[]).unwrap();
        assert_eq!(elsewhere(dir.path()).unwrap(), [""; 0]);
        assert!(!file(dir.path()).exists());
    }
}
