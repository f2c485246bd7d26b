//! Which addresses are not the public internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::cidr::Cidr;

/// Ranges of IPv4 that no public host has: RFC 6890 and its registry, and all from multicast on. The networks for
/// documentation (192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24) are left out: they harm nobody, and tests use them.
pub const PRIVATE4: [Cidr; 10] = [
    Cidr::v4(0, 0, 0, 0, 8),
    Cidr::v4(10, 0, 0, 0, 8),
    Cidr::v4(100, 64, 0, 0, 10),
    Cidr::v4(127, 0, 0, 0, 8),
    Cidr::v4(169, 254, 0, 0, 16),
    Cidr::v4(172, 16, 0, 0, 12),
    Cidr::v4(192, 0, 0, 0, 24),
    Cidr::v4(192, 168, 0, 0, 16),
    Cidr::v4(198, 18, 0, 0, 15),
    Cidr::v4(224, 0, 0, 0, 3),
];

/// Ranges of IPv6 that no public host has, and those that name an IPv4 host in another way.
pub const PRIVATE6: [Cidr; 10] = [
    Cidr::v6([0; 6], 96),
    Cidr::v6([0, 0, 0, 0, 0, 0xffff], 96),
    Cidr::v6([0x64, 0xff9b, 0, 0, 0, 0], 96),
    Cidr::v6([0x64, 0xff9b, 1, 0, 0, 0], 48),
    Cidr::v6([0x100, 0, 0, 0, 0, 0], 64),
    Cidr::v6([0x2001, 0, 0, 0, 0, 0], 32),
    Cidr::v6([0x2002, 0, 0, 0, 0, 0], 16),
    Cidr::v6([0xfc00, 0, 0, 0, 0, 0], 7),
    Cidr::v6([0xfe80, 0, 0, 0, 0, 0], 9),
    Cidr::v6([0xff00, 0, 0, 0, 0, 0], 8),
];

/// Where clouds keep the credentials of their hosts; some lie in no private range.
pub const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Whether an address is in a private range.
pub fn is_private(address: IpAddr) -> bool {
    let mut all = PRIVATE4.iter().chain(&PRIVATE6);
    all.any(|range| range.contains(address))
}
