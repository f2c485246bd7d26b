//! Operations: something with steps that is being done, and what became of it.

use serde::{Deserialize, Serialize};

use crate::id::OperationId;

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What is being done: `image-import`, `image-bootstrap`, …
    pub kind: String,
    /// Id of what it is done to.
    pub target: String,
    /// How far it is.
    pub state: OperationState,
    /// When it began, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// Changes with each change.
    pub version: u64,
}

/// How far an operation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum OperationState {
    /// Going on.
    Running {
        /// The step that it is at, and how much of it is done.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        progress: Option<Progress>,
    },
    /// Done.
    Succeeded,
    /// Given up; its effects are undone.
    Failed {
        /// A stable word.
        code: String,
        /// One sentence.
        message: String,
        /// What to do next.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// How much of a step is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Progress {
    /// The step, for people.
    pub phase: String,
    /// How much of it.
    pub done: u64,
    /// Of how much, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// What is counted: `bytes`, `entries`, `packages`, or nothing.
    pub unit: String,
}
