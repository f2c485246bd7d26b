//! What tests in the lab are run, and what became of them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Result;
use crate::build::FEATURES;
use crate::command::{cargo, command, output};

const CONFORMANCE: &str = "runtime";
/// How a line begins that `tests.sh` prints about a test that has ended.
pub const TEST: &str = "lab:test\t";
/// The same of one that has failed and is tried again.
const AGAIN: &str = "lab:again\t";
/// The binaries with tests for the lab: name, source, seconds for each test.
const SUITES: [(&str, &str, u32); 2] = [
    (CONFORMANCE, "crates/runtime/tests/it/main.rs", 120),
    ("e2e", "tests/e2e/main.rs", 240),
];

/// A binary with tests.
pub struct Suite {
    name: &'static str,
    pub program: PathBuf,
    limit: u32,
}

/// Builds them, and the programs that they start; `conformance` is that of the runtimes alone.
pub fn build(conformance: bool) -> Result<Vec<Suite>> {
    let mut build = cargo(["build", "--message-format=json-render-diagnostics"]);
    if conformance {
        build.args(["--package", "hutch-runtime", "--bins", "--tests"]);
        build.args(["--features", "hutch-runtime/stub"]);
    } else {
        build.args(["--workspace", "--all-targets", "--features", FEATURES]);
    }
    build.stderr(std::process::Stdio::inherit());
    eprintln!("building the tests");
    let messages = output(&mut build)?;
    let built: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let mut suites = Vec::new();
    for (name, source, limit) in SUITES {
        let source = crate::root().join(source);
        let artifact = built.iter().rev().find(|message| {
            message["target"]["src_path"].as_str().map(Path::new) == Some(&source)
                && message["executable"].is_string()
        });
        if let Some(program) = artifact.and_then(|artifact| artifact["executable"].as_str()) {
            suites.push(Suite {
                name,
                program: program.into(),
                limit,
            });
        }
    }
    Ok(suites)
}

impl Suite {
    /// A line for `tests.sh` for each of its tests that needs KVM and has one of `filters` in its name.
    pub fn lines(&self, filters: &[String]) -> Result<Vec<String>> {
        let list = ["--list", "--format", "terse"];
        let list = output(&mut command(&self.program.to_string_lossy(), list))?;
        let wanted = |name: &&str| {
            needs_kvm(name)
                && (filters.is_empty() || filters.iter().any(|filter| name.contains(filter)))
        };
        let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names
            .filter(wanted)
            .map(|name| {
                let (suite, program) = (self.name, self.program.display());
                format!("{suite}\t{program}\t{name}\t{}\n", self.limit)
            })
            .collect())
    }
}

/// Whether a test is of a real VMM with KVM: what every runtime must do, whole lives of machines, and pauses, networks
/// and a server's death for those that only run here. The others say the same where everything is emulated once.
fn needs_kvm(name: &str) -> bool {
    let modules = [
        "conformance::",
        "confinement::",
        "network::",
        "clones::",
        "cloud_hypervisor::",
        "life::",
        "pause::",
        "egress::",
        "crash::",
    ];
    let here_too = ["pause::", "egress::", "crash::"];
    let is_elsewhere =
        here_too.iter().any(|module| name.starts_with(module)) && name.contains("qemu");
    let vmms = [
        "qemu",
        "firecracker",
        "jailed",
        "cloud_hypervisor",
        "restricted_guest",
    ];
    let is_played = name.starts_with("cloud_hypervisor::") && !name.contains("real_vmm");
    modules.iter().any(|module| name.starts_with(module))
        && vmms.iter().any(|vmm| name.contains(vmm))
        && !is_played
        && !is_elsewhere
}

/// Counts what the lab reports, and shows it.
#[derive(Default)]
pub struct Results {
    /// Runtimes that have all they need: what every runtime must do may not be skipped for them.
    required: Vec<&'static str>,
    passed: usize,
    /// Those that failed once.
    again: Vec<String>,
    skipped: Vec<String>,
    failed: Vec<String>,
}

impl Results {
    /// For a lab in which these runtimes have all they need.
    pub fn new(required: &[&'static str]) -> Results {
        Results {
            required: required.to_vec(),
            ..Results::default()
        }
    }

    fn is_required(&self, test: &Test<'_>) -> bool {
        let of_all = [
            "conformance::",
            "confinement::",
            "network::",
            "clones::",
            "life::",
            "pause::",
            "egress::",
        ];
        of_all.iter().any(|module| test.name.starts_with(module))
            && self
                .required
                .iter()
                .any(|name| test.name.contains(&name.replace('-', "_")))
    }

    /// A line from the lab.
    pub fn take(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix(AGAIN) {
            println!("   again            {name}");
            self.again.push(name.to_owned());
            return;
        }
        match parse(line) {
            None => println!("{line}"),
            Some(test) => {
                let (name, seconds) = (format!("{} {}", test.suite, test.name), test.seconds);
                match (test.code, test.skipped) {
                    (0, "") => {
                        self.passed += 1;
                        println!("    pass {seconds:>7.1} s  {name}");
                    }
                    (0, why) if self.is_required(&test) => {
                        println!("  FAILED {seconds:>7.1} s  {name}: skipped: {why}");
                        self.failed.push(name);
                    }
                    (0, why) => {
                        println!("    skip {seconds:>7.1} s  {name}: {why}");
                        self.skipped.push(format!("{name}: {why}"));
                    }
                    (code, _) => {
                        // As timeout(1) ends.
                        let why = if matches!(code, 124 | 137) {
                            "timeout"
                        } else {
                            "FAILED"
                        };
                        println!(" {why:>7} {seconds:>7.1} s  {name}");
                        self.failed.push(name);
                    }
                }
            }
        }
    }

    /// The sum; an error unless all of `expected` tests were run and none failed.
    pub fn finish(self, expected: usize) -> Result {
        let (passed, skipped, failed) = (self.passed, self.skipped.len(), self.failed.len());
        let missing = expected.saturating_sub(passed + skipped + failed);
        for name in &self.skipped {
            println!("skipped: {name}");
        }
        for name in self.again.iter().filter(|name| !self.failed.contains(name)) {
            println!("passed at the second try: {name}");
        }
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!("lab: {passed} passed, {skipped} skipped, {failed} failed, {missing} not run");
        if failed + missing == 0 && expected > 0 {
            Ok(())
        } else {
            Err("the lab's tests have not all passed".into())
        }
    }
}

struct Test<'a> {
    suite: &'a str,
    name: &'a str,
    code: i32,
    seconds: f64,
    skipped: &'a str,
}

/// A line that `tests.sh` prints about a test.
fn parse(line: &str) -> Option<Test<'_>> {
    let mut fields = line.strip_prefix(TEST)?.split('\t');
    let mut next = || fields.next();
    Some(Test {
        suite: next()?,
        name: next()?,
        code: next()?.parse().ok()?,
        seconds: next()?.parse::<f64>().ok()? / 1000.0,
        skipped: next()?.trim_start_matches("skipped: "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_must_have_run() {
        let mut results = Results::default();
        results.take("lab:test\te2e\tlife::qemu\t0\t1500\t");
        results.take("lab:test\te2e\tshell::qemu\t0\t1\tskipped: no mirror");
        results.take("a word of the kernel's");
        assert_eq!(results.passed, 1);
        assert_eq!(results.skipped, ["e2e shell::qemu: no mirror"]);
        let again = || Results {
            passed: 1,
            skipped: vec!["x".into()],
            ..Results::default()
        };
        assert!(again().finish(2).is_ok());
        assert!(again().finish(3).is_err(), "one was not run");
        assert!(Results::default().finish(0).is_err(), "nothing was run");
        results.take("lab:test\te2e\tcrash::qemu\t101\t20\t");
        assert!(results.finish(3).is_err());
    }

    #[test]
    fn a_runtime_that_is_here_is_not_skipped() {
        let mut results = Results::new(&["cloud-hypervisor"]);
        for runtime in ["cloud_hypervisor", "firecracker"] {
            results.take(&format!(
                "lab:test\truntime\tconformance::{runtime}::it_runs\t0\t1\tskipped: no binary"
            ));
        }
        assert_eq!(
            results.failed,
            ["runtime conformance::cloud_hypervisor::it_runs"]
        );
        assert_eq!(results.skipped.len(), 1);
    }
}
