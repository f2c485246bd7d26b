//! How single arguments are read: `KEY=VALUE`, durations, a machine's shape. What they are for is the commands' affair.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use hutch_contract::exec::Exec;
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
    /// Boot from the beginning even where a warm start would do
    #[arg(long)]
    pub cold: bool,
    /// Show how long each step of the start took
    #[arg(long)]
    pub timings: bool,
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
            cold: self.cold,
        }
    }
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
    fn a_value_may_hold_an_equals_sign() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(key_value("A="), Ok(("A".to_owned(), String::new())));
        assert!(key_value("A").is_err() && key_value("=b").is_err());
    }
}
