//! Host labels: what a machine is called below the gateway's domain. Pure.
//!
//! The gateway reads a label that begins with a number and a dash as a port and a label: `3000-web` is port 3000 of
//! `web`. So no machine has a label that begins so: the machine `3000-web` is `m-3000-web`. Labels are one namespace
//! for all owners; a second `web` gets one that has a part of its id.

use hutch_contract::id::MachineId;
use hutch_contract::name::Name;

/// The longest label, in bytes: with `65535-` before it, it is as long as DNS allows (RFC 1035, 2.3.4).
const LONGEST: usize = Name::MAX_LEN - "65535-".len();
/// Characters of the id in a second owner's label.
const MARK: usize = 4;

/// The labels that a machine may have, the nicest first. The last one has its whole id and is nobody else's.
pub(crate) fn candidates(name: &Name, id: &MachineId) -> [String; 3] {
    let plain = without_port(name.to_string());
    let ulid = id.as_str().rsplit('-').next().unwrap_or_default();
    let mark = &ulid[ulid.len().saturating_sub(MARK)..];
    let marked = |mark: &str| {
        let beginning = cut(&plain, LONGEST - 1 - mark.len());
        // Of a name that is a number the mark has made a port.
        without_port(format!("{beginning}-{mark}"))
    };
    let first = match plain.len() > LONGEST {
        true => marked(mark),
        false => plain.clone(),
    };
    [first, marked(mark), marked(ulid)]
}

fn without_port(label: String) -> String {
    match has_port(&label) {
        true => format!("m-{label}"),
        false => label,
    }
}

/// Whether the gateway would, or some day might, take it for a port and a label.
fn has_port(label: &str) -> bool {
    label.split_once('-').is_some_and(|(port, _)| {
        (1..=5).contains(&port.len())
            && !port.starts_with('0')
            && port.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// At most so many bytes of a label, itself one.
fn cut(label: &str, length: usize) -> &str {
    label[..label.len().min(length)].trim_end_matches('-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> MachineId {
        "mch-01k2j3m4n5p6q7r8s9t0v1w2x3".parse().expect("an id")
    }

    fn of(name: &str) -> [String; 3] {
        candidates(&name.parse().expect("a name"), &id())
    }

    #[test]
    fn a_machine_is_called_by_its_name_and_a_second_one_by_its_id_too() {
        let labels = of("web");
        assert_eq!(
            labels,
            ["web", "web-w2x3", "web-01k2j3m4n5p6q7r8s9t0v1w2x3"]
        );
    }

    #[test]
    fn what_reads_as_a_port_is_no_label() {
        for (name, label) in [
            ("3000-web", "m-3000-web"),
            ("1-1", "m-1-1"),
            ("99999-a", "m-99999-a"),
            ("3000", "3000"),
            ("0-web", "0-web"),
            ("080-web", "080-web"),
            ("123456-web", "123456-web"),
            ("3a-web", "3a-web"),
            ("web-3000", "web-3000"),
        ] {
            assert_eq!(of(name)[0], label);
        }
    }

    #[test]
    fn a_long_name_leaves_room_for_a_port() {
        let name = "a".repeat(57);
        assert_eq!(of(&name)[0], name);
        let label = &of(&"a".repeat(63))[0];
        assert_eq!(*label, format!("{}-w2x3", "a".repeat(52)));
    }

    proptest! {
        #[test]
        fn every_label_can_stand_behind_every_port(name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
            for label in of(&name) {
                prop_assert!(label.len() <= LONGEST && !has_port(&label), "{}", label);
                prop_assert!(label.parse::<Name>().is_ok(), "{}", label);
                let longest = format!("65535-{label}");
                prop_assert!(longest.parse::<Name>().is_ok(), "{}", longest);
            }
        }
    }
}
