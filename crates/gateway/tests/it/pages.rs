//! What clients are told when no guest answers.

use std::sync::Arc;

use hutch_gateway::{DialError, Ports};

use crate::town::{Behind, Lab, Recorder, header};

fn code(answer: &crate::town::Answer) -> String {
    let object: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let code = object["code"].as_str().unwrap();
    assert_eq!(answer.header("x-hutch-error"), Some(code));
    assert!(!object["request_id"].as_str().unwrap().is_empty());
    code.to_owned()
}

#[tokio::test]
async fn every_failure_has_a_page_of_its_own() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    for (name, error) in [
        ("stopped", DialError::Stopped),
        ("deaf", DialError::NothingListens),
        ("slow", DialError::Timeout),
        ("full", DialError::Busy),
        ("gone", DialError::NoSuchMachine),
        ("odd", DialError::Failed("words for the log".into())),
    ] {
        lab.town.build(name, Behind::Nothing(error));
    }
    lab.town.build_with("web", recorder.behind(), |found| {
        found.ports = Ports::Only(vec![3000]);
    });
    for (host, status, expected) in [
        ("nobody.vms.test", 404, "no_such_machine"),
        ("a.b.vms.test", 404, "no_such_machine"),
        ("vms.test", 404, "no_such_machine"),
        ("gone.vms.test", 404, "no_such_machine"),
        ("example.net", 421, "misdirected"),
        ("22-web.vms.test", 403, "port_not_exposed"),
        ("stopped.vms.test", 503, "machine_stopped"),
        ("deaf.vms.test", 502, "nothing_listens"),
        ("slow.vms.test", 504, "connect_timeout"),
        ("full.vms.test", 503, "machine_busy"),
        ("odd.vms.test", 502, "bad_answer"),
    ] {
        let answer = lab.get(host, "/", "").await;
        assert_eq!(
            (answer.status, &code(&answer)[..]),
            (status, expected),
            "{host}"
        );
        assert!(!answer.text().contains("words for the log"));
        let page = lab.get(host, "/", "Accept: text/html\r\n").await;
        assert_eq!(page.status, status);
        assert_eq!(
            page.header("content-type"),
            Some("text/html; charset=utf-8")
        );
        assert!(page.text().contains("<h1>"), "{}", page.text());
    }
    let retry = lab.get("stopped.vms.test", "/", "").await;
    assert!(retry.header("retry-after").is_some());
    for (host, port) in [("web", 8080), ("3000-web", 3000)] {
        let answer = lab.get(&format!("{host}.vms.test"), "/x", "").await;
        assert_eq!((answer.status, answer.text()), (200, "/x"), "{host}");
        assert_eq!(lab.town.dialled.lock().unwrap().last(), Some(&port));
    }
    // The HTTP port may be named, too.
    assert_eq!(lab.get("8080-web.vms.test", "/", "").await.status, 200);
}

#[tokio::test]
async fn a_guest_that_speaks_no_http_is_a_bad_gateway() {
    let lab = Lab::new().await;
    for bytes in [
        "",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX\0: y\r\n\r\n",
    ] {
        let (listener, behind) = crate::town::stage().await;
        lab.town.build("odd", behind);
        let playing = tokio::spawn(async move {
            let mut guest = crate::town::next(&listener).await;
            guest.head().await.unwrap();
            guest.send(bytes).await;
        });
        let answer = lab.get("odd.vms.test", "/", "").await;
        assert_eq!(
            (answer.status, &code(&answer)[..]),
            (502, "bad_answer"),
            "{bytes:?}"
        );
        playing.await.unwrap();
    }
}

#[tokio::test]
async fn a_request_is_held_while_its_machine_wakes() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    let wakes = Arc::new(tokio::sync::Notify::new());
    let behind = Behind::Asleep(wakes.clone(), recorder.address);
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client
        .send("POST /a HTTP/1.1\r\nHost: web.vms.test\r\nContent-Length: 5\r\n\r\nhello")
        .await;
    while lab.town.dialled.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(recorder.seen.lock().unwrap().is_empty());
    wakes.notify_one();
    assert_eq!(client.answer().await.text(), "/a");
    assert_eq!(recorder.last().body, b"hello");
}

#[tokio::test]
async fn a_machine_that_does_not_wake_in_time_is_a_timeout() {
    let lab = Lab::with(|limits| limits.dial = std::time::Duration::from_millis(50)).await;
    let recorder = Recorder::start().await;
    let never = Arc::new(tokio::sync::Notify::new());
    lab.town
        .build("web", Behind::Asleep(never, recorder.address));
    let answer = lab.get("web.vms.test", "/", "").await;
    assert_eq!(code(&answer), "connect_timeout");
}

#[tokio::test]
async fn a_guest_that_never_answers_is_a_timeout() {
    let lab = Lab::with(|limits| limits.answer = std::time::Duration::from_millis(50)).await;
    let (listener, behind) = crate::town::stage().await;
    lab.town.build("web", behind);
    let guest =
        tokio::spawn(async move { crate::town::next(&listener).await.until_the_end().await });
    let answer = lab.get("web.vms.test", "/", "").await;
    assert_eq!((answer.status, &code(&answer)[..]), (504, "answer_timeout"));
    // It sees the end of its connection.
    let seen = String::from_utf8(guest.await.unwrap()).unwrap();
    assert_eq!(header(&seen, "host"), Some("web.vms.test"));
}

#[tokio::test]
async fn a_request_whose_body_does_not_come_is_given_up() {
    let lab = Lab::with(|limits| limits.stall = std::time::Duration::from_millis(100)).await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut client = lab.client().await;
    client
        .send("POST / HTTP/1.1\r\nHost: web.vms.test\r\nContent-Length: 10\r\n\r\nhalf")
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status, &code(&answer)[..]), (408, "slow_request"));
    assert!(recorder.seen.lock().unwrap().is_empty());
    assert!(client.maybe_answer().await.is_none());
}

#[tokio::test]
async fn tunnels_and_traces_are_refused() {
    let lab = Lab::new().await;
    for request in ["CONNECT web.vms.test:80", "TRACE /"] {
        let mut client = lab.client().await;
        client
            .send(format!(
                "{request} HTTP/1.1\r\nHost: web.vms.test:80\r\n\r\n"
            ))
            .await;
        assert_eq!(client.answer().await.status, 405, "{request}");
    }
}
