//! What others have in Caddy stays as it is, and what they do to ours is put right.

use hutch_gateway::caddy::{Acme, Admin, Caddy, Issuer, Mode, Status, remove};
use serde_json::{Value, json};

use super::kit::{
    Running, Stage, Theirs, curl, curl_at, down, free_port, have, status, text, until, up,
};

const TAG: &str = "ab12";

/// A plain site, and one with TLS at our port.
fn sites(stage: &Stage, plain: u16) -> Value {
    let mut config = Theirs::base(stage);
    let site = |body: &str| json!([{ "handler": "static_response", "body": body }]);
    config["apps"]["http"]["servers"] = json!({
        "plain": { "listen": [format!("127.0.0.1:{plain}")], "routes": [{ "handle": site("plain <1>") }] },
        "tls": {
            "listen": [format!("127.0.0.1:{}", stage.https_port)],
            "automatic_https": { "disable_redirects": true },
            "routes": [{ "match": [{ "host": ["mine.test"] }], "handle": site("mine"), "terminal": true }],
        },
    });
    config["apps"]["http"]["grace_period"] = json!(1_000_000_000_u64);
    config["apps"]["tls"]["automation"]["policies"] =
        json!([{ "subjects": ["mine.test"], "issuers": [{ "module": "internal" }] }]);
    config
}

async fn assert_served(stage: &Stage, theirs: &Theirs, plain: u16) {
    let output = curl(&[&format!("http://127.0.0.1:{plain}/")]).await;
    assert_eq!(text(&output), "plain <1>");
    let root: Value = serde_json::from_str(&theirs.says("/pki/ca/local").await).unwrap();
    let path = stage.path("local.pem");
    std::fs::write(&path, root["root_certificate"].as_str().unwrap()).unwrap();
    // Caddy gets certificates for its sites in the background.
    until("their site with TLS", async || {
        let output = curl_at("mine.test", stage.https_port, "/", &path, &[]).await;
        output.status.success() && output.stdout == b"mine"
    })
    .await;
}

#[tokio::test]
async fn sites_of_others_are_the_same_before_meanwhile_and_after() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let plain = free_port();
    let sites = sites(&stage, plain);
    let mut theirs = Theirs::start(&stage, &sites).await;
    assert_served(&stage, &theirs, plain).await;
    let before = theirs.says("/config/").await;
    let server = theirs.says("/config/apps/http/servers/plain").await;
    let route = theirs.says("/config/apps/http/servers/tls/routes/0").await;

    let caddy = Caddy::start(stage.config(theirs.mode())).unwrap();
    let shared = Status::Up {
        https_port: stage.https_port,
        shared: true,
    };
    assert_eq!(up(&caddy).await, shared);
    let root = stage.root(&caddy).await;
    assert!(stage.works(&root).await);
    assert_served(&stage, &theirs, plain).await;
    assert_eq!(theirs.says("/config/apps/http/servers/plain").await, server);
    assert_eq!(
        theirs.says("/config/apps/http/servers/tls/routes/1").await,
        route
    );

    // They load theirs anew, and ours is gone.
    theirs.load(&sites).await;
    until("healed after a reload", async || stage.works(&root).await).await;
    assert_served(&stage, &theirs, plain).await;

    theirs.kill();
    let (reason, hint) = down(&caddy).await;
    assert!(reason.contains("cannot connect"), "{reason}");
    assert!(hint.contains("start Caddy"), "{hint}");
    let direct = stage.lab.get("web.vms.test", "/direct", "").await;
    assert_eq!(direct.text(), "/direct", "machines do not wait for it");
    theirs.again().await;
    up(&caddy).await;
    assert!(stage.works(&root).await);

    caddy.close().await;
    assert!(stage.works(&root).await, "it goes on without us");
    assert!(remove(&theirs.admin(), TAG).await.unwrap());
    assert_eq!(theirs.says("/config/").await, before);
    assert!(!stage.works(&root).await);
    assert_served(&stage, &theirs, plain).await;
    assert!(
        !remove(&theirs.admin(), TAG).await.unwrap(),
        "nothing is left"
    );
}

#[tokio::test]
async fn whom_others_ask_stands_in_our_way_until_it_is_gone() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    let base = Theirs::base(&stage);
    let mut asking = base.clone();
    asking["apps"]["tls"]["automation"]["on_demand"] =
        json!({ "ask": "http://127.0.0.1:9/theirs" });
    let theirs = Theirs::start(&stage, &asking).await;
    let before = theirs.says("/config/").await;
    let caddy = Caddy::start(stage.config(theirs.mode())).unwrap();
    let foreign = status(&caddy, |status| matches!(status, Status::Foreign(_))).await;
    let Status::Foreign(foreign) = foreign else {
        unreachable!()
    };
    assert!(
        foreign.what.contains("http://127.0.0.1:9/theirs"),
        "{foreign:?}"
    );
    assert!(foreign.hint.contains(&stage.ask.url), "{foreign:?}");
    assert_eq!(theirs.says("/config/").await, before);
    theirs.load(&base).await;
    up(&caddy).await;
    let root = stage.root(&caddy).await;
    assert!(stage.works(&root).await);
}

#[tokio::test]
async fn what_caddy_refuses_is_told_and_tried_again() {
    if !have(&["caddy", "curl"]) {
        return;
    }
    let stage = Stage::new("vms.test").await;
    // Without a configuration, at an address.
    let admin = format!("127.0.0.1:{}", free_port());
    let first = stage.path("first.json");
    let listen = json!({ "admin": { "listen": admin, "config": { "persist": false } } });
    std::fs::write(&first, listen.to_string()).unwrap();
    let _caddy: Running = Theirs::spawn(stage.dir.path(), Some(&first));
    let taken = std::net::TcpListener::bind(("127.0.0.1", stage.https_port)).unwrap();
    let mode = Mode::Existing(admin.parse::<Admin>().unwrap());
    let caddy = Caddy::start(stage.config(mode.clone())).unwrap();
    let in_use = |status: &Status| match status {
        Status::Down { reason, hint } => {
            reason.contains("address already in use") && hint.contains("port")
        }
        _ => false,
    };
    status(&caddy, in_use).await;
    drop(taken);
    up(&caddy).await;
    let root = stage.root(&caddy).await;
    assert!(stage.works(&root).await);
    caddy.close().await;

    // Debian's Caddy has no modules for DNS providers.
    let mut config = stage.config(mode);
    config.issuer = Issuer::WildcardDns {
        acme: Acme::default(),
        provider: json!({ "name": "nobody_has_this" }),
    };
    let caddy = Caddy::start(config).unwrap();
    let (reason, hint) = down(&caddy).await;
    assert!(reason.contains("dns.providers.nobody_has_this"), "{reason}");
    assert!(hint.contains("xcaddy"), "{hint}");
    assert!(stage.works(&root).await, "what was there goes on");
    caddy.close().await;
    let admin: Admin = admin.parse().unwrap();
    assert!(remove(&admin, TAG).await.unwrap());
    let url = format!("http://{admin}/config/");
    let left: Value = serde_json::from_str(&text(&curl(&[&url]).await)).unwrap();
    assert_eq!(left, listen);
}
