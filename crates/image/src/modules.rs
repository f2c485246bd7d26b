//! Kernel modules: what each needs, in which order they load, and the indexes that `modprobe`
//! reads. Computed from the modules themselves, because packages carry no `modules.dep` and
//! `depmod` may not be installed.

use crate::error::Error;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What machines need to reach their disk, network and channel, in the order of loading, and
/// whether a kernel without it is of no use. (A module that is built in counts as there.)
const BOOT: [(&str, bool); 12] = [
    ("virtio_ring", true),
    ("virtio", true),
    ("virtio_mmio", false),
    ("virtio_pci", false),
    ("virtio_blk", true),
    ("virtio_net", false),
    ("virtio_console", false),
    ("virtio_rng", false),
    ("vsock", false),
    ("vmw_vsock_virtio_transport", false),
    ("overlay", false),
    ("ext4", true),
];

/// One module file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// Below `lib/modules/RELEASE`.
    pub(crate) path: String,
    depends: Vec<String>,
    /// What should be loaded before, if it is there (`softdep=pre:`).
    before: Vec<String>,
    pub(crate) aliases: Vec<String>,
}

/// All modules of a kernel by name (`-` is `_` in names).
#[derive(Debug, Default)]
pub(crate) struct Modules {
    pub(crate) all: BTreeMap<String, Module>,
    pub(crate) built_in: BTreeSet<String>,
}

impl Modules {
    /// Reads the directory `lib/modules/RELEASE`.
    pub(crate) fn read(dir: &Path) -> Result<Self, Error> {
        let mut modules = Self::default();
        let mut stack = vec![PathBuf::new()];
        while let Some(below) = stack.pop() {
            let list = dir.join(&below);
            for entry in std::fs::read_dir(&list).map_err(Error::io("list", &list))? {
                let entry = entry.map_err(Error::io("list", &list))?;
                let kind = entry.file_type().map_err(Error::io("inspect", &list))?;
                let path = below.join(entry.file_name());
                if kind.is_dir() {
                    stack.push(path);
                } else if path.extension().is_some_and(|end| end == "ko") {
                    let whole = dir.join(&path);
                    let elf = std::fs::read(&whole).map_err(Error::io("read", &whole))?;
                    let info = modinfo(&elf).ok_or_else(|| Error::Package {
                        path: whole.clone(),
                        why: "this is no kernel module",
                    })?;
                    let path = path.to_string_lossy().into_owned();
                    modules.all.insert(name_of(&path), module(path, info));
                }
            }
        }
        let list = dir.join("modules.builtin");
        match std::fs::read_to_string(&list) {
            Ok(text) => modules.built_in.extend(text.lines().map(name_of)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &list)(error)),
        }
        Ok(modules)
    }

    /// Refuses modules of a kernel that could not reach its disk.
    pub(crate) fn check(&self, release: &str) -> Result<(), Error> {
        let there = |name| self.all.contains_key(name) || self.built_in.contains(name);
        match BOOT.iter().find(|(name, needed)| *needed && !there(*name)) {
            None => Ok(()),
            Some((module, _)) => Err(Error::MissingModule {
                release: release.to_owned(),
                module: (*module).to_owned(),
            }),
        }
    }

    /// The modules of an initramfs in the order of loading.
    pub(crate) fn boot_order(&self) -> Vec<&Module> {
        let mut order = Vec::new();
        for (name, _) in BOOT {
            self.with_needs(name, &mut order);
        }
        order.iter().map(|name| &self.all[*name]).collect()
    }

    /// Adds `name` after all that it needs. Visits each module once, so a cycle ends.
    fn with_needs<'a>(&'a self, name: &str, order: &mut Vec<&'a str>) {
        let mut seen: BTreeSet<&str> = order.iter().copied().collect();
        let Some((name, _)) = self.all.get_key_value(name) else {
            return;
        };
        if !seen.insert(name) {
            return;
        }
        let mut stack = vec![(name.as_str(), false)];
        while let Some((name, needs_done)) = stack.pop() {
            if needs_done {
                order.push(name);
                continue;
            }
            stack.push((name, true));
            let module = &self.all[name];
            for need in module.before.iter().chain(&module.depends).rev() {
                if let Some((need, _)) = self.all.get_key_value(need)
                    && seen.insert(need)
                {
                    stack.push((need, false));
                }
            }
        }
    }

    /// The hard needs of `name`, direct and indirect, in depmod's order: what must be loaded first
    /// stands last.
    fn needs(&self, name: &str) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        self.visit(name, &mut BTreeSet::new(), &mut found, 0);
        found.pop();
        found.reverse();
        found
    }

    fn visit<'a>(
        &'a self,
        name: &str,
        seen: &mut BTreeSet<&'a str>,
        found: &mut Vec<&'a str>,
        depth: usize,
    ) {
        // Real chains have fewer than twenty links.
        let Some((name, module)) = self.all.get_key_value(name).filter(|_| depth < 100) else {
            return;
        };
        if seen.insert(name) {
            for need in &module.depends {
                self.visit(need, seen, found, depth + 1);
            }
            found.push(name);
        }
    }

    /// One line of `modules.dep` per module.
    pub(crate) fn dep_lines(&self) -> Vec<(String, String)> {
        let path = |name: &str| self.all[name].path.as_str();
        self.all
            .keys()
            .map(|name| {
                let needs: Vec<&str> = self.needs(name).into_iter().map(path).collect();
                (
                    name.clone(),
                    format!("{}: {}", path(name), needs.join(" "))
                        .trim_end()
                        .to_owned(),
                )
            })
            .collect()
    }
}

/// The module's name for a path of its file.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path).trim();
    file.strip_suffix(".ko").unwrap_or(file).replace('-', "_")
}

fn module(path: String, info: &[u8]) -> Module {
    let mut module = Module {
        path,
        depends: Vec::new(),
        before: Vec::new(),
        aliases: Vec::new(),
    };
    for record in info.split(|byte| *byte == 0) {
        let Ok(record) = std::str::from_utf8(record) else {
            continue;
        };
        let names = |list: &str, split: char| -> Vec<String> {
            list.split(split)
                .filter(|name| !name.is_empty())
                .map(name_of)
                .collect()
        };
        match record.split_once('=') {
            Some(("depends", list)) => module.depends.extend(names(list, ',')),
            Some(("alias", alias)) => module.aliases.push(alias.to_owned()),
            Some(("softdep", text)) => {
                let before = text.split("pre:").nth(1).unwrap_or_default();
                let before = before.split("post:").next().unwrap_or_default();
                module.before.extend(names(before, ' '));
            }
            _ => {}
        }
    }
    module
}

/// The section `.modinfo` of an ELF64 little-endian file (elf(5)).
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    let bytes = |at: u64, len: u64| {
        elf.get(usize::try_from(at).ok()?..usize::try_from(at.checked_add(len)?).ok()?)
    };
    let u16_at = |at| {
        Some(u64::from(u16::from_le_bytes(
            bytes(at, 2)?.try_into().ok()?,
        )))
    };
    let u32_at = |at| {
        Some(u64::from(u32::from_le_bytes(
            bytes(at, 4)?.try_into().ok()?,
        )))
    };
    let u64_at = |at| Some(u64::from_le_bytes(bytes(at, 8)?.try_into().ok()?));
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (u64_at(0x28)?, u16_at(0x3a)?, u16_at(0x3c)?);
    let header = |index: u64| table.checked_add(index.checked_mul(size)?);
    let section = |index: u64| {
        let at = header(index)?;
        bytes(
            u64_at(at.checked_add(0x18)?)?,
            u64_at(at.checked_add(0x20)?)?,
        )
    };
    let names = section(u16_at(0x3e)?)?;
    (0..count).find_map(|index| {
        let name = usize::try_from(u32_at(header(index)?)?).ok()?;
        names
            .get(name..)?
            .starts_with(b".modinfo\0")
            .then(|| section(index))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn modules(list: &[(&str, &str)], built_in: &[&str]) -> Modules {
        let all = list.iter().map(|(name, info)| {
            let info = info.replace(';', "\0");
            (
                name_of(name),
                module(format!("kernel/{name}.ko"), info.as_bytes()),
            )
        });
        Modules {
            all: all.collect(),
            built_in: built_in.iter().map(|name| name_of(name)).collect(),
        }
    }

    #[test]
    fn boot_modules_come_after_what_they_need() {
        let modules = modules(
            &[
                ("virtio", "depends=virtio_ring"),
                ("virtio_ring", "depends="),
                ("virtio_blk", "depends=virtio_ring,virtio"),
                (
                    "virtio_net",
                    "depends=net-failover,virtio;softdep=pre: crypto-x post: late",
                ),
                ("net-failover", "depends=failover"),
                ("failover", ""),
                ("crypto-x", ""),
                ("late", ""),
                ("unrelated", ""),
            ],
            &["kernel/fs/ext4/ext4.ko"],
        );
        modules.check("6.1").unwrap();
        let order = modules.boot_order();
        let paths: Vec<_> = order
            .iter()
            .map(|module| &module.path[7..module.path.len() - 3])
            .collect();
        assert_eq!(
            paths,
            [
                "virtio_ring",
                "virtio",
                "virtio_blk",
                "crypto-x",
                "failover",
                "net-failover",
                "virtio_net"
            ]
        );
        let line = &modules
            .dep_lines()
            .into_iter()
            .find(|(name, _)| name == "virtio_net")
            .unwrap()
            .1;
        assert_eq!(
            line,
            "kernel/virtio_net.ko: kernel/virtio.ko kernel/virtio_ring.ko kernel/net-failover.ko kernel/failover.ko"
        );
    }

    #[test]
    fn a_kernel_without_disks_is_of_no_use() {
        let modules = modules(&[("virtio", ""), ("virtio_ring", "")], &["ext4.ko"]);
        let error = modules.check("6.1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel 6.1 has no module virtio_blk, and it is not built in"
        );
    }

    #[test]
    fn modules_that_need_each_other_do_not_hang_us() {
        let list = [
            ("virtio", "depends=virtio_ring"),
            ("virtio_ring", "depends=virtio"),
        ];
        let modules = modules(&list, &["virtio_blk.ko", "ext4.ko"]);
        assert_eq!(modules.boot_order().len(), 2);
        assert_eq!(modules.dep_lines().len(), 2);
    }

    proptest! {
        #[test]
        fn damaged_modules_never_panic(mut elf in prop::collection::vec(any::<u8>(), 64..400)) {
            elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
            let _ = modinfo(&elf);
        }
    }
}
