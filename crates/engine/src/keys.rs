//! Keys of the API: made, shown once, stored as a hash, compared in constant time.

use std::path::Path;

use hutch_contract::id::{KeyId, OwnerId};
use hutch_contract::key::Scope;
use hutch_contract::record::{FORMAT, KeyRecord};
use hutch_store::{Check, Store, Write};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{Error, rows};

/// The file in the data directory that holds the first key.
pub(crate) const ADMIN_KEY_FILE: &str = "admin.key";
/// Random bytes in a secret.
const SECRET_BYTES: usize = 32;

/// Who makes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// Whose things it is about.
    pub owner: OwnerId,
    /// What it may do.
    pub scope: Scope,
    /// The key that was shown; none on the unix socket.
    pub key: Option<KeyId>,
}

/// Finds out whose `secret` is: `KEY-ID.HEX`.
pub(crate) async fn authenticate(
    store: &dyn Store,
    secret: &str,
    now_ms: u64,
) -> Result<Principal, Error> {
    let (id, hex) = secret.split_once('.').ok_or(Error::Unauthenticated)?;
    let id: KeyId = id.parse().map_err(|_| Error::Unauthenticated)?;
    let row = store
        .get_json::<KeyRecord>(&rows::api_key(&id))
        .await?
        .ok_or(Error::Unauthenticated)?;
    let record = row.value;
    let same = sha256_hex(hex.as_bytes())
        .as_bytes()
        .ct_eq(record.secret_sha256.as_bytes());
    let alive = record.expires_at_ms.is_none_or(|end| now_ms < end);
    if bool::from(same) && alive {
        Ok(Principal {
            owner: record.owner,
            scope: record.scope,
            key: Some(record.id),
        })
    } else {
        Err(Error::Unauthenticated)
    }
}

/// Makes the first admin key, unless one was made before.
///
/// The file comes before the row: after a crash between the two no row is there, and both are made again.
pub(crate) async fn ensure_admin(
    store: &dyn Store,
    data_dir: &Path,
    owner: &OwnerId,
    now_ms: u64,
) -> Result<(), Error> {
    if !store.list("key/", None, 1).await?.is_empty() {
        return Ok(());
    }
    let id = KeyId::new();
    let secret = random_hex();
    let text = format!("{id}.{secret}\n");
    hutch_disk::write_atomic(&data_dir.join(ADMIN_KEY_FILE), text.as_bytes(), 0o600)?;
    let record = KeyRecord {
        format: FORMAT,
        id: id.clone(),
        owner: owner.clone(),
        scope: Scope::Admin,
        secret_sha256: sha256_hex(secret.as_bytes()),
        created_at_ms: now_ms,
        expires_at_ms: None,
    };
    let key = rows::api_key(&id);
    store
        .commit(
            vec![Check::Absent(key.clone())],
            vec![Write::json(key, &record)?],
        )
        .await?;
    Ok(())
}

fn random_hex() -> String {
    hex(&random_bytes::<SECRET_BYTES>())
}

/// Bytes nobody can guess.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .expect("the kernel's random source answers on every Linux we run on");
    bytes
}

/// The sha256 of `bytes` in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
