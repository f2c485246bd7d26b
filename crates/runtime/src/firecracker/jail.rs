//! Firecracker's jailer: a root directory of its own, made of hard links, with the few devices that it needs. It begins as
//! root and changes to the machine's user by itself; cgroup and limits are the shim's affair, as everywhere, and so is the
//! empty network namespace of one without a tap. See Firecracker's `docs/jailer.md`.
//!
//! ```text
//! run/vmm/PROGRAM/machine/root/    PROGRAM is the jailed program's file name
//!   kernel initramfs disk.raw modules.img config.json   linked or written by the shim
//!   PROGRAM dev/kvm dev/net/tun dev/urandom …           made by the jailer, which wants them missing
//!   api.sock vsock.sock
//! ```
//! The kernel forgets at the change of user that the VMM is to die with its shim. It stays in its machine's cgroup.

use std::path::Path;

use super::NAME;
use crate::{Error, MachineDir, User};

/// Its name in the jail: machines are told apart by their directories.
const ID: &str = "machine";

/// Where things are for the VMM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Before the names of its own files.
    pub(super) own: &'static str,
    /// Where what it says about itself goes, when not on its standard output.
    pub(super) log: Option<&'static str>,
}

impl Place {
    /// In the machine's directory.
    pub(super) const SHIM: Self = Self {
        own: "run/vmm/",
        // Its standard error, opened again: it takes names only.
        log: Some("/proc/self/fd/2"),
    };
    /// In a jail, where there is no /proc: what it says comes between what its guest says.
    pub(super) const JAIL: Self = Self { own: "", log: None };
}

/// How one machine is jailed.
pub(super) struct Jail {
    jailer: String,
    program: String,
    user: User,
    /// The jail's root, relative to the machine's directory.
    pub(super) root: String,
}

impl Jail {
    /// # Errors
    /// [`Error::Io`] for a program that is not there, [`Error::Setting`] for a path that is not text.
    pub(super) fn new(jailer: &Path, program: &Path, user: User) -> Result<Self, Error> {
        let text = |setting, path: &Path| {
            let path = path.canonicalize().map_err(Error::io("find", path))?;
            let path = path.into_os_string().into_string();
            path.map_err(|path| Error::Setting {
                runtime: NAME,
                setting,
                value: path.to_string_lossy().into_owned(),
            })
        };
        let (jailer, program) = (text("jailer", jailer)?, text("program", program)?);
        let name = program.rsplit('/').next().unwrap_or_default();
        let root = format!("{}/{name}/{ID}/root", MachineDir::VMM);
        Ok(Self {
            jailer,
            program,
            user,
            root,
        })
    }

    /// The command line up to the jailed program's own arguments.
    pub(super) fn argv(&self) -> Vec<String> {
        let (uid, gid) = (self.user.uid.to_string(), self.user.gid.to_string());
        let argv = [
            &self.jailer,
            "--id",
            ID,
            "--exec-file",
            &self.program,
            "--uid",
            &uid,
            "--gid",
            &gid,
            "--chroot-base-dir",
            MachineDir::VMM,
            "--",
        ];
        argv.map(str::to_owned).to_vec()
    }

    /// What is in the jail besides its own files.
    pub(super) fn links(&self, has_modules: bool) -> Vec<(String, String)> {
        let modules = has_modules.then_some(MachineDir::MODULES);
        let all = [MachineDir::KERNEL, MachineDir::INITRAMFS, MachineDir::DISK];
        let link = |name: &str| (name.to_owned(), format!("{}/{name}", self.root));
        all.into_iter().chain(modules).map(link).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jail_is_below_the_machines_directory() {
        let user = User {
            uid: 0x7000_0007,
            gid: 0x7000_0007,
        };
        let this = std::env::current_exe().unwrap().canonicalize().unwrap();
        let jail = Jail::new(Path::new("/bin/true"), &this, user).unwrap();
        let name = this.file_name().unwrap().to_str().unwrap();
        assert_eq!(jail.root, format!("run/vmm/{name}/machine/root"));
        assert_eq!(
            jail.argv()[1..].join(" "),
            format!(
                "--id machine --exec-file {} --uid 1879048199 --gid 1879048199 --chroot-base-dir run/vmm --",
                this.display()
            )
        );
        let links = jail.links(true);
        assert_eq!(links.len(), 4);
        for (old, new) in links {
            assert_eq!(new, format!("{}/{old}", jail.root));
        }
        assert_eq!(jail.links(false).len(), 3);
        let missing = Jail::new(Path::new("/nonexistent/jailer"), &this, user);
        assert!(matches!(missing, Err(Error::Io { .. })));
    }
}
