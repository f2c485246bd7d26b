//! The layers of a configuration, merged: default, file, environment, flags; and below all of them what depends on
//! the host.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml, Yaml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::environment::Environment;
use super::table::{KEYS, Key, Shape};
use super::{CaddyMode, Config, DEFAULT_TOML, Flags, Host, Secret};
use crate::Error;

/// A unix socket's path has 108 bytes, one of which ends it (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// By what programs that work for an account find their files; VirtualBox' are those.
const ACCOUNT: [&str; 5] = [
    "HOME",
    "USER",
    "LOGNAME",
    "XDG_CONFIG_HOME",
    "VBOX_IPC_SOCKETID",
];
/// By what a Caddy of ours finds programs, and the way to certificate authorities.
const CADDY: [&str; 9] = [
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// A configuration, and where each value came from.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Variables that look like ours and name nothing: probably misspelt.
    pub unknown_variables: Vec<String>,
    figment: Figment,
}

/// A value and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key, with dots.
    pub key: String,
    /// The value; secrets are not shown.
    pub value: String,
    /// `default`, `file /etc/hutch/config.toml`, `environment variable API_PORT`, `flag --listen`.
    pub origin: String,
}

impl Loaded {
    /// Every value that is set, ordered by key.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let tree = Value::serialize(&self.config).expect("a configuration is plain data");
        collect("", &tree, &mut |key, value| {
            entries.push(Entry {
                key: key.to_owned(),
                value,
                origin: origin(&self.figment, key),
            });
        });
        entries
    }
}

/// Calls `see` with each leaf of a tree.
fn collect(path: &str, value: &Value, see: &mut impl FnMut(&str, String)) {
    let text = match value {
        Value::Dict(_, dict) => {
            for (key, value) in dict {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                collect(&path, value, see);
            }
            return;
        }
        Value::Empty(..) => return,
        Value::String(_, text) => text.clone(),
        Value::Bool(_, flag) => flag.to_string(),
        other => whole(other).map_or_else(|| format!("{other:?}"), |number| number.to_string()),
    };
    see(path, text);
}

/// One source of values.
pub(super) struct Layer {
    origin: String,
    values: Dict,
}

impl Layer {
    /// A layer with one value.
    pub(super) fn one(origin: impl Into<String>, key: &str, value: impl Into<Value>) -> Layer {
        let nested = figment::util::nest(key, value.into());
        Layer {
            origin: origin.into(),
            values: nested.into_dict().unwrap_or_default(),
        }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// Where the value of a key came from.
fn origin(figment: &Figment, key: &str) -> String {
    figment
        .find_metadata(key)
        .map_or_else(|| "default".to_owned(), describe)
}

fn describe(metadata: &Metadata) -> String {
    match &metadata.source {
        Some(figment::Source::File(path)) => format!("file {}", path.display()),
        _ => metadata.name.to_string(),
    }
}

/// Reads and checks a configuration.
///
/// # Errors
/// [`Error::Setting`] names the key, where its value came from, and what is allowed.
pub fn load(flags: &Flags, host: &Host) -> Result<Loaded, Error> {
    let environment = Environment::of(host)?;
    let default = Toml::string(DEFAULT_TOML)
        .data()
        .expect("default.toml is TOML, a test says so");
    let values = default.into_values().next().unwrap_or_default();
    let figment = Figment::from(Layer {
        origin: "default".to_owned(),
        values,
    });
    let figment = with_file(figment, flags, host, &environment)?;
    let mut figment = environment.merge(figment)?;
    if let Some(listen) = &flags.listen {
        figment = figment.merge(Layer::one("flag --listen", "listen", listen.clone()));
    }
    if let Some(listen) = &flags.http_listen {
        let flag = "flag --http-listen";
        figment = figment.merge(Layer::one(flag, "gateway.http_listen", listen.clone()));
    }
    if let Some(dir) = &flags.data_dir {
        let dir = path_text("data_dir", dir)?;
        figment = figment.merge(Layer::one("flag --data-dir", "data_dir", dir));
    }
    let figment = with_host_defaults(figment, host, &environment)?;
    for key in &KEYS {
        check(&figment, key)?;
    }
    let mut config: Config = figment.extract().map_err(refused)?;
    config.launcher = host.executable.clone();
    config.gateway.chosen = origin(&figment, "gateway.http_listen") != "default";
    if config.gateway.port_min > config.gateway.port_max {
        return Err(Error::Setting {
            key: "gateway.port_min".to_owned(),
            origin: origin(&figment, "gateway.port_min"),
            problem: format!("is above gateway.port_max, {}", config.gateway.port_max),
            allowed: None,
        });
    }
    let account = ACCOUNT.iter().filter_map(|name| {
        let value = environment.text(name)?;
        Some(((*name).to_owned(), value.to_owned()))
    });
    config.account = account.collect();
    config.gateway.caddy_environment = caddy_environment(&config, &environment);
    for dir in [&mut config.data_dir, &mut config.cache_dir] {
        *dir = std::path::absolute(&*dir).map_err(|source| Error::Config {
            path: dir.clone(),
            source,
        })?;
    }
    let mut sockets = vec![config.gateway_socket()];
    if config.gateway.caddy != CaddyMode::Off {
        sockets.push(config.caddy_dir().join("admin.sock"));
    }
    if sockets
        .iter()
        .any(|socket| socket.as_os_str().len() > MAX_SOCKET_PATH)
    {
        return Err(Error::Setting {
            key: "data_dir".to_owned(),
            origin: origin(&figment, "data_dir"),
            problem: format!("makes the path of the socket longer than {MAX_SOCKET_PATH} bytes"),
            allowed: Some("a shorter path".to_owned()),
        });
    }
    Ok(Loaded {
        config,
        unknown_variables: environment.unknown(),
        figment,
    })
}

/// Also the variables that the DNS provider's credentials are in: `{env.NAME}`, as Caddy has it.
fn caddy_environment(config: &Config, environment: &Environment) -> BTreeMap<String, Secret> {
    let provider = config.gateway.caddy_dns_provider.as_ref();
    let provider = provider.map_or("", Secret::expose);
    let named = provider.split("{env.").skip(1);
    let named = named.filter_map(|rest| Some(rest.split_once('}')?.0));
    let all = CADDY.into_iter().chain(named);
    all.filter_map(|name| {
        let value = environment.text(name)?;
        Some((name.to_owned(), Secret(value.to_owned())))
    })
    .collect()
}

/// Merges the configuration file: the one named by flag or environment, else the usual one if it is there.
fn with_file(
    figment: Figment,
    flags: &Flags,
    host: &Host,
    environment: &Environment,
) -> Result<Figment, Error> {
    let usual = if host.root {
        Some(PathBuf::from("/etc/hutch/config.toml"))
    } else {
        environment
            .directory("XDG_CONFIG_HOME", ".config")
            .map(|dir| dir.join("hutch/config.toml"))
    };
    let named = environment.text("HUTCH_CONFIG").map(PathBuf::from);
    let named = flags.config.clone().or(named);
    let Some(path) = named.or_else(|| usual.filter(|path| path.exists())) else {
        return Ok(figment);
    };
    // Only for the system's own word on why it cannot be read.
    std::fs::read(&path).map_err(|source| Error::Config {
        path: path.clone(),
        source,
    })?;
    let yaml = path
        .extension()
        .is_some_and(|extension| extension == "yaml" || extension == "yml");
    // Bad syntax would else show only as a fault of whatever value is asked for first.
    Ok(if yaml {
        Yaml::file_exact(&path)
            .data()
            .map_err(|error| in_file(error, &path))?;
        figment.merge(Yaml::file_exact(&path))
    } else {
        Toml::file_exact(&path)
            .data()
            .map_err(|error| in_file(error, &path))?;
        figment.merge(Toml::file_exact(&path))
    })
}

/// Adds, below everything else, what depends on the host.
fn with_host_defaults(
    figment: Figment,
    host: &Host,
    environment: &Environment,
) -> Result<Figment, Error> {
    let mut below = figment.clone();
    for (key, root, variable, home) in [
        (
            "data_dir",
            "/var/lib/hutch",
            "XDG_DATA_HOME",
            ".local/share",
        ),
        ("cache_dir", "/var/cache/hutch", "XDG_CACHE_HOME", ".cache"),
    ] {
        if figment.contains(key) {
            continue;
        }
        let dir = match host.root {
            true => Some(PathBuf::from(root)),
            false => environment
                .directory(variable, home)
                .map(|dir| dir.join("hutch")),
        };
        let dir = path_text(key, &dir.ok_or(Error::NoHome { key })?)?;
        below = below.join(Layer::one("default", key, dir));
    }
    let beside = host
        .executable
        .parent()
        .unwrap_or(Path::new("/"))
        .join("guest/hutch-agent");
    below = below.join(Layer::one("default", "agent", path_text("agent", &beside)?));
    let listen = figment.extract_inner::<SocketAddr>("listen");
    let loopback = listen.is_ok_and(|listen| listen.ip().is_loopback());
    let below = below.join(Layer::one("default", "runtime.allow_emulation", loopback));
    let bind = if loopback { "127.0.0.1" } else { "0.0.0.0" };
    Ok(below.join(Layer::one("default", "gateway.ports_bind", bind)))
}

/// Holds one value, if there is one, against its row in the table: the types alone do not know the bounds.
fn check(figment: &Figment, key: &Key) -> Result<(), Error> {
    let Ok(value) = figment.find_value(key.path) else {
        return Ok(());
    };
    let number = || whole(&value).and_then(|number| u64::try_from(number).ok());
    let (good, problem) = match &key.shape {
        Shape::Text => (
            value.as_str().is_some_and(|text| !text.is_empty()),
            "is empty or no text",
        ),
        Shape::Word(words) => (
            value.as_str().is_some_and(|text| words.contains(&text)),
            "is another word",
        ),
        Shape::Flag => (value.to_bool().is_some(), "is neither"),
        Shape::Cpus => (
            value
                .as_str()
                .is_some_and(|text| text.parse::<super::Cpus>().is_ok()),
            "names no CPUs",
        ),
        Shape::Range => (
            value
                .as_str()
                .is_some_and(|text| text.parse::<hutch_engine::Cidr>().is_ok()),
            "is no range of addresses",
        ),
        Shape::Ranges => (
            value
                .as_str()
                .is_some_and(|text| super::ranges(text).is_some()),
            "has what is no range of addresses",
        ),
        Shape::Interface => (
            value.as_str().is_some_and(super::is_interface),
            "is no name of an interface",
        ),
        Shape::Servers => (
            value
                .as_str()
                .is_some_and(|text| super::servers(text).is_some()),
            "has what is no address",
        ),
        Shape::Admin => (
            value
                .as_str()
                .is_some_and(|text| text.parse::<hutch_gateway::caddy::Admin>().is_ok()),
            "is no address",
        ),
        Shape::Provider => (
            value
                .as_str()
                .is_some_and(|text| super::gateway::provider(text).is_some()),
            "is something else",
        ),
        Shape::Number(range) => (
            number().is_some_and(|number| range.contains(&number)),
            "is out of range",
        ),
    };
    if good {
        return Ok(());
    }
    Err(Error::Setting {
        key: key.path.to_owned(),
        origin: origin(figment, key.path),
        problem: problem.to_owned(),
        allowed: Some(key.shape.allowed()),
    })
}

/// A whole number, whichever way its source wrote it.
fn whole(value: &Value) -> Option<i128> {
    value.to_i128().or_else(|| {
        value
            .to_u128()
            .and_then(|number| i128::try_from(number).ok())
    })
}

/// A figment error as ours.
pub(super) fn refused(error: figment::Error) -> Error {
    Error::Setting {
        key: error.path.join("."),
        origin: error
            .metadata
            .as_ref()
            .map_or_else(|| "default".to_owned(), describe),
        problem: error.kind.to_string(),
        allowed: None,
    }
}

/// The syntax of a file is wrong.
fn in_file(error: figment::Error, path: &Path) -> Error {
    Error::Config {
        path: path.to_owned(),
        source: std::io::Error::other(error.kind.to_string()),
    }
}

fn path_text(key: &str, path: &Path) -> Result<String, Error> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::Setting {
            key: key.to_owned(),
            origin: path.display().to_string(),
            problem: "is not UTF-8".to_owned(),
            allowed: None,
        })
}
