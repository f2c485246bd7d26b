//! What can go wrong between the host and a guest, as one enum, and its kinds.

use std::io;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call to a guest did not give what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection is gone; a new one may reach the guest again.
    #[error("connection to the guest lost")]
    Disconnected {
        /// What broke it, where that is known.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The guest did not answer in time.
    #[error("guest did not answer {call} in time")]
    Timeout {
        /// The call, as named in the schema.
        call: &'static str,
    },
}

impl Error {
    pub(crate) fn disconnected(source: io::Error) -> Self {
        Self::Disconnected {
            source: Some(source.into()),
        }
    }
}
