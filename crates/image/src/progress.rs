//! How far a long step is.

use serde::{Deserialize, Serialize};

/// What `done` and `total` count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Steps, lines or whatever else comes one by one.
    Steps,
}

/// One report of a long step. Reports of one phase come with a growing `done`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, for people ("reading the archive").
    pub phase: String,
    /// How much is done.
    pub done: u64,
    /// How much there is to do, when that is known.
    pub total: Option<u64>,
    /// What is counted.
    pub unit: Unit,
}

impl Progress {
    pub(crate) fn bytes(phase: &str, done: u64, total: Option<u64>) -> Self {
        Self {
            phase: phase.into(),
            done,
            total,
            unit: Unit::Bytes,
        }
    }

    pub(crate) fn step(phase: impl Into<String>, done: u64) -> Self {
        Self {
            phase: phase.into(),
            done,
            total: None,
            unit: Unit::Steps,
        }
    }
}

/// Where reports go.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);
