//! Who answers a question. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::ZONE;
use crate::cidr::Cidr;
use crate::domain::Domain;
use crate::private::{PRIVATE4, PRIVATE6};

/// Names that mean something only where they are asked: RFC 6761, RFC 6762, RFC 7686.
const NOWHERE: [&str; 4] = ["localhost", "local", "invalid", "onion"];

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// We do, about this name in our zone; empty for the zone itself.
    Own(String),
    /// We do, about the name of this address; or about nothing, where it is only part of one.
    Reverse(Option<IpAddr>),
    /// There is no such name.
    Nobody,
    /// The host's resolver.
    Upstream,
}

/// Who answers questions about a name. Names of private networks, and of those of the host, tell strangers about them.
pub(super) fn route(name: &Domain, host_networks: &[Cidr]) -> Route {
    if let Some(own) = name.within(ZONE) {
        return Route::Own(own.to_owned());
    }
    if NOWHERE.iter().any(|zone| name.within(zone).is_some()) {
        return Route::Nobody;
    }
    let Some((range, whole)) = reverse(name) else {
        return Route::Upstream;
    };
    let mut private = PRIVATE4.iter().chain(&PRIVATE6).chain(host_networks);
    if !private.any(|private| private.covers(&range)) {
        return Route::Upstream;
    }
    Route::Reverse(whole.then(|| range.first()))
}

/// The range that a name of the reverse zones is about, and whether the name is that of one address and no more.
fn reverse(name: &Domain) -> Option<(Cidr, bool)> {
    let (labels, base, most) = match (name.within("in-addr.arpa"), name.within("ip6.arpa")) {
        (Some(labels), _) => (labels, 10, 4),
        (_, Some(labels)) => (labels, 16, 32),
        _ => return None,
    };
    let mut parts: Vec<u8> = Vec::new();
    let mut rest = false;
    for label in labels.rsplit('.').filter(|label| !label.is_empty()) {
        let number = match base {
            10 => label.parse().ok(),
            _ if label.len() == 1 => u8::from_str_radix(label, 16).ok(),
            _ => None,
        };
        match number {
            Some(number) if parts.len() < most => parts.push(number),
            _ => {
                rest = true;
                break;
            }
        }
    }
    let whole = parts.len() == most && !rest;
    let bits = |base: u32| u8::try_from(parts.len() as u32 * base).unwrap_or(u8::MAX);
    let range = if base == 10 {
        let mut octets = [0; 4];
        octets[..parts.len()].copy_from_slice(&parts);
        Cidr::new(Ipv4Addr::from(octets).into(), bits(8))
    } else {
        let nibble = |all, (at, part): (usize, &u8)| all | u128::from(*part) << (124 - 4 * at);
        let address = parts.iter().enumerate().fold(0, nibble);
        Cidr::new(Ipv6Addr::from_bits(address).into(), bits(4))
    };
    Some((range, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(name: &str) -> Route {
        route(&name.parse().unwrap(), &["192.0.2.0/24".parse().unwrap()])
    }

    #[test]
    fn our_zone_is_ours_at_every_depth() {
        assert_eq!(routed("web.hutch.internal"), Route::Own("web".into()));
        assert_eq!(routed("a.b.Hutch.Internal."), Route::Own("a.b".into()));
        assert_eq!(routed("hutch.internal"), Route::Own(String::new()));
        assert_eq!(routed("hutch.internal.example.com"), Route::Upstream);
        assert_eq!(routed("nothutch.internal"), Route::Upstream);
    }

    #[test]
    fn names_of_this_place_lead_nowhere() {
        for name in [
            "localhost",
            "a.localhost",
            "printer.local",
            "x.onion",
            "invalid",
        ] {
            assert_eq!(routed(name), Route::Nobody, "{name}");
        }
        assert_eq!(routed("local.example.com"), Route::Upstream);
    }

    #[test]
    fn addresses_of_private_networks_are_asked_of_nobody_else() {
        let of = |address: &str| Route::Reverse(Some(address.parse().unwrap()));
        assert_eq!(routed("1.2.16.172.in-addr.arpa"), of("172.16.2.1"));
        assert_eq!(routed("7.2.0.192.in-addr.arpa"), of("192.0.2.7"));
        let sixth = format!("1.{}8.6.d.f.ip6.arpa", "0.".repeat(27));
        assert_eq!(routed(&sixth), of("fd68::1"));
        // Part of an address, and more than one.
        for name in [
            "10.in-addr.arpa",
            "x.10.in-addr.arpa",
            "1.2.3.4.10.in-addr.arpa",
            "d.f.ip6.arpa",
        ] {
            assert_eq!(routed(name), Route::Reverse(None), "{name}");
        }
        for name in [
            "10.113.0.203.in-addr.arpa",
            "172.in-addr.arpa",
            "in-addr.arpa",
            "arpa",
            "x.in-addr.arpa",
            "8.b.d.0.1.0.0.2.ip6.arpa",
        ] {
            assert_eq!(routed(name), Route::Upstream, "{name}");
        }
    }
}
