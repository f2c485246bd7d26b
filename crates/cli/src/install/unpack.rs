//! Takes the wanted members out of a release's archive. All others are passed over, so no path of an archive ever
//! becomes one of ours.

use std::fs::File;
use std::io::{self, Read, Seek};

use flate2::read::GzDecoder;
use tempfile::NamedTempFile;

use super::Error;

/// Unpacked, with all that we pass over: many times the largest release there was.
const MAX_UNPACKED: u64 = 1 << 30;

/// The members, each under the name of its program, in files from `stage`.
pub(super) fn members(
    mut archive: &File,
    asset: &str,
    wanted: &[(String, &'static str)],
    stage: impl Fn() -> Result<NamedTempFile, Error>,
) -> Result<Vec<(&'static str, NamedTempFile)>, Error> {
    let wrong = |why: String| Error::Archive {
        asset: asset.to_owned(),
        why,
    };
    let damaged = |error: io::Error| wrong(format!("it cannot be unpacked: {error}"));
    archive.rewind().map_err(damaged)?;
    let unpacked = GzDecoder::new(io::BufReader::new(archive)).take(MAX_UNPACKED);
    let mut found: Vec<(&'static str, NamedTempFile)> = Vec::new();
    for entry in tar::Archive::new(unpacked).entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry.path_bytes();
        let path = path.strip_prefix(b"./").unwrap_or(&path);
        let Some(&(ref member, program)) =
            wanted.iter().find(|(member, _)| member.as_bytes() == path)
        else {
            continue;
        };
        if !entry.header().entry_type().is_file() {
            return Err(wrong(format!("{member} is no file")));
        }
        if found.iter().any(|(name, _)| *name == program) {
            return Err(wrong(format!("{member} is there twice")));
        }
        let mut file = stage()?;
        let expected = entry.size();
        let mut content = Vec::new();
        // Read first: an error of the archive's and one of our disk's are different things.
        entry.read_to_end(&mut content).map_err(damaged)?;
        if content.len() as u64 != expected {
            return Err(wrong(format!("{member} is cut off")));
        }
        let path = file.path().to_owned();
        io::Write::write_all(&mut file, &content).map_err(Error::io("write", &path))?;
        found.push((program, file));
    }
    for (member, program) in wanted {
        if !found.iter().any(|(name, _)| name == program) {
            return Err(wrong(format!("it has no {member}")));
        }
    }
    Ok(found)
}
