//! What of a request reaches the guest, and what of an answer reaches the client.

use std::net::IpAddr;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, FORWARDED, HOST, SET_COOKIE, TE, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::access::{COOKIES, Strip};

/// Most times that a request may come by.
const TIMES: usize = 8;
/// How we call ourselves in `Via`.
const VIA_US: &str = "1.1 hutch";
/// All of these names are ours.
const OURS: &str = "x-hutch-";

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// They are about one connection (RFC 9110, 7.6.1), or were and are still sent.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];
/// What we say anew for each hop, or have answered ourselves.
const SETTLED: [&str; 4] = ["content-length", "expect", "host", "proxy-authorization"];
/// What guests believe of where a request came from: only from us.
const ORIGINS: [&str; 12] = [
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-proto",
    "x-forwarded-scheme",
    "x-forwarded-server",
    "x-forwarded-ssl",
    "x-original-url",
    "x-real-ip",
    "x-rewrite-url",
];

/// Where a request comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct From {
    /// Not known behind a proxy that does not say it.
    pub(super) client: Option<IpAddr>,
    pub(super) https: bool,
}

impl From {
    pub(super) fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    /// What a trusted proxy says: the last address is the one that it saw itself.
    pub(super) fn of_proxy(headers: &HeaderMap) -> Self {
        let last = |name| {
            let value = headers.get_all(name).iter().next_back()?.to_str().ok()?;
            value.rsplit(',').next().map(str::trim)
        };
        Self {
            client: last(X_FORWARDED_FOR).and_then(|address| address.parse().ok()),
            https: last(X_FORWARDED_PROTO) == Some("https"),
        }
    }
}

/// A name as a guest may read it: some hand `x_forwarded_for` to programs as they do `x-forwarded-for`.
fn plain(name: &HeaderName) -> String {
    name.as_str().replace('_', "-")
}

fn words(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn retain(headers: &mut HeaderMap, keep: impl Fn(&HeaderName, &str) -> bool) {
    let gone: Vec<_> = headers
        .keys()
        .filter(|name| !keep(name, &plain(name)))
        .cloned()
        .collect();
    for name in gone {
        headers.remove(name);
    }
}

/// The names that `Connection` lists: they too are about one connection.
fn listed(headers: &HeaderMap) -> Vec<String> {
    let names = words(headers, CONNECTION);
    names.map(str::to_ascii_lowercase).collect()
}

/// Whether the request has come by too often.
pub(super) fn loops(headers: &HeaderMap) -> bool {
    words(headers, VIA).filter(|by| *by == VIA_US).count() >= TIMES
}

/// Turns a client's headers into those that the guest gets. `host` is what the client asked for. Framing is left to
/// who sends them on.
pub(super) fn to_guest(headers: &mut HeaderMap, host: &HeaderValue, from: &From, strip: Strip) {
    let trailers = words(headers, TE).any(|word| word.eq_ignore_ascii_case("trailers"));
    let listed = listed(headers);
    retain(headers, |name, plain| {
        !(HOP_BY_HOP.contains(&plain)
            || SETTLED.contains(&plain)
            || ORIGINS.contains(&plain)
            || plain.starts_with(OURS)
            || listed.iter().any(|listed| listed == name.as_str()))
    });
    if strip.authorization {
        headers.remove(AUTHORIZATION);
    }
    if strip.api_key {
        headers.remove(X_API_KEY);
    }
    strip_cookies(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    headers.insert(HOST, host.clone());
    let proto = HeaderValue::from_static(from.scheme());
    headers.insert(X_FORWARDED_PROTO, proto);
    headers.insert(X_FORWARDED_HOST, host.clone());
    let address = from.client.map(|client| client.to_canonical());
    let text = address.map(|address| address.to_string());
    if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert(X_REAL_IP, value.clone());
        headers.insert(X_FORWARDED_FOR, value);
    }
    // RFC 7239: an IPv6 address needs brackets and quotes.
    let by = match address {
        Some(IpAddr::V6(address)) => format!("for=\"[{address}]\";"),
        Some(IpAddr::V4(address)) => format!("for={address};"),
        None => String::new(),
    };
    let host = host.to_str().unwrap_or_default();
    let forwarded = format!("{by}host=\"{host}\";proto={}", from.scheme());
    if let Ok(value) = HeaderValue::try_from(forwarded) {
        headers.insert(FORWARDED, value);
    }
    headers.append(VIA, HeaderValue::from_static(VIA_US));
}

/// Takes our cookies out of the others, and makes one header of all (HTTP/2 may have several).
fn strip_cookies(headers: &mut HeaderMap) {
    let mut kept: Vec<u8> = Vec::new();
    let mut some = false;
    for value in headers.get_all(COOKIE) {
        some = true;
        for pair in value.as_bytes().split(|byte| *byte == b';') {
            let pair = pair.trim_ascii();
            let name = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
            let ours = COOKIES
                .iter()
                .any(|cookie| name.trim_ascii() == cookie.as_bytes());
            if pair.is_empty() || ours {
                continue;
            }
            if !kept.is_empty() {
                kept.extend_from_slice(b"; ");
            }
            kept.extend_from_slice(pair);
        }
    }
    if !some {
        return;
    }
    headers.remove(COOKIE);
    if let Ok(value) = HeaderValue::from_bytes(&kept)
        && !kept.is_empty()
    {
        headers.insert(COOKIE, value);
    }
}

/// Turns a guest's headers into those that the client gets. Framing is left to who sends them on, but for the length,
/// which an answer to HEAD has without a body.
pub(super) fn to_client(headers: &mut HeaderMap, base_domain: &str) {
    let listed = listed(headers);
    retain(headers, |name, plain| {
        !(HOP_BY_HOP.contains(&plain)
            || plain.starts_with(OURS)
            // A length that vanished would end the answer elsewhere.
            || listed.iter().any(|listed| listed == name.as_str()) && *name != CONTENT_LENGTH)
    });
    let cookies: Vec<_> = headers.get_all(SET_COOKIE).iter().cloned().collect();
    if cookies.iter().all(|cookie| may_set(cookie, base_domain)) {
        return;
    }
    headers.remove(SET_COOKIE);
    for cookie in cookies {
        if may_set(&cookie, base_domain) {
            headers.append(SET_COOKIE, cookie);
        }
    }
}

/// A guest may set cookies for its own name and below; not for its neighbours, and not ours.
fn may_set(cookie: &HeaderValue, base_domain: &str) -> bool {
    let text = String::from_utf8_lossy(cookie.as_bytes());
    let mut parts = text.split(';');
    let name = parts.next().unwrap_or_default();
    let name = name.split('=').next().unwrap_or_default().trim();
    if COOKIES.contains(&name) {
        return false;
    }
    parts.all(|part| {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if !name.trim().eq_ignore_ascii_case("domain") {
            return true;
        }
        let domain = value.trim().trim_matches('.').to_ascii_lowercase();
        let wide = base_domain == domain || base_domain.ends_with(&format!(".{domain}"));
        domain.is_empty() || !wide
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn guest(pairs: &[(&'static str, &str)], strip: Strip) -> HeaderMap {
        let mut headers = map(pairs);
        let from = From {
            client: Some("203.0.113.9".parse().unwrap()),
            https: false,
        };
        let host = HeaderValue::from_static("web.vms.test:81");
        to_guest(&mut headers, &host, &from, strip);
        headers
    }

    #[test]
    fn the_guest_sees_nothing_that_is_about_our_connection_or_ours() {
        let headers = guest(
            &[
                ("connection", "keep-alive, X-Secret"),
                ("connection", "close"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "x"),
                ("proxy-authorization", "Basic x"),
                ("te", "gzip, trailers"),
                ("trailer", "x"),
                ("transfer-encoding", "chunked"),
                ("transfer_encoding", "chunked"),
                ("content-length", "7"),
                ("content_length", "7"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
                ("expect", "100-continue"),
                ("x-hutch-token", "t"),
                ("x_hutch_token", "t"),
                ("x-hutch-anything", "t"),
                ("authorization", "Bearer key"),
                ("x-api-key", "key"),
                ("cookie", "a=1; hutch_access=t;b=2"),
                ("cookie", "__Host-hutch_access=t"),
                ("accept", "*/*"),
            ],
            Strip {
                authorization: true,
                api_key: true,
            },
        );
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let expected = [
            "accept",
            "cookie",
            "forwarded",
            "host",
            "te",
            "via",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-real-ip",
        ];
        assert_eq!(names, expected);
        assert_eq!(headers["cookie"], "a=1; b=2");
        assert_eq!(headers["te"], "trailers");
    }

    #[test]
    fn where_it_came_from_is_what_we_say() {
        let headers = guest(
            &[
                ("x-forwarded-for", "1.1.1.1"),
                ("x_forwarded_for", "1.1.1.1"),
                ("x-real-ip", "1.1.1.1"),
                ("forwarded", "for=1.1.1.1"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "evil"),
                ("x-original-url", "/admin"),
                ("via", "1.1 other"),
                // Naming them does not take ours away.
                ("connection", "x-forwarded-for, host, via"),
                ("host", "evil"),
                ("authorization", "Basic guest"),
            ],
            Strip::default(),
        );
        assert_eq!(headers["x-forwarded-for"], "203.0.113.9");
        assert_eq!(headers["x-real-ip"], "203.0.113.9");
        assert_eq!(headers["x-forwarded-proto"], "http");
        assert_eq!(headers["host"], "web.vms.test:81");
        assert_eq!(headers["x-forwarded-host"], "web.vms.test:81");
        let forwarded = "for=203.0.113.9;host=\"web.vms.test:81\";proto=http";
        assert_eq!(headers["forwarded"], forwarded);
        assert_eq!(headers["authorization"], "Basic guest");
        assert!(
            headers.get("x-original-url").is_none() && headers.get("x_forwarded_for").is_none()
        );
        assert!(!loops(&headers));
        let via = [("via", "1.1 hutch, 1.1 hutch"); 4];
        assert!(loops(&map(&via)));
    }

    #[test]
    fn a_proxy_is_believed_about_the_last_hop_only() {
        let from = |pairs: &[(&'static str, &str)]| From::of_proxy(&map(pairs));
        let said = from(&[
            ("x-forwarded-for", "1.1.1.1, 2001:db8::1"),
            ("x-forwarded-proto", "https"),
        ]);
        assert_eq!(said.client, Some("2001:db8::1".parse().unwrap()));
        assert!(said.https);
        assert_eq!(from(&[("x-forwarded-for", "junk")]).client, None);
    }

    #[test]
    fn an_answer_keeps_its_own_and_loses_what_is_not_the_guests() {
        let mut headers = map(&[
            ("connection", "close, x-inner, content-length"),
            ("x-inner", "1"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("x-hutch-error", "fake"),
            ("set-cookie", "a=1; Path=/"),
            ("set-cookie", "b=1; domain=.VMS.test"),
            ("set-cookie", "c=1; Domain=test"),
            ("set-cookie", "d=1; Domain=web.vms.test"),
            ("set-cookie", "hutch_access=1"),
            ("content-type", "text/plain"),
        ]);
        to_client(&mut headers, "vms.test");
        let cookies: Vec<_> = headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1; Path=/", "d=1; Domain=web.vms.test"]);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-length", "content-type", "set-cookie"]);
    }
}
