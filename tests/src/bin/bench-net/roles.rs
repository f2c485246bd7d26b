//! What this program is in its other processes. Each says its port when it is ready.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use hutch_gateway::http::{Gateway, HttpConfig, Listener};
use hutch_gateway::limits::{HttpLimits, TcpLimits};
use hutch_gateway::tcp::Forwarder;
use hutch_gateway::token::Tokens;
use hutch_gateway::{Access, BoxStream, DialError, Found, KeySays, Machines, Ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::{client, flood, role, taps};

/// Machines are one label below it.
pub const DOMAIN: &str = "vms.localhost";
/// Bytes of the upstream's answer.
const BODY: usize = 128;

/// Plays a role to its end.
pub fn play(role: &str, words: &[&str]) {
    role::many_files();
    // Clients and servers have a thread each; what is measured has as many as it has when it is shipped.
    let mut runtime = match role {
        "gateway" | "forwarder" => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(async {
        match role {
            "taps-alone" => taps::alone(words),
            "client" => client::play(words).await,
            "flood" => flood::play(words).await,
            "upstream" => serve(answer).await,
            "echo" => serve(echo).await,
            "sink" => serve(discard).await,
            "gateway" => gateway(words[0].parse().unwrap()).await,
            "forwarder" => forwarder(words[0].parse().unwrap(), words[1].parse().unwrap()).await,
            _ => panic!("there is no role {role}"),
        }
    });
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

async fn serve<F>(each: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, port) = listen().await;
    println!("{port}");
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(each(stream));
    }
}

/// An answer for each head; requests have no bodies here.
async fn answer(mut stream: TcpStream) {
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {BODY}\r\n\r\n{}",
        "x".repeat(BODY)
    );
    let mut buffer = Vec::with_capacity(16 * 1024);
    while let Ok(read) = stream.read_buf(&mut buffer).await {
        if read == 0 {
            return;
        }
        while let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            buffer.drain(..at + 4);
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

async fn echo(mut stream: TcpStream) {
    let (mut from, mut to) = stream.split();
    let _whatever_ended_it = tokio::io::copy(&mut from, &mut to).await;
}

async fn discard(mut stream: TcpStream) {
    let _whatever_ended_it = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

/// Any name is a machine with one port.
struct Town(SocketAddr);

#[async_trait]
impl Machines for Town {
    async fn find(&self, label: &str) -> Option<Found> {
        Some(Found {
            id: label.to_owned(),
            incarnation: 1,
            http_port: 80,
            ports: Ports::All,
            access: Access::Public,
        })
    }

    async fn key(&self, _machine: &Found, _key: &str) -> KeySays {
        KeySays::NotOurs
    }

    async fn dial(&self, _id: &str, _port: u16) -> Result<BoxStream, DialError> {
        let dialled = TcpStream::connect(self.0).await;
        let stream = dialled.map_err(|error| DialError::Failed(error.to_string()))?;
        stream
            .set_nodelay(true)
            .map_err(|error| DialError::Failed(error.to_string()))?;
        Ok(Box::new(stream))
    }
}

/// The HTTP gateway as the server has it, with its limits.
async fn gateway(upstream: SocketAddr) {
    let config = HttpConfig {
        base_domain: DOMAIN.to_owned(),
        tokens: Tokens::new([7; 32]),
        limits: HttpLimits::default(),
    };
    let gateway = Gateway::new(Arc::new(Town(upstream)), config);
    let (listener, port) = listen().await;
    println!("{port}");
    gateway
        .serve(Listener::Tcp(listener), CancellationToken::new())
        .await;
}

/// The forwarder as the server has it, with its limits; its ports, after the first, are on the lines that follow.
async fn forwarder(echo: SocketAddr, ports: usize) {
    let forwarder = Forwarder::new(Arc::new(Town(echo)), TcpLimits::default());
    let mut all = Vec::new();
    for n in 0..ports {
        let (listener, port) = listen().await;
        all.push(
            forwarder
                .forward(listener, &format!("machine-{n}"), 80)
                .unwrap(),
        );
        println!("{port}");
    }
    std::future::pending::<()>().await;
}
