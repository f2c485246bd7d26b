//! The rules of `deny.toml` that need nothing but `cargo metadata` (licences, sources, duplicate versions), and the
//! borders between our own crates.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::Result;
use crate::command::{cargo, output};

/// Which crate of ours may use which others of ours. Arrows point down; the leaves under the engine do not know each
/// other.
const BORDERS: [(&str, &[&str]); 15] = [
    ("contract", &[]),
    ("guest", &["contract"]),
    ("agent", &["guest", "netlink"]),
    ("runtime", &["contract"]),
    ("image", &["contract"]),
    ("disk", &["contract"]),
    ("netlink", &[]),
    ("net", &["contract", "netlink"]),
    ("store", &["contract"]),
    (
        "engine",
        &[
            "contract", "runtime", "image", "disk", "net", "store", "guest",
        ],
    ),
    ("gateway", &[]),
    ("server", &["contract", "engine", "gateway"]),
    ("cli", &["contract", "server"]),
    // Not shipped: may see everything they test.
    (
        "tests",
        &[
            "contract", "engine", "gateway", "guest", "image", "net", "netlink", "runtime", "store",
        ],
    ),
    ("xtask", &[]),
];

/// Every rule that is broken, one line each.
pub fn check() -> Result<Vec<String>> {
    let metadata = output(&mut cargo([
        "metadata",
        "--format-version",
        "1",
        "--locked",
    ]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"]
        .as_array()
        .ok_or("cargo metadata lists no packages")?;
    let deny = std::fs::read_to_string(crate::root().join("deny.toml"))?;
    let deny: toml::Table = deny.parse()?;
    let mut broken = borders(packages);
    broken.extend(licences(packages, &texts(&deny["licenses"]["allow"])));
    broken.extend(sources(
        packages,
        &texts(&deny["sources"]["allow-registry"]),
    ));
    broken.extend(banned(packages, &deny["bans"]["deny"]));
    Ok(broken)
}

fn texts(list: &toml::Value) -> BTreeSet<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(toml::Value::as_str)
        .collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The name of a crate of ours without the prefix.
fn ours(package: &Value) -> Option<&str> {
    let name = text(package, "name");
    package["source"]
        .is_null()
        .then(|| name.strip_prefix("hutch-").unwrap_or(name))
}

fn borders(packages: &[Value]) -> Vec<String> {
    let mut broken = Vec::new();
    for package in packages {
        let Some(name) = ours(package) else { continue };
        let Some((_, allowed)) = BORDERS.iter().find(|(of, _)| *of == name) else {
            broken.push(format!("{name}: a crate without a row in BORDERS of xtask"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let Some(on) = text(dependency, "name").strip_prefix("hutch-") else {
                continue;
            };
            // A crate's tests may use the crate itself with other features.
            if on != name && !allowed.contains(&on) {
                broken.push(format!(
                    "{name} depends on {on}: the arrow between them is not drawn"
                ));
            }
        }
    }
    broken
}

fn licences(packages: &[Value], allowed: &BTreeSet<&str>) -> Vec<String> {
    let foreign = packages.iter().filter(|package| ours(package).is_none());
    let bad = foreign.filter(|package| !licensed(text(package, "license"), allowed));
    bad.map(|package| format!("{}: licence {}", text(package, "name"), package["license"]))
        .collect()
}

/// Whether an SPDX expression can be met with allowed licences. `AND` binds closer than `OR` (SPDX 2.3, annex D).
fn licensed(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut words = words.as_slice();
    either(&mut words, allowed) && words.is_empty()
}

fn either(words: &mut &[&str], allowed: &BTreeSet<&str>) -> bool {
    let mut good = both(words, allowed);
    while let ["OR", rest @ ..] = words {
        *words = rest;
        good |= both(words, allowed);
    }
    good
}

fn both(words: &mut &[&str], allowed: &BTreeSet<&str>) -> bool {
    let mut good = one(words, allowed);
    while let ["AND", rest @ ..] = words {
        *words = rest;
        good &= one(words, allowed);
    }
    good
}

fn one(words: &mut &[&str], allowed: &BTreeSet<&str>) -> bool {
    match words {
        ["(", rest @ ..] => {
            *words = rest;
            let good = either(words, allowed);
            let closed = words.first() == Some(&")");
            *words = words.get(1..).unwrap_or_default();
            good && closed
        }
        [licence, "WITH", exception, rest @ ..] => {
            *words = rest;
            allowed.contains(format!("{licence} WITH {exception}").as_str())
        }
        [licence, rest @ ..] => {
            *words = rest;
            allowed.contains(licence)
        }
        [] => false,
    }
}

fn sources(packages: &[Value], allowed: &BTreeSet<&str>) -> Vec<String> {
    let bad = packages.iter().filter(|package| {
        let registry = text(package, "source").strip_prefix("registry+");
        ours(package).is_none() && !registry.is_some_and(|registry| allowed.contains(registry))
    });
    bad.map(|package| {
        format!(
            "{}: comes from {}",
            text(package, "name"),
            package["source"]
        )
    })
    .collect()
}

fn banned(packages: &[Value], rules: &toml::Value) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions
            .entry(text(package, "name"))
            .or_default()
            .push(text(package, "version"));
    }
    let rules = rules.as_array().into_iter().flatten();
    rules
        .filter_map(|rule| {
            let name = rule.get("crate")?.as_str()?;
            let found = versions.get(name)?;
            let one_is_fine = rule.get("deny-multiple-versions").is_some();
            let broken = found.len() > 1 || !one_is_fine;
            broken.then(|| format!("{name} {}: banned by deny.toml", found.join(" and ")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn licence_expressions_are_met_or_not() {
        let allowed = BTreeSet::from(["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"]);
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(GPL-3.0 OR MIT) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
            "GPL-3.0 AND X OR MIT",
        ] {
            assert!(licensed(good, &allowed), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT MIT",
            "Apache-2.0 WITH X",
        ] {
            assert!(!licensed(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn an_arrow_that_is_not_drawn_is_named() {
        let package = |name: &str, on: &str| json!({"name": name, "source": null, "dependencies": [{"name": on}]});
        assert_eq!(borders(&[package("hutch-engine", "hutch-store")]), [""; 0]);
        assert_eq!(borders(&[package("hutch-guest", "hutch-guest")]), [""; 0]);
        assert_eq!(borders(&[package("hutch-store", "hutch-disk")]).len(), 1);
        assert_eq!(borders(&[package("hutch-cli", "hutch-engine")]).len(), 1);
        assert_eq!(borders(&[package("hutch-new", "serde")]).len(), 1);
    }

    #[test]
    fn sources_and_versions_are_held_to_the_rules() {
        let package = |name: &str, version: &str, source: &str| json!({"name": name, "version": version, "source": source});
        let packages = [
            package("tokio", "1.0.0", "registry+https://good"),
            package("tokio", "2.0.0", "registry+https://good"),
            package("odd", "1.0.0", "git+https://elsewhere"),
            package("evil", "1.0.0", "registry+https://good"),
        ];
        assert_eq!(
            sources(&packages, &BTreeSet::from(["https://good"])).len(),
            1
        );
        let rules: toml::Table =
            "deny = [{crate = \"tokio\", deny-multiple-versions = true}, {crate = \"evil\"}]"
                .parse()
                .unwrap();
        assert_eq!(banned(&packages, &rules["deny"]).len(), 2);
        assert_eq!(banned(&packages[1..3], &rules["deny"]), [""; 0]);
    }
}
