//! Requests that could be read in two ways: nobody behind the gateway gets to read one.

use crate::town::{Lab, Recorder, header};

/// Requests in a row from one seed, the same every time.
struct Dice(u64);

impl Dice {
    /// SplitMix64.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.roll(from.len())]
    }

    /// The first, mostly.
    fn mostly<'a>(&mut self, from: &[&'a str]) -> &'a str {
        match self.roll(12) {
            0 => self.pick(from),
            _ => from[0],
        }
    }
}

const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: web.vms.test\r\nX-Hidden: 1\r\n\r\n";

/// A request that may be good or bad in any of the ways that servers have been known to read differently.
fn request(dice: &mut Dice) -> String {
    let end =
        |dice: &mut Dice| dice.mostly(&["\r\n", "\n", "\r", "\r\r\n", "\n\r", " \r\n", "\0\r\n"]);
    let method = dice.mostly(&[
        "POST",
        "GET",
        "post",
        "G ET",
        "",
        "HUTCH-REFUSED",
        "PRI",
        "OPTIONS",
        "TRACE",
        "CONNECT",
    ]);
    let target = dice.mostly(&[
        "/",
        "http://web.vms.test/",
        "http://other.test/",
        "*",
        "/a b",
        "//x",
        "web.vms.test:80",
        "/\u{e9}",
        "/?hutch_token=1.x",
        "/#a",
        "",
    ]);
    let version = dice.mostly(&[
        "HTTP/1.1",
        "HTTP/1.0",
        "HTTP/1.2",
        "HTTP/2.0",
        "http/1.1",
        "HTTP/1.1 x",
        "",
    ]);
    let space = dice.mostly(&[" ", "  ", "\t", "\u{b}"]);
    let mut text = format!("{method}{space}{target} {version}{}", end(dice));
    for _ in 0..dice.mostly(&["1", "0", "2"]).parse().unwrap() {
        text += dice.mostly(&[
            "Host: web.vms.test",
            "Host: other.test",
            "Host:",
            "Host : web.vms.test",
            "Host: web.vms.test, x",
            " Host: web.vms.test",
        ]);
        text += end(dice);
    }
    let hidden = format!("{:x}", HIDDEN.len());
    let body = match dice.roll(6) {
        0 => format!("0\r\n\r\n{HIDDEN}"),
        1 => format!("{hidden}\r\n{HIDDEN}\r\n0\r\n\r\n"),
        2 => format!(
            "{hidden};ext=\"{}\"\r\n{HIDDEN}\r\n0\r\nX: y\r\n\r\n",
            dice.pick(&["a", "\n", "\r\n"])
        ),
        3 => format!("{hidden}\n{HIDDEN}\n0\n\n"),
        4 => format!("0{hidden}\r\n{HIDDEN}\r\n0\r\nTransfer-Encoding: x\r\n\r\n"),
        _ => HIDDEN.to_owned(),
    };
    let length = body.len().to_string();
    for _ in 0..1 + dice.roll(3) {
        let line = match dice.roll(9) {
            0 | 1 => format!("Content-Length: {length}"),
            2 => format!(
                "Content-Length: {}",
                dice.pick(&[
                    "0",
                    "+5",
                    "5, 5",
                    "-1",
                    "0x5",
                    "5 ",
                    "",
                    "99999999999999999999",
                    "4\u{b}"
                ])
            ),
            3 | 4 => "Transfer-Encoding: chunked".to_owned(),
            5 => format!(
                "Transfer-Encoding: {}",
                dice.pick(&[
                    "gzip, chunked",
                    "identity",
                    "xchunked",
                    "chunked, identity",
                    "chunked\u{b}",
                    "\"chunked\"",
                    "Chunked",
                    ""
                ])
            ),
            6 => format!(
                "{}: {}",
                dice.pick(&[
                    "Transfer-Encoding ",
                    "Transfer_Encoding",
                    "X\r\n Transfer-Encoding",
                    "Transfer-Encoding\0",
                    "X: y\nTransfer-Encoding"
                ]),
                "chunked"
            ),
            7 => format!(
                "{} {length}",
                dice.pick(&[
                    "Content-Length :",
                    "content_length:",
                    " Content-Length:",
                    "X: y\rContent-Length:"
                ])
            ),
            _ => dice
                .pick(&[
                    "Connection: close",
                    "Connection: content-length, transfer-encoding, host, via",
                    "Connection: upgrade\r\nUpgrade: websocket",
                    "Upgrade: h2c",
                    "Expect: 100-continue",
                    "no colon",
                    ": no name",
                    "X: \u{7f}",
                    "Via: 1.1 hutch",
                ])
                .to_owned(),
        };
        text += &line;
        text += end(dice);
    }
    text += end(dice);
    text + &body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_malformed_request_makes_a_guest_read_another_one() {
    const REQUESTS: u64 = 4000;
    const AT_ONCE: u64 = 50;
    let short = std::time::Duration::from_millis(200);
    let lab = Lab::with(|limits| {
        limits.head = short;
        limits.stall = short;
    })
    .await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut passed = 0;
    for first in (0..REQUESTS).step_by(AT_ONCE as usize) {
        let mut clients = Vec::new();
        for seed in first..first + AT_ONCE {
            let mut client = lab.client().await;
            clients.push(tokio::spawn(async move {
                client.send(request(&mut Dice(seed))).await;
                // Half of a request may be all that there is: then a deadline ends it.
                String::from_utf8_lossy(&client.until_the_end().await).into_owned()
            }));
        }
        // Over the same connections to the guest, everybody else gets the answer to what was asked.
        let mut healthy = lab.client().await;
        for n in 0..AT_ONCE {
            let path = format!("/healthy/{first}/{n}");
            let answer = healthy.get("web.vms.test", &path, "").await;
            assert_eq!((answer.status, answer.text()), (200, &path[..]));
        }
        for client in clients {
            passed += usize::from(client.await.unwrap().starts_with("HTTP/1.1 200"));
        }
    }
    let broken = recorder.broken.lock().unwrap();
    assert!(broken.is_empty(), "{broken:?}");
    let seen = recorder.seen.lock().unwrap();
    for request in seen.iter() {
        // Each of them is one that the gateway made: whole, and once of everything.
        let lower = request.head.to_lowercase();
        let count = |line: &str| lower.matches(line).count();
        assert!(lower.contains("via: 1.1 hutch\r\n"), "{lower}");
        assert_eq!(
            (count("\r\nhost:"), count("\r\nx-forwarded-for:")),
            (1, 1),
            "{lower}"
        );
        assert!(
            count("\r\ncontent-length:") + count("\r\ntransfer-encoding:") <= 1,
            "{lower}"
        );
        assert!(
            !lower.contains("_encoding") && !lower.contains("_length"),
            "{lower}"
        );
        assert!(header(&request.head, "upgrade").is_none_or(|upgrade| upgrade == "websocket"));
    }
    println!(
        "{REQUESTS} requests, {passed} of them good, {} reached the guest",
        seen.len()
    );
    assert!(passed > 50, "the generator makes good ones too: {passed}");
}

#[tokio::test]
async fn ambiguous_requests_are_refused_by_name() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let host = "Host: web.vms.test\r\n";
    for (status, request) in [
        (
            400,
            format!(
                "POST / HTTP/1.1\r\n{host}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
        ),
        (
            400,
            format!(
                "POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
            ),
        ),
        (
            400,
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 1\r\nContent-Length: 1\r\n\r\nx"),
        ),
        (400, format!("GET / HTTP/1.1\n{host}\r\n")),
        (400, "GET / HTTP/1.1\r\nHost: web.vms.test\n\n".into()),
        (400, format!("GET / HTTP/1.1\r\n{host}{host}\r\n")),
        (400, "GET / HTTP/1.1\r\n\r\n".into()),
        (
            400,
            format!("GET http://other.test/ HTTP/1.1\r\n{host}\r\n"),
        ),
        (400, format!("GET / HTTP/1.1\r\n{host}X: a\r\n b\r\n\r\n")),
        (400, format!("GET * HTTP/1.1\r\n{host}\r\n")),
        (
            431,
            format!("GET / HTTP/1.1\r\n{host}X: {}\r\n\r\n", "a".repeat(40_000)),
        ),
        (
            431,
            format!("GET / HTTP/1.1\r\n{host}{}\r\n", "X: a\r\n".repeat(200)),
        ),
        (
            501,
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        ),
    ] {
        let mut client = lab.client().await;
        // Nothing of what follows is looked at.
        client.send(request.clone() + HIDDEN).await;
        let answer = client.answer().await;
        assert_eq!(answer.status, status, "{request:?}");
        assert_eq!(answer.header("connection"), Some("close"), "{request:?}");
        assert!(client.maybe_answer().await.is_none(), "{request:?}");
    }
    assert!(recorder.seen.lock().unwrap().is_empty());
    // The whole form of a target is good when it says the same as Host.
    let mut client = lab.client().await;
    client
        .send(format!("GET http://WEB.vms.test/a HTTP/1.1\r\n{host}\r\n"))
        .await;
    assert_eq!(client.answer().await.text(), "/a");
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_order_up_to_the_bad_one() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut client = lab.client().await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: web.vms.test\r\n\r\n");
    let post = "POST /b HTTP/1.1\r\nHost: web.vms.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let all = [
        &get("/a"),
        post,
        &get("/c"),
        "GET / HTTP/1.1\n\n",
        &get("/d"),
    ]
    .concat();
    client.send(all).await;
    for path in ["/a", "/b", "/c"] {
        assert_eq!(client.answer().await.text(), path);
    }
    assert_eq!(client.answer().await.status, 400);
    assert!(client.maybe_answer().await.is_none());
}
