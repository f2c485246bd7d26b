//! DNS messages written and read by hand, and a resolver of the host's that says what a test wants.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const PTR: u16 = 12;
pub const AAAA: u16 = 28;
pub const HTTPS: u16 = 65;

pub const NO_ERROR: u8 = 0;
pub const FAILED: u8 = 2;
pub const NO_NAME: u8 = 3;
pub const REFUSED: u8 = 5;

/// Owner, type, seconds and data.
pub type Record = (String, u16, u32, Vec<u8>);

/// What a message says.
#[derive(Debug, Clone)]
pub struct Said {
    pub id: u16,
    pub code: u8,
    pub truncated: bool,
    pub name: String,
    pub kind: u16,
    pub answers: Vec<Record>,
}

pub fn name(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

fn message(id: u16, flags: u16, about: (&str, u16), answers: &[Record]) -> Vec<u8> {
    let count = u16::try_from(answers.len()).unwrap();
    let mut bytes = Vec::new();
    for field in [id, flags, 1, count, 0, 0] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(name(about.0));
    bytes.extend(about.1.to_be_bytes());
    bytes.extend([0, 1]);
    for (owner, kind, ttl, data) in answers {
        bytes.extend(name(owner));
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(ttl.to_be_bytes());
        bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
    }
    bytes
}

/// A question that wants recursion.
pub fn question(id: u16, about: &str, kind: u16) -> Vec<u8> {
    message(id, 0x0100, (about, kind), &[])
}

/// An answer to a question with this code and these records.
pub fn answer(asked: &Said, code: u8, answers: &[Record]) -> Vec<u8> {
    let flags = 0x8180 | u16::from(code);
    message(asked.id, flags, (&asked.name, asked.kind), answers)
}

/// An answer that did not fit.
pub fn cut(asked: &Said) -> Vec<u8> {
    message(asked.id, 0x8380, (&asked.name, asked.kind), &[])
}

pub fn a(owner: &str, ttl: u32, address: impl Into<Ipv4Addr>) -> Record {
    (owner.into(), A, ttl, address.into().octets().into())
}

pub fn alias(owner: &str, ttl: u32, to: &str) -> Record {
    (owner.into(), CNAME, ttl, name(to))
}

/// Reads a message without authorities.
pub fn read(bytes: &[u8]) -> Said {
    let number = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let mut at = 12;
    let text = |at: &mut usize| {
        let (mut text, mut here, mut jumped) = (Vec::new(), *at, false);
        loop {
            let length = usize::from(bytes[here]);
            if length & 0xc0 != 0 {
                if !jumped {
                    *at = here + 2;
                }
                jumped = true;
                here = usize::from(number(here) & 0x3fff);
                continue;
            }
            here += 1;
            if length == 0 {
                break;
            }
            text.push(String::from_utf8(bytes[here..here + length].to_vec()).unwrap());
            here += length;
        }
        if !jumped {
            *at = here;
        }
        text.join(".")
    };
    let (mut about, mut kind) = (String::new(), 0);
    for _ in 0..number(4) {
        about = text(&mut at);
        kind = number(at);
        at += 4;
    }
    let mut answers = Vec::new();
    for _ in 0..number(6) {
        let owner = text(&mut at);
        let ttl = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        let length = usize::from(number(at + 8));
        let data = bytes[at + 10..at + 10 + length].to_vec();
        answers.push((owner, number(at), ttl, data));
        at += 10 + length;
    }
    Said {
        id: number(0),
        code: bytes[3] & 15,
        truncated: bytes[2] & 2 != 0,
        name: about,
        kind,
        answers,
    }
}

impl Said {
    /// The IPv4 addresses in it.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        let records = self.answers.iter().filter(|(_, kind, ..)| *kind == A);
        records
            .map(|(.., data)| <[u8; 4]>::try_from(&data[..]).unwrap().into())
            .collect()
    }
}

/// What an upstream sends for a question: each a datagram, or a message of a connection.
pub type Script = fn(&Said, bool) -> Vec<Vec<u8>>;

/// A resolver such as a host has.
pub struct Upstream {
    pub address: SocketAddr,
    /// The names that it was asked for, over UDP or TCP.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Upstream {
    /// Runs until the runtime ends.
    pub async fn start(script: Script) -> Self {
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let note = asked.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
                let said = read(&buffer[..length]);
                note.lock().unwrap().push(said.name.clone());
                for answer in script(&said, false) {
                    udp.send_to(&answer, from).await.unwrap();
                }
            }
        });
        let note = asked.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let said = read(&receive(&mut stream).await.unwrap());
                note.lock().unwrap().push(said.name.clone());
                for answer in script(&said, true) {
                    send(&mut stream, &answer).await;
                }
            }
        });
        Self { address, asked }
    }

    /// How often it was asked for a name.
    pub fn times(&self, name: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| *asked == name).count()
    }
}

/// A message of a connection; none when it has ended.
pub async fn receive(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; usize::from(stream.read_u16().await.ok()?)];
    stream.read_exact(&mut message).await.ok()?;
    Some(message)
}

pub async fn send(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let _ = stream.write_all(&[&length[..], message].concat()).await;
}

/// Answers about `example.com`, good and bad.
pub fn example(asked: &Said, tcp: bool) -> Vec<Vec<u8>> {
    let about = asked.name.to_ascii_lowercase();
    let good = |records: &[Record]| vec![answer(asked, NO_ERROR, records)];
    let ten = [203, 0, 113, 10];
    match &about[..] {
        "plain.example.com" => good(&[a(&about, 300, ten)]),
        "other.example.com" => good(&[a(&about, 300, [203, 0, 113, 11])]),
        "short.example.com" => good(&[a(&about, 1, ten)]),
        "alias.example.com" => good(&[
            alias(&about, 20, "mid.example.net"),
            alias("mid.example.net", 90, "host.example.org"),
            a("host.example.org", 300, ten),
            a("stranger.example.org", 300, [203, 0, 113, 66]),
        ]),
        "circle.example.com" => good(&[
            alias(&about, 20, "circle.example.net"),
            alias("circle.example.net", 20, &about),
        ]),
        "mixed.example.com" => good(&[
            a(&about, 300, [10, 0, 0, 1]),
            a(&about, 300, [169, 254, 169, 254]),
            a(&about, 300, [127, 0, 0, 1]),
            a(&about, 300, [192, 0, 2, 7]),
            a(&about, 300, ten),
        ]),
        "private.example.com" => good(&[a(&about, 300, [10, 0, 0, 1])]),
        "service.example.com" => {
            good(&[(about, HTTPS, 300, vec![0, 1, 0, 0, 4, 0, 4, 1, 1, 1, 1])])
        }
        "large.example.com" if !tcp => vec![cut(asked)],
        "large.example.com" => {
            let record = |last| a(&about, 300, [203, 0, 113, last]);
            good(&(1..=60).map(record).collect::<Vec<_>>())
        }
        "forged.example.com" => {
            let right = answer(asked, NO_ERROR, &[a(&about, 300, ten)]);
            [lies(asked), vec![right]].concat()
        }
        "lies.example.com" => lies(asked),
        "silent.example.com" => vec![],
        "broken.example.com" => vec![answer(asked, FAILED, &[])],
        _ => vec![answer(asked, NO_NAME, &[])],
    }
}

/// What somebody says who wants to be believed.
fn lies(asked: &Said) -> Vec<Vec<u8>> {
    let evil = [a(&asked.name, 300, [203, 0, 113, 66])];
    let other = Said {
        id: asked.id.wrapping_add(1),
        ..asked.clone()
    };
    let elsewhere = Said {
        name: "plain.example.com".into(),
        ..asked.clone()
    };
    let mut circle = answer(asked, NO_ERROR, &evil);
    let owner = 12 + name(&asked.name).len() + 4;
    let pointer = 0xc000 | u16::try_from(owner).unwrap();
    circle[owner..owner + 2].copy_from_slice(&pointer.to_be_bytes());
    let mut no_answer = answer(asked, NO_ERROR, &evil);
    no_answer[2] &= 0x7f;
    vec![
        answer(&other, NO_ERROR, &evil),
        answer(&elsewhere, NO_ERROR, &evil),
        circle,
        no_answer,
        vec![0; 12],
        vec![],
        vec![0xff; 4000],
    ]
}
