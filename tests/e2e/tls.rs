//! HTTPS for machines by Caddy: one of the server's own, and one that runs anyhow.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hutch_contract::expose::Access;
use hutch_contract::machine::CreateMachine;
use hutch_contract::node::{Finding, Level};
use hutch_tests::{Lab, Runtime, is_root, lab, skip, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::reach::{LONG, create, end, get, start};

/// Of the ports of a lab.
const HTTPS: u16 = 10;
const HTTP: u16 = 11;

/// Why these tests cannot be here.
fn missing() -> Option<String> {
    let lacks = |program: &&str| {
        let mut version = std::process::Command::new(program);
        let version = version.arg("--version").stdin(Stdio::null());
        version
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_err()
    };
    let lacking = ["caddy", "curl", "openssl"].into_iter().find(lacks)?;
    Some(format!("{lacking} is not installed"))
}

fn with_caddy(lab: Lab, whose: &str) -> Lab {
    let (https, http) = (lab.port(HTTPS).to_string(), lab.port(HTTP).to_string());
    lab.env("HUTCH_GATEWAY_CADDY", whose)
        .env("HUTCH_GATEWAY_HTTPS_PORT", &https)
        .env("HUTCH_GATEWAY_CADDY_HTTP_PORT", &http)
}

fn root(lab: &Lab) -> PathBuf {
    lab.data_dir().join("caddy-root.crt")
}

/// What curl gets from a name over TLS, or its exit code.
async fn curl(lab: &Lab, name: &str) -> Result<String, i32> {
    let (port, host) = (lab.port(HTTPS), format!("{name}.vms.localhost"));
    let mut command = Command::new("curl");
    command.args([
        "-q",
        "-sS",
        "--noproxy",
        "*",
        "--max-time",
        "60",
        "--cacert",
    ]);
    command.arg(root(lab));
    command.args(["--resolve", &format!("{host}:{port}:127.0.0.1")]);
    command
        .arg(format!("https://{host}:{port}/"))
        .kill_on_drop(true);
    let output = command.output().await.unwrap();
    match output.status.code().unwrap() {
        0 => Ok(String::from_utf8(output.stdout).unwrap()),
        code => Err(code),
    }
}

/// The process that listens at the socket of an admin API.
async fn caddy_at(socket: &Path) -> Option<Pid> {
    let stream = UnixStream::connect(socket).await.ok()?;
    Pid::from_raw(stream.peer_cred().unwrap().pid()?)
}

/// What `hutch doctor` says.
async fn finding(lab: &Lab) -> Finding {
    let said = lab.hutch(&["doctor", "--json"]).await;
    let findings = said
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    findings
        .into_iter()
        .find(|finding: &Finding| finding.area == "https")
        .unwrap_or_else(|| panic!("{said}"))
}

/// A public machine `web` with a page.
async fn web(lab: &Lab, port: u16) -> Vec<String> {
    lab.busybox().await;
    let request = CreateMachine {
        http_port: Some(port),
        access: Access::Public,
        ..lab.request("web")
    };
    let machine = create(lab, request).await;
    let url = format!("https://web.vms.localhost:{}", lab.port(HTTPS));
    assert_eq!(machine.url, Some(url));
    let page = "mkdir -p /tmp/page && echo a page > /tmp/page/index.html";
    assert_eq!(lab.sh("web", page).await.exit.exit_code, 0);
    let httpd = format!("busybox httpd -f -p 127.0.0.1:{port} -h /tmp/page");
    let pids = vec![start(lab, "web", &httpd).await];
    wait_until("the page is there", LONG, async || {
        get(lab, "web", "/", "").await.status == 200
    })
    .await;
    pids
}

async fn is_served(lab: &Lab) -> bool {
    root(lab).exists() && curl(lab, "web").await.as_deref() == Ok("a page\n")
}

#[tokio::test]
async fn a_machine_is_reached_over_tls_with_the_stub() {
    over_tls(lab!(Runtime::Stub)).await;
}

#[tokio::test]
async fn a_machine_is_reached_over_tls_with_qemu() {
    over_tls(lab!(Runtime::Qemu)).await;
}

async fn over_tls(lab: Lab) {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    let mut lab = with_caddy(lab, "own").start().await;
    let pids = web(&lab, lab.port(0)).await;
    wait_until("it is served over TLS", LONG, async || {
        is_served(&lab).await
    })
    .await;
    let mode = fs::metadata(root(&lab)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);

    // An unknown name gets no certificate: the handshake fails (curl's 35).
    assert_eq!(curl(&lab, "nobody").await, Err(35));
    let asked = lab
        .raw("GET", "/caddy/check?domain=nobody.vms.localhost", "")
        .await;
    assert_eq!(asked.status, 404);

    let told = finding(&lab).await;
    assert_eq!(told.level, Level::Good, "{told:?}");
    assert!(
        told.found.contains(root(&lab).to_str().unwrap()),
        "{told:?}"
    );
    let open = lab.hutch(&["open", "web", "--print"]).await;
    assert!(open.stderr.contains(root(&lab).to_str().unwrap()), "{open}");
    assert_eq!(
        open.good().trim(),
        format!("https://web.vms.localhost:{}", lab.port(HTTPS))
    );

    // Caddy dies: the machine is reached all the same, and Caddy comes back with the same authority.
    let admin = lab.data_dir().join("caddy/admin.sock");
    let (first, trusted) = (
        caddy_at(&admin).await.unwrap(),
        fs::read(root(&lab)).unwrap(),
    );
    kill_process(first, Signal::KILL).unwrap();
    assert_eq!(get(&lab, "web", "/", "").await.status, 200);
    wait_until("Caddy is back", LONG, async || is_served(&lab).await).await;
    let second = caddy_at(&admin).await.unwrap();
    assert_ne!(second, first);

    // The server dies, and Caddy with it; both come back.
    lab.kill().await;
    wait_until("Caddy is gone", LONG, async || {
        caddy_at(&admin).await.is_none()
    })
    .await;
    lab.restart().await;
    wait_until("both are back", LONG, async || is_served(&lab).await).await;
    assert_eq!(fs::read(root(&lab)).unwrap(), trusted);
    end(&lab, "web", &pids).await;
    lab.finish().await;
}

#[tokio::test]
async fn a_websocket_of_a_machine_goes_through_tls() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    let lab = with_caddy(lab!(Runtime::Stub), "own").start().await;
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
        drop(tokio::io::copy(&mut from, &mut to).await);
        String::from_utf8(head).unwrap()
    });
    let request = CreateMachine {
        http_port: Some(port),
        access: Access::Public,
        ..lab.request("chat")
    };
    create(&lab, request).await;
    wait_until("Caddy is there", LONG, async || root(&lab).exists()).await;
    let mut client = Command::new("openssl")
        .args([
            "s_client",
            "-quiet",
            "-verify_return_error",
            "-alpn",
            "http/1.1",
        ])
        .args(["-verify_hostname", "chat.vms.localhost"])
        .args(["-servername", "chat.vms.localhost"])
        .args(["-connect", &format!("127.0.0.1:{}", lab.port(HTTPS))])
        .arg("-CAfile")
        .arg(root(&lab))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut to = client.stdin.take().unwrap();
    let mut from = client.stdout.take().unwrap();
    let ask = "GET /ws HTTP/1.1\r\nHost: chat.vms.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    to.write_all(ask.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(LONG, from.read_u8()).await.unwrap().unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    for frame in [b"\x82\x05hello", b"\x82\x05again"] {
        to.write_all(frame).await.unwrap();
        let mut back = [0; 7];
        timeout(LONG, from.read_exact(&mut back))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&back, frame);
    }
    drop((to, from));
    client.kill().await.unwrap();
    let head = guest.await.unwrap();
    assert!(head.starts_with("GET /ws HTTP/1.1\r\n"), "{head}");
    lab.finish().await;
}

/// Somebody's Caddy, of another user where that can be.
async fn somebodys(lab: &Lab) -> (Child, PathBuf) {
    let dir = lab.dir.join("theirs");
    fs::create_dir_all(&dir).unwrap();
    let socket = dir.join("admin.sock");
    let config = serde_json::json!({
        "admin": { "listen": format!("unix/{}", socket.display()), "config": { "persist": false } },
        "storage": { "module": "file_system", "root": dir.join("storage") },
        "apps": {
            "http": { "http_port": lab.port(HTTP), "https_port": lab.port(HTTPS) },
            "pki": { "certificate_authorities": { "local": { "install_trust": false } } },
        },
    });
    if is_root() {
        std::os::unix::fs::chown(&dir, Some(65534), Some(65534)).unwrap();
    }
    (start_theirs(lab, &config.to_string()), socket)
}

/// It, with this configuration.
fn start_theirs(lab: &Lab, config: &str) -> Child {
    let dir = lab.dir.join("theirs");
    fs::write(dir.join("theirs.json"), config).unwrap();
    let mut command = match is_root() {
        true => {
            let mut command = Command::new("setpriv");
            command.args([
                "--reuid",
                "65534",
                "--regid",
                "65534",
                "--clear-groups",
                "caddy",
            ]);
            command
        }
        false => Command::new("caddy"),
    };
    command
        .args(["run", "--config", "theirs.json"])
        .current_dir(&dir);
    command.env("HOME", &dir).env_remove("NOTIFY_SOCKET");
    command
        .env("XDG_DATA_HOME", dir.join("data"))
        .env("XDG_CONFIG_HOME", dir.join("config"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.kill_on_drop(true).spawn().unwrap()
}

#[tokio::test]
async fn a_caddy_that_runs_gets_our_part_and_may_open_the_socket() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    let lab = lab!(Runtime::Stub);
    let (mut caddy, socket) = somebodys(&lab).await;
    let address = format!("unix/{}", socket.display());
    let lab = with_caddy(lab, "running").env("HUTCH_GATEWAY_CADDY_ADMIN", &address);
    let mut lab = lab.start().await;
    let pids = web(&lab, lab.port(0)).await;
    wait_until("it is served over TLS", LONG, async || {
        is_served(&lab).await
    })
    .await;
    let gateway = fs::metadata(lab.data_dir().join("gateway.sock")).unwrap();
    assert_eq!(gateway.permissions().mode() & 0o777, 0o600);
    if is_root() {
        assert_eq!(gateway.uid(), 65534);
    }

    // The server's end leaves our part there as long as there are machines, and the next server is found by it.
    lab.stop().await;
    assert!(has_part(&socket, &lab).await);
    lab.restart().await;
    wait_until("it is served again", LONG, async || is_served(&lab).await).await;
    caddy.kill().await.unwrap();
    assert_eq!(get(&lab, "web", "/", "").await.status, 200);
    let (mut caddy, _) = somebodys(&lab).await;
    wait_until("it comes back", LONG, async || is_served(&lab).await).await;
    end(&lab, "web", &pids).await;
    lab.client().delete("web", Some(LONG)).await.unwrap();
    lab.stop().await;
    assert!(!has_part(&socket, &lab).await);
    caddy.kill().await.unwrap();
    lab.env("HUTCH_GATEWAY_CADDY", "off").finish().await;
}

/// The whole configuration of the Caddy at this socket; nothing when there is none.
async fn configuration(socket: &Path) -> Option<String> {
    let mut curl = Command::new("curl");
    // At a socket it takes no other host than none.
    curl.args(["-q", "-sSf", "-H", "Host;", "--unix-socket"])
        .arg(socket);
    let got = curl.arg("http://localhost/config/").output().await.unwrap();
    let text = String::from_utf8(got.stdout).unwrap();
    got.status.success().then_some(text)
}

async fn has_part(socket: &Path, lab: &Lab) -> bool {
    let gateway = lab.data_dir().join("gateway.sock");
    let config = configuration(socket).await;
    config.is_some_and(|config| config.contains(gateway.to_str().unwrap()))
}

#[tokio::test]
async fn a_caddy_has_no_part_of_ours_once_that_is_off() {
    if let Some(why) = missing() {
        skip!("{why}");
    }
    let lab = lab!(Runtime::Stub);
    let (mut caddy, socket) = somebodys(&lab).await;
    let up = async || configuration(&socket).await.is_some();
    wait_until("Caddy is there", LONG, up).await;
    let before = configuration(&socket).await;
    let address = format!("unix/{}", socket.display());
    let listed = [format!("part of a Caddy {address}")];
    let mut lab = with_caddy(lab, "running")
        .env("HUTCH_GATEWAY_CADDY_ADMIN", &address)
        .start()
        .await;
    wait_until("it has our part", LONG, async || {
        has_part(&socket, &lab).await
    })
    .await;
    assert_eq!(lab.inventory(), listed);
    // Without machines a server takes it along.
    lab.stop().await;
    assert_eq!(configuration(&socket).await, before);
    assert_eq!(lab.inventory(), [""; 0]);

    // One that was killed leaves it; the next one knows of it, though it is to have no Caddy.
    lab.restart().await;
    wait_until("it has our part", LONG, async || {
        has_part(&socket, &lab).await
    })
    .await;
    lab.kill().await;
    assert!(has_part(&socket, &lab).await);
    assert_eq!(lab.inventory(), listed);
    let mut lab = lab.env("HUTCH_GATEWAY_CADDY", "off");
    lab.restart().await;
    let taken_out = async |lab: &Lab| {
        let none = lab.inventory().is_empty();
        none && configuration(&socket).await == before
    };
    wait_until("it is taken out", LONG, async || taken_out(&lab).await).await;

    // Also out of one that comes back later, with what it had.
    lab.stop().await;
    let mut lab = lab.env("HUTCH_GATEWAY_CADDY", "running");
    lab.restart().await;
    wait_until("it has our part", LONG, async || {
        has_part(&socket, &lab).await
    })
    .await;
    lab.kill().await;
    let had = configuration(&socket).await.unwrap();
    caddy.kill().await.unwrap();
    let mut lab = lab.env("HUTCH_GATEWAY_CADDY", "own");
    lab.restart().await;
    wait_until("our own serves", LONG, async || root(&lab).exists()).await;
    assert_eq!(lab.inventory(), listed);
    lab.stop().await;
    assert_eq!(lab.inventory(), listed);
    let mut lab = lab.env("HUTCH_GATEWAY_CADDY", "off");
    lab.restart().await;
    let mut caddy = start_theirs(&lab, &had);
    wait_until("it is taken out", LONG, async || taken_out(&lab).await).await;
    caddy.kill().await.unwrap();
    lab.finish().await;
}
