//! `hutch port`.

use std::process::ExitCode;

use hutch_contract::expose::{Access, ChangeMachine, Expose};

use super::{App, get};
use crate::arguments::{self, Exposed};
use crate::error::Error;
use crate::ui::printable;

/// Show and change how a machine is reached from outside
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch port web                     the ports of the host that lead to web
  hutch port add web 8000:80         one more
  hutch port rm web 8000             take it back; connections through it are cut
  hutch port expose web 3000 5173    URLs for these ports, besides the one behind its name
  hutch port access web public       let everybody use its URLs")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    /// Name or id of the machine
    #[arg(required = true)]
    machine: Option<String>,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show the ports of the host that lead to a machine
    #[command(
        visible_alias = "ls",
        after_help = "Examples:
  hutch port list web
  hutch port list web --json | jq .host_port"
    )]
    List {
        /// Name or id of the machine
        machine: String,
    },
    /// Let ports of the host lead to a machine
    #[command(after_help = "Examples:
  hutch port add web 80
  hutch port add web 8000:80 0.0.0.0:8443:443")]
    Add {
        /// Name or id of the machine
        machine: String,
        /// Ports; without HOST a free one
        #[arg(required = true, value_name = "[[IP:]HOST:]GUEST", value_parser = arguments::publish)]
        ports: Vec<hutch_contract::expose::PublishPort>,
    },
    /// Take ports of the host back from a machine
    #[command(after_help = "Examples:
  hutch port rm web 8000")]
    Rm {
        /// Name or id of the machine
        machine: String,
        /// Ports of the host
        #[arg(required = true, value_name = "HOST", value_parser = arguments::port)]
        ports: Vec<u16>,
    },
    /// Say which ports of a machine have URLs, besides the one behind its name; none without PORT
    #[command(after_help = "Examples:
  hutch port expose web 3000 5173
  hutch port expose web all
  hutch port expose web --http-port 80")]
    Expose {
        /// Name or id of the machine
        machine: String,
        /// Ports of the machine, or all
        #[arg(value_name = "PORT|all", value_parser = arguments::exposed)]
        ports: Vec<Exposed>,
        /// The port behind its name
        #[arg(long, value_name = "PORT")]
        http_port: Option<u16>,
    },
    /// Say who may use a machine's URLs; tokens that were made before open nothing then
    #[command(after_help = "Examples:
  hutch port access web public")]
    Access {
        /// Name or id of the machine
        machine: String,
        /// Everybody, or who has a key or a token
        #[arg(value_enum)]
        access: Who,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Who {
    Public,
    Private,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let client = app.client()?;
    let action = match (args.action, args.machine) {
        (Some(action), _) => action,
        (None, machine) => Action::List {
            machine: machine.unwrap_or_default(),
        },
    };
    match action {
        Action::List { machine } => {
            for port in client.ports(&machine).await? {
                show(app, &port)?;
            }
        }
        Action::Add { machine, ports } => {
            for port in &ports {
                show(app, &client.publish(&machine, port).await?)?;
            }
        }
        Action::Rm { machine, ports } => {
            for port in ports {
                client.unpublish(&machine, port).await?;
                app.ui.name(&port.to_string())?;
            }
        }
        Action::Expose {
            machine,
            ports,
            http_port,
        } => {
            let expose = arguments::expose(&ports);
            let keep = http_port.is_some() && expose.is_empty();
            let change = ChangeMachine {
                http_port,
                expose: (!keep).then_some(expose),
                ..ChangeMachine::default()
            };
            urls(app, &client.change(&machine, &change).await?)?;
        }
        Action::Access { machine, access } => {
            let change = ChangeMachine {
                access: Some(match access {
                    Who::Public => Access::Public,
                    Who::Private => Access::Private,
                }),
                ..ChangeMachine::default()
            };
            urls(app, &client.change(&machine, &change).await?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(app: &App, port: &hutch_contract::expose::Port) -> Result<(), Error> {
    match app.ui.json {
        true => app.ui.object(port),
        false => app.ui.line(printable(&get::port(port))),
    }
}

/// Its URLs, one a line.
fn urls(app: &App, machine: &hutch_contract::machine::Machine) -> Result<(), Error> {
    if app.ui.json {
        return app.ui.object(machine);
    }
    for url in machine.url.iter().chain(machine.urls.values()) {
        app.ui.line(printable(url))?;
    }
    if machine.url.is_some() && machine.expose == Expose::ALL {
        app.ui.say("Every other port has a URL too, PORT-NAME.");
    }
    Ok(())
}
