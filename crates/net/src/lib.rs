//! Networks of machines on the host: names, addresses, taps, and the firewall that stands before them.

mod sys;

pub mod address;
pub mod bridge;
pub mod cidr;
pub mod dns;
pub mod domain;
pub mod elements;
pub mod firewall;
pub mod link;
pub mod private;
pub mod rules;
pub mod tap;

/// Longest name of a network interface, from `IFNAMSIZ` in `linux/if.h` without its NUL.
pub const MAX_INTERFACE_NAME: usize = 15;

/// The name that everything of a machine carries outside of its directory: `h<tag>-<slot>`.
///
/// `tag` has four characters, so that every slot fits into an interface's name.
pub fn label(tag: &str, slot: u16) -> String {
    format!("{}{slot}", label_prefix(tag))
}

/// How the labels of an instance begin.
pub fn label_prefix(tag: &str) -> String {
    format!("h{tag}-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_fits_into_an_interface_name() {
        assert!(label("abcd", u16::MAX).len() <= MAX_INTERFACE_NAME);
    }
}
