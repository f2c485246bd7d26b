//! What guests get of requests, and clients of answers.

use tokio::net::UnixStream;

use crate::town::{Client, Lab, Recorder, header, next, stage};

#[tokio::test]
async fn hop_by_hop_headers_end_here_and_origins_are_ours() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let headers = "Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=9\r\n\
        Proxy-Authorization: Basic x\r\nTE: trailers, deflate\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\
        Trailer: X\r\nX-Hutch-Internal: 1\r\nX-Forwarded-For: 1.2.3.4\r\nX_Forwarded_For: 1.2.3.4\r\n\
        Forwarded: for=1.2.3.4\r\nX-Real-IP: 1.2.3.4\r\nX-Original-URL: /admin\r\nAccept: */*\r\n";
    let answer = lab.get("WEB.vms.test:81", "/a//b?c=%2e", headers).await;
    assert_eq!(answer.text(), "/a//b?c=%2e");
    let head = recorder.last().head;
    for gone in [
        "x-private",
        "keep-alive",
        "proxy-authorization",
        "upgrade",
        "http2-settings",
        "trailer",
        "x-hutch-internal",
        "x_forwarded_for",
        "x-original-url",
        "connection",
    ] {
        assert_eq!(header(&head, gone), None, "{head}");
    }
    assert!(!head.contains("1.2.3.4"), "{head}");
    for (name, value) in [
        ("host", "WEB.vms.test:81"),
        ("te", "trailers"),
        ("accept", "*/*"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-real-ip", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "WEB.vms.test:81"),
        ("via", "1.1 hutch"),
    ] {
        assert_eq!(header(&head, name), Some(value), "{head}");
    }
}

#[tokio::test]
async fn only_a_proxy_of_ours_is_believed() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let path = std::env::temp_dir().join(format!("hutch-gateway-{}", std::process::id()));
    lab.proxy(&path);
    let mut caddy = Client::new(UnixStream::connect(&path).await.unwrap());
    std::fs::remove_file(&path).unwrap();
    let headers = "X-Forwarded-For: 1.2.3.4, 203.0.113.7\r\nX-Forwarded-Proto: https\r\n";
    for _ in 0..3 {
        let answer = caddy.get("web.vms.test", "/", headers).await;
        assert_eq!(answer.status, 200);
        let head = recorder.last().head;
        assert_eq!(header(&head, "x-forwarded-for"), Some("203.0.113.7"));
        assert_eq!(header(&head, "x-forwarded-proto"), Some("https"));
    }
}

#[tokio::test]
async fn an_answer_loses_what_is_not_the_guests_to_say() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    tokio::spawn(async move {
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        let answer = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 418 Teapot\r\nConnection: X-Mine\r\nX-Mine: 1\r\n\
            Keep-Alive: timeout=5\r\nX-Hutch-Error: fake\r\nProxy-Authenticate: Basic\r\n\
            Set-Cookie: a=1\r\nSet-Cookie: b=1; Domain=vms.test\r\nX-Own: yes\r\nContent-Length: 2\r\n\r\nhi";
        guest.send(answer).await;
        guest.until_the_end().await;
    });
    let answer = lab.get("web.vms.test", "/", "").await;
    assert_eq!((answer.status, answer.text()), (418, "hi"));
    for gone in [
        "x-mine",
        "keep-alive",
        "x-hutch-error",
        "proxy-authenticate",
    ] {
        assert_eq!(answer.header(gone), None, "{}", answer.head);
    }
    assert_eq!(answer.header("set-cookie"), Some("a=1"));
    assert!(!answer.head.contains("b=1"), "{}", answer.head);
    assert_eq!(answer.header("x-own"), Some("yes"));
}

#[tokio::test]
async fn a_loop_is_noticed() {
    let lab = Lab::new().await;
    // The machine's program forwards everything to its own name.
    lab.town.build("web", crate::town::Behind::At(lab.address));
    let answer = lab.get("web.vms.test", "/", "").await;
    assert_eq!(answer.status, 508);
}

#[tokio::test]
async fn connections_to_guests_are_used_again_but_not_by_the_next_incarnation() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut client = lab.client().await;
    for _ in 0..20 {
        assert_eq!(client.get("web.vms.test", "/", "").await.status, 200);
    }
    let dialled = || lab.town.dialled.lock().unwrap().len();
    assert!(dialled() < 20, "{}", dialled());
    let before = dialled();
    lab.town
        .build_with("web", recorder.behind(), |found| found.incarnation = 2);
    client.get("web.vms.test", "/", "").await;
    assert_eq!(dialled(), before + 1);
}

#[tokio::test]
async fn a_connection_that_the_guest_ended_meanwhile_is_replaced() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    tokio::spawn(async move {
        loop {
            let mut guest = next(&listener).await;
            guest.head().await.unwrap();
            guest
                .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await;
        }
    });
    let mut client = lab.client().await;
    for _ in 0..50 {
        assert_eq!(client.get("web.vms.test", "/", "").await.text(), "ok");
    }
}

#[tokio::test]
async fn an_old_client_and_a_head_request_get_what_they_understand() {
    let lab = Lab::new().await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    tokio::spawn(async move {
        loop {
            let mut guest = next(&listener).await;
            tokio::spawn(async move {
                while let Some(head) = guest.head().await {
                    let answer = match head.starts_with("HEAD") {
                        true => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
                        false => {
                            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
                        }
                    };
                    guest.send(answer).await;
                }
            });
        }
    });
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.0\r\nHost: web.vms.test\r\n\r\n")
        .await;
    let head = client.head().await.unwrap();
    assert_eq!(header(&head, "transfer-encoding"), None, "{head}");
    assert_eq!(client.until_the_end().await, b"hi");
    let mut client = lab.client().await;
    client
        .send("HEAD / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
        .await;
    let head = client.head().await.unwrap();
    assert_eq!(header(&head, "content-length"), Some("1000"), "{head}");
    // No body came: the next answer begins here.
    assert_eq!(client.get("web.vms.test", "/", "").await.text(), "hi");
}
