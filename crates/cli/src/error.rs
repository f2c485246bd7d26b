//! Everything that can end a command, what a person reads of it, and the exit code it ends with.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use hutch_contract::client;
use hutch_contract::error::Kind;

use crate::ui::{Ui, printable};

/// Exit code of `run` and `exec` when not the command failed but we did, as of `docker run`.
pub const OURS: u8 = 125;

/// Why a command ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server says no, or there is none.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The server of this data directory does not run.
    #[error("no server answers at {} or {url}", socket.display())]
    NoServer {
        /// Its socket.
        socket: PathBuf,
        /// Where it would listen by default.
        url: &'static str,
    },
    /// The socket is there and not for us.
    #[error("{}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No data directory was named and none can be derived.
    #[error("there is no home directory to look for a data directory in")]
    NoDataDir,
    /// The server in this process does not start, or its configuration is wrong.
    #[error(transparent)]
    Server(#[from] hutch_server::Error),
    /// A runtime's program was not installed.
    #[error(transparent)]
    Install(#[from] crate::install::Error),
    /// The server leads no HTTP into machines.
    #[error("machine `{machine}` has no URL")]
    NoUrl {
        /// The machine.
        machine: String,
    },
    /// The server in this process ended, and nobody had asked it to.
    #[error("the server ended by itself")]
    ServerEnded,
    /// The text says nothing about what to log.
    #[error("`{filter}` is no log filter")]
    LogFilter {
        /// The text.
        filter: String,
    },
    /// An operation was given up by the server.
    #[error("{message}")]
    Operation {
        /// What the server says.
        message: String,
        /// What to do next.
        hint: Option<String>,
    },
    /// It took too long to come to a state; it may still come.
    #[error("{machine} is not {until} after {} minutes", crate::waiting::LIMIT.as_secs() / 60)]
    StillWaiting {
        /// Which machine.
        machine: String,
        /// What was waited for.
        until: &'static str,
    },
    /// A command in a machine could not go on.
    #[error("{message}")]
    Exec {
        /// What the server says.
        message: String,
        /// What to do next.
        hint: Option<String>,
    },
    /// More was piped in than an exec takes.
    #[error("standard input is larger than 1 MiB")]
    StdinTooLarge,
    /// Neither or both sides of a copy are in a machine.
    #[error("one side of a copy, and only one, is in a machine")]
    CopySides,
    /// A path in a machine that does not begin at its root.
    #[error("`{path}` is not an absolute path in a machine")]
    RelativePath {
        /// The path.
        path: String,
    },
    /// Directories are not copied.
    #[error("{path} is a directory, and only single files can be copied")]
    IsDirectory {
        /// The path.
        path: String,
    },
    /// The target says "in this directory", and there is none.
    #[error("{path} is not a directory")]
    NotDirectory {
        /// The path.
        path: String,
    },
    /// The target names no file, and the source has no name to give it.
    #[error("{path} names no file")]
    NoFileName {
        /// The path.
        path: String,
    },
    /// The target is a link; following it would write somewhere else.
    #[error("{} is a symbolic link", path.display())]
    IsLink {
        /// The path.
        path: PathBuf,
    },
    /// A file on this side.
    #[error("{action} {}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it ended.
        #[source]
        source: io::Error,
    },
    /// One of our three standard streams, or the signals.
    #[error("{action}")]
    Process {
        /// What was being done.
        action: &'static str,
        /// Why it ended.
        #[source]
        source: io::Error,
    },
    /// Whoever read our output has left.
    #[error("standard output was closed")]
    Closed,
    /// A signal told us to end.
    #[error("interrupted")]
    Interrupted {
        /// Its number.
        signal: u8,
    },
    /// A program that works for us did not do its part; it has said why.
    #[error("{program}: {how}")]
    Program {
        /// Its name.
        program: String,
        /// How it ended.
        how: String,
        /// What it needs.
        hint: &'static str,
    },
    /// All has been said already.
    #[error("there were errors")]
    Reported {
        /// What to exit with.
        exit_code: u8,
    },
}

impl Error {
    /// An error of stdout or stderr.
    pub fn stdout(source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Error::Closed,
            _ => Error::Process {
                action: "write the output",
                source,
            },
        }
    }

    /// What sort of failure it is.
    fn kind(&self) -> Kind {
        match self {
            Error::Client(error) => error.kind(),
            Error::Server(error) => error.kind(),
            Error::Install(error) => error.kind(),
            Error::StillWaiting { .. } => Kind::Timeout,
            Error::StdinTooLarge => Kind::TooLarge,
            Error::NoDataDir
            | Error::LogFilter { .. }
            | Error::CopySides
            | Error::RelativePath { .. }
            | Error::IsDirectory { .. }
            | Error::NotDirectory { .. }
            | Error::NoFileName { .. }
            | Error::IsLink { .. } => Kind::Invalid,
            Error::NoServer { .. }
            | Error::NoUrl { .. }
            | Error::Socket { .. }
            | Error::Program { .. } => Kind::Unavailable,
            Error::File { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Kind::NotFound
            }
            _ => Kind::Bug,
        }
    }

    /// What the process exits with. `ours` is the code of a failure of ours where the command's own code is passed
    /// on; there it must not be mistaken for one.
    pub fn exit_code(&self, ours: Option<u8>) -> u8 {
        match self {
            // As if the signal had ended us, which is what a shell expects.
            Error::Closed => 128 + 13,
            Error::Interrupted { signal } => 128 + signal,
            Error::Reported { exit_code } => ours.unwrap_or(*exit_code),
            other => ours.unwrap_or(other.kind().exit_code()),
        }
    }

    /// What to do next, where we know.
    fn hint(&self) -> Option<String> {
        let hint = match self {
            // The server's own hint is for those who write HTTP.
            Error::Client(error) if error.kind() == Kind::Unauthenticated => {
                "set HUTCH_TOKEN to a key of the server; its first one is in admin.key in its data directory"
            }
            Error::Client(error) => return error.hint(),
            Error::Server(error) => return error.hint(),
            Error::Install(error) => return error.hint(),
            Error::Operation { hint, .. } | Error::Exec { hint, .. } => return hint.clone(),
            Error::NoServer { .. } => {
                "start one with `hutch serve`, or give `--embedded` to `hutch run`; HUTCH_URL says where another one is"
            }
            Error::Socket { .. } => {
                "only the server's own user may use it; others set HUTCH_URL and HUTCH_TOKEN"
            }
            Error::NoUrl { .. } => {
                "the server was started without its HTTP gateway, or its port was taken: see `hutch doctor`"
            }
            Error::NoDataDir => "set HOME, or name the directory with --data-dir",
            Error::StillWaiting { machine, .. } => {
                return Some(format!("see what it does with `hutch get {machine}`"));
            }
            Error::LogFilter { .. } => "such as debug, or info,hutch_engine=debug",
            Error::StdinTooLarge => {
                "copy it into the machine first, with `hutch cp - MACHINE:/path`"
            }
            Error::Program { hint, .. } => hint,
            Error::CopySides => {
                "write it as MACHINE:/path; a local name with a colon needs ./ before it"
            }
            Error::RelativePath { .. } => "write it as MACHINE:/path",
            Error::IsDirectory { .. } => "pack it with tar first",
            Error::NoFileName { .. } => "give the target a file name",
            Error::IsLink { .. } => "give the path that it leads to",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// Tells a person, once: the chain in one line, and what to do next. Text of guests and servers is made harmless.
    pub fn report(&self, ui: Ui) {
        if matches!(
            self,
            Error::Closed | Error::Interrupted { .. } | Error::Reported { .. }
        ) {
            return;
        }
        let mut text = format!("error: {}", printable(&self.to_string()));
        let mut next = self.source();
        while let Some(source) = next {
            text += &format!(": {}", printable(&source.to_string()));
            next = source.source();
        }
        ui.say(text);
        if let Some(hint) = self.hint() {
            ui.say(format!("hint: {}", printable(&hint)));
        }
    }
}
