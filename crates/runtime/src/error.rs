//! What can go wrong with a runtime.

use std::io;
use std::path::PathBuf;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;

use crate::process::ExitReport;

/// Why a runtime did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something of this machine is alive.
    #[error("machine in {} is running already", dir.display())]
    Locked {
        /// Its directory.
        dir: PathBuf,
    },
    /// The VMM ended before it was of use.
    #[error("{runtime} ended at once: {}", describe(report))]
    Exited {
        /// The runtime.
        runtime: &'static str,
        /// How, and its last words.
        report: ExitReport,
    },
    /// This runtime cannot do it at all.
    #[error("{runtime} cannot {what}")]
    Unsupported {
        /// The runtime.
        runtime: &'static str,
        /// A verb and its object, such as `snapshot memory`.
        what: &'static str,
    },
    /// The host lacks what it needs.
    #[error("{runtime} cannot be used here: {reason}")]
    Unusable {
        /// The runtime.
        runtime: &'static str,
        /// What is missing.
        reason: String,
    },
    /// The VMM is not installed.
    #[error("{program} not found")]
    ProgramMissing {
        /// Its name or path.
        program: String,
        /// How to get it.
        hint: &'static str,
    },
    /// The VMM is too old to be trusted with what we ask of it.
    #[error("{program} {version} is older than {oldest}")]
    TooOld {
        /// Its name.
        program: &'static str,
        /// What it is.
        version: String,
        /// What it must be at least.
        oldest: String,
        /// How to get a newer one.
        hint: &'static str,
    },
    /// The configuration means nothing to the runtime.
    #[error("{runtime} has no {setting} {value:?}")]
    Setting {
        /// The runtime.
        runtime: &'static str,
        /// The setting.
        setting: &'static str,
        /// What was given.
        value: String,
    },
    /// What runs cannot be proved to be this machine, or to be dead. Nothing was done to it.
    #[error("identity of what runs in {} is not proved: {reason}", dir.display())]
    Unproved {
        /// The machine's directory.
        dir: PathBuf,
        /// What is missing from the proof.
        reason: String,
    },
    /// A program of the host that would keep our machines cannot be spoken to.
    #[error("{service} cannot be reached: {reason}")]
    Unreachable {
        /// Its name.
        service: &'static str,
        /// What is in the way.
        reason: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The machine cannot be made from this image.
    #[error("image {image} has no {lacks}, which {runtime} needs")]
    WrongImage {
        /// The runtime.
        runtime: &'static str,
        /// The image's id.
        image: String,
        /// A noun.
        lacks: &'static str,
        /// Which way there is.
        hint: &'static str,
    },
    /// It does not run.
    #[error("nothing listens for {}", dir.file_name().unwrap_or_default().display())]
    NotRunning {
        /// The machine's directory.
        dir: PathBuf,
    },
    /// It took too long.
    #[error("{what} took longer than {seconds} s")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The deadline.
        seconds: u64,
    },
    /// It has let so many calls go unanswered that no more are made for a while.
    #[error("the VMM of {} answers nothing", dir.file_name().unwrap_or_default().display())]
    Hung {
        /// The machine's directory.
        dir: PathBuf,
        /// Until it is tried again.
        seconds: u64,
    },
    /// The VMM refused a command, or answered with nonsense.
    #[error("{command}: {answer}")]
    Monitor {
        /// The command.
        command: &'static str,
        /// What it said, made printable.
        answer: String,
    },
    /// A program of the host that a runtime works through refused, or answered with nonsense.
    #[error("{program} {command}: {answer}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// What it was asked for.
        command: String,
        /// What it said, made printable.
        answer: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The launcher could not do its part.
    #[error("launch: {answer}")]
    Launch {
        /// What it said.
        answer: String,
    },
    /// The operating system refused something.
    #[error("{what} {}", path.display())]
    Io {
        /// A verb, such as `open`.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Locked { .. } | Error::NotRunning { .. } | Error::Unproved { .. } => {
                Kind::Conflict
            }
            Error::Unsupported { .. } => Kind::Unsupported,
            Error::WrongImage { .. } => Kind::Unsupported,
            Error::Unusable { .. }
            | Error::Refused { .. }
            | Error::ProgramMissing { .. }
            | Error::TooOld { .. }
            | Error::Unreachable { .. }
            | Error::Hung { .. } => Kind::Unavailable,
            Error::Setting { .. } => Kind::Invalid,
            Error::Timeout { .. } => Kind::Timeout,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Exhausted,
                io::ErrorKind::PermissionDenied => Kind::Denied,
                // A socket that is not there or not answering: the VMM is starting or gone.
                io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock => Kind::Unavailable,
                _ => Kind::Bug,
            },
            Error::Exited { .. } | Error::Monitor { .. } | Error::Launch { .. } => Kind::Bug,
        }
    }

    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::ProgramMissing { hint, .. }
            | Error::TooOld { hint, .. }
            | Error::Unreachable { hint, .. }
            | Error::WrongImage { hint, .. } => Some((*hint).to_owned()),
            Error::Refused { hint, .. } => hint.clone(),
            Error::Unproved { dir, .. } => Some(format!(
                "look who holds {}/run/lock; nothing is killed on doubt",
                dir.display()
            )),
            Error::Hung { seconds, .. } => Some(format!(
                "it is asked again in {seconds} s; stopping or deleting the machine ends it"
            )),
            _ => None,
        }
    }

    /// For `map_err` at a system call on a path.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }
}

fn describe(report: &ExitReport) -> String {
    let how = match &report.exit {
        Exit::PowerOff => "powered off".to_owned(),
        Exit::Reboot => "rebooted".to_owned(),
        Exit::Panic => "guest panic".to_owned(),
        Exit::Killed => "killed".to_owned(),
        Exit::Code { code } => format!("exit code {code}"),
        Exit::Signal { signal } => format!("signal {signal}"),
        Exit::Lost => "nobody saw how".to_owned(),
    };
    match report.stderr_tail.trim() {
        "" => how,
        words => format!("{how}: {words}"),
    }
}
