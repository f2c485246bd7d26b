//! What can go wrong between the host and a guest, as one enum, and its kinds.

use std::error::Error as StdError;
use std::io;

use tonic::{Code, Status};

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Most bytes of a guest's text that an error keeps.
pub(crate) const TEXT: usize = 1024;

/// Why a call to a guest did not give what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection is gone; a new one may reach the guest again.
    #[error("connection to the guest lost")]
    Disconnected {
        /// What broke it, where that is known.
        #[source]
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// The guest did not answer in time.
    #[error("guest did not answer {call} in time")]
    Timeout {
        /// The call, as named in the schema.
        call: &'static str,
    },
    /// The guest answered what no agent answers.
    #[error("guest broke the protocol in {call}: {what}")]
    Protocol {
        /// The call, as named in the schema.
        call: &'static str,
        /// What was wrong.
        what: &'static str,
    },
    /// The guest said no.
    #[error("guest refused {call}: {message}")]
    Refused {
        /// The call, as named in the schema.
        call: &'static str,
        /// What sort of refusal.
        kind: Kind,
        /// The guest's words, at most 1 KiB, control characters escaped.
        message: String,
    },
    /// The agent was made before this call was.
    #[error("the machine's agent is too old for {call}: it is of generation {has}, not {needs}")]
    TooOld {
        /// The call, as named in the schema.
        call: &'static str,
        /// The agent's generation.
        has: u32,
        /// The one that brought the call.
        needs: u32,
    },
    /// As many of these calls as may be are going on, and none ended in time.
    #[error("{limit} connections into the machine are open already")]
    Crowded {
        /// How many may be.
        limit: u32,
    },
    /// What the caller wanted to send could not be had.
    #[error("read what {call} sends")]
    Source {
        /// The call, as named in the schema.
        call: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What sort of failure an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The named file or process does not exist in the guest.
    NotFound,
    /// The request cannot be meant so.
    Invalid,
    /// It does not fit the present state.
    Conflict,
    /// The guest's own rules forbid it.
    Denied,
    /// Not now: the connection is gone, or the guest is not ready.
    Unavailable,
    /// No answer in time.
    Timeout,
    /// The guest has run out of something.
    Exhausted,
    /// This agent does not know the call.
    Unsupported,
    /// Nothing listens on the port that was dialled.
    NothingListens,
    /// The guest has no way to the address that was dialled.
    Unreachable,
    /// A fault of the guest.
    Internal,
}

impl Error {
    /// What sort of failure it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Disconnected { .. } => Kind::Unavailable,
            Self::Timeout { .. } => Kind::Timeout,
            Self::Protocol { .. } => Kind::Internal,
            Self::Refused { kind, .. } => *kind,
            Self::TooOld { .. } => Kind::Unsupported,
            Self::Crowded { .. } => Kind::Exhausted,
            Self::Source { .. } => Kind::Invalid,
        }
    }

    /// What a user can do about it, where that is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Timeout { .. } => Some("the machine may be busy, frozen or still booting".into()),
            Self::Protocol { .. } => Some(
                "the agent in the machine is damaged or was replaced; recreate the machine".into(),
            ),
            Self::TooOld { .. }
            | Self::Refused {
                kind: Kind::Unsupported,
                ..
            } => Some("restart the machine: it then has the agent of this server".into()),
            _ => None,
        }
    }

    pub(crate) fn disconnected(source: impl StdError + Send + Sync + 'static) -> Self {
        Self::Disconnected {
            source: Some(source.into()),
        }
    }

    /// What a failed call means. A status with a source was made on this side.
    pub(crate) fn from_status(call: &'static str, status: Status) -> Self {
        if status.source().is_some() {
            let reset = causes(&status)
                .filter_map(|cause| cause.downcast_ref::<h2::Error>())
                .any(|error| error.is_reset() && error.is_remote());
            if reset {
                return Self::Protocol {
                    call,
                    what: "it broke off the call",
                };
            }
            // Status and transport print their insides; the cause at the bottom is a sentence.
            let bottom = causes(&status).last().map(ToString::to_string);
            return Self::disconnected(io::Error::other(bottom.unwrap_or_default()));
        }
        if let Some(what) = decoding_failure(&status) {
            return Self::Protocol { call, what };
        }
        let kind = match status.code() {
            Code::NotFound => Kind::NotFound,
            Code::InvalidArgument | Code::OutOfRange => Kind::Invalid,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Kind::Conflict,
            Code::PermissionDenied | Code::Unauthenticated => Kind::Denied,
            Code::Unavailable | Code::Cancelled => Kind::Unavailable,
            Code::DeadlineExceeded => Kind::Timeout,
            Code::ResourceExhausted => Kind::Exhausted,
            Code::Unimplemented => Kind::Unsupported,
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => Kind::Internal,
        };
        Self::Refused {
            call,
            kind,
            message: inert(status.message(), TEXT),
        }
    }
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| {
        (*error).source()
    })
}

/// tonic reports a reply that it could not decode as a status like the guest's own, told apart by its words alone.
fn decoding_failure(status: &Status) -> Option<&'static str> {
    let text = status.message();
    match status.code() {
        Code::OutOfRange if text.starts_with("Error, decoded message length too large") => {
            Some("a message larger than the limit")
        }
        Code::Internal if text.starts_with("failed to decode Protobuf message") => {
            Some("a message that cannot be decoded")
        }
        Code::Internal if text.starts_with("protocol error: received message") => {
            Some("a message that cannot be decoded")
        }
        Code::Internal if text.starts_with("Missing response message") => Some("an empty reply"),
        _ => None,
    }
}

/// A guest's text made safe to log and show: control and direction characters escaped, cut to `limit` bytes.
pub(crate) fn inert(text: &str, limit: usize) -> String {
    let mut safe = String::new();
    for character in text.chars() {
        let turns = matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let before = safe.len();
        if character.is_control() || turns || matches!(character, '\u{2028}' | '\u{2029}') {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
        if safe.len() > limit {
            safe.truncate(before);
            break;
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_little_of_what_the_guest_says_and_nothing_that_acts_on_a_terminal() {
        let text = format!("\u{1b}[31mno\r\n\u{202e}{}", "é".repeat(5000));
        let Error::Refused { message, kind, .. } =
            Error::from_status("Stat", Status::not_found(text))
        else {
            panic!("a refusal")
        };
        assert_eq!(kind, Kind::NotFound);
        assert!(
            message.starts_with("\\u{1b}[31mno\\r\\n\\u{202e}é"),
            "{message}"
        );
        assert!(message.len() <= TEXT && message.len() > TEXT - 4);
    }
}
