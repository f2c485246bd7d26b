//! The programs that runtimes start: where they are, and whether they are new enough.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hutch_contract::node::RuntimeInfo;
use tokio::sync::OnceCell;

use crate::{Error, kvm};

const USUAL_DIRS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// Time for a program to tell its version, on a host that is busy with other things.
const VERSION: Duration = Duration::from_secs(10);

/// Major, minor and patch.
pub(crate) type Version = (u32, u32, u32);

/// What a runtime knows of its program.
pub(crate) struct Wanted {
    /// Its file name.
    pub(crate) name: &'static str,
    /// How to get it.
    pub(crate) install: &'static str,
    /// The oldest version that will do.
    pub(crate) oldest: Version,
    /// Whether it is of no use without KVM.
    pub(crate) needs_kvm: bool,
}

/// A program and, once asked for, its version.
pub(crate) struct Program {
    wanted: Wanted,
    configured: Option<PathBuf>,
    /// Where `hutch runtime install` puts programs.
    installed: Option<PathBuf>,
    version: OnceCell<Result<Version, String>>,
    /// Or why it lacks it.
    kvm: Result<(), String>,
}

impl Program {
    pub(crate) fn new(wanted: Wanted, config: &crate::RuntimeConfig) -> Self {
        let kvm = match wanted.needs_kvm {
            true => kvm::required(config.acceleration.as_deref()),
            false => Ok(()),
        };
        Self {
            wanted,
            kvm,
            configured: config.program.clone(),
            installed: config.programs_dir.clone(),
            version: OnceCell::new(),
        }
    }

    /// Its absolute path: the configured one, else one of ours, else the system's.
    ///
    /// # Errors
    /// [`Error::ProgramMissing`].
    pub(crate) fn path(&self) -> Result<PathBuf, Error> {
        let found = match &self.configured {
            Some(program) => std::path::absolute(program).ok(),
            None => {
                let ours = self.installed.as_deref().into_iter();
                ours.chain(USUAL_DIRS.map(Path::new))
                    .filter_map(|dir| std::path::absolute(dir.join(self.wanted.name)).ok())
                    .find(|path| path.is_file())
            }
        };
        let found = found.filter(|program| program.is_file());
        found.ok_or_else(|| Error::ProgramMissing {
            program: match &self.configured {
                Some(program) => program.display().to_string(),
                None => self.wanted.name.to_owned(),
            },
            hint: self.wanted.install,
        })
    }

    /// The path as an argument.
    ///
    /// # Errors
    /// As [`path`](Self::path), and [`Error::Setting`] for one that is not text.
    pub(crate) fn text(&self, runtime: &'static str) -> Result<String, Error> {
        let path = self.path()?.into_os_string().into_string();
        path.map_err(|path| Error::Setting {
            runtime,
            setting: "program",
            value: path.to_string_lossy().into_owned(),
        })
    }

    /// Its version; the program is asked once, and again only when that could not be done.
    ///
    /// # Errors
    /// A sentence for people.
    pub(crate) async fn version(&self) -> &Result<Version, String> {
        let ask = async {
            let program = self.path().map_err(|error| error.to_string())?;
            let asked = tokio::process::Command::new(&program)
                .arg("--version")
                .env_clear()
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .output();
            let output = tokio::time::timeout(VERSION, asked).await;
            let output = output.map_err(|_| format!("{} does not answer", program.display()))?;
            let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
            parse_version(&String::from_utf8_lossy(&output.stdout))
                .ok_or_else(|| format!("{} tells no version", program.display()))
        };
        self.version.get_or_init(|| ask).await
    }

    /// Refuses a program that is missing, too old or of no use on this host, before it is started.
    ///
    /// # Errors
    /// [`Error::ProgramMissing`], [`Error::TooOld`], [`Error::Unusable`] without the KVM that it needs;
    /// [`Error::Launch`] for one that tells no version.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        self.is_since(self.wanted.oldest).await?;
        self.kvm.clone().map_err(|reason| Error::Unusable {
            runtime: self.wanted.name,
            reason,
        })
    }

    /// Refuses a program that is missing or older than this.
    ///
    /// # Errors
    /// [`Error::ProgramMissing`], [`Error::TooOld`]; [`Error::Launch`] for one that tells no version.
    pub(crate) async fn is_since(&self, oldest: Version) -> Result<(), Error> {
        self.path()?;
        match self.version().await {
            Ok(version) if *version >= oldest => Ok(()),
            Ok(version) => Err(Error::TooOld {
                program: self.wanted.name,
                version: in_words(*version),
                oldest: in_words(oldest),
                hint: self.wanted.install,
            }),
            Err(answer) => Err(Error::Launch {
                answer: answer.clone(),
            }),
        }
    }

    /// Fills in whether it is usable, and why not.
    pub(crate) async fn probe(&self, info: &mut RuntimeInfo) {
        info.path = self.path().ok().map(|path| path.display().to_string());
        if info.path.is_some() {
            info.version = self.version().await.as_ref().ok().copied().map(in_words);
        }
        match self.check().await {
            Ok(()) => info.usable = true,
            Err(error) => {
                info.usable = false;
                info.reason = Some(error.to_string());
                info.hint = error.hint().or(info.hint.take());
            }
        }
        // Without it no program helps.
        if let Err(reason) = &self.kvm {
            info.reason = Some(reason.clone());
            info.hint = None;
        }
    }
}

fn in_words((major, minor, patch): Version) -> String {
    format!("{major}.{minor}.{patch}")
}

/// The first word that begins like a version: `QEMU emulator version 7.2.22 (Debian …)`, `Firecracker v1.16.1`,
/// `cloud-hypervisor v53.0`, `7.0.20r163906`.
fn parse_version(text: &str) -> Option<Version> {
    text.split_ascii_whitespace().find_map(|word| {
        let word = word.strip_prefix('v').unwrap_or(word);
        let mut numbers = word.split('.').map(|part| {
            let end = part.find(|c: char| !c.is_ascii_digit());
            part[..end.unwrap_or(part.len())].parse::<u32>()
        });
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some((major, minor, patch))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_programs_print_them() {
        for (text, version) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright",
                (7, 2, 22),
            ),
            ("QEMU emulator version 10.0.0", (10, 0, 0)),
            ("Firecracker v1.16.1\n\nSupported snapshot", (1, 16, 1)),
            ("Firecracker v1.17.0-dev", (1, 17, 0)),
            ("cloud-hypervisor v53.0", (53, 0, 0)),
            ("cloud-hypervisor v53.0.0-12-gabcdef", (53, 0, 0)),
            ("7.0.20r163906", (7, 0, 20)),
        ] {
            assert_eq!(parse_version(text), Some(version), "{text}");
        }
        for text in ["QEMU emulator", "version seven", "", "v", "1", "."] {
            assert_eq!(parse_version(text), None, "{text}");
        }
    }
}
