//! Domain names, patterns of them, and what a policy says about a name. Pure.

use std::fmt;
use std::str::FromStr;

/// Longest name in text, without the dot at its end (RFC 1035 §2.3.4: 255 bytes on the wire).
const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// A domain name in lower case, without the dot at its end. Labels have letters, digits, `-` and `_`; international
/// names are in their `xn--` form.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(String);

/// What is no domain name, or no pattern of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDomain {
    /// As a name.
    #[error("{0:?} is no domain name such as example.com")]
    Name(String),
    /// As a pattern.
    #[error("{0:?} is no pattern of domain names such as example.com or *.example.com")]
    Pattern(String),
}

impl Domain {
    /// The name, in lower case and without a dot at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What comes before `zone`: nothing for `zone` itself. None when the name lies elsewhere.
    pub fn within(&self, zone: &str) -> Option<&str> {
        match self.0.strip_suffix(zone)? {
            "" => Some(""),
            rest => rest.strip_suffix('.'),
        }
    }
}

impl FromStr for Domain {
    type Err = NoDomain;

    fn from_str(text: &str) -> Result<Self, NoDomain> {
        let name = text.strip_suffix('.').unwrap_or(text);
        let of_label = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        let label =
            |label: &str| (1..=LABEL_MAX).contains(&label.len()) && label.bytes().all(of_label);
        if name.len() <= NAME_MAX && name.split('.').all(label) {
            return Ok(Self(name.to_ascii_lowercase()));
        }
        Err(NoDomain::Name(text.to_owned()))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names that are alike: one name, or all below one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pattern {
    /// `example.com`: this name and no other.
    Exact(Domain),
    /// `*.example.com`: every name below, at any depth, and not `example.com` itself.
    Below(Domain),
}

impl Pattern {
    /// Greater for the pattern that leaves less open, of two that match a name.
    fn exactness(&self) -> (bool, usize) {
        match self {
            Self::Exact(_) => (true, 0),
            Self::Below(zone) => (false, zone.0.len()),
        }
    }

    /// Whether a name is one of these.
    pub fn matches(&self, name: &Domain) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Below(zone) => name.within(&zone.0).is_some_and(|rest| !rest.is_empty()),
        }
    }
}

impl FromStr for Pattern {
    type Err = NoDomain;

    fn from_str(text: &str) -> Result<Self, NoDomain> {
        let no = || NoDomain::Pattern(text.to_owned());
        let (below, name) = match text.strip_prefix("*.") {
            Some(zone) => (true, zone),
            None => (false, text),
        };
        let name: Domain = name.parse().map_err(|_| no())?;
        // No zone of the root is a number, so that is an address.
        let top = name.0.rsplit('.').next().unwrap_or_default();
        if top.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(no());
        }
        Ok(if below {
            Self::Below(name)
        } else {
            Self::Exact(name)
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Below(zone) => write!(f, "*.{zone}"),
        }
    }
}

/// What a policy says about names: of the patterns that match, the one that names it more exactly counts; one that is in
/// both lists denies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Domains {
    /// Names whose addresses may be reached, whatever the policy says about addresses that no range names.
    pub allow: Vec<Pattern>,
    /// Names that get no answer.
    pub deny: Vec<Pattern>,
}

impl Domains {
    /// Whether they say nothing at all.
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// What they say about a name.
    pub fn judge(&self, name: &Domain) -> Judgement {
        let best = |patterns: &[Pattern]| {
            let matching = patterns.iter().filter(|pattern| pattern.matches(name));
            matching.map(Pattern::exactness).max()
        };
        let (allow, deny) = (best(&self.allow), best(&self.deny));
        if allow > deny {
            Judgement::Allowed
        } else if deny.is_some() {
            Judgement::Denied
        } else {
            Judgement::Unnamed
        }
    }
}

/// What is said about a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// Its addresses may be reached, because of the name.
    Allowed,
    /// It may not be asked for, and its addresses may not be reached.
    Denied,
    /// Nothing: its addresses are like all others.
    Unnamed,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(text: &str) -> Domain {
        text.parse().unwrap()
    }

    fn patterns(texts: &[&str]) -> Vec<Pattern> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn names_are_compared_without_case_and_last_dot() {
        assert_eq!(domain("WWW.Example.COM."), domain("www.example.com"));
        assert_eq!(
            domain("_sip._tcp.example.com").as_str(),
            "_sip._tcp.example.com"
        );
        let long = format!("{}.com", "a".repeat(63));
        assert_eq!(domain(&long).as_str(), long);
        let too_long = [format!("a{long}"), ["abcdefg"; 32].join(".")];
        for text in [
            "",
            ".",
            "a..b",
            ".a",
            "a b",
            "ex*mple.com",
            "münchen.de",
            "a\\.b",
            "a\0",
        ]
        .into_iter()
        .chain(too_long.iter().map(String::as_str))
        {
            assert!(text.parse::<Domain>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_zone_holds_itself_and_what_is_below_in_whole_labels() {
        assert_eq!(
            domain("a.b.hutch.internal").within("hutch.internal"),
            Some("a.b")
        );
        assert_eq!(domain("hutch.internal").within("hutch.internal"), Some(""));
        assert_eq!(domain("nohutch.internal").within("hutch.internal"), None);
        assert_eq!(domain("internal").within("hutch.internal"), None);
    }

    #[test]
    fn patterns_are_one_name_or_all_below_one() {
        for (pattern, name, matches) in [
            ("example.com", "example.com", true),
            ("Example.com.", "EXAMPLE.com", true),
            ("example.com", "www.example.com", false),
            ("*.example.com", "www.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "notexample.com", false),
            ("*.example.com", "example.com.evil.net", false),
        ] {
            let read: Pattern = pattern.parse().unwrap();
            assert_eq!(read.matches(&domain(name)), matches, "{pattern} {name}");
            assert_eq!(read.to_string().parse(), Ok(read));
        }
        for text in [
            "*",
            "*.",
            "*.*.com",
            "www.*.com",
            "10.0.0.1",
            "*.1",
            "a/8",
            "",
        ] {
            let error = text.parse::<Pattern>().unwrap_err();
            assert_eq!(error, NoDomain::Pattern(text.into()));
        }
    }

    #[test]
    fn the_pattern_that_names_more_exactly_counts() {
        let domains = Domains {
            allow: patterns(&[
                "*.example.com",
                "example.com",
                "good.bad.example.com",
                "same.org",
            ]),
            deny: patterns(&["bad.example.com", "*.bad.example.com", "*.com", "same.org"]),
        };
        for (name, judgement) in [
            ("example.com", Judgement::Allowed),
            ("www.example.com", Judgement::Allowed),
            ("bad.example.com", Judgement::Denied),
            ("x.bad.example.com", Judgement::Denied),
            ("good.bad.example.com", Judgement::Allowed),
            ("other.com", Judgement::Denied),
            ("same.org", Judgement::Denied),
            ("example.org", Judgement::Unnamed),
        ] {
            assert_eq!(domains.judge(&domain(name)), judgement, "{name}");
        }
    }
}
