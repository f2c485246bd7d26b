//! `hutch serve`, and all else that the command line knows of the server: its children, its configuration, and a server
//! in this process for one command.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use hutch_contract::client::{Client, Target};
use hutch_server::config::CaddyMode;
use hutch_server::{Flags, Host, Loaded, Running, Server, config};
use serde_json::json;
use tracing_subscriber::EnvFilter;

use super::App;
use crate::error::Error;
use crate::signals::Signals;

/// Run the server
///
/// SIGINT or SIGTERM ends it; machines go on running, and the next server finds them again. All settings can stand in
/// a file or in the environment too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch serve
  hutch serve --listen 127.0.0.1:9000 --data-dir /srv/hutch
  hutch serve --config hutch.toml --log debug --log-format json")]
pub struct Args {
    /// Where the API listens [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Where HTTP for machines comes in, or off [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    http_listen: Option<String>,
    /// Configuration file, TOML or YAML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to log, such as debug or info,hutch_engine=debug
    #[arg(long, value_name = "FILTER", env = "HUTCH_LOG", default_value = "info")]
    log: String,
    /// How to write the log
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

pub async fn run(args: Args, app: &App, mut signals: Signals) -> Result<ExitCode, Error> {
    log_to_stderr(&args.log, args.log_format)?;
    let data_dir = app.place.data_dir.clone();
    let config = load(
        app,
        Flags {
            config: args.config,
            listen: args.listen,
            http_listen: args.http_listen,
            data_dir,
        },
    )?
    .config;
    let admin_key = config.data_dir.join("admin.key");
    let running = signals
        .or(async { Ok(Server::start(config).await?) })
        .await?;
    let url = format!("http://{}", running.addr());
    let (socket, key) = (running.socket().display(), admin_key.display());
    let told = if app.ui.json {
        let gateway = running
            .http_addr()
            .map(|address| format!("http://{address}"));
        app.ui.object(&json!({
            "url": url, "socket": running.socket(), "admin_key": admin_key, "gateway": gateway,
        }))
    } else {
        app.ui.line(format_args!(
            "hutch listens on {url} and {socket}; the admin key is in {key}"
        ))
    };
    match told {
        // It serves just as well when nobody reads that line.
        Ok(()) | Err(Error::Closed) => {}
        Err(error) => return Err(error),
    }
    tokio::select! {
        _ = signals.next() => {}
        () = running.closed() => return Err(Error::ServerEnded),
    }
    app.ui
        .say("Ending; machines go on. Interrupt again to end at once.");
    let ending = async {
        running.shutdown().await;
        Ok(ExitCode::SUCCESS)
    };
    signals.or(ending).await
}

/// The children of a server, which come before threads and argument parsing.
pub fn hidden(subcommand: Option<&OsStr>) -> Option<ExitCode> {
    match subcommand.and_then(OsStr::to_str) {
        Some("shim") => Some(hutch_server::shim_main()),
        Some("build-disk") => Some(hutch_server::build_disk_main()),
        _ => None,
    }
}

/// Reads the configuration as the server does.
pub fn load(app: &App, flags: Flags) -> Result<Loaded, Error> {
    let executable = std::env::current_exe();
    let executable = executable.map_err(|source| Error::Process {
        action: "find the executable",
        source,
    })?;
    let host = Host {
        root: rustix::process::geteuid().is_root(),
        executable,
        environment: std::env::vars_os().collect(),
    };
    let loaded = config::load(&flags, &host)?;
    for variable in &loaded.unknown_variables {
        app.ui
            .say(format_args!("warning: {variable} is no setting"));
    }
    Ok(loaded)
}

fn log_to_stderr(filter: &str, format: LogFormat) -> Result<(), Error> {
    let filter = EnvFilter::try_new(filter).map_err(|_| Error::LogFilter {
        filter: filter.to_owned(),
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// A server in this process, for one command.
pub struct Embedded(Running);

impl Embedded {
    /// Starts it on the data directory that is meant, on its socket and a free port of the loopback.
    pub async fn start(app: &App) -> Result<Embedded, Error> {
        let filter = std::env::var("HUTCH_LOG");
        log_to_stderr(filter.as_deref().unwrap_or("warn"), LogFormat::Text)?;
        let flags = Flags {
            listen: Some("127.0.0.1:0".to_owned()),
            http_listen: Some("off".to_owned()),
            data_dir: app.place.data_dir.clone(),
            config: None,
        };
        let mut config = load(app, flags)?.config;
        // Nobody is let in from outside.
        config.gateway.caddy = CaddyMode::Off;
        Ok(Embedded(Server::start(config).await?))
    }

    /// A client of it.
    pub fn client(&self) -> Result<Client, Error> {
        Ok(Client::new(Target::Unix(self.0.socket().to_owned()))?)
    }

    /// Ends it; machines that are left go on.
    pub async fn stop(self) {
        self.0.shutdown().await;
    }
}
