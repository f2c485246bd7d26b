//! Caddy before the gateway: what is configured becomes what [`hutch_gateway::caddy`] keeps, and what that says becomes
//! files in the data directory, for `hutch doctor` and for clients.

mod parts;
mod user;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hutch_contract::node::{Finding, Level};
use hutch_gateway::caddy::{Acme, Admin, Caddy, CaddyConfig, Issuer, Mode, OwnCaddy, Status};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::{CaddyMode, paths, provider};
use crate::{Config, gateway};

/// Between two looks at a Caddy.
const CHECK_EVERY: Duration = Duration::from_secs(15);
/// How long a Caddy may take to take a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Before a root certificate is asked for once more.
const AGAIN: Duration = Duration::from_secs(1);

/// What `auto` comes to at this moment; the others stay as they are.
pub(crate) async fn chosen(config: &Config) -> CaddyMode {
    let gateway = &config.gateway;
    if gateway.caddy != CaddyMode::Auto {
        return gateway.caddy;
    }
    if user::connect(&admin(config), CONNECT).await.is_ok() {
        CaddyMode::Running
    } else if program(config).is_some() {
        CaddyMode::Own
    } else {
        info!("there is no Caddy: machines are reached without TLS");
        CaddyMode::Off
    }
}

/// Keeps HTTPS for machines until `closing`. `api` is where the API listens.
pub(crate) async fn keep(config: &Config, api: SocketAddr, closing: CancellationToken) {
    // What an earlier server left.
    remove(&config.caddy_note());
    if config.gateway.caddy == CaddyMode::Off || !config.gateway.is_own_authority() {
        remove(&config.caddy_root());
    }
    let tag = tag(config);
    let wanted = wanted(config, api, &tag);
    let existing = wanted.as_ref().and_then(|wanted| match &wanted.mode {
        Mode::Existing(admin) => Some(admin.clone()),
        Mode::Own(_) => None,
    });
    let noted = existing
        .as_ref()
        .map_or(Ok(()), |admin| parts::note(config, admin));
    let ours = async {
        match (wanted, noted) {
            (Some(wanted), Ok(())) => keep_ours(config, wanted, &closing).await,
            // What is not known to be there would never be taken out.
            (Some(_), Err(error)) => {
                warn!(error = %error.chain(), "Caddy gets no part of ours: machines are reached without TLS");
            }
            (None, _) => {}
        }
    };
    let others = parts::take_out_others(config, &tag, existing.as_ref(), &closing);
    tokio::join!(ours, others);
}

/// Ends what [`keep`] did: without machines nothing of ours stays in a Caddy of others. With machines it stays, and their
/// clients find them again as soon as the next server is there.
pub(crate) async fn end(config: &Config, has_machines: bool) {
    if !has_machines {
        parts::take_out_all(config, &tag(config)).await;
    }
}

fn tag(config: &Config) -> String {
    let tag = fs::read_to_string(config.data_dir.join("tag"));
    tag.unwrap_or_default().trim().to_owned()
}

async fn keep_ours(config: &Config, wanted: CaddyConfig, closing: &CancellationToken) {
    if matches!(wanted.mode, Mode::Existing(_)) {
        share(config).await;
    }
    let mode = wanted.mode.clone();
    let caddy = match Caddy::start(wanted) {
        Ok(caddy) => caddy,
        Err(error) => {
            warn!(%error, "machines are reached without TLS");
            return;
        }
    };
    let mut status = caddy.status();
    loop {
        let now = status.borrow_and_update().clone();
        note(config, &now);
        let mut has_root = true;
        match &now {
            Status::Up { .. } => {
                if let Mode::Existing(_) = mode {
                    share(config).await;
                }
                if config.gateway.is_own_authority() {
                    has_root = write_root(config, &caddy).await;
                }
            }
            Status::Absent => warn!(
                program = %config.gateway.caddy_program.display(),
                "is not there: machines are reached without TLS"
            ),
            _ => {}
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() {
                break;
            },
            () = sleep(AGAIN), if !has_root => {}
            () = closing.cancelled() => break,
        }
    }
    caddy.close().await;
    remove(&config.caddy_note());
}

/// What the library is told; nothing when there is to be no Caddy.
fn wanted(config: &Config, api: SocketAddr, tag: &str) -> Option<CaddyConfig> {
    let gateway = &config.gateway;
    let mode = match gateway.caddy {
        CaddyMode::Off | CaddyMode::Auto => return None,
        CaddyMode::Running => Mode::Existing(admin(config)),
        CaddyMode::Own => {
            let environment = gateway.caddy_environment.iter();
            Mode::Own(OwnCaddy {
                program: gateway.caddy_program.clone(),
                dir: config.caddy_dir(),
                environment: environment
                    .map(|(name, value)| (name.into(), value.expose().into()))
                    .collect(),
                http_port: gateway.caddy_http_port,
            })
        }
    };
    let acme = Acme {
        email: gateway.acme_email.clone(),
        directory: gateway.acme_directory.clone(),
        trusted_roots: gateway.acme_roots.as_deref().map(paths).unwrap_or_default(),
    };
    let given = gateway.caddy_dns_provider.as_ref();
    let issuer = match given.and_then(|text| provider(text.expose())) {
        _ if gateway.is_own_authority() => Issuer::Internal,
        Some(provider) => Issuer::WildcardDns { acme, provider },
        None => Issuer::Acme(acme),
    };
    Some(CaddyConfig {
        mode,
        tag: tag.to_owned(),
        domain: gateway.domain.to_string(),
        https_port: gateway.https_port,
        bind: gateway.https_addresses(),
        // An authority of our own needs no second port, which may be taken or for root alone.
        redirect: !matches!(issuer, Issuer::Internal),
        ask_url: format!("http://{}/caddy/check", on_this_host(api)),
        upstream: config.gateway_socket(),
        issuer,
        check_every: CHECK_EVERY,
    })
}

/// Where a process of this host reaches what listens there.
fn on_this_host(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.is_ipv4() {
            true => Ipv4Addr::LOCALHOST.into(),
            false => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn admin(config: &Config) -> Admin {
    let address = config.gateway.caddy_admin.parse();
    address.expect("the configuration was checked")
}

/// Lets the user of the Caddy that runs, and nobody else, open the gateway's socket.
async fn share(config: &Config) {
    let (admin, socket) = (admin(config), config.gateway_socket());
    let shared = match user::of(&admin, CONNECT).await {
        Ok(uid) => user::let_in(uid, &socket),
        // It is told as the status.
        Err(error) if error.kind() != io::ErrorKind::NotFound => return,
        Err(error) => Err(error),
    };
    if let Err(error) = shared {
        warn!(
            socket = %socket.display(), %error,
            "Caddy may not be able to open it: let it run as the server's user, or the server as root"
        );
    }
}

/// Writes the root certificate, and says whether it did.
async fn write_root(config: &Config, caddy: &Caddy) -> bool {
    let path = config.caddy_root();
    let pem = match caddy.root_certificate().await {
        Ok(pem) => pem,
        Err(error) => {
            debug!(%error, "no root certificate yet");
            return false;
        }
    };
    match write(&path, pem.as_bytes(), 0o644) {
        Ok(()) => info!(root = %path.display(), "clients must trust this certificate"),
        Err(error) => warn!(path = %path.display(), %error, "the root certificate was not written"),
    }
    true
}

/// Leaves a finding for `hutch doctor`.
fn note(config: &Config, status: &Status) {
    let path = config.caddy_note();
    let text = serde_json::to_vec(&told(config, status)).expect("a finding is plain data");
    if let Err(error) = write(&path, &text, 0o600) {
        warn!(path = %path.display(), %error, "cannot be written");
    }
}

/// Writes a file that is there as a whole or not at all. After a crash of the host it is written anew anyhow.
fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, path)
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path = %path.display(), %error, "cannot be removed");
        }
        _ => {}
    }
}

/// The program of a Caddy of ours.
fn program(config: &Config) -> Option<PathBuf> {
    let gateway = &config.gateway;
    let is_there = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if gateway.caddy_program.components().count() > 1 {
        return Some(gateway.caddy_program.clone()).filter(is_there);
    }
    let path = gateway.caddy_environment.get("PATH")?;
    let dirs = std::env::split_paths(path.expose());
    dirs.map(|dir| dir.join(&gateway.caddy_program))
        .find(is_there)
}

/// How it stands with HTTPS: in the words of the server that runs, else what there is for one.
pub(crate) async fn finding(config: &Config) -> Finding {
    if gateway::runs(config) {
        let noted = fs::read(config.caddy_note()).ok();
        if let Some(finding) = noted.and_then(|noted| serde_json::from_slice(&noted).ok()) {
            return finding;
        }
    }
    let mode = config.gateway.caddy;
    let running = match mode {
        CaddyMode::Auto | CaddyMode::Running => {
            Some(user::connect(&admin(config), CONNECT).await.map(drop))
        }
        CaddyMode::Off | CaddyMode::Own => None,
    };
    let found = match (mode, running) {
        (CaddyMode::Off, _) => {
            Ok("off: machines are reached without TLS, or by a proxy of yours".to_owned())
        }
        (_, Some(Ok(()))) => Ok(format!("the one at {} answers", admin(config))),
        (CaddyMode::Running, Some(Err(error))) => Err((
            format!("{}: {error}", admin(config)),
            "start Caddy, or correct gateway.caddy_admin".to_owned(),
        )),
        _ => own_finding(config),
    };
    match found {
        Ok(found) => of(Level::Good, found, None),
        Err((found, hint)) => of(Level::Limited, found, Some(hint)),
    }
}

/// Whether a Caddy of ours could serve; else what is wrong, and a hint.
fn own_finding(config: &Config) -> Result<String, (String, String)> {
    let gateway = &config.gateway;
    let Some(program) = program(config) else {
        return Err(absent(config));
    };
    let first = gateway.https_addresses().first().copied();
    let address = SocketAddr::new(
        first.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
        gateway.https_port,
    );
    match TcpListener::bind(address) {
        Err(error) if !gateway::runs(config) => Err((
            format!("{address}: {error}"),
            "choose another port with gateway.https_port".to_owned(),
        )),
        _ => Ok(format!("the server would start {}", program.display())),
    }
}

fn absent(config: &Config) -> (String, String) {
    let program = config.gateway.caddy_program.display();
    (
        format!("there is no {program}; machines are reached without TLS"),
        "install Caddy (https://caddyserver.com/docs/install), or name it in gateway.caddy_program"
            .to_owned(),
    )
}

fn told(config: &Config, status: &Status) -> Finding {
    let without = "; machines are reached without TLS";
    let limited = |found: String, hint: &str| of(Level::Limited, found, Some(hint.to_owned()));
    match status {
        Status::Starting => limited("starting".to_owned(), "look again in a moment"),
        Status::Absent => {
            let (found, hint) = absent(config);
            limited(found, &hint)
        }
        Status::Down { reason, hint } => limited(format!("{reason}{without}"), hint),
        Status::Foreign(foreign) => limited(
            format!("not changed: {}{without}", foreign.what),
            &foreign.hint,
        ),
        Status::Up { https_port, shared } => {
            let whose = match config.gateway.caddy {
                CaddyMode::Own => "a Caddy of ours".to_owned(),
                _ => format!("the Caddy at {}", admin(config)),
            };
            let mut found = format!(
                "https://NAME.{}:{https_port} by {whose}",
                config.gateway.domain
            );
            if *shared {
                found += ", in a server of others there";
            }
            if config.gateway.is_own_authority() {
                found += &format!("; clients must trust {}", config.caddy_root().display());
            }
            of(Level::Good, found, None)
        }
    }
}

fn of(level: Level, found: String, hint: Option<String>) -> Finding {
    Finding {
        area: "https".to_owned(),
        level,
        found,
        hint,
    }
}

#[cfg(test)]
mod tests;
