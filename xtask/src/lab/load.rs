//! What is brought into the lab: a read-only disk with programs, VMMs, a kernel for guests and the job.
//!
//! ```text
//! init job tests.sh tests environment
//! programs/          as below the target directory, and mounted there
//! vmm/               copied to /usr/local/bin
//! cache/             copied to /var/cache/hutch
//! files/             what was asked for by name
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::command::{self, command, output};

const INIT: &str = include_str!("init.sh");
/// Programs of ours, as far as they are built.
const PROGRAMS: [&str; 5] = [
    "hutch",
    "hutch-stub-vmm",
    "hutch-build-disk",
    "guest/hutch-agent",
    "bench-boot",
];
/// Programs of others, with the variable that names each.
const VMMS: [(&str, &str); 3] = [
    ("firecracker", "HUTCH_FIRECRACKER"),
    ("jailer", "HUTCH_JAILER"),
    ("cloud-hypervisor", "HUTCH_CLOUD_HYPERVISOR"),
];
/// Variables of ours that tests and programs in the lab get, too.
const PASSED: [&str; 4] = ["HUTCH_LOG", "HUTCH_TEST_SEED", "RUST_BACKTRACE", "RUST_LOG"];

/// A disk that is being put together in a directory.
pub struct Load {
    dir: PathBuf,
    stage: PathBuf,
    environment: String,
    /// Runtimes that have all they need.
    pub runtimes: Vec<&'static str>,
}

impl Load {
    /// Ours and theirs, without a job. `dir` is the run's own.
    pub fn new(dir: &Path, cache: &Path, release: bool, programs: &[PathBuf]) -> Result<Load> {
        let stage = dir.join("stage");
        fs::create_dir_all(&stage)?;
        let mut load = Load {
            dir: dir.to_owned(),
            stage,
            environment: String::new(),
            runtimes: vec!["qemu"],
        };
        load.write("init", INIT)?;
        load.programs(release, programs)?;
        load.vmms(cache)?;
        load.kernel(cache)?;
        for name in PASSED {
            if let Ok(value) = std::env::var(name) {
                load.variable(name, &value);
            }
        }
        Ok(load)
    }

    /// A file of text.
    pub fn write(&self, name: &str, text: &str) -> Result {
        Ok(fs::write(self.stage.join(name), text)?)
    }

    /// A file or directory of somebody's, to lie in `files/`.
    pub fn file(&self, from: &Path) -> Result {
        let files = self.stage.join("files");
        fs::create_dir_all(&files)?;
        command::run(command("cp", ["-rL"]).arg(from).arg(files))
    }

    /// For everything that runs inside.
    pub fn variable(&mut self, name: &str, value: &str) {
        let value = quoted(value);
        self.environment
            .push_str(&format!("export {name}={value}\n"));
    }

    fn programs(&mut self, release: bool, more: &[PathBuf]) -> Result {
        let from = crate::profile_dir(release);
        let ours = PROGRAMS.map(|name| from.join(name));
        for program in ours.iter().filter(|path| path.exists()).chain(more) {
            let below = program.strip_prefix(&from)?;
            place(program, &self.stage.join("programs").join(below))?;
        }
        self.variable("LAB_PROGRAMS", &from.to_string_lossy());
        Ok(())
    }

    fn vmms(&mut self, cache: &Path) -> Result {
        let mut missing = Vec::new();
        for (name, variable) in VMMS {
            let named = std::env::var_os(variable).map(PathBuf::from);
            let cached = cache.join("vmm").join(name);
            match named.or(cached.exists().then_some(cached)) {
                Some(path) => {
                    let path = path
                        .canonicalize()
                        .map_err(|error| format!("{variable}={}: {error}", path.display()))?;
                    place(&path, &self.stage.join("vmm").join(name))?;
                }
                None => {
                    let place = cache.join("vmm").join(name);
                    eprintln!(
                        "skipped: {name}: no binary (set {variable}, or put it to {})",
                        place.display()
                    );
                    missing.push(name);
                }
            }
        }
        let complete = |needs: &[&str]| !missing.iter().any(|name| needs.contains(name));
        if complete(&["firecracker", "jailer"]) {
            self.runtimes.push("firecracker");
        }
        if complete(&["cloud-hypervisor"]) {
            self.runtimes.push("cloud-hypervisor");
        }
        self.variable("HUTCH_TEST_REQUIRE", &self.runtimes.join(","));
        Ok(())
    }

    /// The kernel that guests boot with.
    fn kernel(&mut self, cache: &Path) -> Result {
        // It completes what is in the cache, and is not there after a build of a single crate.
        let test_kernel = crate::profile_dir(false).join("test-kernel");
        if test_kernel.exists() {
            let made = output(&mut command::<&str>(&test_kernel.to_string_lossy(), []));
            made.map_err(|error| format!("a kernel for guests is needed: {error}"))?;
        }
        let known = cache.join("distribution");
        let key = fs::read_to_string(&known).map_err(|error| {
            format!("no kernel for guests: {error}; `cargo xtask test` makes one")
        })?;
        let to = self.stage.join("cache/kernels");
        fs::create_dir_all(&to)?;
        command::run(
            command("cp", ["-r", "--sparse=always"])
                .arg(cache.join("kernels").join(&key))
                .arg(&to),
        )?;
        fs::copy(known, self.stage.join("cache/distribution"))?;
        self.variable("LAB_KERNEL", &key);
        self.variable("HUTCH_TEST_KERNEL", "/kernel/vmlinuz");
        self.variable("HUTCH_TEST_MODULES", "/kernel/boot");
        Ok(())
    }

    /// Makes the disk.
    pub fn finish(self, job: &str, terminal: bool) -> Result<PathBuf> {
        self.write("job", job)?;
        let mut environment = self.environment.clone();
        environment.push_str(&format!(
            "LAB_TERMINAL={}\n",
            if terminal { "yes" } else { "" }
        ));
        self.write("environment", &environment)?;
        let size = output(command("du", ["--summarize", "--block-size=1M"]).arg(&self.stage))?;
        let mib: u64 = size.split_whitespace().next().unwrap_or_default().parse()?;
        let disk = self.dir.join("load.raw");
        let options = ["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0"];
        command::run(
            command("mke2fs", options)
                .args(["-E", "root_owner=0:0", "-d"])
                .arg(&self.stage)
                .arg(&disk)
                .arg(format!("{}M", mib + mib / 8 + 32)),
        )?;
        fs::remove_dir_all(&self.stage)?;
        Ok(disk)
    }
}

/// Puts a file there, by a link where that is possible. Users of all kinds may read and run it.
fn place(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to.parent().expect("a file in a directory"))?;
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to)?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// A word for the shell.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_shell_takes_quoted_words_as_they_are() {
        assert_eq!(super::quoted("a b$c"), "'a b$c'");
        assert_eq!(super::quoted("it's"), r"'it'\''s'");
    }
}
