//! Tokens that open one private machine in a browser. Nothing is stored for them: they say until when they hold, and
//! carry a MAC (RFC 2104, with SHA-256) over that, the machine and its access generation.
//!
//! `EXPIRY.MAC`: seconds since 1970 in decimal, and the MAC in base64 for URLs.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Bytes of SHA-256's block, to which RFC 2104 pads the key.
const BLOCK: usize = 64;
/// The longest text that can be a token.
const LONGEST: usize = 64;

/// Makes and checks tokens with one secret.
#[derive(Clone)]
pub struct Tokens {
    secret: [u8; 32],
}

impl fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tokens(..)")
    }
}

impl Tokens {
    /// With a secret that nobody else has, the same after a restart.
    #[must_use]
    pub fn new(secret: [u8; 32]) -> Self {
        Self { secret }
    }

    /// A token for the machine with this id that holds for `lifetime` from now on.
    #[must_use]
    pub fn mint(&self, machine: &str, generation: u64, lifetime: Duration) -> String {
        let expiry = now().saturating_add(lifetime.as_secs());
        self.at(machine, generation, expiry)
    }

    fn at(&self, machine: &str, generation: u64, expiry: u64) -> String {
        let message = format!("hutch access 1\n{machine}\n{generation}\n{expiry}");
        let mac = hmac(&self.secret, message.as_bytes());
        format!("{expiry}.{}", BASE64_URL_SAFE_NO_PAD.encode(mac))
    }

    /// How long `token` still opens the machine; `None` when it does not.
    #[must_use]
    pub fn check(&self, token: &str, machine: &str, generation: u64) -> Option<Duration> {
        if token.len() > LONGEST {
            return None;
        }
        let (expiry, _) = token.split_once('.')?;
        let expiry: u64 = expiry.parse().ok()?;
        let expected = self.at(machine, generation, expiry);
        let same = bool::from(expected.as_bytes().ct_eq(token.as_bytes()));
        let left = expiry.checked_sub(now()).filter(|left| *left > 0)?;
        same.then(|| Duration::from_secs(left))
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn hmac(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; BLOCK];
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        block
    };
    let inner = Sha256::new()
        .chain_update(pad(0x36))
        .chain_update(message)
        .finalize();
    let outer = Sha256::new()
        .chain_update(pad(0x5c))
        .chain_update(inner)
        .finalize();
    outer.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mac_is_the_one_of_rfc_4231() {
        // Test case 1 of RFC 4231 with its 20-byte key, which zeros pad.
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let mac: String = hmac(&key, b"Hi There")
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            mac,
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        );
    }

    #[test]
    fn a_token_opens_one_machine_for_a_while() {
        let tokens = Tokens::new([7; 32]);
        let token = tokens.mint("mch-1", 3, Duration::from_secs(60));
        assert!(tokens.check(&token, "mch-1", 3).is_some());
        assert!(tokens.check(&token, "mch-2", 3).is_none());
        assert!(tokens.check(&token, "mch-1", 4).is_none());
        assert!(Tokens::new([8; 32]).check(&token, "mch-1", 3).is_none());
        let (expiry, mac) = token.split_once('.').unwrap();
        let later: u64 = expiry.parse::<u64>().unwrap() + 1;
        assert!(
            tokens
                .check(&format!("{later}.{mac}"), "mch-1", 3)
                .is_none()
        );
        assert!(tokens.check(&format!("+{token}"), "mch-1", 3).is_none());
        let over = tokens.at("mch-1", 3, now());
        assert!(tokens.check(&over, "mch-1", 3).is_none());
        for junk in ["", ".", "1.", "x.y", &"9".repeat(1000)] {
            assert!(tokens.check(junk, "mch-1", 3).is_none(), "{junk}");
        }
    }
}
