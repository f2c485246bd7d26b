//! Certificates from a real ACME server: pebble, which checks that it reaches the name before it gives one.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use hutch_gateway::caddy::{Acme, Caddy, Issuer};
use serde_json::json;

use super::kit::{Running, Stage, Theirs, curl, free_port, have, text, until, up};

fn spawn(dir: &Path, program: &str, args: &[&str]) -> Running {
    let log = File::create(dir.join(format!("{program}.log"))).unwrap();
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(dir)
        .env("PEBBLE_VA_NOSLEEP", "1")
        .env("PEBBLE_WFE_NONCEREJECT", "0")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    Running(command.spawn().unwrap())
}

#[tokio::test]
async fn an_authority_gives_certificates_for_names_when_they_are_first_asked_for() {
    if !have(&["caddy", "curl", "openssl", "pebble", "pebble-challtestsrv"]) {
        return;
    }
    let stage = Stage::new("vms.example.net").await;
    let dir = stage.dir.path();
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
        ])
        .args(["-keyout", "pebble.key", "-out", "pebble.pem"])
        .current_dir(dir)
        .stderr(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let (acme, management, dns, control) = (free_port(), free_port(), free_port(), free_port());
    let config = json!({ "pebble": {
        "listenAddress": format!("127.0.0.1:{acme}"),
        "managementListenAddress": format!("127.0.0.1:{management}"),
        "certificate": "pebble.pem",
        "privateKey": "pebble.key",
        "httpPort": stage.http_port,
        "tlsPort": stage.https_port,
        "ocspResponderURL": "",
    } });
    std::fs::write(dir.join("pebble.json"), config.to_string()).unwrap();
    let (dns, control) = (format!("127.0.0.1:{dns}"), format!("127.0.0.1:{control}"));
    let _names = spawn(
        dir,
        "pebble-challtestsrv",
        &[
            "-defaultIPv4",
            "127.0.0.1",
            "-defaultIPv6",
            "",
            "-dns01",
            &dns,
            "-management",
            &control,
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
        ],
    );
    let _pebble = spawn(
        dir,
        "pebble",
        &["-config", "pebble.json", "-dnsserver", &dns],
    );
    let pebble_pem = stage.path("pebble.pem");
    let root = stage.path("root.pem");
    let url = format!("https://localhost:{management}/roots/0");
    until("pebble answers", async || {
        let args = [
            "--cacert",
            pebble_pem.to_str().unwrap(),
            "-o",
            root.to_str().unwrap(),
            &url,
        ];
        curl(&args).await.status.success()
    })
    .await;

    let theirs = Theirs::start(&stage, &Theirs::base(&stage)).await;
    let mut config = stage.config(theirs.mode());
    config.issuer = Issuer::Acme(Acme {
        email: Some("ops@example.net".into()),
        directory: Some(format!("https://localhost:{acme}/dir")),
        trusted_roots: vec![pebble_pem],
    });
    let caddy = Caddy::start(config).unwrap();
    up(&caddy).await;
    let output = stage
        .curl("web", "/by-acme", &root, &["-w", " HTTP/%{http_version}"])
        .await;
    assert_eq!(text(&output), "/by-acme HTTP/2");
    assert!(!stage.curl("nobody", "/", &root, &[]).await.status.success());
    let asked = stage.ask.asked.lock().unwrap().clone();
    assert_eq!(asked, ["web.vms.example.net", "nobody.vms.example.net"]);
    caddy.close().await;
}
