//! Processes beside the bench.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use hutch_tests::world::World;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A role in a process of its own, ended with this value.
pub struct Role {
    child: Child,
    output: BufReader<ChildStdout>,
    /// What it said when it was ready: its port.
    pub port: u16,
}

impl Role {
    /// Starts it, on the host of a world if there is one, and waits until it is ready.
    pub fn start(world: Option<&World>, words: &[&str]) -> Role {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(words);
        Role::of(command, world)
    }

    /// One that gives way to everything else on the processors.
    pub fn modest(words: &[&str]) -> Role {
        let mut command = Command::new("nice");
        command.args(["-n", "19"]);
        command.arg(std::env::current_exe().unwrap()).args(words);
        Role::of(command, None)
    }

    fn of(mut command: Command, world: Option<&World>) -> Role {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = match world {
            None => command.spawn().unwrap(),
            Some(world) => world.on_host(|| command.spawn().unwrap()),
        };
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        output.read_line(&mut ready).unwrap();
        let port = ready.trim().parse();
        let port = port.unwrap_or_else(|_| panic!("{command:?} says {ready:?}"));
        Role {
            child,
            output,
            port,
        }
    }

    /// Its address, as an argument of another one.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it says.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// What it says until its end.
    pub fn ended(mut self) -> String {
        let mut said = String::new();
        self.output.read_to_string(&mut said).unwrap();
        assert!(self.child.wait().unwrap().success());
        said
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _may_have_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Opens as many files as the system lets us.
pub fn many_files() {
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: now.maximum,
        ..now
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
