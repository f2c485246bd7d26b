//! What can go wrong between a client and its server.

use std::error::Error as StdError;

use super::Target;
use crate::error::{ErrorBody, Kind};

type Source = Box<dyn StdError + Send + Sync>;

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server says no.
    #[error("{}", body.message)]
    Api {
        /// HTTP status.
        status: u16,
        /// What it says.
        body: ErrorBody,
    },
    /// Nobody answers there.
    #[error("no server answers at {target}")]
    Unreachable {
        /// Where.
        target: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The answer did not come in time; the server may still do what was asked.
    #[error("{target} did not answer in time")]
    Timeout {
        /// Who.
        target: String,
    },
    /// The conversation broke off or made no sense; the server may still do what was asked.
    #[error("{what}")]
    Protocol {
        /// What was being done.
        what: &'static str,
        /// Why it ended.
        #[source]
        source: Source,
    },
    /// The text is no address of a server.
    #[error("`{target}` is no address of a server: {reason}")]
    Target {
        /// What was given.
        target: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The key has characters that no key has.
    #[error("the key has characters that no key has")]
    Token,
    /// The text can be no id and no name.
    #[error("`{reference}` is neither an id nor a name")]
    Reference {
        /// What was given.
        reference: String,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Api { status, .. } => Kind::from_http_status(*status),
            Error::Unreachable { .. } | Error::Protocol { .. } => Kind::Unavailable,
            Error::Timeout { .. } => Kind::Timeout,
            Error::Target { .. } | Error::Token | Error::Reference { .. } => Kind::Invalid,
        }
    }

    /// The server's word for it, when the server said it.
    pub fn code(&self) -> Option<&str> {
        match self {
            Error::Api { body, .. } => Some(&body.code),
            _ => None,
        }
    }

    /// What to do next, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Api { body, .. } => body.hint.clone(),
            Error::Unreachable { .. } => {
                Some("start one with `hutch serve`, or say where it is with HUTCH_URL".to_owned())
            }
            Error::Target { .. } => Some("for example http://127.0.0.1:8080".to_owned()),
            _ => None,
        }
    }

    /// A request that could not be sent, or whose answer did not begin.
    pub(super) fn sending(target: &Target, source: reqwest::Error) -> Error {
        let target = target.to_string();
        if source.is_connect() {
            Error::Unreachable {
                target,
                source: cause(source),
            }
        } else if source.is_timeout() {
            Error::Timeout { target }
        } else {
            Error::Protocol {
                what: "send the request",
                source: cause(source),
            }
        }
    }

    /// An answer that broke off.
    pub(super) fn reading(source: reqwest::Error) -> Error {
        Error::Protocol {
            what: "read the answer",
            source: cause(source),
        }
    }
}

/// What lies at the bottom of reqwest's sentences, which only repeat the URL and each other.
fn cause(error: reqwest::Error) -> Source {
    let mut deepest = error.source();
    while let Some(below) = deepest.and_then(|cause| cause.source()) {
        deepest = Some(below);
    }
    match deepest {
        Some(deepest) => deepest.to_string().into(),
        None => error.without_url().into(),
    }
}
