//! What Caddies do that are not at hand: a listener plays them.

use std::sync::{Arc, Mutex};

use hutch_gateway::caddy::{Admin, Caddy, Mode, Status};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::kit::{Stage, down, up};
use crate::town::{Client, header};

/// Answers to changes, one after the other; the last one to all that follow.
async fn play(answers: &'static [&'static str]) -> (Mode, Arc<Mutex<Vec<(String, Value)>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let changes: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
    let seen = changes.clone();
    tokio::spawn(async move {
        let mut config = Value::Null;
        let mut at = 0;
        while let Ok((stream, _)) = listener.accept().await {
            let mut peer = Client::new(stream);
            let Some(head) = peer.head().await else {
                continue;
            };
            let body = peer.body(&head, false).await;
            if head.starts_with("GET /config/ ") {
                let config = config.to_string();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nTrailer: ETag\r\nTransfer-Encoding: chunked\r\n\r\n\
                     {:x}\r\n{config}\r\n0\r\nEtag: \"/config/ {at}\"\r\n\r\n",
                    config.len()
                );
                peer.send(answer).await;
                continue;
            }
            assert!(head.starts_with("POST /config/ "), "{head}");
            let change: Value = serde_json::from_slice(&body).unwrap();
            seen.lock().unwrap().push((head, change.clone()));
            let answer = answers[at.min(answers.len() - 1)];
            at += 1;
            if answer.starts_with("200") {
                config = change;
            }
            let error = r#"{"error":"loading new config: json: unknown field \"ask\""}"#;
            let length = error.len();
            peer.send(format!(
                "HTTP/1.1 {answer}\r\nContent-Length: {length}\r\n\r\n{error}"
            ))
            .await;
        }
    });
    (Mode::Existing(Admin::Tcp(address)), changes)
}

#[tokio::test]
async fn a_caddy_that_knows_no_ask_is_told_permission() {
    let stage = Stage::new("vms.test").await;
    let (mode, changes) = play(&["400 Bad Request", "200 OK"]).await;
    let caddy = Caddy::start(stage.config(mode)).unwrap();
    up(&caddy).await;
    caddy.close().await;
    let changes = changes.lock().unwrap().clone();
    let on_demand = |at: usize| changes[at].1["apps"]["tls"]["automation"]["on_demand"].clone();
    assert_eq!(on_demand(0)["ask"], stage.ask.url);
    let permission = json!({ "module": "http", "endpoint": stage.ask.url });
    assert_eq!(on_demand(1)["permission"], permission);
    assert_eq!(on_demand(1).get("ask"), None);
}

#[tokio::test]
async fn a_change_that_came_between_is_looked_at_again() {
    let stage = Stage::new("vms.test").await;
    let (mode, changes) = play(&["412 Precondition Failed", "200 OK"]).await;
    let caddy = Caddy::start(stage.config(mode)).unwrap();
    up(&caddy).await;
    caddy.close().await;
    let changes = changes.lock().unwrap().clone();
    let tag = |at: usize| header(&changes[at].0, "if-match").map(str::to_owned);
    assert_eq!(tag(0).as_deref(), Some("\"/config/ 0\""));
    assert_eq!(tag(1).as_deref(), Some("\"/config/ 1\""));
    assert_eq!(changes.len(), 2);
}

#[tokio::test]
async fn something_else_at_the_address_is_told() {
    let stage = Stage::new("vms.test").await;
    // A gateway has no such page.
    let mode = Mode::Existing(Admin::Tcp(stage.lab.address.to_string()));
    let caddy = Caddy::start(stage.config(mode)).unwrap();
    let (reason, _) = down(&caddy).await;
    assert!(reason.contains("refuses with status 421"), "{reason}");
    assert_ne!(*caddy.status().borrow(), Status::Absent);
}
