//! A directory of modules: copied from elsewhere, listed as `modprobe` wants it, packed into a disk.

use crate::build::build_disk;
use crate::deb;
use crate::error::Error;
use crate::ext4::Purpose;
use crate::kmod_index;
use crate::limits::Limits;
use crate::modules::Modules;
use crate::progress::OnProgress;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Copies `lib/modules/RELEASE` to `modules/RELEASE` below `tree`, and gives that path.
pub(crate) fn copy_modules(modules: &Path, tree: &Path) -> Result<PathBuf, Error> {
    let release = modules.file_name().ok_or_else(|| Error::Package {
        path: modules.to_owned(),
        why: "the directory of modules must be named like the release",
    })?;
    let into = tree.join("modules").join(release);
    fs::create_dir_all(&into).map_err(Error::io("create", &into))?;
    let mut stack = vec![PathBuf::new()];
    while let Some(below) = stack.pop() {
        let from = modules.join(&below);
        for entry in fs::read_dir(&from).map_err(Error::io("list", &from))? {
            let entry = entry.map_err(Error::io("list", &from))?;
            let path = below.join(entry.file_name());
            // depmod's own lists are made anew; links lead to headers.
            let name = path.to_string_lossy();
            let kept = name.contains(".ko")
                || name.starts_with("modules.builtin")
                || name == "modules.order";
            match entry.file_type().map_err(Error::io("inspect", &from))? {
                kind if kind.is_dir() => stack.push(path),
                kind if kind.is_file() && kept => {
                    let source = entry.path();
                    let mut file = File::open(&source).map_err(Error::io("open", &source))?;
                    deb::put(&mut file, &into.join(&path), &Limits::default())?;
                }
                _ => {}
            }
        }
    }
    Ok(into)
}

/// The lists that depmod would write: text for busybox and people, binary for kmod.
pub(crate) fn write_indexes(all: &Modules, dir: &Path) -> Result<(), Error> {
    let needs = all.dep_lines();
    let text: String = needs.iter().map(|(_, line)| format!("{line}\n")).collect();
    let mut aliases = Vec::new();
    for (name, module) in &all.all {
        aliases.extend(
            module
                .aliases
                .iter()
                .map(|alias| (alias.replace('-', "_"), name.clone())),
        );
    }
    let alias_text: String = aliases
        .iter()
        .map(|(alias, name)| format!("alias {alias} {name}\n"))
        .collect();
    let built_in = all
        .built_in
        .iter()
        .map(|name| (name.clone(), String::new()));
    for (file, bytes) in [
        ("modules.dep", text.into_bytes()),
        ("modules.dep.bin", kmod_index::render(needs)),
        ("modules.alias", alias_text.into_bytes()),
        ("modules.alias.bin", kmod_index::render(aliases)),
        ("modules.builtin.bin", kmod_index::render(built_in)),
        ("modules.symbols.bin", kmod_index::render([])),
    ] {
        let path = dir.join(file);
        fs::write(&path, bytes).map_err(Error::io("write", &path))?;
    }
    Ok(())
}

/// Packs `dir` (with one directory, the release) into an ext4 disk and gives its digest.
pub(crate) fn modules_disk(
    dir: &Path,
    disk: &Path,
    progress: OnProgress<'_>,
) -> Result<String, Error> {
    let pack = || -> io::Result<File> {
        let mut tar = tar::Builder::new(tempfile::tempfile_in(dir)?);
        tar.mode(tar::HeaderMode::Deterministic);
        let mut stack = vec![PathBuf::new()];
        while let Some(below) = stack.pop() {
            let mut entries: Vec<_> = fs::read_dir(dir.join(&below))?.collect::<Result<_, _>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let path = below.join(entry.file_name());
                tar.append_path_with_name(entry.path(), &path)?;
                if entry.file_type()?.is_dir() {
                    stack.push(path);
                }
            }
        }
        tar.into_inner()
    };
    let mut inputs = [pack().map_err(Error::io("pack", dir))?];
    let output = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(disk);
    let output = output.map_err(Error::io("create", disk))?;
    let limits = Limits::default();
    let built = build_disk(&mut inputs, &output, Purpose::Modules, &limits, progress)?;
    Ok(built.sha256)
}
