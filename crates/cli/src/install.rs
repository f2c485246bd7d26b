//! Puts a runtime's program, as its makers released it, into the data directory.
//!
//! Nothing of a release is believed before its checksum has been compared, and nothing of an archive is unpacked but
//! the members that are wanted. A program appears by rename, whole and executable; one that runs keeps its old file.

mod fetch;
mod release;
mod unpack;

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hutch_contract::error::Kind;
use reqwest::Url;
use tempfile::NamedTempFile;

use crate::ui::Ui;
use release::Form;
pub use release::{Release, known};

/// Why a program was not installed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such release to be had by us.
    #[error("{name} is none that can be installed")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The text is no version.
    #[error("`{version}` is no version")]
    Version {
        /// The text.
        version: String,
    },
    /// The makers release nothing for this processor.
    #[error("there is no release of {name} for {arch}")]
    Processor {
        /// The program.
        name: &'static str,
        /// The processor.
        arch: &'static str,
    },
    /// The text is no checksum.
    #[error("`{text}` is no sha256 in hexadecimal")]
    Sha256 {
        /// The text.
        text: String,
    },
    /// The text is no address to download from.
    #[error("`{url}` is no address of releases")]
    Address {
        /// The text.
        url: String,
    },
    /// The server of the release did not give it.
    #[error("download {url}: the server answers {status}")]
    Status {
        /// What was asked for.
        url: Url,
        /// What it answered.
        status: reqwest::StatusCode,
    },
    /// The download broke off, or could not begin.
    #[error("download {url}")]
    Download {
        /// What was asked for.
        url: Url,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It has more bytes than any release.
    #[error("{url} has more than {limit} bytes")]
    TooLarge {
        /// What was asked for.
        url: Url,
        /// The limit.
        limit: u64,
    },
    /// Nobody says what its checksum must be.
    #[error("the checksum of {asset} is not known")]
    NoSum {
        /// The file of the release.
        asset: String,
    },
    /// It is not what was released.
    #[error("{asset} has the sha256 {found}, and must have {wanted}")]
    WrongSum {
        /// The file of the release.
        asset: String,
        /// What it has.
        found: String,
        /// What it must have.
        wanted: String,
    },
    /// The archive is not like a release.
    #[error("{asset}: {why}")]
    Archive {
        /// The file of the release.
        asset: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file of ours.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it ended.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Unknown { .. }
            | Error::Version { .. }
            | Error::Sha256 { .. }
            | Error::Address { .. } => Kind::Invalid,
            Error::Processor { .. } => Kind::Unsupported,
            Error::Status { status, .. } if status.as_u16() == 404 => Kind::NotFound,
            Error::Status { .. } | Error::Download { .. } => Kind::Unavailable,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Kind::Exhausted
            }
            _ => Kind::Bug,
        }
    }

    /// What to do next, where we know.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Unknown { .. } => {
                let names = known().map(|release| release.name);
                return Some(format!(
                    "{} can be; the others come from the distribution: `hutch doctor` says how",
                    names.collect::<Vec<_>>().join(" and ")
                ));
            }
            Error::Version { .. } => "such as 1.16.1",
            Error::NoSum { .. } => {
                "take the version that needs no --version, or give the checksum with --sha256"
            }
            Error::WrongSum { .. } => {
                "nothing was installed; download it again, from another place if it stays so"
            }
            Error::Status { .. } | Error::Download { .. } => {
                "--from names a mirror; behind a proxy set HTTPS_PROXY"
            }
            Error::Address { .. } => "such as https://mirror.example/releases/download",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// What to install, and from where.
pub struct Order {
    /// Of which release.
    pub release: &'static Release,
    /// Which version; ours when left out.
    pub version: Option<String>,
    /// The address below which versions are, instead of the makers' own.
    pub from: Option<String>,
    /// What the file's sha256 must be, for a version that we do not know.
    pub sha256: Option<String>,
}

/// What was installed.
pub struct Installed {
    /// Its version.
    pub version: String,
    /// The programs.
    pub paths: Vec<PathBuf>,
}

/// Downloads, checks and installs into `programs`. Nothing has changed after an error, but that of several programs
/// the first ones may be new when the file system fails in between.
///
/// # Errors
/// See [`Error`].
pub async fn install(order: Order, programs: &Path, ui: Ui) -> Result<Installed, Error> {
    let file = order.release.file(
        order.version.as_deref(),
        std::env::consts::ARCH,
        order.from.as_deref(),
    )?;
    let told = order.sha256.map(|text| {
        let lower = text.to_ascii_lowercase();
        match release::is_sha256(&lower) {
            true => Ok(lower),
            false => Err(Error::Sha256 { text }),
        }
    });
    let http = fetch::client(&file.url)?;
    // What was typed counts most; what came over the same wire as the file counts least.
    let ours = told.transpose()?.or(file.sha256.map(str::to_owned));
    let published = match &file.sums {
        Some(url) => fetch::published_sum(&http, url, &file.asset, ours.is_some()).await?,
        None => None,
    };
    if let (Some(ours), Some(published)) = (&ours, &published)
        && ours != published
    {
        return Err(Error::WrongSum {
            asset: format!("{}.sha256.txt", file.asset),
            found: published.clone(),
            wanted: ours.clone(),
        });
    }
    let wanted = ours.or(published).ok_or_else(|| Error::NoSum {
        asset: file.asset.clone(),
    })?;
    make_dir(programs)?;
    let downloaded = stage(programs)?;
    let found = fetch::download(&http, &file.url, &file.asset, &downloaded, ui).await?;
    if found != wanted {
        return Err(Error::WrongSum {
            asset: file.asset,
            found,
            wanted,
        });
    }
    let (programs, version) = (programs.to_owned(), file.version.clone());
    let put = move || match file.form {
        Form::Program(name) => publish(vec![(name, downloaded)], &programs),
        Form::Archive(members) => {
            let staged = unpack::members(downloaded.as_file(), &file.asset, &members, || {
                stage(&programs)
            })?;
            publish(staged, &programs)
        }
    };
    let paths = tokio::task::spawn_blocking(put)
        .await
        .expect("it does not panic")?;
    Ok(Installed { version, paths })
}

/// Makes the directory of programs: VMMs run as other users, who must be able to execute what is in it.
fn make_dir(programs: &Path) -> Result<(), Error> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o711).create(programs);
    made.map_err(Error::io("create", programs))
}

/// A file that goes again unless it is published.
fn stage(programs: &Path) -> Result<NamedTempFile, Error> {
    let mut builder = tempfile::Builder::new();
    let staged = builder.prefix(".install-").tempfile_in(programs);
    staged.map_err(Error::io("create a file in", programs))
}

/// Lets the programs appear, whole.
fn publish(
    staged: Vec<(&'static str, NamedTempFile)>,
    programs: &Path,
) -> Result<Vec<PathBuf>, Error> {
    for (_, file) in &staged {
        file.as_file()
            .set_permissions(Permissions::from_mode(0o755))
            .and_then(|()| file.as_file().sync_all())
            .map_err(Error::io("write", file.path()))?;
    }
    let mut paths = Vec::new();
    for (name, file) in staged {
        let path = programs.join(name);
        // A program that runs keeps the file it was started from.
        file.persist(&path)
            .map_err(|error| Error::io("replace", &path)(error.error))?;
        paths.push(path);
    }
    let synced = std::fs::File::open(programs).and_then(|dir| dir.sync_all());
    synced.map_err(Error::io("sync", programs))?;
    Ok(paths)
}
