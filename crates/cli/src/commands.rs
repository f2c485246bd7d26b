//! The commands: one file each (those that only want another level share one), and one row each in [`Command`] and its [`run`](Command::run).

mod agent;
mod completion;
mod cp;
mod create;
mod delete;
mod doctor;
mod exec;
mod fork;
mod get;
mod image;
mod level;
mod list;
mod logs;
mod network;
mod open;
mod port;
mod restore;
mod run;
mod runtime;
pub mod serve;
mod snapshot;
mod update;

use std::process::ExitCode;

use clap::Subcommand;
use futures::StreamExt;
use hutch_contract::client::Client;

use crate::error::Error;
use crate::signals::Signals;
use crate::target::Place;
use crate::ui::Ui;
use level::Level;

/// How many machines one command works on at the same time.
const AT_ONCE: usize = 16;

/// What every command gets.
pub struct App {
    /// The streams.
    pub ui: Ui,
    /// Which server is meant.
    pub place: Place,
}

impl App {
    /// A client of the server that is meant.
    pub fn client(&self) -> Result<Client, Error> {
        self.place.client()
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Serve(serve::Args),
    Doctor(doctor::Args),
    Run(run::Args),
    Create(create::Args),
    #[command(visible_alias = "ls")]
    List(list::Args),
    Get(get::Args),
    /// Start stopped machines
    #[command(after_help = "Examples:
  hutch start web
  hutch start web db --no-wait")]
    Start(level::Args),
    /// Stop machines; their disks are kept
    #[command(after_help = "Examples:
  hutch stop web
  hutch stop web db --no-wait")]
    Stop(level::Args),
    /// Stop machines and start them again
    #[command(after_help = "Examples:
  hutch restart web
  hutch restart web db --no-wait")]
    Restart(level::Args),
    /// Stop machines from executing; they keep their memory, and go on when something uses them
    #[command(after_help = "Examples:
  hutch pause web
  hutch pause web && hutch exec web -- uptime")]
    Pause(level::Args),
    /// Let paused machines go on
    #[command(after_help = "Examples:
  hutch resume web")]
    Resume(level::Args),
    Update(update::Args),
    #[command(visible_alias = "rm")]
    Delete(delete::Args),
    Exec(exec::Args),
    Logs(logs::Args),
    Cp(cp::Args),
    Network(network::Args),
    Port(port::Args),
    Open(open::Args),
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    Fork(fork::Args),
    Image(image::Args),
    Runtime(runtime::Args),
    Agent(agent::Args),
    Completion(completion::Args),
}

impl Command {
    /// Whether the exit code is that of a command in a machine, so that our own failures need one of their own.
    pub fn passes_exit_code_on(&self) -> bool {
        matches!(self, Command::Run(_) | Command::Exec(_))
    }

    /// Does it. A signal ends a command by dropping it, but for the two that have something to put in order before.
    pub async fn run(self, app: &App) -> Result<ExitCode, Error> {
        let mut signals = Signals::listen()?;
        match self {
            Command::Serve(args) => serve::run(args, app, signals).await,
            Command::Run(args) => run::run(args, app, signals).await,
            Command::Doctor(args) => signals.or(doctor::run(args, app)).await,
            Command::Create(args) => signals.or(create::run(args, app)).await,
            Command::List(args) => signals.or(list::run(args, app)).await,
            Command::Get(args) => signals.or(get::run(args, app)).await,
            Command::Start(args) => signals.or(level::run(Level::Start, args, app)).await,
            Command::Stop(args) => signals.or(level::run(Level::Stop, args, app)).await,
            Command::Pause(args) => signals.or(level::run(Level::Pause, args, app)).await,
            Command::Resume(args) => signals.or(level::run(Level::Resume, args, app)).await,
            Command::Restart(args) => signals.or(level::run(Level::Restart, args, app)).await,
            Command::Update(args) => signals.or(update::run(args, app)).await,
            Command::Delete(args) => signals.or(delete::run(args, app)).await,
            Command::Exec(args) => signals.or(exec::run(args, app)).await,
            Command::Logs(args) => signals.or(logs::run(args, app)).await,
            Command::Cp(args) => signals.or(cp::run(args, app)).await,
            Command::Network(args) => signals.or(network::run(args, app)).await,
            Command::Port(args) => signals.or(port::run(args, app)).await,
            Command::Open(args) => signals.or(open::run(args, app)).await,
            Command::Snapshot(args) => signals.or(snapshot::run(args, app)).await,
            Command::Restore(args) => signals.or(restore::run(args, app)).await,
            Command::Fork(args) => signals.or(fork::run(args, app)).await,
            Command::Image(args) => signals.or(image::run(args, app)).await,
            Command::Runtime(args) => signals.or(runtime::run(args, app)).await,
            Command::Agent(args) => signals.or(agent::run(args, app)).await,
            Command::Completion(args) => completion::run(args),
        }
    }
}

/// Does the same to several things at once and names each that it is done to, in the order given. A failure is told
/// and stops none of the others; the exit code is that of the first.
async fn each<'a, Done>(
    app: &App,
    names: &'a [String],
    act: impl Fn(&'a str) -> Done,
) -> Result<ExitCode, Error>
where
    Done: Future<Output = Result<(), Error>>,
{
    let mut results = futures::stream::iter(names)
        .map(|name| act(name))
        .buffered(AT_ONCE)
        .enumerate();
    let mut first_failure = None;
    while let Some((index, result)) = results.next().await {
        match result {
            Ok(()) => app.ui.name(&names[index])?,
            Err(error) => {
                error.report(app.ui);
                first_failure.get_or_insert(error.exit_code(None));
            }
        }
    }
    match first_failure {
        Some(exit_code) => Err(Error::Reported { exit_code }),
        None => Ok(ExitCode::SUCCESS),
    }
}
