//! Every key that is not a table: what it is, its bounds, and by which names the environment knows it.

use std::ops::RangeInclusive;

/// What the value of a key is.
pub(super) enum Shape {
    /// Any text, a path or an address.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
    /// A whole number within bounds.
    Number(RangeInclusive<u64>),
    /// Numbers of CPUs.
    Cpus,
    /// A range of addresses.
    Range,
    /// Several.
    Ranges,
    /// The name of a network interface.
    Interface,
    /// Addresses of servers.
    Servers,
    /// Where a Caddy's admin API is.
    Admin,
    /// What Caddy's module for a DNS provider wants, in JSON.
    Provider,
}

impl Shape {
    /// What is allowed, for an error's text.
    pub(super) fn allowed(&self) -> String {
        match self {
            Shape::Text => "a text".to_owned(),
            Shape::Word(words) => words.join(" or "),
            Shape::Flag => "true or false".to_owned(),
            Shape::Number(range) => {
                format!("a whole number from {} to {}", range.start(), range.end())
            }
            Shape::Cpus => "numbers of CPUs such as 0-3,8".to_owned(),
            Shape::Range => "a range of addresses such as 10.20.0.0/16".to_owned(),
            Shape::Interface => "1 to 15 letters, digits, `-`, `_` or `.`".to_owned(),
            Shape::Servers => "addresses such as 192.0.2.53 or 127.0.0.1:5353".to_owned(),
            Shape::Admin => "HOST:PORT or unix/ and the path of a socket".to_owned(),
            Shape::Provider => "a JSON object with a name".to_owned(),
            Shape::Ranges => "ranges of addresses such as 10.0.0.0/8,fd00::/8".to_owned(),
        }
    }
}

/// A key.
pub(super) struct Key {
    /// Its place in the tree, with dots.
    pub path: &'static str,
    /// What its value is.
    pub shape: Shape,
    /// Other names in the environment, which older systems used; the first that is there counts.
    pub also: &'static [&'static str],
}

impl Key {
    /// Its name in the environment.
    pub(super) fn variable(&self) -> String {
        format!("{PREFIX}{}", self.path.replace('.', "_").to_uppercase())
    }
}

/// What the names of our variables begin with.
pub(super) const PREFIX: &str = "HUTCH_";
/// Variables of ours that are no keys: the file itself, and what the command line and its log read.
pub(super) const OTHER_VARIABLES: [&str; 4] =
    ["HUTCH_CONFIG", "HUTCH_URL", "HUTCH_TOKEN", "HUTCH_LOG"];
/// Names a runtime's program: `HUTCH_RUNTIME_PROGRAMS_QEMU`.
pub(super) const PROGRAMS_PREFIX: &str = "HUTCH_RUNTIME_PROGRAMS_";

const fn key(path: &'static str, shape: Shape, also: &'static [&'static str]) -> Key {
    Key { path, shape, also }
}

/// All of them.
pub(super) const KEYS: [Key; 57] = [
    key("listen", Shape::Text, &[]),
    key("data_dir", Shape::Text, &["DATA_DIR"]),
    key("cache_dir", Shape::Text, &[]),
    key("agent", Shape::Text, &[]),
    key(
        "kernel",
        Shape::Text,
        &["FC_KERNEL", "HYPERFLEET_KERNEL_IMAGE_PATH", "KERNEL_PATH"],
    ),
    key("kernel_modules", Shape::Text, &[]),
    key("kernel_args", Shape::Text, &["HYPERFLEET_KERNEL_ARGS"]),
    key("api.token", Shape::Text, &["API_TOKEN"]),
    key("gateway.http_listen", Shape::Text, &["HUTCH_HTTP_LISTEN"]),
    key("gateway.domain", Shape::Text, &["BASE_DOMAIN"]),
    key("gateway.url_scheme", Shape::Word(&["http", "https"]), &[]),
    key("gateway.url_port", Shape::Number(1..=65_535), &[]),
    key("gateway.ports_bind", Shape::Text, &[]),
    key("gateway.port_min", Shape::Number(1..=65_535), &["PORT_MIN"]),
    key("gateway.port_max", Shape::Number(1..=65_535), &["PORT_MAX"]),
    key(
        "gateway.caddy",
        Shape::Word(&["off", "auto", "running", "own"]),
        &[],
    ),
    key("gateway.https_port", Shape::Number(1..=65_535), &[]),
    key("gateway.https_bind", Shape::Text, &[]),
    key("gateway.caddy_admin", Shape::Admin, &[]),
    key("gateway.caddy_program", Shape::Text, &[]),
    key("gateway.caddy_http_port", Shape::Number(1..=65_535), &[]),
    key("gateway.acme_email", Shape::Text, &[]),
    key("gateway.acme_directory", Shape::Text, &[]),
    key("gateway.acme_roots", Shape::Text, &[]),
    key("gateway.caddy_dns_provider", Shape::Provider, &[]),
    key("runtime.default", Shape::Text, &["SANDBOX_RUNTIME"]),
    key("runtime.acceleration", Shape::Word(&["kvm", "tcg"]), &[]),
    key("runtime.docker_socket", Shape::Text, &[]),
    key("runtime.docker_network", Shape::Text, &["DOCKER_NETWORK"]),
    key("runtime.allow_emulation", Shape::Flag, &[]),
    key("runtime.cpu_template", Shape::Text, &[]),
    key("runtime.huge_pages", Shape::Flag, &[]),
    key("runtime.affinity", Shape::Cpus, &[]),
    key("runtime.cpu_percent", Shape::Number(1..=100), &[]),
    key("runtime.jailer", Shape::Text, &[]),
    key("runtime.balloon", Shape::Flag, &[]),
    key(
        "runtime.disk_bytes_per_s",
        Shape::Number(1_048_576..=1 << 40),
        &[],
    ),
    key(
        "runtime.disk_ops_per_s",
        Shape::Number(10..=10_000_000),
        &[],
    ),
    key("runtime.virtualbox_base", Shape::Text, &[]),
    key("runtime.virtualbox_home", Shape::Text, &["VBOX_USER_HOME"]),
    key(
        "network.mode",
        Shape::Word(&["auto", "routed", "user", "none"]),
        &[],
    ),
    key("network.subnet", Shape::Range, &["NETWORK_SUBNET"]),
    key("network.bridge", Shape::Interface, &["NETWORK_BRIDGE"]),
    key("network.private", Shape::Ranges, &[]),
    key("network.dns", Shape::Servers, &[]),
    key("network.connections", Shape::Number(1..=1 << 24), &[]),
    key(
        "network.out_bytes_per_s",
        Shape::Number(65_536..=1 << 40),
        &[],
    ),
    key(
        "network.in_bytes_per_s",
        Shape::Number(65_536..=1 << 40),
        &[],
    ),
    key("disk.pool", Shape::Word(&["auto", "off", "require"]), &[]),
    // A machine's slot is a u16.
    key(
        "limits.machines",
        Shape::Number(1..=65_535),
        &["MAX_VMS_PER_HOST"],
    ),
    key("limits.memory_overcommit", Shape::Number(1..=100), &[]),
    key("limits.memory_floor_mib", Shape::Number(0..=1 << 24), &[]),
    key("limits.disk_reserve_mib", Shape::Number(0..=1 << 30), &[]),
    key("limits.image_max_gib", Shape::Number(1..=16_384), &[]),
    key("limits.templates_mib", Shape::Number(0..=1 << 30), &[]),
    key("limits.console_kib", Shape::Number(16..=1 << 20), &[]),
    key(
        "limits.boot_timeout_ms",
        Shape::Number(1_000..=3_600_000),
        &[],
    ),
];
