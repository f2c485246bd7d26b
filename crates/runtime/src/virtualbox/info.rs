//! What VirtualBox says: `showvminfo --machinereadable`, `list vms`, `guestproperty get`. Pure parsing; anything that is
//! not understood is passed over.

use std::collections::BTreeMap;

/// What a machine is doing: `machineStateToName` in VirtualBox' `VBoxManageInfo.cpp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// Off, and the guest or we wanted it.
    PoweredOff,
    /// Off, since its process died.
    Aborted,
    /// Off, with the memory of the guest in a file.
    Saved,
    /// On, in whatever way.
    On(String),
    /// VirtualBox cannot read its files.
    Inaccessible,
}

/// What is of use to us of all that VirtualBox knows about a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) state: State,
    /// Numbers of network cards that there are, from 1.
    pub(super) cards: Vec<u32>,
    /// Folders of the host that its guest would see.
    pub(super) shared_folders: Vec<String>,
}

impl Info {
    /// `None` for a text that says nothing of a state.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let values: BTreeMap<&str, String> = text.lines().filter_map(pair).collect();
        let state = match values.get("VMState")?.as_str() {
            "poweroff" => State::PoweredOff,
            // `aborted-saved`: its process died while it was restored.
            "aborted" => State::Aborted,
            "saved" | "aborted-saved" => State::Saved,
            "inaccessible" => State::Inaccessible,
            other => State::On(other.chars().take(40).collect()),
        };
        let numbered = |name: &str| name.strip_prefix("nic")?.parse().ok();
        let cards = values
            .iter()
            .filter(|(_, value)| *value != "none")
            .filter_map(|(name, _)| numbered(name));
        let shared = values
            .iter()
            .filter(|(name, _)| name.starts_with("SharedFolderNameMachineMapping"))
            .map(|(_, value)| value.clone());
        Some(Self {
            state,
            cards: cards.collect(),
            shared_folders: shared.collect(),
        })
    }
}

/// `name="value"`, `name=value` or `"name"="value"`.
fn pair(line: &str) -> Option<(&str, String)> {
    let (name, value) = line.trim_end().split_once('=')?;
    let value = match value.strip_prefix('"').and_then(|v| v.strip_suffix('"')) {
        Some(quoted) => quoted.replace("\\\"", "\"").replace("\\\\", "\\"),
        None => value.to_owned(),
    };
    Some((name.trim_matches('"'), value))
}

/// The UUIDs of `list vms`, from lines `"NAME" {UUID}`. The name may be anything, or `<inaccessible>`.
pub(super) fn machines(text: &str) -> Vec<&str> {
    fn uuid(line: &str) -> Option<&str> {
        let (_, uuid) = line.trim_end().rsplit_once(' ')?;
        let uuid = uuid.strip_prefix('{')?.strip_suffix('}')?;
        is_uuid(uuid).then_some(uuid)
    }
    text.lines().filter_map(uuid).collect()
}

/// Whether a text may be handed on as a UUID.
pub(super) fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The value in the answer of `guestproperty get`, `Value: TEXT`; `None` when none is set.
pub(super) fn property(text: &str) -> Option<&str> {
    text.lines()
        .find_map(|line| line.strip_prefix("Value:"))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: &str = r#"name="hab12-7"
Encryption:     disabled
groups="/"
ostype="Debian (64-bit)"
UUID="5e3ba8a1-6a6f-4c1c-8b6e-2d4d0a2f9a11"
memory=512
"SATA-0-0"="/data/vm/hab12-7/Snapshots/{a}.vmdk"
nic1="nat"
nictype1="82540EM"
nicspeed1="0"
nic2="none"
nic3="hostonly"
uart1="0x03f8,4"
uartmode1="server,run/vmm/serial"
VMState="running"
VMStateChangeTime="2025-01-01T00:00:00.000000000"
SharedFolderNameMachineMapping1="home \"of\" me"
SharedFolderPathMachineMapping1="/home/me"
"#;

    #[test]
    fn what_matters_is_found_and_the_rest_passed_over() {
        let info = Info::parse(RUNNING).unwrap();
        assert_eq!(info.state, State::On("running".to_owned()));
        assert_eq!(info.cards, [1, 3]);
        assert_eq!(info.shared_folders, ["home \"of\" me"]);
    }

    #[test]
    fn states_are_told_apart() {
        for (word, state) in [
            ("poweroff", State::PoweredOff),
            ("aborted", State::Aborted),
            ("saved", State::Saved),
            ("aborted-saved", State::Saved),
            ("inaccessible", State::Inaccessible),
            ("gurumeditation", State::On("gurumeditation".to_owned())),
        ] {
            let info = Info::parse(&format!("VMState=\"{word}\"\r\n")).unwrap();
            assert_eq!(info.state, state);
        }
    }

    #[test]
    fn nonsense_is_nothing() {
        for text in [
            "",
            "\0\0\0=",
            "VMState",
            "VMStat=\"off\"",
            "\u{202e}=\"\"\n=\n",
        ] {
            assert_eq!(Info::parse(text), None, "{text:?}");
        }
        assert_eq!(machines("\"a\" {b}\n<inaccessible> {x}\n\"\n{}"), [""; 0]);
    }

    #[test]
    fn machines_are_listed_whatever_they_are_called() {
        let text = "\"debian base\" {6e3ba8a1-6a6f-4c1c-8b6e-2d4d0a2f9a11}\n\
                    \"a {b\" {not-a-uuid}\n\
                    \"<inaccessible>\" {61623132-0007-8068-8075-746368766278}\r\n";
        assert_eq!(
            machines(text),
            [
                "6e3ba8a1-6a6f-4c1c-8b6e-2d4d0a2f9a11",
                "61623132-0007-8068-8075-746368766278"
            ]
        );
    }

    #[test]
    fn a_property_is_its_value() {
        assert_eq!(property("Value: Reset\n"), Some("Reset"));
        assert_eq!(property("No value set!\n"), None);
    }
}
