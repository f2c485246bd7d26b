//! What the gateway itself answers: a page for people, an object for programs, the same facts in both.

use bytes::Bytes;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

/// Tells our answers from those of guests, whose own header of this name is removed.
pub(super) const ERROR: HeaderName = HeaderName::from_static("x-hutch-error");

/// What the gateway has to say by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    BadRequest,
    NotImplemented,
    HeadTooLarge,
    MethodNotAllowed,
    Misdirected,
    NoSuchMachine,
    PortNotExposed,
    Stopped,
    NothingListens,
    Broken,
    DialTimeout,
    AnswerTimeout,
    SlowRequest,
    TooManyRequests,
    Busy,
    Loop,
}

impl Code {
    /// Status, word for programs, title, and what to do.
    fn facts(self) -> (u16, &'static str, &'static str, &'static str) {
        match self {
            Code::BadRequest => (
                400,
                "bad_request",
                "This request could not be understood",
                "It is malformed, or could be read in more than one way.",
            ),
            Code::NotImplemented => (
                501,
                "not_implemented",
                "This request uses something that is not spoken here",
                "Bodies may be chunked, and have no other transfer encoding.",
            ),
            Code::HeadTooLarge => (
                431,
                "head_too_large",
                "This request's head is too large",
                "Send fewer or shorter headers; perhaps cookies have piled up.",
            ),
            Code::MethodNotAllowed => (
                405,
                "method_not_allowed",
                "This method is not passed on",
                "Tunnels and traces end here.",
            ),
            Code::Misdirected => (
                421,
                "misdirected",
                "This name is not served here",
                "Machines are at NAME.DOMAIN and PORT-NAME.DOMAIN, with the domain that the server is configured for.",
            ),
            Code::NoSuchMachine => (
                404,
                "no_such_machine",
                "No machine answers to this name",
                "It does not exist, or it is private and this request may not see it. A private machine wants a key in `Authorization: Bearer`, or a token in `x-hutch-token`; `hutch open NAME` gives a link.",
            ),
            Code::PortNotExposed => (
                403,
                "port_not_exposed",
                "This port is not exposed",
                "`hutch port expose NAME PORT` gives it a URL.",
            ),
            Code::Stopped => (
                503,
                "machine_stopped",
                "This machine is not running",
                "Start it with `hutch start`, then load this page again.",
            ),
            Code::NothingListens => (
                502,
                "nothing_listens",
                "Nothing listens on this port",
                "The machine runs, but no program in it takes connections here. Perhaps it is still starting.",
            ),
            Code::Broken => (
                502,
                "bad_answer",
                "The program in the machine gave no proper answer",
                "It closed the connection, or does not speak HTTP.",
            ),
            Code::DialTimeout => (
                504,
                "connect_timeout",
                "The machine did not answer in time",
                "It may be starting, or very busy. Try again.",
            ),
            Code::AnswerTimeout => (
                504,
                "answer_timeout",
                "The program in the machine did not answer in time",
                "It took the request and said nothing.",
            ),
            Code::SlowRequest => (
                408,
                "slow_request",
                "The rest of this request did not come",
                "Nothing came for too long.",
            ),
            Code::TooManyRequests => (
                429,
                "too_many_requests",
                "Too many requests at once",
                "Wait for some of them to end.",
            ),
            Code::Busy => (
                503,
                "machine_busy",
                "This machine has too many requests at once",
                "Try again in a moment.",
            ),
            Code::Loop => (
                508,
                "loop",
                "This request has come by several times",
                "A program in a machine seems to forward requests to its own name.",
            ),
        }
    }

    /// The word for programs, and for the log.
    pub(super) fn word(self) -> &'static str {
        self.facts().1
    }

    /// Seconds after which it is worth another try.
    fn retry_after(self) -> Option<&'static str> {
        match self {
            Code::Stopped => Some("10"),
            Code::DialTimeout | Code::Busy | Code::TooManyRequests => Some("1"),
            Code::NothingListens => Some("2"),
            _ => None,
        }
    }

    /// After these there is no telling where the next request begins, or none is wanted.
    fn closes(self) -> bool {
        matches!(
            self,
            Code::BadRequest | Code::NotImplemented | Code::HeadTooLarge | Code::SlowRequest
        )
    }
}

/// Whether a person is likely to look at the answer.
pub(super) fn wants_html(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(ACCEPT).iter();
    accept
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|kind| {
            let kind = kind.split(';').next().unwrap_or_default();
            kind.trim().eq_ignore_ascii_case("text/html")
        })
}

/// The answer for `code`. Nothing in it comes from the request.
pub(super) fn page(code: Code, html: bool, request_id: &str) -> Response<Bytes> {
    let (status, word, title, advice) = code.facts();
    let body = if html {
        html_page(status, title, advice, request_id)
    } else {
        let object = serde_json::json!({
            "code": word,
            "message": title,
            "hint": advice,
            "request_id": request_id,
        });
        format!("{object}\n")
    };
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let headers = response.headers_mut();
    let kind = if html {
        "text/html; charset=utf-8"
    } else {
        "application/json"
    };
    let fixed = HeaderValue::from_static;
    headers.insert(CONTENT_TYPE, fixed(kind));
    headers.insert(CACHE_CONTROL, fixed("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, fixed("nosniff"));
    let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
    headers.insert(CONTENT_SECURITY_POLICY, fixed(policy));
    headers.insert(ERROR, fixed(word));
    if let Some(seconds) = code.retry_after() {
        headers.insert(RETRY_AFTER, fixed(seconds));
    }
    if code.closes() {
        headers.insert(CONNECTION, fixed("close"));
    }
    response
}

fn html_page(status: u16, title: &str, advice: &str, request_id: &str) -> String {
    // Backticks are commands.
    let mut text = String::new();
    for (at, part) in advice.split('`').enumerate() {
        match at % 2 {
            0 => text.push_str(part),
            _ => text.push_str(&format!("<code>{part}</code>")),
        }
    }
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;\
         padding:0 1rem;color:#222;background:#fff}}small{{color:#666}}@media(prefers-color-scheme:dark)\
         {{body{{color:#ddd;background:#181818}}small{{color:#999}}}}</style>\
         <h1>{title}</h1><p>{text}</p><p><small>{status} · request {request_id}</small></p></html>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_gets_a_page_and_a_program_an_object() {
        let accepts = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            wants_html(&headers)
        };
        assert!(accepts("text/html,application/xhtml+xml,*/*;q=0.8"));
        assert!(accepts("application/json, Text/HTML;q=0.1"));
        assert!(!accepts("*/*") && !accepts("application/json"));
        let html = page(Code::Stopped, true, "r1");
        let text = String::from_utf8(html.body().to_vec()).unwrap();
        assert!(
            text.contains("<code>hutch start</code>") && text.contains("r1"),
            "{text}"
        );
        assert_eq!(html.status(), 503);
        assert_eq!(html.headers()[RETRY_AFTER], "10");
        let json = page(Code::NothingListens, false, "r2");
        let object: serde_json::Value = serde_json::from_slice(json.body()).unwrap();
        assert_eq!(
            (&object["code"], &object["request_id"]),
            (&"nothing_listens".into(), &"r2".into())
        );
        assert_eq!(json.headers()[ERROR], "nothing_listens");
    }
}
