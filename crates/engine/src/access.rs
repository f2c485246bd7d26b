//! Who may do what: one pure function over a principal and what is wanted.

use hutch_contract::id::OwnerId;
use hutch_contract::key::Scope;

use crate::{Error, Principal};

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Looks.
    Read,
    /// Changes something, or acts inside a machine.
    Write,
}

/// Refuses what the key's scope does not cover.
pub(crate) fn check(who: &Principal, access: Access) -> Result<(), Error> {
    match (who.scope, access) {
        (Scope::Admin | Scope::Owner, _) | (Scope::Read, Access::Read) => Ok(()),
        (Scope::Read, Access::Write) => Err(Error::Denied),
    }
}

/// Whether `who` may know that something of `owner` exists.
pub(crate) fn sees(who: &Principal, owner: &OwnerId) -> bool {
    who.scope == Scope::Admin || who.owner == *owner
}
