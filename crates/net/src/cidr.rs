//! Ranges of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Addresses that share their first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    first: IpAddr,
    prefix: u8,
}

/// What is no range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no range of addresses such as 10.0.0.0/8")]
pub struct NoCidr(String);

impl Cidr {
    /// The range of `prefix` bits that `address` is in; more bits than an address has are all of them.
    pub const fn new(address: IpAddr, prefix: u8) -> Self {
        match address {
            IpAddr::V4(address) => {
                let prefix = if prefix > 32 { 32 } else { prefix };
                let mask = match prefix {
                    0 => 0,
                    _ => u32::MAX << (32 - prefix),
                };
                let first = Ipv4Addr::from_bits(address.to_bits() & mask);
                let first = IpAddr::V4(first);
                Self { first, prefix }
            }
            IpAddr::V6(address) => {
                let prefix = if prefix > 128 { 128 } else { prefix };
                let mask = match prefix {
                    0 => 0,
                    _ => u128::MAX << (128 - prefix),
                };
                let first = Ipv6Addr::from_bits(address.to_bits() & mask);
                let first = IpAddr::V6(first);
                Self { first, prefix }
            }
        }
    }

    pub(crate) const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
    }

    pub(crate) const fn v6(start: [u16; 6], prefix: u8) -> Self {
        let [a, b, c, d, e, f] = start;
        Self::new(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, 0, 0)), prefix)
    }

    /// Its first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// How many bits its addresses share.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Its last address.
    pub fn last(&self) -> IpAddr {
        match self.first {
            IpAddr::V4(first) => {
                let rest = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                Ipv4Addr::from_bits(first.to_bits() | rest).into()
            }
            IpAddr::V6(first) => {
                let rest = u128::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                Ipv6Addr::from_bits(first.to_bits() | rest).into()
            }
        }
    }

    /// The address behind its last one, unless it holds the last one that there is.
    pub fn end(&self) -> Option<IpAddr> {
        match self.last() {
            IpAddr::V4(last) => Some(Ipv4Addr::from_bits(last.to_bits().checked_add(1)?).into()),
            IpAddr::V6(last) => Some(Ipv6Addr::from_bits(last.to_bits().checked_add(1)?).into()),
        }
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4()
            && Self::new(address, self.prefix).first == self.first
    }

    /// Whether it holds all of another one.
    pub fn covers(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.first)
    }
}

/// The same addresses without ranges that lie within others, in order.
pub fn without_nested(ranges: &[Cidr]) -> Vec<Cidr> {
    let mut sorted = ranges.to_vec();
    sorted.sort();
    let mut kept: Vec<Cidr> = Vec::new();
    for range in sorted {
        if !kept.last().is_some_and(|last| last.covers(&range)) {
            kept.push(range);
        }
    }
    kept
}

impl FromStr for Cidr {
    type Err = NoCidr;

    fn from_str(text: &str) -> Result<Self, NoCidr> {
        let no = || NoCidr(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| no())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), |prefix| prefix.parse().map_err(|_| no()))?;
        (prefix <= longest)
            .then(|| Self::new(address, prefix))
            .ok_or_else(no)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_know_their_ends() {
        for (text, first, last, end) in [
            ("10.1.2.3/8", "10.0.0.0", "10.255.255.255", Some("11.0.0.0")),
            ("224.0.0.0/3", "224.0.0.0", "255.255.255.255", None),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255", None),
            ("10.0.0.1", "10.0.0.1", "10.0.0.1", Some("10.0.0.2")),
            (
                "fe80::/9",
                "fe80::",
                "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                Some("ff00::"),
            ),
            (
                "ff00::/8",
                "ff00::",
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                None,
            ),
        ] {
            let range = cidr(text);
            assert_eq!(range.first(), first.parse::<IpAddr>().unwrap(), "{text}");
            assert_eq!(range.last(), last.parse::<IpAddr>().unwrap(), "{text}");
            assert_eq!(range.end(), end.map(|end| end.parse().unwrap()), "{text}");
            assert!(range.contains(range.last()));
        }
        for bad in ["", "x", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/-1"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn nested_ranges_go() {
        let all = [
            "10.1.0.0/16",
            "10.0.0.0/8",
            "11.0.0.0/8",
            "10.1.2.0/24",
            "::/0",
            "fc00::/7",
        ];
        let all: Vec<_> = all.map(cidr).into();
        let kept: Vec<_> = without_nested(&all).iter().map(Cidr::to_string).collect();
        assert_eq!(kept, ["10.0.0.0/8", "11.0.0.0/8", "::/0"]);
    }
}
