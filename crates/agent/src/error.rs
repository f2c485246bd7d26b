//! What can go wrong in PID 1 and in serving. Failures of single calls are gRPC statuses and never come here.

use std::io;
use std::path::PathBuf;

/// One fact each; the source is printed by whoever reports the chain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or device could not be used.
    #[error("{verb} {}", path.display())]
    Path {
        /// Present-tense verb.
        verb: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call without a path.
    #[error("{what}")]
    System {
        /// Verb phrase.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A disk did not appear.
    #[error("no disk {wanted} after {waited_s} s; block devices here: {present}")]
    NoDisk {
        /// What `hutch.root` or `hutch.modules` asked for.
        wanted: String,
        /// Seconds waited.
        waited_s: u64,
        /// Names and serials.
        present: String,
    },
    /// No disk can ever appear.
    #[error("the kernel {kernel} has no virtio_blk built in, and {modules}")]
    NoDriver {
        /// Its release.
        kernel: String,
        /// What is the case with the modules.
        modules: String,
    },
    /// A kernel parameter or an argument that makes no sense.
    #[error("{name}={value} is not one of: {allowed}")]
    Parameter {
        /// Its name.
        name: &'static str,
        /// What was given.
        value: String,
        /// What could be.
        allowed: &'static str,
    },
    /// A kernel parameter with our prefix that we do not know.
    #[error("unknown kernel parameter {word}; there are {known}")]
    UnknownParameter {
        /// As it stands there.
        word: String,
        /// What there is.
        known: &'static str,
    },
    /// Every agent has ended soon after its start.
    #[error("the agent does not stay up; it was started {starts} times")]
    NoAgent {
        /// Starts since boot.
        starts: u32,
    },
    /// The command line is not complete.
    #[error("{0}")]
    Usage(&'static str),
}

/// Short for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the operation whose error follows.
pub trait Context<T> {
    /// `verb path: error`.
    fn path(self, verb: &'static str, path: impl Into<PathBuf>) -> Result<T>;
    /// `what: error`.
    fn what(self, what: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn path(self, verb: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::Path {
            verb,
            path: path.into(),
            source: source.into(),
        })
    }

    fn what(self, what: &'static str) -> Result<T> {
        self.map_err(|source| Error::System {
            what,
            source: source.into(),
        })
    }
}

/// An error with all of its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// One line on the console or standard error. A console that cannot be written to is no reason to end.
pub fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(io::stderr().lock(), "hutch: {line}");
}
