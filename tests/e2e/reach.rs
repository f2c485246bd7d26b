//! Machines are reached from outside: by ports of the host, and by name over HTTP; also after a crash of the server.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use hutch_contract::client::Client;
use hutch_contract::error::Kind;
use hutch_contract::expose::{
    Access, ChangeMachine, Expose, MintToken, PortKind, PortState, PublishPort,
};
use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_tests::{Lab, Runtime, lab, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

pub(crate) const LONG: Duration = Duration::from_secs(180);

/// An answer of the gateway.
pub(crate) struct Answer {
    pub(crate) status: u16,
    text: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let head = self.text.split("\r\n\r\n").next().unwrap();
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Status, and the word of the gateway's own pages.
    fn said(&self) -> (u16, &str) {
        (
            self.status,
            self.header("x-hutch-error").unwrap_or_default(),
        )
    }
}

/// One GET on a connection of its own.
pub(crate) async fn get(lab: &Lab, name: &str, target: &str, header: &str) -> Answer {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", lab.gateway()))
            .await
            .unwrap();
        let host = format!("{name}.vms.localhost:{}", lab.gateway());
        let ask =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{header}Connection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let text = timeout(LONG, exchange).await.expect("an answer");
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no HTTP: {text}")),
        text,
    }
}

/// Sends through a port of the host, ends that direction, and takes what comes back until the end.
async fn echo(port: u16, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut from, mut to) = stream.into_split();
    let mut back = Vec::new();
    let sending = async {
        to.write_all(bytes).await?;
        to.shutdown().await
    };
    let (sent, read) = tokio::join!(sending, from.read_to_end(&mut back));
    sent?;
    read?;
    Ok(back)
}

async fn echoes(port: u16) -> bool {
    echo(port, b"hello")
        .await
        .is_ok_and(|back| back == b"hello")
}

/// Starts a program in the machine that goes on running; ended by [`end`].
pub(crate) async fn start(lab: &Lab, machine: &str, program: &str) -> String {
    let script = format!("cd / && {program} </dev/null >/dev/null 2>&1 & echo $!");
    let started = lab.sh(machine, &script).await;
    assert_eq!(started.exit.exit_code, 0, "{started:?}");
    started.stdout.trim().to_owned()
}

pub(crate) async fn end(lab: &Lab, machine: &str, pids: &[String]) {
    lab.sh(machine, &format!("kill {}", pids.join(" "))).await;
}

fn publish(guest_port: u16) -> PublishPort {
    PublishPort {
        guest_port,
        host_port: None,
        bind: None,
    }
}

pub(crate) async fn create(lab: &Lab, request: CreateMachine) -> Machine {
    let created = lab.client().create(&request, None, Some(LONG)).await;
    created.unwrap_or_else(|error| panic!("{error}\n{}", lab.log()))
}

async fn token(client: &Client, machine: &str) -> String {
    let asked = MintToken::default();
    client.token(machine, &asked).await.unwrap().token
}

#[tokio::test]
async fn a_machine_is_reached_with_the_stub() {
    reached(lab!(Runtime::Stub)).await;
}

#[tokio::test]
async fn a_machine_is_reached_with_qemu() {
    reached(lab!(Runtime::Qemu)).await;
}

#[tokio::test]
async fn a_machine_is_reached_with_firecracker() {
    reached(lab!(Runtime::Firecracker)).await;
}

#[tokio::test]
async fn a_machine_is_reached_with_cloud_hypervisor() {
    reached(lab!(Runtime::CloudHypervisor)).await;
}

#[tokio::test]
async fn a_machine_is_reached_with_docker() {
    reached(lab!(Runtime::Docker)).await;
}

async fn reached(lab: Lab) {
    let lab = lab.start().await;
    lab.busybox().await;
    let client = lab.client();
    // Machines of the stub share the host's ports.
    let (web, more, back, hidden) = (lab.port(0), lab.port(1), lab.port(2), lab.port(3));
    let machine = create(
        &lab,
        CreateMachine {
            ports: vec![publish(back)],
            ssh: true,
            http_port: Some(web),
            expose: Expose::Ports(vec![more]),
            ..lab.request("web")
        },
    )
    .await;
    let gateway = lab.gateway();
    let url = format!("http://web.vms.localhost:{gateway}");
    assert_eq!(machine.url.as_ref(), Some(&url));
    assert_eq!(
        machine.urls[&more],
        format!("http://{more}-web.vms.localhost:{gateway}")
    );
    assert_eq!(machine.access, Some(Access::Private));
    let kinds = machine
        .ports
        .iter()
        .map(|port| (port.kind, port.guest_port));
    assert_eq!(
        kinds.collect::<Vec<_>>(),
        [(PortKind::Ssh, 22), (PortKind::Tcp, back)]
    );
    let echo_port = machine.ports[1].host_port;
    assert!(machine.ports.iter().all(|port| port.bind.is_loopback()));

    // Nothing listens in it yet.
    assert!(echo(echo_port, b"x").await.is_err(), "a reset, no answer");
    let entry = format!("x-hutch-token: {}\r\n", token(&client, "web").await);
    let nothing = get(&lab, "web", "/", &entry).await;
    assert_eq!(nothing.said(), (502, "nothing_listens"), "{}", nothing.text);

    let httpd = |port| format!("busybox httpd -f -p 127.0.0.1:{port} -h /tmp/{port}");
    for port in [web, more] {
        let page = format!("mkdir -p /tmp/{port} && echo page of {port} > /tmp/{port}/index.html");
        assert_eq!(lab.sh("web", &page).await.exit.exit_code, 0);
    }
    let mut pids = vec![
        start(&lab, "web", &format!("busybox nc -ll -p {back} -e cat")).await,
        start(&lab, "web", &httpd(web)).await,
        start(&lab, "web", &httpd(more)).await,
    ];
    wait_until("the programs listen", LONG, async || {
        echoes(echo_port).await
            && get(&lab, "web", "/", &entry).await.status == 200
            && get(&lab, &format!("{more}-web"), "/", &entry).await.status == 200
    })
    .await;

    let much: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    assert!(echo(echo_port, &much).await.unwrap() == much);
    let ports = client.ports("web").await.unwrap();
    assert!(ports.iter().all(|port| port.state == PortState::Listening));

    // By name: not without what opens it, and nobody learns that it is there.
    let closed = get(&lab, "web", "/", "").await;
    assert_eq!(closed.said(), (404, "no_such_machine"));
    assert_eq!(get(&lab, "nobody", "/", "").await.said(), closed.said());
    let open = get(&lab, "web", "/", &entry).await;
    assert!(
        open.text.ends_with(&format!("page of {web}\n")),
        "{}",
        open.text
    );
    let key = std::fs::read_to_string(lab.data_dir().join("admin.key")).unwrap();
    let bearer = format!("Authorization: Bearer {}\r\n", key.trim());
    assert_eq!(get(&lab, "web", "/", &bearer).await.status, 200);
    let wrong = bearer.replace(key.trim(), &key.trim().replace('.', ".0"));
    assert_eq!(get(&lab, "web", "/", &wrong).await.status, 404);
    let other = get(&lab, &format!("{more}-web"), "/", &entry).await;
    assert!(
        other.text.ends_with(&format!("page of {more}\n")),
        "{}",
        other.text
    );
    let hidden = get(&lab, &format!("{hidden}-web"), "/", &entry).await;
    assert_eq!(hidden.said(), (403, "port_not_exposed"));

    // A browser's way: the link sends it on without the token, which stays in a cookie.
    let shown = lab.hutch(&["open", "web", "--print"]).await.good();
    let (before, target) = shown.trim().split_once(&format!(":{gateway}")).unwrap();
    assert_eq!(before, "http://web.vms.localhost");
    let sent_on = get(&lab, "web", target, "").await;
    assert_eq!(sent_on.status, 303, "{}", sent_on.text);
    assert_eq!(sent_on.header("location"), Some(format!("{url}/").as_str()));
    let cookie = sent_on.header("set-cookie").unwrap();
    let cookie = format!("Cookie: {}\r\n", cookie.split(';').next().unwrap());
    assert_eq!(get(&lab, "web", "/", &cookie).await.status, 200);

    // What was given out can be made worthless, and everybody let in.
    client.revoke_tokens("web").await.unwrap();
    assert_eq!(get(&lab, "web", "/", &entry).await.status, 404);
    let change = ChangeMachine {
        access: Some(Access::Public),
        http_port: Some(more),
        expose: Some(Expose::ALL),
        ..ChangeMachine::default()
    };
    let changed = client.change("web", &change).await.unwrap();
    assert_eq!(changed.access, Some(Access::Public));
    let public = get(&lab, "web", "/", "").await;
    assert!(
        public.text.ends_with(&format!("page of {more}\n")),
        "{}",
        public.text
    );
    assert_eq!(get(&lab, &format!("{web}-web"), "/", "").await.status, 200);

    end(&lab, "web", &pids).await;
    pids.clear();
    client.stop("web", Some(LONG)).await.unwrap();
    let stopped = get(&lab, "web", "/", "").await;
    assert_eq!(stopped.said(), (503, "machine_stopped"));
    assert!(echo(echo_port, b"x").await.is_err());
    client.start("web", Some(LONG)).await.unwrap();
    pids.push(start(&lab, "web", &format!("busybox nc -ll -p {back} -e cat")).await);
    wait_until("it echoes again", LONG, async || echoes(echo_port).await).await;
    end(&lab, "web", &pids).await;

    client.delete("web", Some(LONG)).await.unwrap();
    assert_eq!(
        get(&lab, "web", "/", "").await.said(),
        (404, "no_such_machine")
    );
    wait_until("its port is free", LONG, async || {
        TcpListener::bind(("127.0.0.1", echo_port)).await.is_ok()
    })
    .await;
    lab.finish().await;
}

#[tokio::test]
async fn ports_urls_and_tokens_outlive_the_server() {
    let mut lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let back = lab.port(0);
    let listener = TcpListener::bind(("127.0.0.1", back)).await.unwrap();
    // What the machine's port is, for a machine of the stub.
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                drop(tokio::io::copy(&mut from, &mut to).await);
                drop(to.shutdown().await);
            });
        }
    });
    let request = CreateMachine {
        ports: vec![publish(back), publish(back)],
        expose: Expose::Ports(vec![back]),
        ..lab.request("3000-web")
    };
    let before = create(&lab, request).await;
    let url = before.url.clone().unwrap();
    assert!(url.contains("//m-3000-web."), "{url}");
    let token = token(&lab.client(), "3000-web").await;
    let entry = format!("x-hutch-token: {token}\r\n");
    let name = format!("{back}-m-3000-web");
    // The echo is no HTTP: that it came so far is all that counts.
    assert_eq!(
        get(&lab, &name, "/", &entry).await.said(),
        (502, "bad_answer")
    );
    let ports: Vec<_> = before.ports.iter().map(|port| port.host_port).collect();
    wait_until("both echo", LONG, async || {
        echoes(ports[0]).await && echoes(ports[1]).await
    })
    .await;

    lab.kill().await;
    // Meanwhile a stranger takes one of the ports.
    let stranger = TcpListener::bind(("127.0.0.1", ports[1])).await.unwrap();
    lab.restart().await;
    lab.wait("3000-web", Status::Running).await;
    let client = lab.client();
    let after = client.machine("3000-web").await.unwrap();
    assert_eq!((&after.url, &after.urls), (&before.url, &before.urls));
    let same = after.ports.iter().map(|port| port.host_port);
    assert_eq!(same.collect::<Vec<_>>(), ports);
    wait_until("the first echoes", LONG, async || echoes(ports[0]).await).await;
    assert_eq!(
        get(&lab, &name, "/", &entry).await.said(),
        (502, "bad_answer")
    );
    let state = async || client.ports("3000-web").await.unwrap()[1].clone();
    wait_until("the second one waits", LONG, async || {
        state().await.reason.is_some()
    })
    .await;
    assert_eq!(state().await.state, PortState::Waiting);
    drop(stranger);
    wait_until("the second echoes", LONG, async || echoes(ports[1]).await).await;
    assert_eq!(state().await.state, PortState::Listening);
    lab.finish().await;
}

#[tokio::test]
async fn a_connection_to_a_machine_that_starts_waits_for_it() {
    let lab = lab!(Runtime::Stub);
    // Its guest takes long to come up, until it is told to go on.
    let program = |name: &str, text: String| {
        let path = lab.dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let (go, bin) = (lab.dir.join("go"), lab.dir.join("bin"));
    let (waits, bin) = (go.display(), bin.display());
    let agent = program(
        "slow-agent",
        format!("while [ ! -e {waits} ]; do sleep 0.1; done\nexec {bin}/guest/hutch-agent \"$@\""),
    );
    let vmm = program("vmm", format!("exec {bin}/hutch-stub-vmm \"$1\" {agent}"));
    let lab = lab.env("HUTCH_RUNTIME_PROGRAMS_STUB", &vmm);
    let lab = lab.start().await;
    lab.busybox().await;
    let back = lab.port(0);
    let listener = TcpListener::bind(("127.0.0.1", back)).await.unwrap();
    let echo = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
    });
    let request = CreateMachine {
        ports: vec![publish(back)],
        access: Access::Public,
        ..lab.request("web")
    };
    let created = lab.client().create(&request, None, None).await.unwrap();
    assert_eq!(created.status, Status::Starting);
    let port = created.ports[0].host_port;
    let by_port = async {
        let mut stream = None;
        // The port may not be listened on yet.
        wait_until("it connects", LONG, async || {
            stream = TcpStream::connect(("127.0.0.1", port)).await.ok();
            stream.is_some()
        })
        .await;
        let mut stream = stream.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"hello");
    };
    let by_name = async {
        let answer = get(&lab, "web", "/", "").await;
        assert_eq!(answer.said(), (502, "nothing_listens"));
    };
    let start = async {
        // Longer than a connection to a machine that runs may take.
        tokio::time::sleep(Duration::from_secs(11)).await;
        let machine = lab.client().machine("web").await.unwrap();
        assert_eq!(machine.status, Status::Starting);
        fs::write(&go, "").unwrap();
    };
    tokio::join!(by_port, by_name, start);
    echo.await.unwrap();
    lab.finish().await;
}

#[tokio::test]
async fn a_port_is_one_machine_s_until_it_is_taken_back() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let (client, back, wanted) = (lab.client(), lab.port(0), lab.port(1));
    lab.create("one").await;
    let listener = TcpListener::bind(("127.0.0.1", back)).await.unwrap();

    let mapping = format!("{wanted}:{back}");
    let added = lab.hutch(&["port", "add", "one", &mapping]).await.good();
    assert!(
        added.starts_with(&format!("127.0.0.1:{wanted} -> {back}")),
        "{added}"
    );
    let again = lab.hutch(&["port", "add", "one", &mapping]).await;
    assert_eq!(again.code, 0, "{again}");
    let listed = lab.hutch(&["port", "one"]).await.good();
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let asked = PublishPort {
        host_port: Some(wanted),
        ..publish(back)
    };
    let second = CreateMachine {
        ports: vec![asked.clone()],
        ..lab.request("two")
    };
    let refused = client.create(&second, None, None).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Conflict, "{refused}");
    assert!(refused.hint().is_some());

    // A connection through it is cut when the port is taken back, and the port is free for another one.
    let mut through = TcpStream::connect(("127.0.0.1", wanted)).await.unwrap();
    let (_inside, _) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    lab.hutch(&["port", "rm", "one", &wanted.to_string()])
        .await
        .good();
    let cut = timeout(LONG, through.read(&mut [0])).await.unwrap();
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    assert_eq!(client.ports("one").await.unwrap(), []);
    let gone = client.unpublish("one", wanted).await.unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound);
    create(&lab, second.clone()).await;
    // Deleted and made again at once, it gets the very same port.
    client.delete("two", Some(LONG)).await.unwrap();
    let made = create(&lab, second).await;
    assert_eq!(made.ports[0].host_port, wanted);

    let foreign = PublishPort {
        host_port: Some(back),
        ..publish(1)
    };
    let refused = client.publish("one", &foreign).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Conflict, "{refused}");
    lab.finish().await;
}

#[tokio::test]
async fn a_websocket_of_a_machine_carries_bytes_both_ways() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let port = lab.port(0);
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let guest = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let yes = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Accept: HSmrc0sMlYUkAGmm5OPpG2HaGWk=\r\n\r\n";
        stream.write_all(yes.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
        String::from_utf8(head).unwrap()
    });
    let request = CreateMachine {
        http_port: Some(port),
        access: Access::Public,
        ..lab.request("chat")
    };
    create(&lab, request).await;
    let mut client = TcpStream::connect(("127.0.0.1", lab.gateway()))
        .await
        .unwrap();
    let ask = "GET /ws HTTP/1.1\r\nHost: chat.vms.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    client.write_all(ask.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(LONG, client.read_u8()).await.unwrap().unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    client.write_all(b"\x82\x05hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut back = Vec::new();
    timeout(LONG, client.read_to_end(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(back, b"\x82\x05hello");
    let head = guest.await.unwrap();
    assert!(head.starts_with("GET /ws HTTP/1.1\r\n"), "{head}");
    lab.finish().await;
}

#[tokio::test]
async fn caddy_is_told_which_names_are_machines() {
    let lab = lab!(Runtime::Stub).start().await;
    lab.busybox().await;
    let request = CreateMachine {
        expose: Expose::Ports(vec![3000]),
        ..lab.request("web")
    };
    create(&lab, request).await;
    for (name, status) in [
        ("web.vms.localhost", 200),
        ("WEB.vms.localhost", 200),
        ("3000-web.vms.localhost", 200),
        ("8080-web.vms.localhost", 200),
        ("3001-web.vms.localhost", 404),
        ("other.vms.localhost", 404),
        ("a.web.vms.localhost", 404),
        ("vms.localhost", 404),
        ("web.example.net", 404),
        ("web.vms.localhost:443", 404),
    ] {
        let path = format!("/caddy/check?domain={name}");
        assert_eq!(lab.raw("GET", &path, "").await.status, status, "{name}");
    }
    lab.finish().await;
}
