//! What a request that fails is answered with: one shape, made in one place.
//!
//! A handler returns a [`Failure`]; it travels as an extension of the response to `around.rs`, which knows the request
//! id, writes the body and the log line.

use std::borrow::Cow;
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hutch_contract::error::{ErrorBody, Kind};

/// The longest message or hint: both may quote what a guest or a client said.
const MAX_TEXT: usize = 1000;

/// A request failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub status: StatusCode,
    pub code: Cow<'static, str>,
    pub message: String,
    pub hint: Option<String>,
    /// For the log only.
    pub cause: Option<String>,
}

/// The failure that a response stands for.
#[derive(Clone)]
pub(crate) struct Failed(pub Arc<Failure>);

impl Failure {
    /// A failure with the status of its kind.
    pub(crate) fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Failure {
        let status = StatusCode::from_u16(kind.http_status()).expect("the table holds statuses");
        Failure::with_status(status, code, message)
    }

    /// A failure of the protocol itself, which has a status that no kind has.
    pub(crate) fn with_status(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
    ) -> Failure {
        Failure {
            status,
            code: code.into(),
            message: message.into(),
            hint: None,
            cause: None,
        }
    }

    /// The request cannot be meant so.
    pub(crate) fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Invalid, "invalid", message)
    }

    /// A fault of ours, of which only the log says more.
    pub(crate) fn bug(cause: impl Into<String>) -> Failure {
        let mut failure = Failure::new(Kind::Bug, "internal", "the server has a fault");
        failure.hint = Some("its log says more, under this request id".to_owned());
        failure.cause = Some(cause.into());
        failure
    }

    /// The server ends.
    pub(crate) fn stopping() -> Failure {
        Failure::new(Kind::Unavailable, "stopping", "the server is stopping")
            .hint("machines go on running; ask again when it is back")
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// What the client reads.
    pub(crate) fn body(&self, request_id: String) -> ErrorBody {
        ErrorBody {
            code: self.code.to_string(),
            message: plain(&self.message),
            hint: self.hint.as_deref().map(plain),
            request_id,
        }
    }
}

impl From<hutch_engine::Error> for Failure {
    fn from(error: hutch_engine::Error) -> Failure {
        let kind = error.kind();
        if kind == Kind::Bug {
            return Failure::bug(error.chain());
        }
        let mut failure = Failure::new(kind, error.code(), error.to_string());
        failure.hint = error.hint();
        failure.cause = std::error::Error::source(&error)
            .is_some()
            .then(|| error.chain());
        failure
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(Failed(Arc::new(self)));
        response
    }
}

/// A text without what could move a cursor, forge a line or reverse the reading direction, and of bounded length.
pub(crate) fn plain(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars()
        .take(MAX_TEXT)
        .map(|c| if hidden(c) { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_cannot_forge_a_line_or_grow_without_bound() {
        assert_eq!(plain("a\r\nb\u{1b}[2Jc\u{202e}d é😀"), "a��b�[2Jc�d é😀");
        assert_eq!(plain(&"x".repeat(1_000_000)).len(), MAX_TEXT);
    }

    #[test]
    fn a_fault_of_ours_tells_the_client_nothing_and_the_log_everything() {
        let io = std::io::Error::other("disk on fire");
        let error = hutch_engine::Error::Io {
            action: "write",
            path: "/secret/place".into(),
            source: io,
        };
        let failure = Failure::from(error);
        assert_eq!(failure.status, 500);
        let body = serde_json::to_string(&failure.body("id".to_owned())).unwrap();
        assert!(!body.contains("secret") && !body.contains("fire"), "{body}");
        assert!(
            failure
                .cause
                .unwrap()
                .contains("/secret/place: disk on fire")
        );
    }
}
