//! Whether a request may come in, and what of its credentials is ours and must not go on.

use http::header::{AUTHORIZATION, COOKIE, LOCATION, ORIGIN, REFERRER_POLICY, SET_COOKIE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::headers::From;
use super::route;
use crate::token::Tokens;
use crate::{Access, Found, KeySays, Machines};

/// The cookie that keeps a browser's token, over HTTPS and without. The first is one that only this very host could
/// set, so that no other machine can plant one.
pub(super) const COOKIES: [&str; 2] = ["__Host-hutch_access", "hutch_access"];
/// The parameter of a link that opens a private machine.
const PARAMETER: &str = "hutch_token";
const X_HUTCH_TOKEN: HeaderName = HeaderName::from_static("x-hutch-token");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

/// Which headers carried a key of ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Strip {
    pub(super) authorization: bool,
    pub(super) api_key: bool,
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on, without these.
    Enter(Strip),
    /// The browser is sent (303, with these headers) to the same place without the token, which it keeps in a cookie.
    Keep(HeaderMap),
    /// As if there were no such machine.
    Refuse,
}

/// A request as far as access goes.
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) target: &'a PathAndQuery,
    pub(super) headers: &'a HeaderMap,
    pub(super) from: &'a From,
    /// The authority that was asked for.
    pub(super) authority: &'a str,
}

/// Decides.
pub(super) async fn judge(
    machines: &dyn Machines,
    tokens: &Tokens,
    found: &Found,
    asked: &Asked<'_>,
) -> Verdict {
    let bearer = one(asked.headers, &AUTHORIZATION).and_then(bearer);
    let api_key = one(asked.headers, &X_API_KEY);
    let mut opened = false;
    let mut ours = [false; 2];
    for (at, key) in [bearer, api_key].into_iter().enumerate() {
        let Some(key) = key else { continue };
        match machines.key(found, key).await {
            KeySays::NotOurs => {}
            KeySays::No => ours[at] = true,
            KeySays::Yes => {
                ours[at] = true;
                opened = true;
            }
        }
    }
    let enter = Verdict::Enter(Strip {
        authorization: ours[0],
        api_key: ours[1],
    });
    let Access::Private { generation } = found.access else {
        return enter;
    };
    let left = |token: &str| tokens.check(token, &found.id, generation);
    if opened || one(asked.headers, &X_HUTCH_TOKEN).and_then(left).is_some() {
        return enter;
    }
    if let (Some(token), _) = split_parameter(asked.target)
        && let Some(left) = left(&token)
    {
        let page = matches!(*asked.method, Method::GET | Method::HEAD);
        return match keep(asked, &token, left.as_secs()) {
            Some(answer) if page => Verdict::Keep(answer),
            _ => enter,
        };
    }
    if own_page(asked) && cookies(asked).any(|token| left(token).is_some()) {
        return enter;
    }
    Verdict::Refuse
}

/// The value of a header that is there once.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn cookies<'a>(asked: &Asked<'a>) -> impl Iterator<Item = &'a str> {
    // Over HTTPS the other one may be a neighbour's.
    let name = COOKIES[usize::from(!asked.from.https)];
    let values = asked.headers.get_all(COOKIE).iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.split_once('='))
        .filter(move |(key, _)| key.trim() == name)
        .map(|(_, token)| token.trim())
}

/// A cookie is sent along by pages of other machines too, whose names share our domain: only what a person opens, or
/// a page of the very same host asks for, may use it.
fn own_page(asked: &Asked<'_>) -> bool {
    let text = |name: &HeaderName| {
        let value = asked.headers.get(name);
        value.map(|value| value.to_str().unwrap_or_default())
    };
    if let Some(origin) = text(&ORIGIN) {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        return authority.is_some_and(|authority| authority.eq_ignore_ascii_case(asked.authority));
    }
    match text(&FETCH_SITE) {
        Some("same-origin" | "none") | None => true,
        Some(_) => text(&FETCH_MODE) == Some("navigate") && *asked.method == Method::GET,
    }
}

/// The token in a target, and the target without it.
pub(super) fn split_parameter(target: &PathAndQuery) -> (Option<String>, PathAndQuery) {
    let Some(query) = target.query().filter(|query| query.contains(PARAMETER)) else {
        return (None, target.clone());
    };
    let mut token = None;
    let mut kept = Vec::new();
    for pair in query.split('&') {
        match pair.split_once('=').unwrap_or((pair, "")) {
            (PARAMETER, value) => token = Some(value.to_owned()),
            _ => kept.push(pair),
        }
    }
    let text = match &kept.join("&")[..] {
        "" => target.path().to_owned(),
        query => format!("{}?{query}", target.path()),
    };
    let rest = PathAndQuery::try_from(text).unwrap_or_else(|_| target.clone());
    (token, rest)
}

/// Keeps the token where a page of the machine cannot read it, and out of the address bar and of what is linked to.
fn keep(asked: &Asked<'_>, token: &str, seconds: u64) -> Option<HeaderMap> {
    let (_, target) = split_parameter(asked.target);
    let (scheme, authority) = (asked.from.scheme(), asked.authority);
    // The whole of it: a path may begin with two slashes.
    let location = format!("{scheme}://{authority}{target}");
    let (name, secure) = match asked.from.https {
        true => (COOKIES[0], "; Secure"),
        false => (COOKIES[1], ""),
    };
    let cookie =
        format!("{name}={token}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}");
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, HeaderValue::try_from(location).ok()?);
    headers.insert(SET_COOKIE, HeaderValue::try_from(cookie).ok()?);
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Some(headers)
}

/// The one authority that a request names, or why there is none.
pub(super) fn authority(uri: &http::Uri, headers: &HeaderMap) -> Result<String, &'static str> {
    let mut hosts = headers.get_all(http::header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => Some(host.to_str().map_err(|_| "a Host that is no name")?),
        (None, _) => None,
        _ => return Err("a request has exactly one Host"),
    };
    let named = uri.authority().map(http::uri::Authority::as_str);
    let authority = match (named, host) {
        (Some(named), Some(host)) if !named.eq_ignore_ascii_case(host) => {
            return Err("the target and Host are not the same");
        }
        (Some(one), _) | (None, Some(one)) => one,
        (None, None) => return Err("a request has a Host"),
    };
    // Nothing goes on into headers and links that could end there early.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    if authority.is_empty() || !authority.bytes().all(plain) || route::host(authority).is_empty() {
        return Err("a Host that is no name");
    }
    Ok(authority.to_owned())
}

#[cfg(test)]
mod tests;
