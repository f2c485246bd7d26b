//! A machine as VirtualBox has it: our record of it, and the command lines that make, change and remove it. Pure but
//! for the record's file. Options are those of VirtualBox 7.0 and 7.1, from the manual pages `VBoxManage-*`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::info::{Info, is_uuid};
use crate::launch::{read_json, write_json};
use crate::{Error, MachineDir, MachineSpec, Nic};

/// The record, in the machine's directory. It is there before VirtualBox knows the machine, and until it does not.
const RECORD: &str = "virtualbox.json";
/// The end of the UUIDs of our machines: `hutchvbx`.
const MARK: &str = "-8068-8075-746368766278";
/// Where VirtualBox puts its files of the machine, in the machine's directory.
const FOLDER: &str = "vm";
/// The agent's serial line. Relative, since the address of a socket has room for 108 bytes: the VMM's working directory
/// is the machine's.
pub(super) const CHANNEL: &str = "run/vmm/serial";
/// What VirtualBox calls the VMM's own standard output, which the shim keeps in a bounded ring.
const CONSOLE: &str = "/proc/self/fd/1";
/// Says why a machine is off, as long as [`RESET_IS_OFF`] is set: `PowerOff` or `Reset` (VirtualBox' `ConsoleImpl.cpp`).
pub(super) const OFF_REASON: &str = "/VirtualBox/HostInfo/VMPowerOffReason";
/// The id of the machine that it is.
const OWNER: &str = "hutch/machine";
/// Makes a reset by the guest end the VMM, as on the other runtimes.
const RESET_IS_OFF: &str = "VBoxInternal2/TurnResetIntoPowerOff";

/// A base VM and the snapshot of it that machines are clones of: `VM@SNAPSHOT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    vm: String,
    snapshot: String,
}

impl Base {
    /// The last `@` separates: names of VMs may contain one, those of snapshots then may not.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (vm, snapshot) = text.rsplit_once('@')?;
        // A name that begins so would be an option.
        let fits = |name: &str| !name.is_empty() && !name.starts_with('-');
        (fits(vm) && fits(snapshot)).then(|| Self {
            vm: vm.to_owned(),
            snapshot: snapshot.to_owned(),
        })
    }

    pub(super) fn vm(&self) -> &str {
        &self.vm
    }
}

/// What we know of a machine that VirtualBox may know. The UUID follows from the label, so that no other machine is ever
/// meant (the user has machines too), and ours are known even when VirtualBox cannot read their names any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LinkedClone {
    pub(super) uuid: String,
    pub(super) name: String,
}

impl LinkedClone {
    /// The one in a directory.
    pub(super) fn find(dir: &MachineDir) -> Option<Self> {
        let found = read_json::<Self>(&dir.file(RECORD))?;
        is_uuid(&found.uuid).then_some(found)
    }

    /// The one that a label names, whether it is there or not.
    pub(super) fn of(label: &str) -> Result<Self, Error> {
        let found = label.strip_prefix('h').and_then(|rest| {
            let (tag, slot) = rest.split_once('-')?;
            let tag: [u8; 4] = tag.as_bytes().try_into().ok()?;
            Some(Self {
                uuid: uuid(tag, slot.parse().ok()?),
                name: label.to_owned(),
            })
        });
        found.ok_or_else(|| Error::Setting {
            runtime: super::NAME,
            setting: "label",
            value: label.to_owned(),
        })
    }

    /// Writes the record, so that the directory alone tells which machine it is.
    pub(super) fn note(&self, dir: &MachineDir) -> Result<(), Error> {
        if Self::find(dir).as_ref() == Some(self) {
            return Ok(());
        }
        let path = dir.file(RECORD);
        write_json(&path, self).map_err(Error::io("write", path))
    }

    /// Drops the record, and what VirtualBox may have left of its files.
    pub(super) fn forget(dir: &MachineDir) -> Result<(), Error> {
        let gone = |result: std::io::Result<()>| match result {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let folder = dir.file(FOLDER);
        gone(std::fs::remove_dir_all(&folder)).map_err(Error::io("remove", folder))?;
        let record = dir.file(RECORD);
        gone(std::fs::remove_file(&record)).map_err(Error::io("remove", record))
    }

    /// Makes it, linked to its base. The folder must be named from the root: VBoxSVC makes it, whose directory is
    /// another.
    pub(super) fn make(&self, base: &Base, dir: &Path) -> Vec<String> {
        let folder = dir.join(FOLDER);
        words([
            "clonevm",
            base.vm.as_str(),
            "--snapshot",
            base.snapshot.as_str(),
            "--mode",
            "machine",
            "--options",
            "Link",
            "--name",
            self.name.as_str(),
            "--uuid",
            self.uuid.as_str(),
            "--basefolder",
            &folder.to_string_lossy(),
            "--register",
        ])
    }

    /// Gives it its shape, and takes from it what its base may have: network cards that lead somewhere, and folders of
    /// the host.
    pub(super) fn shape(&self, spec: &MachineSpec, info: &Info) -> Vec<Vec<String>> {
        let (memory, vcpu) = (spec.memory_mib.to_string(), spec.vcpu.to_string());
        let mut modify = words([
            "modifyvm",
            self.uuid.as_str(),
            "--memory",
            &memory,
            "--cpus",
            &vcpu,
        ]);
        let first = match &spec.nic {
            Nic::None => "none",
            // A card without a cable. Taps and passt are refused before.
            Nic::Restricted | Nic::Tap { .. } | Nic::Filtered(_) => "null",
        };
        modify.extend(words(["--nic1", first]));
        for card in info.cards.iter().filter(|card| **card != 1) {
            modify.extend(words([&format!("--nic{card}"), "none"]));
        }
        modify.extend(words(["--uart1", "0x3F8", "4", "--uart-mode1", "server"]));
        modify.push(CHANNEL.to_owned());
        modify.extend(words(["--uart2", "0x2F8", "3", "--uart-mode2", "file"]));
        modify.push(CONSOLE.to_owned());
        let mut all = vec![
            modify,
            words(["setextradata", self.uuid.as_str(), RESET_IS_OFF, "1"]),
        ];
        all.extend(info.shared_folders.iter().map(|folder| {
            words([
                "sharedfolder",
                "remove",
                self.uuid.as_str(),
                "--name",
                folder,
            ])
        }));
        all
    }

    /// Throws the memory away that VirtualBox saved: a start is a boot.
    pub(super) fn discard(&self) -> Vec<String> {
        words(["discardstate", self.uuid.as_str()])
    }

    /// Asks what it is doing.
    pub(super) fn show(&self) -> Vec<String> {
        words(["showvminfo", self.uuid.as_str(), "--machinereadable"])
    }

    /// Asks why it is off.
    pub(super) fn why_off(&self) -> Vec<String> {
        words(["guestproperty", "get", self.uuid.as_str(), OFF_REASON])
    }

    /// Does something to it while it runs.
    pub(super) fn control(&self, what: &str) -> Vec<String> {
        words(["controlvm", self.uuid.as_str(), what])
    }

    /// Notes whose it is where VirtualBox keeps it: a directory may be gone before what it was the directory of.
    pub(super) fn belongs(&self, id: &str) -> Vec<String> {
        words(["setextradata", self.uuid.as_str(), OWNER, id])
    }

    /// What the shim runs. Remote display off: the base may have it on.
    pub(super) fn run(&self, program: String) -> Vec<String> {
        let mut argv = vec![program];
        argv.extend(words(["--startvm", self.uuid.as_str(), "--vrde", "off"]));
        argv
    }
}

/// Asks whose a machine is.
pub(super) fn whose(uuid: &str) -> Vec<String> {
    words(["getextradata", uuid, OWNER])
}

/// Removes the machine of that UUID with all of its files.
pub(super) fn remove(uuid: &str) -> Vec<String> {
    words(["unregistervm", uuid, "--delete"])
}

/// Version 8 of RFC 9562: tag and slot, and our mark.
fn uuid(tag: [u8; 4], slot: u16) -> String {
    format!("{:08x}-{slot:04x}{MARK}", u32::from_be_bytes(tag))
}

/// Whether a UUID is that of a machine of a server with this tag.
pub(super) fn is_of(uuid: &str, tag: &str) -> bool {
    let tag = <[u8; 4]>::try_from(tag.as_bytes()).map(u32::from_be_bytes);
    tag.is_ok_and(|tag| uuid.starts_with(&format!("{tag:08x}-"))) && uuid.ends_with(MARK)
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtualbox::info::State;

    const UUID: &str = "5e3ba8a1-6a6f-4c1c-8b6e-2d4d0a2f9a11";

    fn machine() -> LinkedClone {
        LinkedClone {
            uuid: UUID.to_owned(),
            name: "hab12-7".to_owned(),
        }
    }

    fn info() -> Info {
        Info {
            state: State::PoweredOff,
            cards: vec![1, 3],
            shared_folders: vec!["my home".to_owned()],
        }
    }

    fn spec(nic: Nic) -> MachineSpec {
        MachineSpec {
            id: "mch-1".into(),
            label: "hab12-7".into(),
            vcpu: 2,
            memory_mib: 512,
            kernel_args: Vec::new(),
            nic,
            user: None,
        }
    }

    #[test]
    fn a_base_is_a_machine_and_its_snapshot() {
        let base = |text: &str| Base::parse(text).map(|base| (base.vm, base.snapshot));
        let pair = |vm: &str, snapshot: &str| Some((vm.to_owned(), snapshot.to_owned()));
        assert_eq!(base("debian 12@clean"), pair("debian 12", "clean"));
        assert_eq!(base("a@b@c"), pair("a@b", "c"));
        for text in [
            "",
            "debian",
            "@clean",
            "debian@",
            "--all@clean",
            "debian@-x",
        ] {
            assert_eq!(base(text), None, "{text}");
        }
    }

    #[test]
    fn the_command_lines() {
        let base = Base::parse("debian 12@clean").unwrap();
        assert_eq!(
            machine()
                .make(&base, Path::new("/data/machines/mch-1"))
                .join("|"),
            format!(
                "clonevm|debian 12|--snapshot|clean|--mode|machine|--options|Link|--name|hab12-7|--uuid|{UUID}|\
                 --basefolder|/data/machines/mch-1/vm|--register"
            )
        );
        let shape = machine().shape(&spec(Nic::Restricted), &info());
        let shape: Vec<_> = shape.iter().map(|line| line.join("|")).collect();
        assert_eq!(
            shape,
            [
                format!(
                    "modifyvm|{UUID}|--memory|512|--cpus|2|--nic1|null|--nic3|none|\
                     --uart1|0x3F8|4|--uart-mode1|server|run/vmm/serial|\
                     --uart2|0x2F8|3|--uart-mode2|file|/proc/self/fd/1"
                ),
                format!("setextradata|{UUID}|VBoxInternal2/TurnResetIntoPowerOff|1"),
                format!("sharedfolder|remove|{UUID}|--name|my home"),
            ]
        );
        assert_eq!(
            machine().run("/opt/VBoxHeadless".to_owned()).join("|"),
            format!("/opt/VBoxHeadless|--startvm|{UUID}|--vrde|off")
        );
        assert_eq!(
            remove(UUID).join("|"),
            format!("unregistervm|{UUID}|--delete")
        );
    }

    #[test]
    fn no_card_of_the_base_leads_anywhere() {
        for nic in [Nic::None, Nic::Restricted] {
            let all = &machine().shape(&spec(nic), &info())[0];
            let cards = all.windows(2).filter(|pair| pair[0].starts_with("--nic"));
            for pair in cards {
                assert!(["none", "null"].contains(&pair[1].as_str()), "{pair:?}");
            }
        }
    }

    #[test]
    fn a_label_has_a_uuid_of_its_own() {
        let uuid = |label: &str| LinkedClone::of(label).map(|clone| clone.uuid);
        let one = uuid("hab12-7").unwrap();
        assert_eq!(one, "61623132-0007-8068-8075-746368766278");
        assert!(is_uuid(&one) && is_of(&one, "ab12"));
        assert!(!is_of(&one, "ab13") && !is_of(UUID, "ab12") && !is_of(&one, ""));
        assert_ne!(uuid("hab12-8").unwrap(), one);
        for label in [
            "",
            "hab12",
            "hab12-",
            "hab12-70000",
            "hab-1",
            "xab12-1",
            "hab12-7x",
        ] {
            assert!(uuid(label).is_err(), "{label}");
        }
    }

    #[test]
    fn a_record_is_made_once_and_believed_only_when_it_can_be() {
        let path = std::env::temp_dir().join(format!("hutch-vbox-record-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let dir = MachineDir::new(&path);
        assert_eq!(LinkedClone::find(&dir), None);
        let machine = LinkedClone::of("hab12-7").unwrap();
        machine.note(&dir).unwrap();
        machine.note(&dir).unwrap();
        assert_eq!(LinkedClone::find(&dir), Some(machine));
        std::fs::write(path.join(RECORD), r#"{"uuid": "--all", "name": "x"}"#).unwrap();
        assert_eq!(LinkedClone::find(&dir), None);
        LinkedClone::forget(&dir).unwrap();
        LinkedClone::forget(&dir).unwrap();
        std::fs::remove_dir(&path).unwrap();
    }
}
