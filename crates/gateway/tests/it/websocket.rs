//! Upgrades: only what both sides agreed on, and then every byte.

use tokio::io::AsyncWriteExt;

use crate::town::{Lab, header, next, stage};

const ASK: &str = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n";
const YES: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\
    Sec-WebSocket-Accept: HSmrc0sMlYUkAGmm5OPpG2HaGWk=\r\nX-Hutch-Error: fake\r\n\r\n";

fn ask(headers: &str) -> String {
    format!("GET /ws?a HTTP/1.1\r\nHost: web.vms.test\r\n{headers}\r\n")
}

#[tokio::test]
async fn a_websocket_carries_any_bytes_and_each_way_ends_for_itself() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    // What follows at once is no HTTP, and would be refused as such.
    client
        .send([ask(ASK).as_bytes(), b"\x81\n\nearly"].concat())
        .await;
    let mut guest = next(&listener).await;
    let head = guest.head().await.unwrap();
    assert!(head.starts_with("GET /ws?a HTTP/1.1\r\n"), "{head}");
    assert_eq!(header(&head, "upgrade"), Some("websocket"));
    assert_eq!(header(&head, "connection"), Some("upgrade"));
    assert_eq!(header(&head, "sec-websocket-version"), Some("13"));
    guest.send([YES.as_bytes(), b"\x82first"].concat()).await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.header("upgrade")),
        (101, Some("websocket"))
    );
    assert!(answer.header("sec-websocket-accept").is_some());
    assert_eq!(answer.header("x-hutch-error"), None);
    assert_eq!(client.exactly(6).await, b"\x82first");
    assert_eq!(guest.exactly(8).await, b"\x81\n\nearly");
    let much: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let (from_client, copied) = (much.clone(), much.clone());
    let sending = tokio::spawn(async move {
        client.send(from_client).await;
        client.stream.shutdown().await.unwrap();
        client
    });
    assert!(guest.until_the_end().await == copied);
    let mut client = sending.await.unwrap();
    guest.send("last words").await;
    drop(guest);
    assert_eq!(client.until_the_end().await, b"last words");
}

#[tokio::test]
async fn a_guest_that_does_not_want_it_answers_and_the_connection_ends() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    // A second request behind it must not be taken for one.
    client.send(ask(ASK) + &ask("")).await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    guest
        .send("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.text()), (403, "no"));
    assert_eq!(answer.header("connection"), Some("close"));
    assert!(client.maybe_answer().await.is_none());
    assert_eq!(guest.until_the_end().await, b"");
}

#[tokio::test]
async fn another_protocol_is_not_switched_to() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client.send(ask(ASK)).await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    guest.send(YES.replace("WebSocket", "h2c")).await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.header("x-hutch-error")),
        (502, Some("bad_answer"))
    );
    assert!(client.maybe_answer().await.is_none());
    assert_eq!(guest.until_the_end().await, b"");
}

#[tokio::test]
async fn what_is_no_websocket_is_an_ordinary_request() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    for headers in [
        ASK.replace("websocket", "h2c"),
        ASK.replace("Upgrade: websocket", "Upgrade: websocket, h2c"),
        ASK.replace("keep-alive, Upgrade", "keep-alive"),
        format!("{ASK}Content-Length: 4\r\n"),
    ] {
        let mut client = lab.client().await;
        client.send(ask(&headers) + "body").await;
        let mut guest = next(&listener).await;
        let head = guest.head().await.unwrap();
        assert_eq!(header(&head, "upgrade"), None, "{head}");
        guest
            .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            .await;
        assert_eq!(client.answer().await.text(), "ok");
    }
}

#[tokio::test]
async fn websockets_of_a_machine_are_counted() {
    let lab = Lab::with(|limits| limits.upgrades_per_machine = 2).await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = lab.client().await;
        client.send(ask(ASK)).await;
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        guest.send(YES).await;
        assert_eq!(client.answer().await.status, 101);
        open.push((client, guest));
    }
    let busy = lab.get("web.vms.test", "/", ASK).await;
    assert_eq!(
        (busy.status, busy.header("x-hutch-error")),
        (503, Some("machine_busy"))
    );
    drop(open.pop());
    loop {
        let mut client = lab.client().await;
        client.send(ask(ASK)).await;
        tokio::select! {
            answer = client.answer() => assert_eq!(answer.status, 503),
            mut guest = next(&listener) => {
                assert!(guest.head().await.is_some());
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_gateway_that_ends_cuts_websockets() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client.send(ask(ASK)).await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    guest.send(YES).await;
    assert_eq!(client.answer().await.status, 101);
    lab.closing.cancel();
    assert_eq!(client.until_the_end().await, b"");
    assert_eq!(guest.until_the_end().await, b"");
}
