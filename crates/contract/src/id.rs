//! Ids: a prefix that says what the thing is, and a ULID.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// A text is no id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id of the form {prefix}-…")]
pub struct InvalidId {
    /// What was given, cut to 64 characters.
    pub text: String,
    /// What the id must begin with.
    pub prefix: &'static str,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
        #[cfg_attr(feature = "schema", schema(value_type = String))]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A new id, unique in practice and ordered by time.
            #[expect(clippy::new_without_default, reason = "each call gives another value")]
            pub fn new() -> Self {
                Self(format!("{}-{}", $prefix, Ulid::generate().to_string().to_lowercase()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let canonical = text
                    .strip_prefix(concat!($prefix, "-"))
                    .and_then(|rest| Ulid::from_string(rest).ok())
                    .map(|ulid| format!("{}-{}", $prefix, ulid.to_string().to_lowercase()));
                match canonical {
                    Some(canonical) if canonical == text => Ok(Self(canonical)),
                    _ => Err(InvalidId { text: text.chars().take(64).collect(), prefix: $prefix }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

ids! {
    /// Names a machine.
    MachineId = "mch";
    /// Names an image.
    ImageId = "img";
    /// Names a snapshot.
    SnapshotId = "snp";
    /// Names an operation.
    OperationId = "op";
    /// Names a key of the API.
    KeyId = "key";
    /// Names an owner: who has machines, images, quotas and keys.
    OwnerId = "own";
    /// Names a process in a machine.
    ProcessId = "prc";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_was_written() {
        let id = MachineId::new();
        assert_eq!(id.as_str().parse::<MachineId>(), Ok(id));
    }

    #[test]
    fn only_the_canonical_form_is_an_id() {
        for text in [
            "",
            "mch-",
            "mch",
            "img-01arz3ndektsv4rrffq69g5fav",
            "mch-01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "mch-../x",
        ] {
            assert!(text.parse::<MachineId>().is_err(), "{text}");
        }
    }
}
