//! Machines as listeners on loopback, a gateway in front of them, and clients that speak in bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hutch_gateway::http::{Gateway, HttpConfig, Listener};
use hutch_gateway::limits::HttpLimits;
use hutch_gateway::token::Tokens;
use hutch_gateway::{Access, BoxStream, DialError, Found, KeySays, Machines, Ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_util::sync::CancellationToken;

/// Far beyond what anything here takes; only a hang reaches it.
pub const BOUND: Duration = Duration::from_secs(60);

/// What lies behind a port of a machine.
#[derive(Clone)]
pub enum Behind {
    /// A listener of the test.
    At(SocketAddr),
    /// Nothing, for this reason.
    Nothing(DialError),
    /// A listener that is reached once this is notified: the machine sleeps.
    Asleep(Arc<tokio::sync::Notify>, SocketAddr),
}

#[derive(Default)]
pub struct Town {
    machines: Mutex<BTreeMap<String, (Found, Behind)>>,
    /// Ports that were dialled.
    pub dialled: Mutex<Vec<u16>>,
}

impl Town {
    /// A public machine whose every port leads there.
    pub fn build(&self, name: &str, behind: Behind) {
        self.build_with(name, behind, |_| {});
    }

    pub fn build_with(&self, name: &str, behind: Behind, change: impl FnOnce(&mut Found)) {
        let mut found = Found {
            id: format!("mch-{name}"),
            incarnation: 1,
            http_port: 8080,
            ports: Ports::All,
            access: Access::Public,
        };
        change(&mut found);
        let mut machines = self.machines.lock().unwrap();
        machines.insert(name.into(), (found, behind));
    }
}

/// The key of every machine's owner, and somebody else's.
pub const KEY: &str = "key-1";
pub const OTHER_KEY: &str = "key-2";

#[async_trait]
impl Machines for Town {
    async fn find(&self, label: &str) -> Option<Found> {
        let machines = self.machines.lock().unwrap();
        machines.get(label).map(|(found, _)| found.clone())
    }

    async fn key(&self, _: &Found, key: &str) -> KeySays {
        match key {
            KEY => KeySays::Yes,
            OTHER_KEY => KeySays::No,
            _ => KeySays::NotOurs,
        }
    }

    async fn dial(&self, id: &str, port: u16) -> Result<BoxStream, DialError> {
        self.dialled.lock().unwrap().push(port);
        let behind = {
            let machines = self.machines.lock().unwrap();
            let name = id.strip_prefix("mch-").unwrap();
            machines.get(name).map(|(_, behind)| behind.clone())
        };
        let address = match behind.ok_or(DialError::NoSuchMachine)? {
            Behind::At(address) => address,
            Behind::Nothing(error) => return Err(error),
            Behind::Asleep(wakes, address) => {
                wakes.notified().await;
                address
            }
        };
        let stream = TcpStream::connect(address).await;
        Ok(Box::new(stream.map_err(|_| DialError::NothingListens)?))
    }
}

pub fn tokens() -> Tokens {
    Tokens::new([9; 32])
}

/// A gateway, for `vms.test` unless said otherwise.
pub struct Lab {
    pub town: Arc<Town>,
    pub gateway: Gateway,
    pub address: SocketAddr,
    pub closing: CancellationToken,
}

impl Lab {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut HttpLimits)) -> Self {
        let mut limits = HttpLimits::default();
        change(&mut limits);
        Self::start("vms.test", limits).await
    }

    pub async fn below(base_domain: &str) -> Self {
        Self::start(base_domain, HttpLimits::default()).await
    }

    async fn start(base_domain: &str, limits: HttpLimits) -> Self {
        let town = Arc::new(Town::default());
        let config = HttpConfig {
            base_domain: base_domain.into(),
            tokens: tokens(),
            limits,
        };
        let gateway = Gateway::new(town.clone(), config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let closing = CancellationToken::new();
        let (serving, until) = (gateway.clone(), closing.clone());
        tokio::spawn(async move { serving.serve(Listener::Tcp(listener), until).await });
        Self {
            town,
            gateway,
            address,
            closing,
        }
    }

    /// A door for a proxy, too.
    pub fn proxy(&self, path: &std::path::Path) {
        let listener = Listener::Proxy(UnixListener::bind(path).unwrap());
        let (serving, until) = (self.gateway.clone(), self.closing.clone());
        tokio::spawn(async move { serving.serve(listener, until).await });
    }

    pub async fn client(&self) -> Client<TcpStream> {
        Client::new(TcpStream::connect(self.address).await.unwrap())
    }

    /// One request on a connection of its own.
    pub async fn get(&self, host: &str, path: &str, headers: &str) -> Answer {
        let mut client = self.client().await;
        client.get(host, path, headers).await
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// The other side has ended the connection in the middle of something.
const CUT_OFF: &str = "the connection was cut off";

/// A client that speaks in bytes.
pub struct Client<S> {
    pub stream: S,
    pub rest: Vec<u8>,
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.split("\r\n").skip(1);
    let mut pairs = lines.filter_map(|line| line.split_once(':'));
    pairs
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            rest: Vec::new(),
        }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    pub async fn get(&mut self, host: &str, path: &str, headers: &str) -> Answer {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
        self.send(request).await;
        self.answer().await
    }

    /// More bytes; `false` at the end.
    async fn more(&mut self) -> bool {
        let read = tokio::time::timeout(BOUND, self.stream.read_buf(&mut self.rest)).await;
        matches!(read.expect("it hangs"), Ok(1..))
    }

    pub async fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.rest.len() < length {
            assert!(self.more().await, "{CUT_OFF}");
        }
        self.rest.drain(..length).collect()
    }

    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            let found = self
                .rest
                .windows(end.len())
                .position(|window| window == end);
            if let Some(at) = found {
                return Some(self.rest.drain(..at + end.len()).collect());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// The head of the next answer or request, or `None` at the end.
    pub async fn head(&mut self) -> Option<String> {
        let head = self.until(b"\r\n\r\n").await?;
        Some(String::from_utf8(head).unwrap())
    }

    /// The body that a head declares, strictly.
    pub async fn body(&mut self, head: &str, or_until_the_end: bool) -> Vec<u8> {
        if header(head, "transfer-encoding").is_some() {
            assert_eq!(header(head, "transfer-encoding"), Some("chunked"), "{head}");
            assert_eq!(header(head, "content-length"), None, "{head}");
            let mut body = Vec::new();
            loop {
                let chunk = self.chunk().await;
                if chunk.is_empty() {
                    assert_eq!(self.exactly(2).await, b"\r\n");
                    return body;
                }
                body.extend(chunk);
            }
        }
        match header(head, "content-length") {
            Some(length) => self.exactly(length.parse().unwrap()).await,
            None if or_until_the_end => self.until_the_end().await,
            None => Vec::new(),
        }
    }

    /// The next chunk of a chunked body; the last one is empty, and the line after it is still to come.
    pub async fn chunk(&mut self) -> Vec<u8> {
        let line = self.until(b"\r\n").await.expect(CUT_OFF);
        let size = std::str::from_utf8(&line).unwrap().trim_end();
        let size = usize::from_str_radix(size, 16).expect("a size");
        if size == 0 {
            return Vec::new();
        }
        let chunk = self.exactly(size).await;
        assert_eq!(self.exactly(2).await, b"\r\n");
        chunk
    }

    pub async fn until_the_end(&mut self) -> Vec<u8> {
        while self.more().await {}
        std::mem::take(&mut self.rest)
    }

    pub async fn answer(&mut self) -> Answer {
        self.maybe_answer().await.expect("an answer")
    }

    pub async fn maybe_answer(&mut self) -> Option<Answer> {
        let head = self.head().await?;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let has_body = status != 101 && status != 204 && status != 304;
        let body = match has_body {
            true => self.body(&head, true).await,
            false => Vec::new(),
        };
        Some(Answer { status, head, body })
    }
}

/// A request that reached a machine.
#[derive(Debug, Clone)]
pub struct Seen {
    pub head: String,
    pub body: Vec<u8>,
}

/// A strict little server that writes down every request and answers with its path.
pub struct Recorder {
    pub address: SocketAddr,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    /// Connections that carried something else than requests.
    pub broken: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let recorder = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            broken: Arc::default(),
        };
        let (seen, broken) = (recorder.seen.clone(), recorder.broken.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, broken) = (seen.clone(), broken.clone());
                tokio::spawn(async move {
                    let Err(panic) = tokio::spawn(record(stream, seen)).await else {
                        return;
                    };
                    // Half a request is not taken for a whole one.
                    let panic = panic.to_string();
                    if !panic.contains(CUT_OFF) {
                        broken.lock().unwrap().push(panic);
                    }
                });
            }
        });
        recorder
    }

    pub fn behind(&self) -> Behind {
        Behind::At(self.address)
    }

    pub fn last(&self) -> Seen {
        self.seen.lock().unwrap().last().unwrap().clone()
    }
}

async fn record(stream: TcpStream, seen: Arc<Mutex<Vec<Seen>>>) {
    let mut peer = Client::new(stream);
    while let Some(head) = peer.head().await {
        let body = peer.body(&head, false).await;
        let path = head.split(' ').nth(1).unwrap().to_owned();
        seen.lock().unwrap().push(Seen { head, body });
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}",
            path.len()
        );
        if peer.stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// A machine whose next connections the test plays itself.
pub async fn stage() -> (TcpListener, Behind) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let behind = Behind::At(listener.local_addr().unwrap());
    (listener, behind)
}

pub async fn next(listener: &TcpListener) -> Client<TcpStream> {
    let accepted = tokio::time::timeout(BOUND, listener.accept()).await;
    Client::new(accepted.expect("it hangs").unwrap().0)
}
