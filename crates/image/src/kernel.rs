//! The boot set: kernel, initramfs and modules disk, the same for every machine, made once per
//! kernel and agent and kept in a cache.
//!
//! ```text
//! CACHE/kernels/KEY/   vmlinuz, vmlinux, modules.raw, boot/*.ko, boot/order, kernel.json   per package or kernel
//! CACHE/boot/ID/       initramfs                                                  per kernel and agent
//! CACHE/distribution   KEY of the distribution's kernel that was found first
//! CACHE/lock           held while anything of this is made
//! ```
//! Directories appear by rename, whole. The distribution's kernel stays the one found first until
//! `distribution` is removed, so that machines do not change under their owner and a start needs
//! no package tool.

use crate::apt;
use crate::build::hex;
use crate::cpio::Cpio;
use crate::deb;
use crate::error::Error;
use crate::kernel_image;
use crate::modules::Modules;
use crate::modules_dir::{copy_modules, modules_disk, write_indexes};
use crate::progress::{OnProgress, Progress};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Counts up when the content of a cached directory changes its form.
const FORM: &str = "2";
/// The kernel as an ELF file, and the disk of modules, in a kernel's directory.
const ELF: &str = "vmlinux";
const MODULES_DISK: &str = "modules.raw";

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The distribution's package for virtual machines, by `apt-get download`.
    Distribution,
    /// A file of the administrator's.
    File {
        /// A kernel package (`.deb`) that holds both kernel and modules, or a kernel alone.
        path: PathBuf,
        /// Modules for a kernel alone: its directory `lib/modules/RELEASE`. When left out, the host's modules of the
        /// same release are taken, else those of the distribution's kernel in the cache, else none.
        modules: Option<PathBuf>,
    },
}

/// What a machine boots with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootSet {
    /// Digest of kernel, modules and agent, hexadecimal: equal sets have equal ids.
    pub id: String,
    /// The kernel as the distribution ships it.
    pub kernel: PathBuf,
    /// The same as an ELF file, for VMMs that have no boot loader; none when it cannot be unpacked.
    pub elf: Option<PathBuf>,
    /// The initramfs (cpio, not packed).
    pub initramfs: PathBuf,
    /// A read-only ext4 disk to be mounted on `/lib/modules`; none for a kernel without modules.
    pub modules_disk: Option<PathBuf>,
    /// What `uname -r` says under this kernel.
    pub kernel_release: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kernel {
    release: String,
    /// Digest of kernel and modules disk.
    digest: String,
}

/// Finds or makes the boot set for the program `agent`, which becomes `/init`. Cheap when all of
/// it is in the cache; safe when several processes do it at once.
pub fn boot_set(
    cache_dir: &Path,
    agent: &Path,
    source: &KernelSource,
    progress: OnProgress<'_>,
) -> Result<BootSet, Error> {
    for dir in ["kernels", "boot"] {
        let dir = cache_dir.join(dir);
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    }
    let agent_bytes = fs::read(agent).map_err(Error::io("read", agent))?;
    let cache = Cache { dir: cache_dir };
    if let Some(dir) = cache.find(source)?
        && let Some(set) = cache.set(&dir, &agent_bytes)?
    {
        return Ok(set);
    }
    let lock = cache_dir.join("lock");
    let file = File::create(&lock).map_err(Error::io("create", &lock))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|errno| Error::io("lock", &lock)(errno.into()))?;
    // Another process may have been faster.
    let dir = match cache.find(source)? {
        Some(dir) => dir,
        None => cache.add_kernel(source, progress)?,
    };
    add_elf(&dir)?;
    if let Some(set) = cache.set(&dir, &agent_bytes)? {
        return Ok(set);
    }
    progress(Progress::step("making the initramfs", 0));
    cache.add_initramfs(&dir, &agent_bytes)?;
    let set = cache.set(&dir, &agent_bytes)?;
    set.ok_or_else(|| Error::io("read", &dir)(io::ErrorKind::NotFound.into()))
}

struct Cache<'a> {
    dir: &'a Path,
}

impl Cache<'_> {
    /// The directory of the kernel, if it is here.
    fn find(&self, source: &KernelSource) -> Result<Option<PathBuf>, Error> {
        let key = match source {
            KernelSource::Distribution => {
                let path = self.dir.join("distribution");
                match fs::read_to_string(&path) {
                    Ok(key) if is_key(&key) => key,
                    Ok(_) => return Ok(None),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(Error::io("read", &path)(error)),
                }
            }
            KernelSource::File { path, modules } => {
                key_of([Some(path), modules.as_ref()].into_iter().flatten())?
            }
        };
        let dir = self.dir.join("kernels").join(key);
        Ok(dir.is_dir().then_some(dir))
    }

    fn id(&self, kernel: &Kernel, agent: &[u8]) -> String {
        let agent = Sha256::digest(agent);
        let all = Sha256::new()
            .chain_update(FORM)
            .chain_update(&kernel.digest)
            .chain_update(agent);
        hex(&all.finalize())
    }

    fn kernel(&self, dir: &Path) -> Result<Kernel, Error> {
        let path = dir.join("kernel.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|error| Error::io("understand", &path)(error.into()))
    }

    /// The set, if its initramfs is here.
    fn set(&self, dir: &Path, agent: &[u8]) -> Result<Option<BootSet>, Error> {
        let kernel = self.kernel(dir)?;
        let id = self.id(&kernel, agent);
        let initramfs = self.dir.join("boot").join(&id).join("initramfs");
        let elf = dir.join(ELF);
        let (true, Ok(found)) = (initramfs.is_file(), fs::metadata(&elf)) else {
            return Ok(None);
        };
        Ok(Some(BootSet {
            id,
            kernel: dir.join("vmlinuz"),
            elf: (found.len() > 0).then_some(elf),
            initramfs,
            modules_disk: Some(dir.join(MODULES_DISK)).filter(|disk| disk.is_file()),
            kernel_release: kernel.release,
        }))
    }

    fn add_kernel(
        &self,
        source: &KernelSource,
        progress: OnProgress<'_>,
    ) -> Result<PathBuf, Error> {
        let kernels = self.dir.join("kernels");
        sweep(&kernels);
        let tmp = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempdir_in(&kernels)
            .map_err(Error::io("create a directory in", &kernels))?;
        let (tree, result) = (tmp.path().join("tree"), tmp.path().join("kernel"));
        for dir in [&tree, &result] {
            fs::create_dir(dir).map_err(Error::io("create", dir))?;
        }
        let key = match source {
            KernelSource::Distribution => {
                let packages = apt::download_kernel(tmp.path(), progress)?;
                progress(Progress::step("unpacking the kernel package", 0));
                for deb in &packages.files {
                    deb::take_kernel(deb, &tree)?;
                }
                assemble(&tree, &result, Path::new(&packages.key), progress)?;
                packages.key
            }
            KernelSource::File { path, modules } => {
                if !deb::is_package(path)? {
                    self.take_image(path, modules.as_deref(), &tree, &result, progress)?;
                } else if modules.is_none() {
                    progress(Progress::step("unpacking the kernel package", 0));
                    deb::take_kernel(path, &tree)?;
                    assemble(&tree, &result, path, progress)?;
                } else {
                    return Err(Error::Package {
                        path: path.clone(),
                        why: "a package brings its own modules, and others were named besides",
                    });
                }
                key_of([Some(path), modules.as_ref()].into_iter().flatten())?
            }
        };
        let dir = kernels.join(&key);
        publish(&result, &dir)?;
        if *source == KernelSource::Distribution {
            self.remember(&key)?;
        }
        Ok(dir)
    }

    /// A kernel alone, with the modules that go with it. Whether it can do without them only a boot shows: what is
    /// missing may be built in, and the agent says what is not.
    fn take_image(
        &self,
        path: &Path,
        modules: Option<&Path>,
        tree: &Path,
        result: &Path,
        progress: OnProgress<'_>,
    ) -> Result<(), Error> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        if !kernel_image::is_kernel(&bytes) {
            return Err(Error::Package {
                path: path.to_owned(),
                why: "this is neither a kernel package (.deb) nor a kernel (bzImage, ELF)",
            });
        }
        let told = kernel_image::release(&bytes);
        let host = told
            .as_ref()
            .map(|release| Path::new("/lib/modules").join(release));
        let host = host.filter(|dir| dir.join("kernel").is_dir());
        let vmlinuz = tree.join("vmlinuz");
        fs::write(&vmlinuz, &bytes).map_err(Error::io("write", &vmlinuz))?;
        let release = told.unwrap_or_else(|| "unknown".to_owned());
        if let Some(modules) = modules.or(host.as_deref()) {
            let copied = copy_modules(modules, tree)?;
            let all = Modules::read(&copied)?;
            return keep(&vmlinuz, release, Some((&all, &copied)), result, progress);
        }
        match self.with_modules_of(&release) {
            Some(other) => {
                keep(&vmlinuz, release, None, result, progress)?;
                borrow_modules(&other, result)
            }
            None => keep(&vmlinuz, release, None, result, progress),
        }
    }

    /// A kernel of the distribution's in the cache that has modules of this release. Others may have come with any
    /// modules.
    fn with_modules_of(&self, release: &str) -> Option<PathBuf> {
        let kernels = fs::read_dir(self.dir.join("kernels")).ok()?;
        let mut dirs = kernels.filter_map(|entry| Some(entry.ok()?.path()));
        dirs.find(|dir| {
            dir.file_name()
                .is_some_and(|key| key.as_encoded_bytes().starts_with(b"linux-image-"))
                && dir.join(MODULES_DISK).is_file()
                && self
                    .kernel(dir)
                    .is_ok_and(|kernel| kernel.release == release)
        })
    }

    fn remember(&self, key: &str) -> Result<(), Error> {
        let (tmp, path) = (
            self.dir.join(".distribution"),
            self.dir.join("distribution"),
        );
        fs::write(&tmp, key)
            .and_then(|()| File::open(&tmp)?.sync_all())
            .and_then(|()| fs::rename(&tmp, &path))
            .map_err(Error::io("write", &path))
    }

    fn add_initramfs(&self, kernel_dir: &Path, agent: &[u8]) -> Result<(), Error> {
        let boot = self.dir.join("boot");
        sweep(&boot);
        let tmp = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempdir_in(&boot)
            .map_err(Error::io("create a directory in", &boot))?;
        // Not the temporary directory itself, which is ours alone: machines run as other users.
        let set = tmp.path().join("set");
        fs::create_dir(&set).map_err(Error::io("create", &set))?;
        let path = set.join("initramfs");
        let write = || -> io::Result<()> {
            let out = io::BufWriter::new(File::create_new(&path)?);
            initramfs(out, agent, &kernel_dir.join("boot"))
        };
        write().map_err(Error::io("write", &path))?;
        publish(&set, &boot.join(self.id(&self.kernel(kernel_dir)?, agent)))
    }
}

/// Writes the initramfs: the agent, the boot modules with their order in `/modules`, and the few
/// names that the kernel and the agent need before anything is mounted.
fn initramfs(out: impl io::Write, agent: &[u8], modules: &Path) -> io::Result<()> {
    let order = fs::read_to_string(modules.join("order"))?;
    let mut cpio = Cpio::new(out);
    for dir in ["dev", "proc", "sys", "newroot", "lib", "lib/modules"] {
        cpio.directory(dir)?;
    }
    // The kernel opens it for PID 1 before devtmpfs is there.
    cpio.character("dev/console", 0o600, (5, 1))?;
    cpio.file("init", 0o755, agent)?;
    for name in order.lines() {
        cpio.file(
            &format!("lib/modules/{name}"),
            0o644,
            &fs::read(modules.join(name))?,
        )?;
    }
    let paths: String = order
        .lines()
        .map(|name| format!("/lib/modules/{name}\n"))
        .collect();
    cpio.file("modules", 0o644, paths.as_bytes())?;
    cpio.finish()?.flush()
}

/// From an unpacked package to the directory that is kept.
fn assemble(
    tree: &Path,
    result: &Path,
    origin: &Path,
    progress: OnProgress<'_>,
) -> Result<(), Error> {
    let package = |why| Error::Package {
        path: origin.to_owned(),
        why,
    };
    let kernel = only_entry(tree, "vmlinuz-")?
        .ok_or_else(|| package("it has not exactly one kernel (boot/vmlinuz-*)"))?;
    let modules = only_entry(&tree.join("modules"), "")?
        .ok_or_else(|| package("it has not the modules of exactly one kernel (lib/modules/*)"))?;
    let release = name(&modules);
    if name(&kernel) != format!("vmlinuz-{release}") {
        return Err(package("kernel and modules are of different releases"));
    }
    progress(Progress::step("reading the kernel modules", 0));
    let all = Modules::read(&modules)?;
    all.check(&release)?;
    keep(&kernel, release, Some((&all, &modules)), result, progress)
}

/// Fills the directory that is kept. `modules` are `…/modules/RELEASE` and what was read there.
fn keep(
    kernel: &Path,
    release: String,
    modules: Option<(&Modules, &Path)>,
    result: &Path,
    progress: OnProgress<'_>,
) -> Result<(), Error> {
    let boot = result.join("boot");
    fs::create_dir(&boot).map_err(Error::io("create", &boot))?;
    let mut order = String::new();
    let mut digest = Sha256::new();
    let bytes = fs::read(kernel).map_err(Error::io("read", kernel))?;
    digest.update(Sha256::digest(&bytes));
    if let Some((all, modules)) = modules {
        for module in all.boot_order() {
            let from = modules.join(&module.path);
            let file = name(&from);
            let to = boot.join(&file);
            fs::copy(&from, &to).map_err(Error::io("write", &to))?;
            order.push_str(&format!("{file}\n"));
        }
        write_indexes(all, modules)?;
        let dir = modules.parent().expect("it is modules/RELEASE");
        digest.update(modules_disk(dir, &result.join(MODULES_DISK), progress)?);
    }
    let list = boot.join("order");
    fs::write(&list, order).map_err(Error::io("write", &list))?;
    let vmlinuz = result.join("vmlinuz");
    fs::rename(kernel, &vmlinuz).map_err(Error::io("move", &vmlinuz))?;
    write_json(
        &Kernel {
            release,
            digest: hex(&digest.finalize()),
        },
        result,
    )
}

fn write_json(kernel: &Kernel, dir: &Path) -> Result<(), Error> {
    let json = serde_json::to_vec(kernel).expect("plain data");
    let path = dir.join("kernel.json");
    fs::write(&path, json).map_err(Error::io("write", &path))
}

/// Gives a kept kernel the modules of another one.
fn borrow_modules(other: &Path, result: &Path) -> Result<(), Error> {
    let link = |file: &Path| {
        let to = result.join(file);
        // The list of none is there already.
        let _absent = fs::remove_file(&to);
        fs::hard_link(other.join(file), &to).map_err(Error::io("write", &to))
    };
    let boot = other.join("boot");
    for entry in fs::read_dir(&boot).map_err(Error::io("list", &boot))? {
        let entry = entry.map_err(Error::io("list", &boot))?;
        link(&Path::new("boot").join(entry.file_name()))?;
    }
    link(Path::new(MODULES_DISK))?;
    let read = |dir: &Path| {
        let path = dir.join("kernel.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice::<Kernel>(&text)
            .map_err(|error| Error::io("understand", &path)(error.into()))
    };
    let (mut kernel, theirs) = (read(result)?, read(other)?);
    let both = Sha256::digest(format!("{}{}", kernel.digest, theirs.digest));
    kernel.digest = hex(&both);
    write_json(&kernel, result)
}

/// Adds the kernel as an ELF file; an empty one says that it cannot be had. Call with the lock held.
fn add_elf(dir: &Path) -> Result<(), Error> {
    let (kernel, path) = (dir.join("vmlinuz"), dir.join(ELF));
    if path.exists() {
        return Ok(());
    }
    let bytes = fs::read(&kernel).map_err(Error::io("read", &kernel))?;
    let elf = kernel_image::elf(&bytes).unwrap_or_default();
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir)?;
        io::Write::write_all(&mut file, &elf)?;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().map_err(Error::io("write", &path))
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The only entry of `dir` whose name starts with `prefix`.
fn only_entry(dir: &Path, prefix: &str) -> Result<Option<PathBuf>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let names = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut matching = names.filter(|path| {
        path.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
    });
    let first = matching.next();
    Ok(first.filter(|_| matching.next().is_none()))
}

/// A name for files that stay what they are while path, size and time do.
fn key_of<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Result<String, Error> {
    let mut sum = Sha256::new().chain_update(FORM);
    for path in paths {
        let meta = fs::metadata(path).map_err(Error::io("inspect", path))?;
        let absolute = fs::canonicalize(path).map_err(Error::io("inspect", path))?;
        sum.update(absolute.as_os_str().as_encoded_bytes());
        sum.update([0]);
        for number in [
            meta.len(),
            meta.ino(),
            meta.mtime() as u64,
            meta.mtime_nsec() as u64,
        ] {
            sum.update(number.to_le_bytes());
        }
    }
    Ok(hex(&sum.finalize()[..16]))
}

fn is_key(key: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._+~-".contains(&byte);
    !key.is_empty() && !key.starts_with('.') && key.bytes().all(good)
}

/// Removes what a killed process left; call with the lock held.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".tmp-") {
            // What cannot be removed now costs only space.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes `target` appear whole and durable; another process' equal one is as good.
fn publish(from: &Path, target: &Path) -> Result<(), Error> {
    let fail = |errno: rustix::io::Errno| Error::io("publish", target)(errno.into());
    let dir = File::open(from).map_err(Error::io("open", from))?;
    rustix::fs::syncfs(&dir).map_err(fail)?;
    match rustix::fs::renameat_with(CWD, from, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => return Ok(()),
        Err(errno) => return Err(fail(errno)),
    }
    let parent = target.parent().expect("in the cache directory");
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync", parent))
}
