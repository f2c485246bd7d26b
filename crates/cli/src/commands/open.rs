//! `hutch open`.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use hutch_contract::expose::{Access, MintToken};

use super::App;
use crate::arguments::duration;
use crate::error::Error;
use crate::ui::printable;

/// Print the URL of a machine, and open it where there is a browser
///
/// The URL of a private machine has a token in it: whoever has the link may come in, until it ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch open web
  hutch open web --port 3000
  curl \"$(hutch open web --print --for 10m)\"")]
pub struct Args {
    /// Name or id of the machine
    machine: String,
    /// One of its exposed ports [default: the one behind its name]
    #[arg(long)]
    port: Option<u16>,
    /// How long the link may be used, such as 10m [default: 24h]
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    lifetime: Option<Duration>,
    /// Open no browser
    #[arg(long)]
    print: bool,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let machine = client.machine(&args.machine).await?;
    let no_gateway = || Error::NoUrl {
        machine: args.machine.clone(),
    };
    let base = machine.url.clone().ok_or_else(no_gateway)?;
    let own = machine.http_port;
    let public = machine.access == Some(Access::Public);
    let url = match (public, args.port.filter(|port| Some(*port) != own)) {
        (true, None) => base,
        (true, Some(port)) if machine.urls.contains_key(&port) => machine.urls[&port].clone(),
        _ => {
            // Also for a port of a public machine that has no URL: the server says why.
            let asked = MintToken {
                lifetime_s: args.lifetime.map(|lifetime| lifetime.as_secs().max(1)),
                port: args.port,
            };
            let token = client.token(machine.id.as_str(), &asked).await?;
            let url = token.url.ok_or_else(no_gateway)?;
            match public {
                true => url.split("/?").next().unwrap_or_default().to_owned(),
                false => url,
            }
        }
    };
    if app.ui.json {
        app.ui.object(&serde_json::json!({ "url": url }))?;
    } else {
        app.ui.line(printable(&url))?;
    }
    if let Some(root) = root(app, &url) {
        app.ui.say(format_args!(
            "Its certificate is of this server's own authority: trust {0} in browsers, or curl --cacert {0}",
            root.display()
        ));
    }
    if !args.print && !app.ui.json && io::stdout().is_terminal() {
        browse(app, &url);
    }
    Ok(ExitCode::SUCCESS)
}

/// The certificate that clients must trust, where that is one of the server on this machine.
fn root(app: &App, url: &str) -> Option<PathBuf> {
    let elsewhere = app.place.url.as_deref().is_some_and(|url| !url.is_empty());
    if elsewhere || !url.starts_with("https://") {
        return None;
    }
    let root = app.place.data_dir().ok()?.join("caddy-root.crt");
    root.is_file().then_some(root)
}

/// Opens a browser where there can be one. The link has been printed, so it may fail.
fn browse(app: &App, url: &str) {
    let display = ["DISPLAY", "WAYLAND_DISPLAY"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    if !display {
        return;
    }
    let mut command = std::process::Command::new("xdg-open");
    let command = command
        .arg(url)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if command.spawn().is_err() {
        app.ui.say("There is no xdg-open to open it with.");
    }
}
