//! Keys of the API.

use serde::{Deserialize, Serialize};

use crate::id::{KeyId, OwnerId};

/// A key as the API shows it; its secret is shown once, when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Key {
    /// Its id; also the public part of the secret.
    pub id: KeyId,
    /// Whose it is.
    pub owner: OwnerId,
    /// What it may do.
    pub scope: Scope,
    /// When it was made, UTC, in milliseconds since 1970.
    pub created_at_ms: u64,
}

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Everything, for every owner.
    Admin,
    /// Everything of its owner.
    Owner,
    /// Look at what its owner has.
    Read,
}
