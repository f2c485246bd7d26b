//! Through Caddy's TLS into machines.

use hutch_gateway::caddy::{Caddy, Status};

use super::kit::{Stage, Theirs, curl, forwarded, have, text, up};
use crate::town::{next, stage};

#[tokio::test]
async fn machines_are_served_over_tls_and_unknown_names_get_no_certificate() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let theirs = Theirs::start(&stage, &Theirs::base(&stage)).await;
    let mut config = stage.config(theirs.mode());
    config.redirect = true;
    let caddy = Caddy::start(config).unwrap();
    let there = Status::Up {
        https_port: stage.https_port,
        shared: false,
    };
    assert_eq!(up(&caddy).await, there);
    let root = stage.root(&caddy).await;

    let version = ["-w", " by HTTP/%{http_version}"];
    let http2 = stage.curl("web", "/hello?a=b", &root, &version).await;
    assert_eq!(text(&http2), "/hello?a=b by HTTP/2");
    let head = stage.recorder.last().head;
    assert_eq!(forwarded(&head, "proto"), Some("https"));
    assert_eq!(forwarded(&head, "for"), Some("127.0.0.1"));
    let host = format!("web.vms.test:{}", stage.https_port);
    assert_eq!(forwarded(&head, "host"), Some(&*host));
    // What a client says of itself is not believed.
    let lie = ["-H", "X-Forwarded-For: 192.0.2.1", "--http1.1"];
    let lie = stage.curl("3000-web", "/lie", &root, &lie).await;
    assert_eq!(text(&lie), "/lie");
    let head = stage.recorder.last().head;
    assert_eq!(forwarded(&head, "for"), Some("127.0.0.1"));
    assert_eq!(
        *stage.lab.town.dialled.lock().unwrap().last().unwrap(),
        3000
    );

    let unknown = stage.curl("nobody", "/", &root, &[]).await;
    assert!(!unknown.status.success());
    let asked = stage.ask.asked.lock().unwrap().clone();
    assert_eq!(
        asked,
        ["web.vms.test", "3000-web.vms.test", "nobody.vms.test"]
    );
    // A name with a certificate whose machine is gone.
    stage.ask.names.lock().unwrap().insert("gone".into());
    let status = ["-w", "%{http_code}", "-o", "/dev/null"];
    let gone = stage.curl("gone", "/", &root, &status).await;
    assert_eq!(text(&gone), "404");

    let to = format!("web.vms.test:{0}:127.0.0.1", stage.http_port);
    let url = format!("http://web.vms.test:{}/a", stage.http_port);
    let redirect = ["--resolve", &to, &url, "-w", "%{http_code} %{redirect_url}"];
    let redirect = text(&curl(&redirect).await);
    // Caddy's own, as this is its HTTPS port.
    assert_eq!(redirect, "308 https://web.vms.test/a");
    caddy.close().await;
    assert!(stage.works(&root).await, "it goes on without us");
}

#[tokio::test]
async fn websockets_and_streams_go_through_as_they_come() {
    if !have(&["caddy", "curl", "openssl"]) {
        return;
    }
    let site = Stage::new("vms.test").await;
    let theirs = Theirs::start(&site, &Theirs::base(&site)).await;
    let caddy = Caddy::start(site.config(theirs.mode())).unwrap();
    up(&caddy).await;
    let root = site.root(&caddy).await;
    let (listener, behind) = stage().await;
    site.lab.town.build("web", behind);

    for content_type in ["text/event-stream", "text/plain"] {
        let (mut client, _tunnel) = site.tls_client(&root);
        client
            .send("GET /events HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
            .await;
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        guest.send(head).await;
        let head = client.head().await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        for event in ["data: 1\n\n", "data: 2\n\n"] {
            guest.send(format!("9\r\n{event}\r\n")).await;
            // The guest has not sent the rest yet.
            assert_eq!(client.chunk().await, event.as_bytes());
        }
        guest.send("0\r\n\r\n").await;
        assert_eq!(client.chunk().await, b"");
    }

    let (mut client, _tunnel) = site.tls_client(&root);
    client
        .send(
            "GET /ws HTTP/1.1\r\nHost: web.vms.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        )
        .await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    guest
        .send(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: HSmrc0sMlYUkAGmm5OPpG2HaGWk=\r\n\r\n",
        )
        .await;
    assert_eq!(client.answer().await.status, 101);
    for round in 0..3 {
        let frame = format!("\u{1}frame {round}");
        client.send(&frame).await;
        let seen = guest.exactly(frame.len()).await;
        guest.send(seen).await;
        assert_eq!(client.exactly(frame.len()).await, frame.as_bytes());
    }
    // Looks that find nothing to do change nothing.
    tokio::time::sleep(site.config(theirs.mode()).check_every * 5).await;
    client.send("late").await;
    assert_eq!(guest.exactly(4).await, b"late");
}
