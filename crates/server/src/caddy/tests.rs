//! What Caddy is told, and what is told of it.

use std::ffi::OsString;
use std::net::SocketAddr;

use hutch_gateway::caddy::Foreign;

use super::*;
use crate::config::{self, Flags, Host};

fn config(variables: &[(&str, &str)]) -> Config {
    let home = [("HOME", "/nowhere"), ("PATH", "/no/such:/bin")];
    let host = Host {
        root: false,
        executable: "/opt/hutch/bin/hutch".into(),
        environment: variables
            .iter()
            .chain(&home)
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
    };
    config::load(&Flags::default(), &host).unwrap().config
}

fn told_to_caddy(variables: &[(&str, &str)]) -> CaddyConfig {
    let api: SocketAddr = "0.0.0.0:8080".parse().unwrap();
    wanted(&config(variables), api, "ab12").unwrap()
}

const OWN: (&str, &str) = ("HUTCH_GATEWAY_CADDY", "own");
const DOMAIN: (&str, &str) = ("BASE_DOMAIN", "vms.example.net");

#[test]
fn without_a_word_there_is_no_caddy() {
    let api = "127.0.0.1:8080".parse().unwrap();
    assert!(wanted(&config(&[]), api, "ab12").is_none());
    assert!(wanted(&config(&[DOMAIN]), api, "ab12").is_none());
}

#[test]
fn a_domain_of_this_host_stays_on_it_and_has_its_own_authority() {
    let told = told_to_caddy(&[OWN, ("HUTCH_GATEWAY_HTTPS_PORT", "8443")]);
    assert!(matches!(told.issuer, Issuer::Internal) && !told.redirect);
    assert_eq!(
        told.bind,
        ["127.0.0.1".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(
        (told.domain.as_str(), told.https_port),
        ("vms.localhost", 8443)
    );
    assert_eq!(told.ask_url, "http://127.0.0.1:8080/caddy/check");
    assert_eq!(
        told.upstream,
        Path::new("/nowhere/.local/share/hutch/gateway.sock")
    );
    let Mode::Own(own) = told.mode else {
        panic!("{:?}", told.mode)
    };
    assert_eq!(own.dir, Path::new("/nowhere/.local/share/hutch/caddy"));
    let path = (OsString::from("PATH"), OsString::from("/no/such:/bin"));
    assert_eq!(own.environment, [path]);
}

#[test]
fn a_public_domain_has_certificates_of_a_public_authority() {
    let told = told_to_caddy(&[
        DOMAIN,
        ("HUTCH_GATEWAY_CADDY", "running"),
        ("HUTCH_GATEWAY_CADDY_ADMIN", "unix//run/caddy.sock"),
        ("HUTCH_GATEWAY_ACME_EMAIL", "a@example.net"),
        ("HUTCH_GATEWAY_ACME_ROOTS", "/a.pem, /b.pem"),
    ]);
    assert!(told.redirect && told.bind.is_empty());
    let Issuer::Acme(acme) = told.issuer else {
        panic!("{:?}", told.issuer)
    };
    assert_eq!(acme.email.as_deref(), Some("a@example.net"));
    assert_eq!(
        acme.trusted_roots,
        [Path::new("/a.pem"), Path::new("/b.pem")]
    );
    let Mode::Existing(admin) = told.mode else {
        panic!("{:?}", told.mode)
    };
    assert_eq!(admin, Admin::Unix("/run/caddy.sock".into()));
}

#[test]
fn a_directory_that_is_named_counts_for_local_domains_too() {
    let named = ("HUTCH_GATEWAY_ACME_DIRECTORY", "https://ca.internal/dir");
    let told = told_to_caddy(&[OWN, ("BASE_DOMAIN", "vms.internal"), named]);
    assert!(matches!(told.issuer, Issuer::Acme(_)), "{:?}", told.issuer);
}

#[test]
fn a_dns_provider_gives_one_certificate_and_its_credentials_are_shown_nowhere() {
    let text = r#"{"name": "cloudflare", "api_token": "{env.CF}", "zone": "tell-nobody"}"#;
    let variables = [
        OWN,
        DOMAIN,
        ("HUTCH_GATEWAY_CADDY_DNS_PROVIDER", text),
        ("CF", "nor-this"),
    ];
    let told = told_to_caddy(&variables);
    let shown = format!("{told:?} {:?}", config(&variables));
    assert!(
        !shown.contains("tell-nobody") && !shown.contains("nor-this"),
        "{shown}"
    );
    let Issuer::WildcardDns { provider, .. } = told.issuer else {
        panic!("{:?}", told.issuer)
    };
    assert_eq!(provider["name"], "cloudflare");
    let Mode::Own(own) = told.mode else {
        panic!("{:?}", told.mode)
    };
    assert!(own.environment.contains(&("CF".into(), "nor-this".into())));
}

#[test]
fn each_state_is_told_with_what_to_do() {
    let config = config(&[OWN]);
    let of = |status| told(&config, &status);
    let up = of(Status::Up {
        https_port: 443,
        shared: false,
    });
    assert_eq!((up.level, up.hint), (Level::Good, None));
    assert!(up.found.contains("NAME.vms.localhost:443") && up.found.contains("caddy-root.crt"));
    for status in [
        Status::Starting,
        Status::Absent,
        Status::Down {
            reason: "it ended".to_owned(),
            hint: "look".to_owned(),
        },
        Status::Foreign(Foreign {
            what: "a site".to_owned(),
            hint: "look".to_owned(),
        }),
    ] {
        let finding = of(status);
        assert_eq!(finding.level, Level::Limited);
        assert!(finding.hint.is_some(), "{finding:?}");
    }
}

#[tokio::test]
async fn what_there_is_is_seen_without_a_server() {
    let off = finding(&config(&[])).await;
    assert_eq!((off.area.as_str(), off.level), ("https", Level::Good));
    let absent = finding(&config(&[OWN, ("HUTCH_GATEWAY_CADDY_PROGRAM", "no-caddy")])).await;
    assert_eq!(absent.level, Level::Limited);
    assert!(absent.found.contains("no-caddy"), "{}", absent.found);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("admin.sock");
    let address = format!("unix/{}", socket.display());
    let variables = [
        ("HUTCH_GATEWAY_CADDY", "running"),
        ("HUTCH_GATEWAY_CADDY_ADMIN", address.as_str()),
    ];
    let down = finding(&config(&variables)).await;
    assert_eq!(down.level, Level::Limited, "{down:?}");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(finding(&config(&variables)).await.level, Level::Good);
    let auto = [("HUTCH_GATEWAY_CADDY", "auto"), variables[1]];
    assert_eq!(chosen(&config(&auto)).await, CaddyMode::Running);
    drop(listener);
    let auto = |program| [auto[0], auto[1], ("HUTCH_GATEWAY_CADDY_PROGRAM", program)];
    // Any program, as it is not started.
    assert_eq!(chosen(&config(&auto("sh"))).await, CaddyMode::Own);
    assert_eq!(chosen(&config(&auto("no-caddy"))).await, CaddyMode::Off);
}
