//! What the host knows about Debian mirrors: its release, its apt sources, its proxy. Read-only.

use std::path::Path;
use std::process::{Command, Stdio};

/// Used where the host is no Debian.
const DEFAULT_SUITE: &str = "bookworm";

/// The code name of the host's release.
pub fn host_suite() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    suite_of(&text).unwrap_or_else(|| DEFAULT_SUITE.to_owned())
}

fn suite_of(os_release: &str) -> Option<String> {
    let value = |key: &str| {
        let line = os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    value("VERSION_CODENAME").filter(|_| value("ID").as_deref() == Some("debian"))
}

/// The host's sources for `suite`, each as one line of `sources.list`; none when it has none, and
/// then `mmdebstrap` takes Debian's own mirror. Other vendors' archives are left out: they have
/// other suites or no component `main`.
pub(crate) fn for_suite(suite: &str) -> Vec<String> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
    let parts = std::fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten();
    let mut parts: Vec<_> = parts.map(|entry| entry.path()).collect();
    parts.sort();
    files.extend(parts);
    let mut found = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        found.extend(match file.extension().and_then(|end| end.to_str()) {
            Some("list") => one_line(&text, suite),
            Some("sources") => deb822(&text, suite),
            _ => Vec::new(),
        });
    }
    found
}

fn is_wanted(candidate: &str, suite: &str) -> bool {
    let rest = candidate.strip_prefix(suite);
    matches!(rest, Some("" | "-updates" | "-security" | "/updates"))
}

fn one_line(text: &str, suite: &str) -> Vec<String> {
    let wanted = |line: &&str| {
        let Some(rest) = line.strip_prefix("deb ") else {
            return false;
        };
        // Options in brackets may hold spaces.
        let rest = match rest.trim_start().strip_prefix('[') {
            Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
            None => rest,
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        words.len() > 2 && is_wanted(words[1], suite) && words[2..].contains(&"main")
    };
    text.lines()
        .map(str::trim)
        .filter(wanted)
        .map(str::to_owned)
        .collect()
}

fn deb822(text: &str, suite: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut found = Vec::new();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            let value = stanza.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
            });
            value.unwrap_or_default()
        };
        let components = field("Components");
        let on = !field("Enabled").eq_ignore_ascii_case("no");
        let binary = field("Types").split_whitespace().any(|kind| kind == "deb");
        if !on || !binary || !components.split_whitespace().any(|name| name == "main") {
            continue;
        }
        let signed = field("Signed-By");
        let options = if signed.starts_with('/') {
            format!("[signed-by={signed}] ")
        } else {
            String::new()
        };
        for uri in field("URIs").split_whitespace() {
            for name in field("Suites")
                .split_whitespace()
                .filter(|name| is_wanted(name, suite))
            {
                found.push(format!("deb {options}{uri} {name} {components}"));
            }
        }
    }
    found
}

/// The proxy that apt is set up with; `mmdebstrap` reads it from the environment only.
pub(crate) fn apt_proxy() -> Option<String> {
    let mut command = Command::new("apt-config");
    command.args(["dump", "--format", "%v%n", "Acquire::http::Proxy"]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let proxy = text.lines().next()?.trim();
    (!proxy.is_empty() && proxy != "DIRECT").then(|| proxy.to_owned())
}

/// Our user's name, for `/etc/subuid`.
pub(crate) fn user_name() -> Option<String> {
    let uid = rustix::process::getuid().as_raw().to_string();
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_sources_of_the_release_are_taken() {
        let text = "# deb http://old bookworm main\n\
            deb http://deb.debian.org/debian bookworm main contrib\n\
            deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm-updates main\n\
            deb-src http://deb.debian.org/debian bookworm main\n\
            deb https://download.docker.com/linux/debian bookworm stable\n\
            deb http://apt.postgresql.org/pub bookworm-pgdg main\n\
            deb http://deb.debian.org/debian trixie main\n";
        assert_eq!(
            one_line(text, "bookworm"),
            [
                "deb http://deb.debian.org/debian bookworm main contrib",
                "deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm-updates main"
            ]
        );
    }

    #[test]
    fn deb822_stanzas_are_understood() {
        let text = "Types: deb\n# a comment\nURIs: http://deb.debian.org/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main\n\
            Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
            Types: deb\nURIs: https://deb.nodesource.com/node_20.x\nSuites: nodistro\nComponents: main\n\n\
            Types: deb\nEnabled: no\nURIs: http://off\nSuites: bookworm\nComponents: main\n";
        let signed = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        assert_eq!(
            deb822(text, "bookworm"),
            [
                format!("{signed} http://deb.debian.org/debian bookworm main"),
                format!("{signed} http://deb.debian.org/debian bookworm-updates main")
            ]
        );
    }

    #[test]
    fn the_release_is_the_hosts_only_on_debian() {
        let debian = "ID=debian\nVERSION_CODENAME=trixie\n";
        assert_eq!(suite_of(debian).as_deref(), Some("trixie"));
        assert_eq!(suite_of("ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
    }
}
