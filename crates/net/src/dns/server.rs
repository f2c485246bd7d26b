//! Sockets at the gateway's address, and what is done about each question.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::load::{Limits, Load};
use super::message::{About, Asked, Code, Question, Reply, TCP_MAX, read};
use super::resolv::{Resolvers, Upstreams};
use super::route::{Route, route};
use super::upstream;
use super::{Asker, Directory, ZONE};
use crate::cidr::Cidr;
use crate::domain::{Domain, Judgement};

/// Seconds for which our own names are good.
const OWN_TTL: u32 = 5;
/// An address is recorded for at least and at most so long, and for a while after the machine should have forgotten it.
const RECORDED_LEAST: u32 = 30;
const RECORDED_MOST: u32 = 3600;
const GRACE: u32 = 60;
/// Ports that are tried until one is free for UDP and TCP.
const PORTS: usize = 20;
const BACKLOG: i32 = 128;
/// No question is longer, as far as we answer it.
const QUESTION_MAX: usize = 4096;
/// Before the next try when the kernel is short of something.
const SHORT: Duration = Duration::from_millis(100);

/// How the resolver runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where it listens: the gateway of machines. No interface need have it yet.
    pub address: IpAddr,
    /// The port to have, such as that of the server before, so that the firewall's rules can stay. Another one is
    /// taken where it is not to be had.
    pub port: Option<u16>,
    /// Whom it asks.
    pub upstreams: Upstreams,
    /// Networks beside the private ones that names of others must not lead to, as in [`crate::rules::Rules`].
    pub host_networks: Vec<Cidr>,
    /// How much of everything.
    pub limits: Limits,
}

/// A resolver that runs. Dropping it ends it, with the questions that it is at.
#[derive(Debug)]
pub struct Server {
    port: u16,
    tasks: [JoinHandle<()>; 2],
}

impl Server {
    /// Listens, and answers from then on, within the calling runtime, whose thread's network namespace is the one of
    /// machines.
    ///
    /// # Errors
    /// The kernel gives no sockets.
    pub fn start<D: Directory>(config: Config, directory: Arc<D>) -> io::Result<Self> {
        let (udp, tcp) = bind(config.address, config.port)?;
        let port = udp.local_addr()?.port();
        let inner = Arc::new(Inner {
            resolvers: Resolvers::new(config.upstreams, config.address),
            host_networks: config.host_networks,
            load: Load::new(config.limits.clone()),
            limits: config.limits,
            directory,
        });
        let tasks = [
            tokio::spawn(over_udp(udp, inner.clone())),
            tokio::spawn(over_tcp(tcp, inner)),
        ];
        Ok(Self { port, tasks })
    }

    /// Where it listens, over UDP and TCP: for [`crate::rules::Rules::dns_port`].
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Sockets of one port, which is the wished one where it is free.
fn bind(address: IpAddr, wished: Option<u16>) -> io::Result<(UdpSocket, TcpListener)> {
    let mut refused = None;
    for port in wished.into_iter().chain([0; PORTS]) {
        let both = || {
            let udp = socket(SocketType::DGRAM, (address, port).into())?;
            let udp = UdpSocket::from_std(udp.into())?;
            let there = (address, udp.local_addr()?.port()).into();
            let tcp = socket(SocketType::STREAM, there)?;
            rustix::net::listen(&tcp, BACKLOG)?;
            Ok((udp, TcpListener::from_std(tcp.into())?))
        };
        match both() {
            Ok(both) => return Ok(both),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

/// A socket at an address that need not be there.
fn socket(kind: SocketType, address: SocketAddr) -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    if kind == SocketType::STREAM {
        // Connections of the server before may still be ending at this port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

struct Inner<D> {
    resolvers: Resolvers,
    host_networks: Vec<Cidr>,
    load: Load,
    limits: Limits,
    directory: Arc<D>,
}

async fn over_udp<D: Directory>(socket: UdpSocket, inner: Arc<Inner<D>>) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; QUESTION_MAX];
    let mut tasks = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            Some(_) = tasks.join_next() => continue,
        };
        let Ok((length, from)) = received else {
            tokio::time::sleep(SHORT).await;
            continue;
        };
        let Some(asker) = inner.directory.asker(from.ip().to_canonical()) else {
            continue;
        };
        let Some(place) = inner.load.question(&asker.label) else {
            continue;
        };
        let (question, inner, socket) = (buffer[..length].to_vec(), inner.clone(), socket.clone());
        tasks.spawn(async move {
            if let Some(answer) = inner.answer(&asker, &question, Question::udp_limit).await {
                // Who does not hear it asks again.
                let _ = socket.send_to(&answer, from).await;
            }
            drop(place);
        });
    }
}

async fn over_tcp<D: Directory>(listener: TcpListener, inner: Arc<Inner<D>>) {
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        let Ok((stream, from)) = accepted else {
            tokio::time::sleep(SHORT).await;
            continue;
        };
        let from = from.ip().to_canonical();
        let Some(asker) = inner.directory.asker(from) else {
            continue;
        };
        let Some(place) = inner.load.connection(&asker.label) else {
            continue;
        };
        let inner = inner.clone();
        tasks.spawn(async move {
            // The end of a connection is nobody's error.
            let _ = inner.converse(stream, from).await;
            drop(place);
        });
    }
}

impl<D: Directory> Inner<D> {
    /// Answers the questions of a connection, one after the other.
    async fn converse(&self, mut stream: TcpStream, from: IpAddr) -> io::Result<()> {
        loop {
            let question = timeout(self.limits.idle, upstream::read(&mut stream)).await??;
            // Its policy may have changed meanwhile, and the address may be another machine's.
            let asker = self.directory.asker(from);
            let asker = asker.ok_or(io::ErrorKind::ConnectionAborted)?;
            let place = self.load.question(&asker.label);
            let _place = place.ok_or(io::ErrorKind::ConnectionAborted)?;
            let answer = self.answer(&asker, &question, |_| TCP_MAX).await;
            let answer = answer.ok_or(io::ErrorKind::InvalidData)?;
            timeout(self.limits.idle, upstream::write(&mut stream, &answer)).await??;
        }
    }

    /// The bytes of an answer; none to what is no question.
    async fn answer(
        &self,
        asker: &Asker,
        bytes: &[u8],
        limit: impl Fn(&Question) -> usize,
    ) -> Option<Vec<u8>> {
        let question = match read(bytes) {
            Asked::Question(question) => question,
            Asked::Refused(answer) => return Some(answer),
            Asked::Nothing => return None,
        };
        let reply = timeout(self.limits.deadline, self.resolve(asker, &question)).await;
        let reply = reply.unwrap_or_else(|_| question.empty(Code::Failed));
        Some(reply.bytes(limit(&question)))
    }

    async fn resolve(&self, asker: &Asker, question: &Question) -> Reply {
        match route(&question.name, &self.host_networks) {
            Route::Own(name) if name.is_empty() => question.empty(Code::NoError),
            Route::Own(name) => match self.directory.addresses(asker, &name) {
                Some(addresses) => question.with_addresses(&addresses, OWN_TTL),
                None => question.empty(Code::NoName),
            },
            Route::Reverse(address) => self.reverse(asker, question, address),
            Route::Nobody => question.empty(Code::NoName),
            Route::Upstream => self.forward(asker, question).await,
        }
    }

    fn reverse(&self, asker: &Asker, question: &Question, address: Option<IpAddr>) -> Reply {
        let name = address.and_then(|address| self.directory.name(asker, address));
        let name = name.and_then(|name| format!("{name}.{ZONE}").parse::<Domain>().ok());
        match name {
            Some(name) if question.about() == About::Pointer => {
                question.with_pointer(&name, OWN_TTL)
            }
            Some(_) => question.empty(Code::NoError),
            None => question.empty(Code::NoName),
        }
    }

    async fn forward(&self, asker: &Asker, question: &Question) -> Reply {
        let policy = &asker.policy;
        if policy.judge(&question.name) == Judgement::Denied {
            return question.empty(Code::Refused);
        }
        if question.about() == About::Service && !policy.domains.is_empty() {
            return question.empty(Code::NoError);
        }
        let servers = self.resolvers.servers();
        let answer = upstream::ask(&servers, question, self.limits.server).await;
        let Some(mut answer) = answer else {
            return question.empty(Code::Failed);
        };
        answer.retain_addresses(|address| policy.believes(address, &self.host_networks));
        let addresses = answer.addresses();
        if !addresses.is_empty() {
            let seconds = answer.ttl().clamp(RECORDED_LEAST, RECORDED_MOST) + GRACE;
            let lifetime = Duration::from_secs(seconds.into());
            let name = &question.name;
            let recorded = self.directory.record(asker, name, addresses, lifetime);
            match recorded.await {
                Ok(Judgement::Denied) => return question.empty(Code::Refused),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(label = asker.label, error, "an answer is not recorded");
                    return question.empty(Code::Failed);
                }
            }
        }
        answer.reply(question)
    }
}
