//! Connections that are slow, broken or hostile.

use std::time::Duration;

use hutch_contract::client::{Client, Error as ClientError, Target};
use hutch_contract::error::Kind;
use hutch_server::Running;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Home, by_tcp};

/// Sends bytes; gives what comes back until the server closes.
async fn raw(running: &Running, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(running.addr()).await.unwrap();
    // The server may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_clearly_http_is_refused_and_the_connection_closed() {
    let home = Home::new();
    let running = home.start().await;
    let many: String = (0..200).map(|i| format!("x-{i}: y\r\n")).collect();
    let big = "y".repeat(1024 * 1024);
    for (head, status) in [
        ("nonsense\r\n\r\n".to_owned(), "400"),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), "400"),
        (
            "POST /v1/machines HTTP/1.1\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcd"
                .to_owned(),
            "400",
        ),
        (
            "POST /v1/machines HTTP/1.1\r\ncontent-length: +4\r\n\r\nabcd".to_owned(),
            "400",
        ),
        (
            "POST /v1/machines HTTP/1.1\r\ncontent-length: 0x4\r\n\r\nabcd".to_owned(),
            "400",
        ),
        (
            "POST /v1/machines HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n".to_owned(),
            "400",
        ),
        (
            "GET /health HTTP/1.1\r\nx: a\r\n folded\r\n\r\n".to_owned(),
            "400",
        ),
        (format!("GET /health HTTP/1.1\r\n{many}\r\n"), "431"),
        (format!("GET /health HTTP/1.1\r\nx: {big}\r\n\r\n"), "431"),
    ] {
        let answer = raw(&running, head.as_bytes()).await;
        let shown: String = head.chars().take(90).collect();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{shown:?}: {answer:?}"
        );
        assert!(
            !answer.contains("\r\n\r\nHTTP/1.1"),
            "{shown:?} was taken for two requests"
        );
    }
    // Two lengths: RFC 9112 §6.3 lets the chunks count, if nothing after them is taken for a request.
    let smuggled = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let head = "POST /v1/machines HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let answer = raw(&running, format!("{head}{smuggled}").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 401") && answer.matches("HTTP/1.1").count() == 1,
        "{answer}"
    );
    assert!(
        by_tcp(&running).health().await.is_ok(),
        "nobody else notices"
    );
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_speak_is_sent_away() {
    let home = Home::new();
    let running = home.start().await;
    let mut silent = TcpStream::connect(running.addr()).await.unwrap();
    let mut slow = TcpStream::connect(running.addr()).await.unwrap();
    slow.write_all(b"GET /health HTTP/1.1\r\nhost:")
        .await
        .unwrap();
    let mut idle = TcpStream::connect(running.addr()).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let ended = async {
        let mut rest = Vec::new();
        for stream in [&mut silent, &mut slow, &mut idle] {
            let _ = stream.read_to_end(&mut rest).await;
        }
        rest
    };
    // The deadline is 10 s; this bound only keeps a broken server from hanging the test.
    let answers = tokio::time::timeout(Duration::from_secs(60), ended)
        .await
        .expect("they are closed");
    assert!(
        String::from_utf8_lossy(&answers).contains("200 OK"),
        "the idle one had its answer"
    );
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_requests_on_one_connection_are_two_answers() {
    let home = Home::new();
    let running = home.start().await;
    let request = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = raw(&running, format!("{request}{last}").as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upload_is_told_why() {
    let home = Home::new();
    let running = home.start().await;
    let chunk = bytes::Bytes::from(vec![7; 64 * 1024]);
    let body = || {
        Box::pin(futures::stream::iter(
            vec![chunk.clone(); 64].into_iter().map(Ok),
        )) as hutch_contract::client::Body
    };
    let name = "x".parse().unwrap();
    let format = hutch_contract::image::ImportFormat::Tar;
    let client = by_tcp(&running);
    for size in [Some(4 * 1024 * 1024), None] {
        let refused = client
            .import_image(&name, format, size, body())
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), Kind::Unauthenticated, "{refused:?}");
    }
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_says_what_is_wrong_with_its_target() {
    for bad in ["", "127.0.0.1:8080", "ftp://x", "http://", "not a url"] {
        let error = Client::new(Target::Url(bad.to_owned())).unwrap_err();
        assert!(
            error.kind() == Kind::Invalid && error.hint().is_some(),
            "{bad}: {error}"
        );
    }
    let client = Client::new(Target::Unix("/nowhere/hutch.sock".into())).unwrap();
    let error = client.health().await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { .. }),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("/nowhere/hutch.sock")
            && error.hint().unwrap().contains("hutch serve")
    );
    for reference in ["", ".", ".."] {
        let error = client.machine(reference).await.unwrap_err();
        assert!(
            matches!(error, ClientError::Reference { .. }),
            "{reference}: it would be another route"
        );
    }
    assert!(matches!(client.with_token("a\nb"), Err(ClientError::Token)));
}

#[tokio::test(flavor = "multi_thread")]
async fn something_else_that_answers_is_not_taken_for_a_server() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answers = [
        "HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nnginx",
        "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{",
        "SSH-2.0-OpenSSH\r\n",
    ];
    let other = tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    for answer in answers {
        let client = Client::new(Target::Url(format!("http://{address}"))).unwrap();
        let error = client.health().await.unwrap_err();
        let fits = match &error {
            ClientError::Api { body, .. } => body.code == "not_hutch" && body.hint.is_some(),
            ClientError::Protocol { .. } => true,
            _ => false,
        };
        assert!(fits, "{answer:?}: {error:?}");
    }
    other.await.unwrap();
}
