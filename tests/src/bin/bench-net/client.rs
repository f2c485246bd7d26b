//! A client that speaks as much HTTP/1.1 as a measurement needs.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use hutch_tests::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::numbers::Times;
use crate::role::Role;

/// No request takes longer without being an error.
const LIMIT: Duration = Duration::from_secs(10);

/// What a client does: connections, each with one request after the other.
#[derive(Clone, Copy)]
pub struct Load {
    pub connections: usize,
    pub time: Duration,
    /// Between an answer and the next request of the same connection.
    pub pause: Duration,
    /// Requests until a connection is replaced by a new one; 0 keeps it.
    pub renew: usize,
}

/// What became of it.
pub struct Done {
    pub times: Times,
    pub errors: usize,
    took: Duration,
}

impl Done {
    pub fn per_second(&self) -> f64 {
        self.times.len() as f64 / self.took.as_secs_f64()
    }
}

impl Load {
    /// Does it in a process of its own.
    pub fn run(self, world: Option<&World>, to: &str, host: &str) -> Done {
        let numbers = [
            self.connections.to_string(),
            self.time.as_millis().to_string(),
            self.pause.as_micros().to_string(),
            self.renew.to_string(),
        ];
        let mut words = vec!["client", to, host];
        words.extend(numbers.iter().map(String::as_str));
        let said = Role::start(world, &words).ended();
        let mut lines = said.lines().map(|line| line.parse::<u64>().unwrap());
        let (errors, took) = (lines.next().unwrap(), lines.next().unwrap());
        let mut times = Times::default();
        times.extend(lines.map(Duration::from_micros));
        Done {
            times,
            errors: errors as usize,
            took: Duration::from_millis(took),
        }
    }
}

/// The role: prints errors, milliseconds, and the microseconds of each request.
pub async fn play(words: &[&str]) {
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let to: SocketAddr = words[0].parse().unwrap();
    let load = Load {
        connections: number(2) as usize,
        time: Duration::from_millis(number(3)),
        pause: Duration::from_micros(number(4)),
        renew: number(5) as usize,
    };
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", words[1]);
    println!("0");
    let start = Instant::now();
    let each = (0..load.connections).map(|_| tokio::spawn(one(to, request.clone(), load, start)));
    let (mut all, mut errors) = (Vec::new(), 0);
    for done in futures::future::join_all(each).await {
        let (times, failed) = done.unwrap();
        all.extend(times);
        errors += failed;
    }
    let mut said = format!("{errors}\n{}\n", start.elapsed().as_millis());
    for took in all {
        said.push_str(&format!("{}\n", took.as_micros()));
    }
    print!("{said}");
}

async fn one(to: SocketAddr, request: String, load: Load, start: Instant) -> (Vec<Duration>, u64) {
    let (mut times, mut errors, mut sent) = (Vec::new(), 0, 0);
    let mut connection = None;
    while start.elapsed() < load.time {
        let began = Instant::now();
        let exchange = async {
            let mut open = match connection.take() {
                Some(open) => open,
                None => Connection::open(None, to).await?,
            };
            let goes_on = open.get(request.as_bytes()).await?;
            io::Result::Ok((open, goes_on))
        };
        sent += 1;
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(Ok((open, goes_on))) => {
                times.push(began.elapsed());
                let renew = load.renew > 0 && sent % load.renew == 0;
                connection = (goes_on && !renew).then_some(open);
            }
            failed => {
                if errors == 0 {
                    let failed = failed.map(|exchange| exchange.map(drop));
                    eprintln!("a request failed: {failed:?}");
                }
                errors += 1;
            }
        }
        if !load.pause.is_zero() {
            tokio::time::sleep(load.pause).await;
        }
    }
    (times, errors)
}

/// A connection to a proxy or server.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub async fn open(from: Option<Ipv4Addr>, to: SocketAddr) -> io::Result<Connection> {
        let socket = TcpSocket::new_v4()?;
        if let Some(from) = from {
            socket.bind((from, 0).into())?;
        }
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            buffer: Vec::with_capacity(64 * 1024),
        })
    }

    /// One request; whether another may follow. Whatever is not 200 is an error.
    async fn get(&mut self, request: &[u8]) -> io::Result<bool> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut windows = self.buffer.windows(4);
            if let Some(at) = windows.position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
        };
        let text = String::from_utf8_lossy(&self.buffer[..head]);
        if !text.starts_with("HTTP/1.1 200") {
            return Err(io::Error::other(text.into_owned()));
        }
        let header = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(found, _)| found.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.trim().to_owned())
        };
        let length = header("content-length").and_then(|length| length.parse::<usize>().ok());
        let length = length.ok_or_else(|| io::Error::other("an answer without a length"))?;
        let goes_on = header("connection").as_deref() != Some("close");
        while self.buffer.len() < head + length {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(goes_on)
    }

    /// Sends something, and takes as much back.
    pub async fn echo(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        let mut back = vec![0; bytes.len()];
        self.stream.read_exact(&mut back).await?;
        match back == bytes {
            true => Ok(()),
            false => Err(io::Error::other("another echo")),
        }
    }
}

/// Whether a program is installed.
pub fn is_there(program: &str) -> bool {
    Command::new(program)
        .arg("version")
        .output()
        .is_ok_and(|done| done.status.success())
}
