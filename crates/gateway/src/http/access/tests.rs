//! Keys, tokens, links and cookies, and pages that would like to borrow them.

use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::{BoxStream, DialError, Ports};

/// One key, `key-1`; `key-2` is somebody else's.
struct Keys;

#[async_trait]
impl Machines for Keys {
    async fn find(&self, _: &str) -> Option<Found> {
        None
    }

    async fn key(&self, _: &Found, key: &str) -> KeySays {
        match key {
            "key-1" => KeySays::Yes,
            "key-2" => KeySays::No,
            _ => KeySays::NotOurs,
        }
    }

    async fn dial(&self, _: &str, _: u16) -> Result<BoxStream, DialError> {
        Err(DialError::NoSuchMachine)
    }
}

const PRIVATE: Access = Access::Private { generation: 1 };

struct Case {
    access: Access,
    method: Method,
    target: String,
    headers: HeaderMap,
    https: bool,
}

impl Case {
    fn new(pairs: &[(&'static str, &str)]) -> Self {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        Self {
            access: PRIVATE,
            method: Method::GET,
            target: "/".into(),
            headers,
            https: false,
        }
    }

    async fn judge(&self) -> Verdict {
        let found = Found {
            id: "mch-1".into(),
            incarnation: 1,
            http_port: 8080,
            ports: Ports::All,
            access: self.access,
        };
        let from = From {
            client: None,
            https: self.https,
        };
        let target = self.target.parse().unwrap();
        let asked = Asked {
            method: &self.method,
            target: &target,
            headers: &self.headers,
            from: &from,
            authority: "web.vms.test",
        };
        judge(&Keys, &tokens(), &found, &asked).await
    }
}

fn tokens() -> Tokens {
    Tokens::new([1; 32])
}

fn token() -> String {
    tokens().mint("mch-1", 1, Duration::from_secs(600))
}

fn enter(authorization: bool, api_key: bool) -> Verdict {
    Verdict::Enter(Strip {
        authorization,
        api_key,
    })
}

#[tokio::test]
async fn a_private_machine_opens_for_keys_and_tokens_only() {
    assert_eq!(Case::new(&[]).judge().await, Verdict::Refuse);
    for (pairs, verdict) in [
        ([("authorization", "Bearer key-1")], enter(true, false)),
        ([("authorization", "bearer  key-1")], enter(true, false)),
        ([("x-api-key", "key-1")], enter(false, true)),
        ([("authorization", "Bearer key-2")], Verdict::Refuse),
        ([("authorization", "Bearer other")], Verdict::Refuse),
        ([("authorization", "Basic key-1")], Verdict::Refuse),
        ([("x-hutch-token", "1.x")], Verdict::Refuse),
    ] {
        assert_eq!(Case::new(&pairs).judge().await, verdict, "{pairs:?}");
    }
    let token = token();
    let with_header = Case::new(&[("x-hutch-token", &token), ("authorization", "Basic app")]);
    assert_eq!(with_header.judge().await, enter(false, false));
    let mut other = Case::new(&[("x-hutch-token", &token)]);
    other.access = Access::Private { generation: 2 };
    assert_eq!(other.judge().await, Verdict::Refuse);
}

#[tokio::test]
async fn a_public_machine_keeps_its_own_credentials_and_loses_ours() {
    for (key, strip) in [("key-1", true), ("key-2", true), ("of the app", false)] {
        let mut case = Case::new(&[("authorization", &format!("Bearer {key}"))]);
        case.access = Access::Public;
        assert_eq!(case.judge().await, enter(strip, false), "{key}");
    }
}

#[tokio::test]
async fn a_link_with_a_token_becomes_a_cookie() {
    let token = token();
    for https in [false, true] {
        let mut case = Case::new(&[]);
        case.https = https;
        case.target = format!("//evil.test/a?x=1&hutch_token={token}&y=%20");
        let Verdict::Keep(answer) = case.judge().await else {
            panic!("a cookie")
        };
        let scheme = if https { "https" } else { "http" };
        let location = format!("{scheme}://web.vms.test//evil.test/a?x=1&y=%20");
        assert_eq!(answer[LOCATION], location.as_str());
        let cookie = answer[SET_COOKIE].to_str().unwrap().to_owned();
        let expected = if https {
            "__Host-hutch_access="
        } else {
            "hutch_access="
        };
        assert!(cookie.starts_with(expected), "{cookie}");
        assert!(cookie.contains("; HttpOnly; SameSite=Lax"), "{cookie}");
        assert_eq!(cookie.ends_with("; Secure"), https);
        // It opens the next time.
        let pair = cookie.split(';').next().unwrap();
        let mut next = Case::new(&[("cookie", &format!("a=b; {pair}"))]);
        next.https = https;
        assert_eq!(next.judge().await, enter(false, false));
        // The name of the other scheme could be a neighbour's.
        next.https = !https;
        assert_eq!(next.judge().await, Verdict::Refuse);
    }
    let mut post = Case::new(&[]);
    post.method = Method::POST;
    post.target = format!("/?hutch_token={token}");
    assert_eq!(post.judge().await, enter(false, false));
    post.target = "/?hutch_token=1.wrong".into();
    assert_eq!(post.judge().await, Verdict::Refuse);
}

#[tokio::test]
async fn a_cookie_is_no_use_to_pages_of_other_machines() {
    let cookie = format!("hutch_access={}", token());
    for (pairs, works) in [
        (&[][..], true),
        (&[("origin", "http://web.vms.test")], true),
        (&[("origin", "http://evil.vms.test")], false),
        (&[("origin", "null")], false),
        (&[("sec-fetch-site", "same-origin")], true),
        (&[("sec-fetch-site", "none")], true),
        (&[("sec-fetch-site", "same-site")], false),
        (
            &[
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "navigate"),
            ],
            true,
        ),
        (
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "no-cors"),
            ],
            false,
        ),
    ] {
        let mut all = vec![("cookie", &cookie[..])];
        all.extend(pairs);
        let expected = if works {
            enter(false, false)
        } else {
            Verdict::Refuse
        };
        assert_eq!(Case::new(&all).judge().await, expected, "{pairs:?}");
    }
}

#[test]
fn the_token_leaves_the_target_and_nothing_else_does() {
    for (target, token, rest) in [
        ("/a?hutch_token=t", Some("t"), "/a"),
        ("/a?b=1&hutch_token=t&c", Some("t"), "/a?b=1&c"),
        ("/a?my_hutch_token=t", None, "/a?my_hutch_token=t"),
        ("/a?hutch_token", Some(""), "/a"),
        ("/a?b", None, "/a?b"),
    ] {
        let (found, left) = split_parameter(&target.parse().unwrap());
        assert_eq!((found.as_deref(), left.as_str()), (token, rest));
    }
}

#[test]
fn a_request_names_one_authority() {
    let of = |uri: &str, hosts: &[&str]| {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append("host", HeaderValue::from_str(host).unwrap());
        }
        authority(&uri.parse().unwrap(), &headers)
    };
    assert_eq!(of("/", &["a.b:80"]).unwrap(), "a.b:80");
    assert_eq!(of("http://a.b/", &["A.b"]).unwrap(), "a.b");
    assert_eq!(of("http://a.b/", &[]).unwrap(), "a.b");
    for (uri, hosts) in [
        ("/", &[][..]),
        ("/", &["a", "a"]),
        ("http://a.b/", &["c"]),
        ("http://u@a.b/", &["u@a.b"]),
        ("/", &[""]),
        ("/", &[":80"]),
        ("/", &["a/b"]),
        ("/", &["a\"b"]),
        ("/", &["a,b"]),
    ] {
        assert!(of(uri, hosts).is_err(), "{uri} {hosts:?}");
    }
}
