//! Commands in machines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::ProcessId;

/// The most output that a blocking exec returns of each stream; the rest is counted in `dropped_bytes`.
pub const MAX_BLOCKING_OUTPUT_BYTES: usize = 4 * 1024 * 1024;

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Added to the machine's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; the image's when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User, or `user:group`; the image's when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Standard input as a whole, in base64; none when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Ends the command and all it started after so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ExecExit {
    /// Its exit code; 128 and the number when a signal ended it, as shells do.
    pub exit_code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether that was the timeout.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// A command that has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ExecResult {
    /// How it ended.
    #[serde(flatten)]
    pub exit: ExecExit,
    /// What it wrote to standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// What it wrote to standard error; bytes that are not UTF-8 are replaced.
    pub stderr: String,
    /// Bytes of output beyond the limit.
    #[serde(default)]
    pub dropped_bytes: u64,
}

/// What a streaming exec sends, one event each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ExecEvent {
    /// It runs.
    Started {
        /// The process, for attaching again.
        process: ProcessId,
    },
    /// Bytes of standard output.
    Stdout {
        /// Count of output bytes before these, over both streams.
        sequence: u64,
        /// The bytes.
        data_base64: String,
    },
    /// Bytes of standard error.
    Stderr {
        /// Count of output bytes before these, over both streams.
        sequence: u64,
        /// The bytes.
        data_base64: String,
    },
    /// So many bytes are gone.
    Dropped {
        /// How many.
        bytes: u64,
    },
    /// It has ended; nothing follows.
    Exit(ExecExit),
    /// We cannot go on; nothing follows.
    Error {
        /// A stable word.
        code: String,
        /// One sentence.
        message: String,
        /// What to do next.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}
