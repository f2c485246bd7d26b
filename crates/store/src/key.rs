//! Names of records. Owns what a key may look like, not which keys exist.

use std::borrow::Borrow;
use std::fmt;

use crate::Error;

/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 256;

/// Name of a record: 1 to 256 printable ASCII characters, by custom parted by slashes, such as
/// `machine/mch-01J…`. Ordered by bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Checks and wraps a name.
    ///
    /// # Errors
    /// [`Error::InvalidKey`] when it is empty, too long or not printable ASCII.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let problem = if name.is_empty() {
            "is empty"
        } else if name.len() > MAX_KEY_BYTES {
            "is longer than 256 bytes"
        } else if !name.bytes().all(|b| matches!(b, b' '..=b'~')) {
            "is not printable ASCII"
        } else {
            return Ok(Self(name));
        };
        // A hostile name must not fill the log.
        let key = name.chars().take(64).collect();
        Err(Error::InvalidKey { key, problem })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for Key {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self, Error> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_printable_ascii_up_to_the_limit() {
        for name in ["a", "machine/mch-01J", "~ !/", &"k".repeat(MAX_KEY_BYTES)] {
            assert_eq!(Key::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_everything_else() {
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        for name in ["", &long, "a\nb", "a\0", "a\x7f", "ü", "\u{202e}"] {
            assert!(
                matches!(Key::new(name), Err(Error::InvalidKey { .. })),
                "{name:?}"
            );
        }
    }
}
