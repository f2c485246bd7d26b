//! Who makes a request: a key in a header, or the owner of the unix socket. An address proves nothing: behind a proxy
//! every request comes from loopback, and so may one of a guest.

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HeaderMap};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hutch_contract::error::Kind;
use hutch_engine::Principal;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::http::{App, Failure};

/// The longest key that is looked at.
const MAX_KEY: usize = 512;

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Somebody on the network, or nobody knows.
    Remote,
    /// A process of this host on the unix socket, whose user the kernel vouches for (SO_PEERCRED).
    Local {
        /// Its effective user.
        uid: u32,
    },
}

impl Peer {
    /// Whether this is who could read our files anyway.
    fn owns_us(self) -> bool {
        match self {
            Peer::Remote => false,
            Peer::Local { uid } => uid == 0 || uid == rustix::process::geteuid().as_raw(),
        }
    }
}

/// The key of the configuration, kept as a hash so that comparing takes the same time for every guess.
#[derive(Clone)]
pub(crate) struct Token([u8; 32]);

impl Token {
    pub(crate) fn new(secret: &str) -> Token {
        Token(Sha256::digest(secret).into())
    }

    pub(crate) fn is(&self, guess: &str) -> bool {
        self.0.ct_eq(&Token::new(guess).0).into()
    }
}

/// Lets a request pass with the [`Principal`] in its extensions, or answers 401.
pub(crate) async fn authenticated(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request
        .extensions()
        .get::<Peer>()
        .copied()
        .unwrap_or(Peer::Remote);
    match principal(&app, peer, request.headers()).await {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(failure) => failure.into_response(),
    }
}

async fn principal(app: &App, peer: Peer, headers: &HeaderMap) -> Result<Principal, Failure> {
    // A key that is shown decides, also on the unix socket: who shows one means to be who it stands for.
    let Some(key) = key(headers)? else {
        return match peer.owns_us() {
            true => Ok(app.engine.local_admin()),
            false => Err(unauthenticated("a key is needed")),
        };
    };
    if app.token.as_ref().is_some_and(|token| token.is(&key)) {
        return Ok(app.engine.local_admin());
    }
    match app.engine.authenticate(&key).await {
        Err(error) if error.kind() == Kind::Unauthenticated => {
            Err(unauthenticated("the key is not valid"))
        }
        result => Ok(result?),
    }
}

/// The one key of a request.
fn key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let shown: Vec<_> = headers
        .get_all(AUTHORIZATION)
        .iter()
        .map(|value| (value, true))
        .collect();
    let mut shown = shown.into_iter().chain(
        headers
            .get_all("x-api-key")
            .iter()
            .map(|value| (value, false)),
    );
    let Some((value, scheme)) = shown.next() else {
        return Ok(None);
    };
    if shown.next().is_some() {
        return Err(Failure::invalid("a request shows one key, in one header"));
    }
    let text = value.to_str().unwrap_or_default();
    let key = match (scheme, text.split_once(' ')) {
        (false, _) => Some(text),
        (true, Some((word, key))) if word.eq_ignore_ascii_case("bearer") => Some(key),
        (true, _) => None,
    };
    match key.map(str::trim) {
        Some(key) if (1..=MAX_KEY).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(unauthenticated("the key is not valid")),
    }
}

fn unauthenticated(message: &str) -> Failure {
    Failure::new(Kind::Unauthenticated, "unauthenticated", message).hint(
        "send `Authorization: Bearer KEY` or `x-api-key: KEY`; the first key is in admin.key in the data directory",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_user_and_root_own_the_socket() {
        let us = rustix::process::geteuid().as_raw();
        assert!(Peer::Local { uid: us }.owns_us() && Peer::Local { uid: 0 }.owns_us());
        assert!(!Peer::Local { uid: us + 1 }.owns_us() && !Peer::Remote.owns_us());
    }

    #[test]
    fn the_configured_key_is_that_and_no_part_of_it() {
        let token = Token::new("correct horse");
        assert!(token.is("correct horse"));
        for guess in [
            "",
            "correct",
            "correct horse ",
            "Correct horse",
            "correct horsf",
        ] {
            assert!(!token.is(guess), "{guess}");
        }
    }
}
