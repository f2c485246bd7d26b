//! The error body of every API, and what kinds of failure there are.

use serde::{Deserialize, Serialize};

/// What sort of failure: decides HTTP status, exit code and whether to try again, each in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The request cannot be meant so.
    Invalid,
    /// No valid key was shown.
    Unauthenticated,
    /// The key may not do this.
    Denied,
    /// No such thing, or not this owner's.
    NotFound,
    /// It does not fit the present state.
    Conflict,
    /// A request body or an answer is larger than the limit.
    TooLarge,
    /// The owner's quota is used up.
    QuotaExceeded,
    /// The host has no room left: memory, disk, addresses.
    Exhausted,
    /// This runtime or guest cannot do it.
    Unsupported,
    /// Something it needs is not there now.
    Unavailable,
    /// It took longer than its deadline.
    Timeout,
    /// Ours.
    Bug,
}

impl Kind {
    /// The HTTP status that this kind is answered with.
    pub fn http_status(self) -> u16 {
        match self {
            Kind::Invalid => 400,
            Kind::Unauthenticated => 401,
            Kind::Denied => 403,
            Kind::NotFound => 404,
            Kind::Conflict => 409,
            Kind::TooLarge => 413,
            Kind::QuotaExceeded => 429,
            Kind::Bug => 500,
            Kind::Unsupported => 501,
            Kind::Unavailable => 503,
            Kind::Timeout => 504,
            Kind::Exhausted => 507,
        }
    }

    /// The kind that an HTTP status stands for.
    pub fn from_http_status(status: u16) -> Kind {
        match status {
            401 => Kind::Unauthenticated,
            403 => Kind::Denied,
            404 => Kind::NotFound,
            408 | 504 => Kind::Timeout,
            409 | 412 | 422 => Kind::Conflict,
            413 => Kind::TooLarge,
            429 => Kind::QuotaExceeded,
            501 => Kind::Unsupported,
            502 | 503 => Kind::Unavailable,
            507 => Kind::Exhausted,
            400..=499 => Kind::Invalid,
            _ => Kind::Bug,
        }
    }

    /// The exit code of the command line. `run` and `exec` end with the command's own code unless we failed: then 125,
    /// as `docker run` does.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Invalid => 2,
            Kind::NotFound => 4,
            Kind::Unauthenticated | Kind::Denied => 5,
            Kind::Conflict => 6,
            Kind::Timeout => 7,
            _ => 1,
        }
    }

    /// Whether the same request may succeed later without a change by the caller.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Kind::Unavailable | Kind::Timeout | Kind::QuotaExceeded | Kind::Exhausted
        )
    }
}

/// The body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// A stable word for programs, such as `machine_not_found`.
    pub code: String,
    /// One sentence for people: what happened, to what.
    pub message: String,
    /// What to do next, where we know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Finds this request in the server's log.
    pub request_id: String,
}
