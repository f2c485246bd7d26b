//! `hutch run`.

use std::process::ExitCode;

use hutch_contract::client::{Client, Until};
use hutch_contract::error::Kind;
use hutch_contract::machine::{Machine, Status};

use super::{App, serve};
use crate::arguments::{Shape, Surroundings};
use crate::creating::{create, idempotency_key, show_timings};
use crate::error::Error;
use crate::signals::Signals;
use crate::ui::Ui;
use crate::{output, waiting};

/// Run a command in a machine of its own, and delete the machine afterwards
///
/// Its output appears as it comes, and its exit code becomes that of hutch; 125 means that not the command failed but
/// we did. Interrupted, it deletes the machine too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch run debian-base -- cat /etc/os-release
  hutch run --memory 1024 --env MODE=test debian-base -- sh -c 'echo $MODE'
  hutch run --embedded busybox -- uname -a      with no server running")]
pub struct Args {
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    surroundings: Surroundings,
    /// Keep the machine
    #[arg(long)]
    keep: bool,
    /// Delete the machine afterwards, which is the default
    #[arg(long, conflicts_with = "keep")]
    rm: bool,
    /// Start a server for this command alone, in the data directory of this machine
    #[arg(long)]
    embedded: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

pub async fn run(args: Args, app: &App, mut signals: Signals) -> Result<ExitCode, Error> {
    if !args.embedded {
        return Temporary {
            args,
            client: app.client()?,
            ui: app.ui,
        }
        .run(&mut signals)
        .await;
    }
    let server = serve::Embedded::start(app).await?;
    let ended = Temporary {
        args,
        client: server.client()?,
        ui: app.ui,
    }
    .run(&mut signals)
    .await;
    server.stop().await;
    ended
}

/// One command in one machine.
struct Temporary {
    args: Args,
    client: Client,
    ui: Ui,
}

impl Temporary {
    async fn run(self, signals: &mut Signals) -> Result<ExitCode, Error> {
        let machine = self.create(signals).await?;
        let ended = signals.or(self.command(&machine)).await;
        // Interrupted, it goes even when it was to be kept: nobody has learnt its name yet.
        if self.args.keep && !matches!(ended, Err(Error::Interrupted { .. })) {
            self.ui
                .say(format_args!("The machine {} is kept.", machine.name));
            return ended;
        }
        let failed = match &ended {
            Ok(_) | Err(Error::Interrupted { .. } | Error::Closed) => None,
            Err(error) => {
                error.report(self.ui);
                Some(error.exit_code(None))
            }
        };
        self.delete(&machine, signals).await;
        match failed {
            Some(exit_code) => {
                self.ui
                    .say("hint: the machine is deleted now; with --keep it stays, to be looked at");
                Err(Error::Reported { exit_code })
            }
            None => ended,
        }
    }

    async fn create(&self, signals: &mut Signals) -> Result<Machine, Error> {
        let (request, key) = (self.args.shape.request(), idempotency_key());
        let created = signals
            .or(create(&self.client, &request, &key, self.ui))
            .await;
        if matches!(created, Err(Error::Interrupted { .. })) {
            // The request may be on its way already. The same key gives the machine that it makes, and no second one.
            let made = signals
                .or(async { Ok(self.client.create(&request, Some(&key), None).await?) })
                .await;
            if let Ok(machine) = made {
                self.delete(&machine, signals).await;
            }
        }
        created
    }

    async fn command(&self, machine: &Machine) -> Result<ExitCode, Error> {
        let id = machine.id.as_str();
        let running = waiting::until(&self.client, id, Until::Status(Status::Running)).await?;
        if self.args.shape.timings {
            show_timings(running.as_ref().unwrap_or(machine), self.ui);
        }
        let exec = self
            .args
            .surroundings
            .exec(self.args.command.clone(), Default::default());
        let exit = output::of_command(self.client.exec_stream(id, &exec).await?, self.ui).await?;
        Ok(output::exit_code(&exit))
    }

    /// Deletes the machine and waits until it is gone. A second signal ends the waiting; a machine that stays is told.
    async fn delete(&self, machine: &Machine, signals: &mut Signals) {
        let id = machine.id.as_str();
        let deleting = async {
            match self.client.delete(id, None).await {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => {}
                Err(error) => return Err(error.into()),
            }
            waiting::until(&self.client, id, Until::Gone)
                .await
                .map(drop)
        };
        match signals.or(deleting).await {
            Ok(()) => {}
            Err(Error::Client(error)) if error.kind() == Kind::NotFound => {}
            Err(error) => {
                error.report(self.ui);
                self.ui.say(format!(
                    "hint: the machine {} may be left; `hutch delete {}` removes it",
                    machine.name, machine.name
                ));
            }
        }
    }
}
