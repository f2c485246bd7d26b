//! `cargo xtask lab`: a Debian in an emulated machine whose processor has SVM, so that KVM in it is real. Runtimes that
//! need KVM are tested there on hosts that have none.
//!
//! It emulates everything twice, and is ten to thirty times slower than hardware: only ratios mean anything.

mod load;
mod machine;
mod results;
mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::{Args as ClapArgs, Subcommand};

use crate::command::{self, cargo, command};
use crate::{Result, agent, build, setup};
use load::{Load, quoted};
use machine::Machine;
use results::Results;

/// The most machines that run tests at the same time.
const MACHINES: usize = 2;

/// What to do in it.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// When its machine is ended, whatever happens; by default after 10, with `bench` after 20
    #[arg(long, global = true, value_name = "MINUTES")]
    limit: Option<u64>,
}

#[derive(Subcommand)]
enum What {
    /// Run tests: all that have real guests, or those with one of the words in their names
    Test {
        /// Only the runtimes' conformance suite, which little has to be built for
        #[arg(long)]
        conformance: bool,
        /// Parts of names
        filters: Vec<String>,
    },
    /// Run a command with what is built. What it leaves in /out comes to target/lab/out
    Run {
        /// A file or directory to bring to /lab/files
        #[arg(long, value_name = "PATH")]
        bring: Vec<PathBuf>,
        /// The command. One word is a script
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Measure create to first exec, against the same VMM started bare; prints lines `NAME: ratio …`
    Bench {
        /// How many times each, in turn. With few, noise decides
        #[arg(short, default_value_t = 12)]
        n: u32,
        /// Measure the debug build
        #[arg(long)]
        debug: bool,
        /// Runtimes; by default all that have their programs
        runtimes: Vec<String>,
    },
    /// Open a shell in it
    Shell {
        /// A file or directory to bring to /lab/files
        #[arg(long, value_name = "PATH")]
        bring: Vec<PathBuf>,
    },
}

/// Does it.
pub fn run(args: Args) -> Result {
    let usual = if matches!(args.what, Some(What::Bench { .. })) {
        20
    } else {
        15
    };
    let limit = Duration::from_secs(args.limit.unwrap_or(usual) * 60);
    setup::run(false)?;
    let all = What::Test {
        conformance: false,
        filters: Vec::new(),
    };
    match args.what.unwrap_or(all) {
        What::Test {
            conformance,
            filters,
        } => test(conformance, &filters, limit),
        What::Run { bring, command } => {
            let job = match command.as_slice() {
                [script] => script.clone(),
                words => words.iter().map(|word| quoted(word) + " ").collect(),
            };
            Lab::new(false, &[])?.bring(&bring)?.show(&job, limit)
        }
        What::Bench { n, debug, runtimes } => bench(n, !debug, runtimes, limit),
        What::Shell { bring } => Lab::new(false, &[])?.bring(&bring)?.shell(),
    }
}

fn test(conformance: bool, filters: &[String], limit: Duration) -> Result {
    if !conformance {
        agent::build(false)?;
    }
    let suites = results::build(conformance)?;
    let mut lines = Vec::new();
    for suite in &suites {
        lines.extend(suite.lines(filters)?);
    }
    if lines.is_empty() {
        return Err("no test has such a name".into());
    }
    let programs: Vec<_> = suites.into_iter().map(|suite| suite.program).collect();
    let lab = Lab::new(false, &programs)?;
    lab.load.write("tests", &lines.concat())?;
    lab.load.write("tests.sh", include_str!("lab/tests.sh"))?;
    let mut results = Results::new(&lab.load.runtimes);
    let ran = lab.tests(limit, &mut |line| results.take(line));
    // What was run before the end came counts as well.
    let finished = results.finish(lines.len());
    ran.and(finished)
}

fn bench(n: u32, release: bool, names: Vec<String>, limit: Duration) -> Result {
    build::run(release)?;
    let mut bench = cargo(["build", "--package", "hutch-tests", "--bin", "bench-boot"]);
    if release {
        command::run(bench.arg("--release"))?;
    }
    let lab = Lab::new(release, &[])?;
    let names = match names.as_slice() {
        [] => lab.load.runtimes.join(" "),
        _ => names.join(" "),
    };
    let job = format!(
        "for name in {names}; do \"$LAB_PROGRAMS\"/bench-boot {n} 0 $name || failed=1; done; exit ${{failed:-0}}"
    );
    lab.show(&job, limit)
}

/// One run of it.
struct Lab {
    dir: PathBuf,
    load: Load,
    root: root::Root,
    /// Nobody else has the lab meanwhile.
    _lock: fs::File,
}

impl Lab {
    /// Waits for it, and puts together what goes in: programs of ours, and these.
    fn new(release: bool, programs: &[PathBuf]) -> Result<Lab> {
        let cache = cache();
        let (lab, lock) = root::take(&cache)?;
        let root = root::root(&lab)?;
        // Beside the programs, so that these are linked and not copied.
        let dir = crate::target_dir().join("lab");
        drop(fs::remove_dir_all(&dir));
        fs::create_dir_all(&dir)?;
        Ok(Lab {
            load: Load::new(&dir, &cache, release, programs)?,
            dir,
            root,
            _lock: lock,
        })
    }

    fn bring(self, files: &[PathBuf]) -> Result<Lab> {
        for file in files {
            self.load.file(&std::env::current_dir()?.join(file))?;
        }
        Ok(self)
    }

    /// Runs a script and shows what it prints.
    fn show(self, job: &str, limit: Duration) -> Result {
        match self.run(job, limit, &mut |line| println!("{line}"))? {
            0 => Ok(()),
            code => Err(format!("the command in the lab ended with {code}").into()),
        }
    }

    /// Runs a script, and returns its exit code.
    fn run(self, job: &str, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<i32> {
        let start = Instant::now();
        let load = self.load.finish(job, false)?;
        let machine = alone(&self.root, &load, &self.dir);
        let code = machine.run(start + limit, line)?;
        unpack(&machine.out(), &self.dir.join("out"))?;
        eprintln!("lab: {:.0} s", start.elapsed().as_secs_f64());
        Ok(code)
    }

    /// Runs the tests, on a machine for each processor that can emulate one, and gives all that they say to `line`.
    fn tests(self, limit: Duration, line: &mut dyn FnMut(&str)) -> Result {
        let start = Instant::now();
        let load = self.load.finish("sh /lab/tests.sh", false)?;
        let parts = std::thread::available_parallelism().map_or(1, |n| n.get().min(MACHINES));
        let (sender, lines) = mpsc::channel::<String>();
        let (root, load, dir) = (&self.root, load.as_path(), self.dir.as_path());
        let ran = std::thread::scope(|scope| {
            let run = |part| {
                let sender = sender.clone();
                // Errors of other threads must be able to go there.
                let one = move || {
                    let ran = share(root, load, dir, (part, parts), start + limit, &sender);
                    ran.map_err(|error| error.to_string())
                };
                scope.spawn(one)
            };
            let all: Vec<_> = (0..parts).map(run).collect();
            drop(sender);
            lines.iter().for_each(|text| line(&text));
            let ended = |one: std::thread::ScopedJoinHandle<'_, _>| one.join().expect("no panic");
            all.into_iter().try_for_each(ended)
        });
        eprintln!("lab: {:.0} s", start.elapsed().as_secs_f64());
        Ok(ran?)
    }

    fn shell(self) -> Result {
        let load = self.load.finish("exec bash -l || exec sh -l", true)?;
        let machine = alone(&self.root, &load, &self.dir);
        let settings =
            command::output(command("stty", ["-g"]).stdin(std::process::Stdio::inherit()))?;
        command("stty", ["raw", "-echo"]).status()?;
        let ended = machine.terminal();
        command("stty", [settings.trim()]).status()?;
        ended
    }
}

/// A machine that has the host for itself: for benches, with a processor for the VMM beside the server's.
fn alone<'a>(root: &'a root::Root, load: &'a Path, dir: &Path) -> Machine<'a> {
    Machine {
        root,
        load,
        dir: dir.to_owned(),
        vcpus: 2,
        memory_mib: 4096,
        words: String::new(),
    }
}

/// Runs every `parts`th test. A machine that dies is started once more and goes on with the test in which it died.
fn share(
    root: &root::Root,
    load: &Path,
    dir: &Path,
    (part, parts): (usize, usize),
    deadline: Instant,
    lines: &mpsc::Sender<String>,
) -> Result {
    let mut done = 0;
    let mut again = true;
    loop {
        let machine = Machine {
            root,
            load,
            dir: dir.join(format!("machine-{part}")),
            vcpus: 1,
            memory_mib: 3072,
            words: format!("lab.part={part} lab.parts={parts} lab.done={done}"),
        };
        drop(fs::remove_dir_all(&machine.dir));
        fs::create_dir_all(&machine.dir)?;
        let before = done;
        let ran = machine.run(deadline, |line| {
            done += usize::from(line.starts_with(results::TEST));
            // The receiver is there for as long as any of us is.
            drop(lines.send(line.to_owned()));
        });
        match ran {
            Ok(_) => return unpack(&machine.out(), &dir.join("out")),
            Err(error) if again && Instant::now() < deadline => {
                eprintln!(
                    "lab: a machine died after {} tests and is started again: {error}",
                    done - before
                );
                again = false;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What the lab left in `/out`.
fn unpack(tar: &Path, out: &Path) -> Result {
    fs::create_dir_all(out)?;
    command::run(
        command("tar", ["--extract", "--no-same-owner", "--file"])
            .arg(tar)
            .current_dir(out),
    )
}

/// As `hutch` has it.
fn cache() -> PathBuf {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("HUTCH_CACHE_DIR").unwrap_or_else(|| match variable("HOME").filter(|_| !is_root()) {
        None => "/var/cache/hutch".into(),
        Some(home) => variable("XDG_CACHE_HOME")
            .unwrap_or_else(|| home.join(".cache"))
            .join("hutch"),
    })
}

fn is_root() -> bool {
    command::output(&mut command("id", ["-u"])).is_ok_and(|id| id.trim() == "0")
}
