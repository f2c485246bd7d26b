//! The rules as `nft` reads them.

use hutch_net::elements::{Egress, Limits};
use hutch_net::firewall::Firewall;

use crate::bed::{Place, config, in_own_network, machine, nft};

/// The tables without what differs between two instances: their comments.
fn listed() -> Option<String> {
    let listed = nft(&["list", "ruleset"])?;
    let lines = listed
        .lines()
        .filter(|line| !line.trim_start().starts_with("comment "));
    Some(lines.map(|line| format!("{line}\n")).collect())
}

#[test]
fn the_rules_are_those_of_the_text() {
    for (place, name, golden) in [
        (
            Place::Taps,
            "rules.nft",
            include_str!("../../src/rules.nft"),
        ),
        (
            Place::Bridge { called: false },
            "rules-bridge.nft",
            include_str!("../../src/rules-bridge.nft"),
        ),
    ] {
        in_own_network(|| {
            let _firewall = Firewall::open(place.config(false), Vec::new()).unwrap();
            let Some(version) = nft(&["--version"]) else {
                return;
            };
            if !version.contains("v1.0.6 ") {
                return eprintln!("skipped: the text is that of nft 1.0.6, not of {version}");
            }
            let Some(listed) = listed() else { return };
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                let path = format!("{}/src/{name}", env!("CARGO_MANIFEST_DIR"));
                std::fs::write(path, &listed).unwrap();
            }
            assert_same(&listed, golden);
        });
    }
}

fn assert_same(listed: &str, golden: &str) {
    for (number, (listed, golden)) in listed.lines().zip(golden.lines()).enumerate() {
        assert_eq!(listed, golden, "line {}", number + 1);
    }
    assert_eq!(listed.lines().count(), golden.lines().count());
}

#[test]
fn a_machine_with_everything_is_listed_as_meant() {
    in_own_network(|| {
        let mut all = machine(7);
        all.limits = Limits {
            connections: Some(100),
            out_bytes: Some(1_000_000),
            in_bytes: Some(2_000_000),
        };
        all.policy.egress = Egress::None;
        all.policy.allow = ["203.0.113.0/24", "2001:db8::/32"]
            .map(|range| range.parse().unwrap())
            .into();
        let _firewall = Firewall::open(config(false), vec![all]).unwrap();
        let Some(listed) = listed() else { return };
        for part in [
            r#""hab12-7" . 02:68:75:74:63:02 . 172.16.0.7"#,
            r#""hab12-7" . 02:68:75:74:63:02 . fd68::1:7"#,
            "172.16.0.7 ct count over 100",
            "172.16.0.7 : goto c_none",
            "172.16.0.7 : 0xab120007",
            "172.16.0.7 . 203.0.113.0/24",
            "fd68::1:7 . 2001:db8::/32",
            "172.16.0.7 limit rate over 1000000 bytes/second burst 125000 bytes",
        ] {
            assert!(listed.contains(part), "{part} is not in\n{listed}");
        }
    });
}
