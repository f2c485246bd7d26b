//! How single arguments are read: `KEY=VALUE`, durations, a machine's shape. What they are for is the commands' affair.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use hutch_contract::exec::Exec;
use hutch_contract::expose::{Access, Expose, PublishPort};
use hutch_contract::lifetime::{Lifetime, Restart, TtlAction};
use hutch_contract::machine::CreateMachine;
use hutch_contract::name::Name;
use hutch_contract::network::{Egress, NetworkPolicy};

/// What a new machine is to be like.
#[derive(Debug, Args)]
pub struct Shape {
    /// Name or id of the image
    pub image: String,
    /// Name of the machine [default: three words]
    #[arg(long)]
    pub name: Option<Name>,
    /// What runs it, such as qemu [default: the best usable one]
    #[arg(long)]
    pub runtime: Option<String>,
    /// One of the kernels that the server's configuration names [default: the server's own]
    #[arg(long, value_name = "NAME")]
    pub kernel: Option<String>,
    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub vcpu: Option<u32>,
    /// Memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u32>,
    /// Size of the root disk in GiB [default: 8, or the image's]
    #[arg(long, value_name = "GIB")]
    pub disk: Option<u32>,
    /// Environment of every process in the machine
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// Label to find the machine by
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub label: Vec<(String, String)>,
    #[command(flatten)]
    pub policy: Policy,
    #[command(flatten)]
    pub life: Life,
    /// Boot from the beginning even where a warm start would do
    #[arg(long)]
    pub cold: bool,
    /// Keep its disk as it is before the first start, as a snapshot named `initial`
    #[arg(long)]
    pub snapshot_initial: bool,
    /// Show how long each step of the start took
    #[arg(long)]
    pub timings: bool,
    #[command(flatten)]
    pub ways: Ways,
}

/// How a new machine is to be reached from outside.
#[derive(Debug, Args)]
#[command(next_help_heading = "Ways to the machine")]
pub struct Ways {
    /// Let a port of the host lead to one of the machine; without HOST a free one
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST", value_parser = publish)]
    pub publish: Vec<PublishPort>,
    /// Let a free port of the host lead to the machine's SSH
    #[arg(long)]
    pub ssh: bool,
    /// The port behind the machine's URL [default: 8080]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
    /// Give further ports URLs, or all of them
    #[arg(long, value_name = "PORT|all", value_parser = exposed)]
    pub expose: Vec<Exposed>,
    /// Let everybody use its URLs, not only who has a key or a token
    #[arg(long)]
    pub public: bool,
}

/// A port that is to have a URL, or every one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposed {
    /// This one.
    Port(u16),
    /// Every one.
    All,
}

/// All of them together.
pub fn expose(all: &[Exposed]) -> Expose {
    let ports = all.iter().map(|one| match one {
        Exposed::Port(port) => Some(*port),
        Exposed::All => None,
    });
    let ports: Option<Vec<_>> = ports.collect();
    ports.map_or(Expose::ALL, Expose::Ports)
}

/// Reads a port, or `all`.
pub fn exposed(text: &str) -> Result<Exposed, String> {
    match text {
        "all" => Ok(Exposed::All),
        port => self::port(port).map(Exposed::Port),
    }
}

/// Reads `GUEST`, `HOST:GUEST` or `IP:HOST:GUEST`, where HOST may be empty: a free one. An IPv6 address stands in
/// brackets.
pub fn publish(text: &str) -> Result<PublishPort, String> {
    let (before, guest) = text.rsplit_once(':').unwrap_or(("", text));
    let (bind, host) = match before.rsplit_once(':') {
        Some((address, host)) => {
            let bare = address
                .strip_prefix('[')
                .and_then(|address| address.strip_suffix(']'));
            let address = bare.unwrap_or(address).parse();
            let address = address.map_err(|_| format!("`{before}` begins with no IP address"))?;
            (Some(address), host)
        }
        None => (None, before),
    };
    Ok(PublishPort {
        guest_port: port(guest)?,
        host_port: match host {
            "" => None,
            host => Some(port(host)?),
        },
        bind,
    })
}

/// Reads a port.
pub fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is no port: those are 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

impl Shape {
    /// The request for such a machine.
    pub fn request(&self) -> CreateMachine {
        CreateMachine {
            image: self.image.clone(),
            name: self.name.clone(),
            runtime: self.runtime.clone(),
            kernel: self.kernel.clone(),
            vcpu: self.vcpu,
            memory_mib: self.memory,
            disk_gib: self.disk,
            env: map(&self.env),
            labels: map(&self.label),
            network: self.policy.request(),
            lifetime: self.life.request(),
            cold: self.cold,
            snapshot_initial: self.snapshot_initial,
            ports: self.ways.publish.clone(),
            ssh: self.ways.ssh,
            http_port: self.ways.http_port,
            expose: expose(&self.ways.expose),
            access: match self.ways.public {
                true => Access::Public,
                false => Access::Private,
            },
        }
    }
}

/// When a machine rests or ends by itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Time")]
pub struct Life {
    /// Pause it when nobody has used it for so long, such as 10m; its next use lets it go on [default: never]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    idle_pause: Option<u32>,
    /// How long it lives, such as 1h, used or not [default: never ends]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    ttl: Option<u32>,
    /// What happens after that: pause, stop or delete [default: pause]
    #[arg(long, value_name = "WHAT", value_parser = ttl_action)]
    ttl_action: Option<TtlAction>,
    /// When to start it again after it has ended by itself, also with the host: never, on-failure (not after a power-off by
    /// its guest) or always [default: never]
    #[arg(long, value_name = "WHEN", value_parser = restart)]
    restart: Option<Restart>,
}

impl Life {
    /// The lifetime that the options say.
    pub fn request(&self) -> Lifetime {
        Lifetime {
            idle_pause_s: self.idle_pause,
            ttl_s: self.ttl,
            ttl_action: self.ttl_action,
            restart: self.restart,
        }
    }
}

fn ttl_action(text: &str) -> Result<TtlAction, String> {
    match text {
        "pause" => Ok(TtlAction::Pause),
        "stop" => Ok(TtlAction::Stop),
        "delete" => Ok(TtlAction::Delete),
        _ => Err("expected pause, stop or delete".to_owned()),
    }
}

fn restart(text: &str) -> Result<Restart, String> {
    match text {
        "never" | "no" => Ok(Restart::Never),
        "on-failure" => Ok(Restart::OnFailure),
        "always" => Ok(Restart::Always),
        _ => Err("expected never, on-failure or always".to_owned()),
    }
}

/// Reads a time in whole seconds; `never` is 0.
fn seconds(text: &str) -> Result<u32, String> {
    if text == "never" {
        return Ok(0);
    }
    let time = duration(text)?;
    if time.subsec_millis() != 0 {
        return Err("expected whole seconds".to_owned());
    }
    u32::try_from(time.as_secs()).map_err(|_| "expected less than 136 years".to_owned())
}

/// Whom a machine may talk to.
#[derive(Debug, Args)]
pub struct Policy {
    /// What the machine reaches where --allow and --deny do not say: the public internet, that and private networks, or
    /// nothing [default: public]
    #[arg(long, value_name = "WHAT", value_parser = egress)]
    egress: Option<Egress>,
    /// Let it reach a range of addresses or a domain, such as 10.1.0.0/16, example.com or '*.example.com'
    #[arg(long, value_name = "RANGE|DOMAIN")]
    allow: Vec<String>,
    /// Keep it from a range of addresses or a domain
    #[arg(long, value_name = "RANGE|DOMAIN")]
    deny: Vec<String>,
    /// Let it and the other machines of this group talk to each other
    #[arg(long, value_name = "NAME")]
    group: Vec<Name>,
}

impl Policy {
    /// Whether any option was given.
    pub fn is_given(&self) -> bool {
        self.egress.is_some()
            || !(self.allow.is_empty() && self.deny.is_empty() && self.group.is_empty())
    }

    /// The policy that the options say.
    pub fn request(&self) -> NetworkPolicy {
        NetworkPolicy {
            egress: self.egress.unwrap_or_default(),
            allow: self.allow.clone(),
            deny: self.deny.clone(),
            groups: self.group.clone(),
        }
    }
}

fn egress(text: &str) -> Result<Egress, String> {
    let mut all = Egress::ALL.into_iter();
    all.find(|egress| egress.as_str() == text)
        .ok_or_else(|| "expected public, open or none".to_owned())
}

/// How a command runs in a machine.
#[derive(Debug, Args)]
pub struct Surroundings {
    /// Working directory [default: the image's]
    #[arg(short = 'w', long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// User, or user:group [default: the image's]
    #[arg(short, long)]
    pub user: Option<String>,
    /// End the command and all it started after so long, such as 90s or 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
}

impl Surroundings {
    /// The request to run a command so.
    pub fn exec(&self, command: Vec<String>, env: BTreeMap<String, String>) -> Exec {
        Exec {
            command,
            env,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            stdin_base64: None,
            timeout_ms: self
                .timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// Pairs as a map; the last of equal keys wins, as it does in a shell.
pub fn map(pairs: &[(String, String)]) -> BTreeMap<String, String> {
    pairs.iter().cloned().collect()
}

/// Reads `KEY=VALUE`. The value may be empty and may hold further `=`.
pub fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// Reads a time: a whole number with `ms`, `s`, `m` or `h`; seconds without a unit.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor_ms: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("expected a time such as 500ms, 90s, 5m or 1h".to_owned()),
    };
    match number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor_ms))
    {
        Some(0) | None => {
            Err("expected a time above zero, such as 500ms, 90s, 5m or 1h".to_owned())
        }
        Some(ms) => Ok(Duration::from_millis(ms)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, ms) in [
            ("500ms", 500),
            ("90", 90_000),
            ("90s", 90_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "",
            "0",
            "s",
            "-1s",
            "1.5s",
            "1d",
            "99999999999999999999",
            "9999999999999999h",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_life_is_counted_in_seconds() {
        for (text, expected) in [("90", 90), ("10m", 600), ("1000ms", 1), ("never", 0)] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "500ms", "1500ms", "9999999h", "Never"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_are_written_as_docker_does() {
        let port = |guest_port, host_port, bind: Option<&str>| PublishPort {
            guest_port,
            host_port,
            bind: bind.map(|bind| bind.parse().expect("an address")),
        };
        for (text, expected) in [
            ("80", port(80, None, None)),
            (":80", port(80, None, None)),
            ("8000:80", port(80, Some(8000), None)),
            ("0.0.0.0:8000:80", port(80, Some(8000), Some("0.0.0.0"))),
            ("127.0.0.1::80", port(80, None, Some("127.0.0.1"))),
            ("[::1]:8000:80", port(80, Some(8000), Some("::1"))),
            ("::1:8000:80", port(80, Some(8000), Some("::1"))),
        ] {
            assert_eq!(publish(text), Ok(expected), "{text}");
        }
        for text in [
            "", "0", "a", "80:", "0:80", "65536", "host:1:2", "1:2:3", "80/udp",
        ] {
            assert!(publish(text).is_err(), "{text}");
        }
        assert_eq!(expose(&[]), Expose::default());
        assert_eq!(expose(&[Exposed::Port(1), Exposed::All]), Expose::ALL);
    }

    #[test]
    fn a_value_may_hold_an_equals_sign() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(key_value("A="), Ok(("A".to_owned(), String::new())));
        assert!(key_value("A").is_err() && key_value("=b").is_err());
    }
}
