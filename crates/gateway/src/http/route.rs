//! Which machine and port a host name means.

/// The longest DNS label, in bytes.
const LABEL: usize = 63;

/// What a host name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// A machine by its label, and a port when one is named.
    Machine {
        /// In lower case.
        label: String,
        port: Option<u16>,
    },
    /// Below our domain, but no name that a machine can have.
    Nobody,
    /// Not our domain.
    Foreign,
}

/// Reads the value of a Host header or an `:authority`. `base` is in lower case, without dots at its ends.
///
/// A label that begins with a port and a dash always names that port: `3000-web` is port 3000 of `web`, and no machine
/// may have that label itself.
pub(super) fn route(authority: &str, base: &str) -> Route {
    let host = host(authority).to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    if host == base {
        return Route::Nobody;
    }
    let below = host
        .strip_suffix(base)
        .and_then(|rest| rest.strip_suffix('.'));
    let Some(first) = below else {
        return Route::Foreign;
    };
    if !is_label(first) {
        return Route::Nobody;
    }
    match first
        .split_once('-')
        .map(|(port, label)| (number(port), label))
    {
        Some((Some(port), label)) if is_label(label) => Route::Machine {
            label: label.into(),
            port: Some(port),
        },
        Some((Some(_), _)) => Route::Nobody,
        _ => Route::Machine {
            label: first.into(),
            port: None,
        },
    }
}

/// The label and the port that a domain name means, when it can mean a machine below `base`.
#[must_use]
pub fn named(domain: &str, base: &str) -> Option<(String, Option<u16>)> {
    match route(domain, base) {
        Route::Machine { label, port } if !domain.contains(':') => Some((label, port)),
        _ => None,
    }
}

/// An authority without its port. Brackets of an IPv6 address stay; it is none of ours.
pub(super) fn host(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_label(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=LABEL).contains(&text.len())
        && text.bytes().all(good)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// A port as we write it: decimal, no zero in front.
fn number(text: &str) -> Option<u16> {
    let plain = !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(authority: &str) -> Route {
        route(authority, "vms.example.net")
    }

    fn machine(label: &str, port: Option<u16>) -> Route {
        Route::Machine {
            label: label.into(),
            port,
        }
    }

    #[test]
    fn names_are_machines_and_numbers_before_them_are_ports() {
        assert_eq!(of("web.vms.example.net"), machine("web", None));
        assert_eq!(of("WEB.vms.Example.net.:8081"), machine("web", None));
        assert_eq!(of("3000-web.vms.example.net"), machine("web", Some(3000)));
        assert_eq!(
            of("3000-my-web.vms.example.net:80"),
            machine("my-web", Some(3000))
        );
        assert_eq!(of("1-1.vms.example.net"), machine("1", Some(1)));
        // No port: too large, too long, or with a zero in front.
        assert_eq!(of("65536-web.vms.example.net"), machine("65536-web", None));
        assert_eq!(of("080-web.vms.example.net"), machine("080-web", None));
        assert_eq!(of("+80-web.vms.example.net"), Route::Nobody);
        assert_eq!(
            of("m-3000-web.vms.example.net"),
            machine("m-3000-web", None)
        );
        assert_eq!(of("3000.vms.example.net"), machine("3000", None));
    }

    #[test]
    fn nobody_is_deeper_and_nothing_else_is_ours() {
        for name in [
            "a.b",
            "-a",
            "a-",
            "80--a",
            "80-",
            "",
            "a_b",
            "a b",
            "ä",
            &"a".repeat(64),
        ] {
            assert_eq!(
                of(&format!("{name}.vms.example.net")),
                Route::Nobody,
                "{name}"
            );
        }
        assert_eq!(of("vms.example.net"), Route::Nobody);
        for name in [
            "",
            "example.net",
            "webvms.example.net",
            "web.vms.example.net.evil.org",
            "[::1]:80",
            "web.vms.example.net:x",
            "web.vms.example.net@evil",
        ] {
            assert_eq!(of(name), Route::Foreign, "{name}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC*") {
            of(&text);
            of(&format!("{text}.vms.example.net"));
        }
    }
}
