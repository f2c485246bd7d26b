//! Lists in pages.

use serde::{Deserialize, Serialize};

/// Rows in a page when the request does not say.
pub const DEFAULT_LIMIT: u32 = 100;
/// The most rows in a page.
pub const MAX_LIMIT: u32 = 1000;

/// A page of a list. A row that exists throughout is shown exactly once over all pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Ask with `cursor` set to this for the rest; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}
