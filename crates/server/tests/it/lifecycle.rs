//! Start and end of a server.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use hutch_contract::client::Error as ClientError;
use hutch_contract::error::Kind;
use hutch_server::config::HttpListen;
use hutch_server::{Error, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Home, by_socket, by_tcp};

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_on_port_and_socket_and_leaves_nothing_behind() {
    let home = Home::new();
    let running = home.start().await;
    let (tcp, unix) = (by_tcp(&running), by_socket(running.socket()));
    assert_eq!(tcp.health().await.unwrap().status, "ok");
    assert_eq!(unix.health().await.unwrap().status, "ok");
    assert!(
        unix.all_machines(None).await.unwrap().is_empty(),
        "the owner needs no key on the socket"
    );
    let refused = tcp.all_machines(None).await.unwrap_err();
    assert_eq!(
        refused.kind(),
        Kind::Unauthenticated,
        "that it is loopback proves nothing"
    );
    let keyed = tcp.clone().with_token(&home.admin_key()).unwrap();
    assert!(keyed.all_machines(None).await.unwrap().is_empty());
    let mode = fs::metadata(running.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    running.shutdown().await;
    running.closed().await;
    assert!(!running.socket().exists());
    assert!(matches!(
        tcp.health().await,
        Err(ClientError::Unreachable { .. })
    ));
    assert!(matches!(
        unix.health().await,
        Err(ClientError::Unreachable { .. })
    ));
    let again = home.start().await;
    assert_eq!(
        by_tcp(&again)
            .with_token(&home.admin_key())
            .unwrap()
            .all_images()
            .await
            .unwrap(),
        []
    );
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_the_same_directory_harms_nothing() {
    let home = Home::new();
    let first = home.start().await;
    let error = home.refusal(&[]).await;
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert!(error.hint().is_some());
    assert!(
        by_socket(first.socket()).all_machines(None).await.is_ok(),
        "the first one has its socket still"
    );
    assert!(by_tcp(&first).health().await.is_ok());
    first.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_said_before_anything_is_touched() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let home = Home::new();
    let error = home.refusal(&[("HUTCH_LISTEN", &address)]).await;
    assert!(matches!(error, Error::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&address) && error.hint().unwrap().contains("--listen"));
    assert!(!home.data_dir().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_port_in_use_counts_only_when_somebody_chose_it() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let home = Home::new();
    let error = home.refusal(&[("HUTCH_HTTP_LISTEN", &address)]).await;
    assert!(matches!(error, Error::GatewayInUse { .. }), "{error}");
    assert!(
        error.to_string().contains(&address) && error.hint().unwrap().contains("--http-listen")
    );
    assert!(!home.data_dir().exists());

    // The same port as if nobody had chosen it.
    let mut config = home.config(&[]);
    config.gateway.http_listen = HttpListen(taken.local_addr().ok());
    config.gateway.chosen = false;
    let running = Server::start(config).await.unwrap();
    assert_eq!(running.http_addr(), None);
    assert!(by_tcp(&running).health().await.is_ok());
    running.shutdown().await;

    let running = home.start().await;
    assert!(running.http_addr().is_some());
    let socket = home.data_dir().join("gateway.sock");
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    running.shutdown().await;
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_of_a_dead_server_is_replaced_and_anything_else_is_left_alone() {
    let home = Home::new();
    fs::create_dir(home.data_dir()).unwrap();
    let socket = home.data_dir().join("hutch.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let running = home.start().await;
    assert!(by_socket(&socket).health().await.is_ok());
    running.shutdown().await;

    fs::write(&socket, "somebody's notes").unwrap();
    let error = home.refusal(&[]).await;
    assert!(matches!(error, Error::NotASocket { .. }), "{error}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "somebody's notes");
    fs::remove_file(&socket).unwrap();
    std::os::unix::fs::symlink("/nowhere", &socket).unwrap();
    assert!(matches!(home.refusal(&[]).await, Error::NotASocket { .. }));
    fs::remove_file(&socket).unwrap();
    home.start().await.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_being_answered_is_answered_when_the_server_ends() {
    let home = Home::new();
    let running = home.start().await;
    let mut stream = TcpStream::connect(running.addr()).await.unwrap();
    let body = r#"{"image":"no-such-thing"}"#;
    let head = format!(
        "POST /v1/machines HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-type: application/json\r\n\
        expect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        home.admin_key(),
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert!(
        interim.starts_with(b"HTTP/1.1 100"),
        "the handler reads the body now"
    );
    let mut idle = TcpStream::connect(running.addr()).await.unwrap();

    let ending = async { running.shutdown().await };
    let finishing = async {
        while TcpStream::connect(running.addr()).await.is_ok() {
            tokio::task::yield_now().await;
        }
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let ((), answer) = tokio::join!(ending, finishing);
    assert!(
        answer.starts_with("HTTP/1.1 404") && answer.contains("image_not_found"),
        "{answer}"
    );
    assert_eq!(
        idle.read(&mut [0; 1]).await.unwrap_or(0),
        0,
        "an idle connection is closed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_can_be_examined_without_a_server() {
    let home = Home::new();
    assert!(!hutch_server::doctor(&home.config(&[])).await.is_empty());
}
