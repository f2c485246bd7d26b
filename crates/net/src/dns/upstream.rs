//! Asking the host's resolvers: a new socket, port and id for each question, so that nobody guesses what to forge
//! (RFC 5452).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::message::{Answer, Heard, Question, TCP_MAX};

/// Each server is asked so often.
const ROUNDS: usize = 2;
/// Room for more than what we say that we take.
const UDP_BUFFER: usize = 4096;

/// The first answer, or none when no server has one. The caller bounds the time of all together.
pub(super) async fn ask(
    servers: &[SocketAddr],
    question: &Question,
    patience: Duration,
) -> Option<Answer> {
    for _ in 0..ROUNDS {
        for server in servers {
            if let Ok(Ok(Some(answer))) = timeout(patience, ask_one(*server, question)).await {
                return Some(answer);
            }
        }
    }
    None
}

async fn ask_one(server: SocketAddr, question: &Question) -> io::Result<Option<Answer>> {
    match over_udp(server, question).await? {
        Heard::Answer(answer) => Ok(Some(*answer)),
        Heard::Truncated => match over_tcp(server, question).await? {
            Heard::Answer(answer) => Ok(Some(*answer)),
            _ => Ok(None),
        },
        Heard::Failed | Heard::NotOurs => Ok(None),
    }
}

async fn over_udp(server: SocketAddr, question: &Question) -> io::Result<Heard> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = random_id()?;
    socket.send(&question.forwarded(id)).await?;
    let mut buffer = vec![0; UDP_BUFFER];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match question.hear(id, &buffer[..length]) {
            // Somebody guesses; the real one may still come.
            Heard::NotOurs => {}
            heard => return Ok(heard),
        }
    }
}

async fn over_tcp(server: SocketAddr, question: &Question) -> io::Result<Heard> {
    let mut stream = TcpStream::connect(server).await?;
    let id = random_id()?;
    write(&mut stream, &question.forwarded(id)).await?;
    let answer = read(&mut stream).await?;
    Ok(question.hear(id, &answer))
}

/// Reads a message with its length before it (RFC 1035 §4.2.2).
pub(super) async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message with its length before it.
pub(super) async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let message = &message[..message.len().min(TCP_MAX)];
    let length = message.len() as u16;
    stream
        .write_all(&[&length.to_be_bytes()[..], message].concat())
        .await
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}
